"""Calls of the ``tinker`` command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.compatibility.lab import LIMIT_S, PROJECT, CommandRefused, Lab
from tests.compatibility.registry import call

FILES = {"adapter_config.json", "adapter_model.safetensors"}


def window() -> tuple[str, str]:
    """Two whole hours around now."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return tuple((hour + timedelta(hours=add)).strftime("%Y-%m-%dT%H:00:00Z") for add in (-1, 1))


def folder(lab: Lab) -> Path:
    made = lab.folder / lab.name()
    made.mkdir()
    return made


@call("tinker", "--format")
def json_format(lab: Lab, do: Any) -> None:
    assert json.loads(do("--format", "json", "run", "list"))["runs"]


@call("tinker version")
def version(lab: Lab, do: Any) -> None:
    assert do().startswith("tinker ")


# ---- auth ----


@call("tinker auth status")
def auth_status(lab: Lab, do: Any) -> None:
    assert do() == "Credentials available: yes\nTinker accessible: yes\n"


@call("tinker auth whoami", refused="whoami requires JWT auth")
def auth_whoami(lab: Lab, do: Any) -> None:
    assert "Organization" in do()


@call("tinker auth login")
@call("tinker auth logout")
def login_and_out(lab: Lab, do: Any) -> None:
    assert "Stored API key" in lab.cli("auth", "login", typed="tml-test\n")
    assert "Removed credential" in lab.cli("auth", "logout")


# ---- models, runs, sessions ----


@call("tinker model list")
@call("tinker model list", "[substring]")
def model_list(lab: Lab, do: Any) -> None:
    assert lab.base_model in do()
    assert lab.base_model in do(lab.base_model[:5].upper())


@call("tinker run list")
@call("tinker run list", "--limit", "--columns")
def run_list(lab: Lab, do: Any) -> None:
    lab.new_training()
    assert lab.base_model in do()
    listed = do("--limit", "1", "--columns", "id,owner,lora,checkpoint")
    assert "Rank 4" in listed
    assert "1 training run " in listed
    assert lab.run_id in do("--limit", "0")


@call("tinker run info")
def run_info(lab: Lab, do: Any) -> None:
    assert lab.run_id in do(lab.run_id)


@call("tinker session export-trace")
@call("tinker session export-trace", "--output", "--url-only")
def export_trace(lab: Lab, do: Any) -> None:
    target = folder(lab) / "trace.pftrace"
    do(lab.session_id, "--output", str(target))
    assert target.stat().st_size > 100
    assert lab.download(do(lab.session_id, "--url-only").strip()) is not None


# ---- checkpoints ----


@call("tinker checkpoint list")
@call("tinker checkpoint list", "--limit", "--run-id")
def checkpoint_list(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    assert path in do()
    assert path in do("--limit", "1")
    assert path in do("--run-id", lab.run_id)


@call("tinker checkpoint info")
def checkpoint_info(lab: Lab, do: Any) -> None:
    assert "Yes (Rank 4)" in do(lab.weights)


@call("tinker checkpoint publish")
@call("tinker checkpoint unpublish")
def checkpoint_publish(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    lab.cli("checkpoint", "publish", path)
    assert lab.checkpoint(path).public
    lab.cli("checkpoint", "unpublish", path)
    assert not lab.checkpoint(path).public


@call("tinker checkpoint set-ttl")
@call("tinker checkpoint set-ttl", "--ttl", "--remove")
def checkpoint_set_ttl(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    do(path, "--ttl", "3600")
    assert lab.checkpoint(path).expires_at is not None
    do(path, "--remove")
    assert lab.checkpoint(path).expires_at is None


@call("tinker checkpoint delete")
@call("tinker checkpoint delete", "--yes", "[checkpoint_paths]")
def checkpoint_delete(lab: Lab, do: Any) -> None:
    one, two, three = (lab.new_weights() for _ in range(3))
    assert "Deleted 2" in do("--yes", one, two)
    assert "Deleted 1" in do(three, typed="y\n")
    assert [lab.checkpoint(path) for path in (one, two, three)] == [None] * 3


@call("tinker checkpoint delete", "--run-id", "--type", "--before", "--after")
def checkpoint_delete_of_a_run(lab: Lab, do: Any) -> None:
    training = lab.new_training()
    run = training.get_info().model_id
    paths = [training.save_state("a").result(LIMIT_S).path, training.save_weights_for_sampler("b").result(LIMIT_S).path]
    before, after = window()[::-1]
    assert "No checkpoints" in do("--yes", "--run-id", run, "--after", before)
    assert "Deleted 1" in do("--yes", "--run-id", run, "--type", "weights", "--after", after, "--before", before)
    assert [lab.checkpoint(path) is None for path in paths] == [True, False]


@call("tinker checkpoint download")
@call("tinker checkpoint download", "--output", "--force")
def checkpoint_download(lab: Lab, do: Any) -> None:
    target = folder(lab)
    for path in (lab.weights, lab.external_weights):
        do(path, "--output", str(target))
        made = target / path.removeprefix("tinker://").replace("/", "_")
        assert {file.name for file in made.iterdir()} >= FILES
    do(lab.external_weights, "--output", str(target), "--force")


# ---- the Hub ----


def push(lab: Lab, *flags: str) -> None:
    """In a process of its own: the Hub's address is read when its library is imported."""
    variables = {"HF_ENDPOINT": lab.hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-m", "tinker.cli", "checkpoint", "push-hf", *flags]
    done = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, timeout=LIMIT_S)
    # Once in some fifty runs the SDK's transport aborts while its interpreter shuts down, with all work done.
    if done.returncode not in (0, -signal.SIGABRT):
        raise CommandRefused(done.stderr)


@call("tinker checkpoint push-hf")
def push_hf(lab: Lab, do: Any) -> None:
    push(lab, lab.external_weights)
    assert {*FILES, "README.md"} <= set(next(iter(lab.hub.pushed.values())))


@call("tinker checkpoint push-hf", "--repo", "--public", "--commit-message", "--revision", "--create-pr")
@call("tinker checkpoint push-hf", "--allow-pattern", "--ignore-pattern", "--no-model-card")
def push_hf_as(lab: Lab, do: Any) -> None:
    where = ["--repo", "me/adapter", "--public", "--commit-message", "New", "--revision", "main", "--create-pr"]
    what = ["--allow-pattern", "*.json", "--ignore-pattern", "*.txt", "--no-model-card"]
    push(lab, lab.external_weights, *where, *what)
    commit = lab.hub.commits[-1]
    assert (commit["repo"], commit["revision"], commit["pull_request"]) == ("me/adapter", "main", True)
    assert commit["summary"] == "New"
    assert set(lab.hub.pushed["me/adapter"]) == {"adapter_config.json"}


# ---- billing ----


@call("tinker billing usage")
@call("tinker billing usage", "--csv", "--sessions-csv")
def billing_usage(lab: Lab, do: Any) -> None:
    assert lab.full_response
    assert "training" in do(*window())
    target = folder(lab)
    do(*window(), "--csv", str(target / "usage.csv"), "--sessions-csv", str(target / "sessions.csv"))
    assert "token_count" in (target / "usage.csv").read_text()
    assert lab.session_id in (target / "sessions.csv").read_text()


@call("tinker billing checkpoint-storage")
@call("tinker billing checkpoint-storage", "--csv", "--project-id")
def checkpoint_storage(lab: Lab, do: Any) -> None:
    assert lab.weights
    assert "size_bytes" in do()
    target = folder(lab) / "storage.csv"
    do("--csv", str(target), "--project-id", PROJECT)
    assert PROJECT in target.read_text()
