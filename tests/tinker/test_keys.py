"""The file of API keys: what the command makes, what is kept, and what is refused."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
import threading

import pytest

from tx.errors import InvalidInput
from tx.tinker import keys


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tx.tinker.keys", *arguments], capture_output=True, text=True)


def test_the_command_prints_a_key_once_and_keeps_its_hash(file):
    made = run("add", "alice", "--file", str(file), "--max-requests-per-s", "5", "--max-queued-samples", "7")
    key = made.stdout.strip()
    assert key.startswith("tml-")
    assert len(key) >= 40
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text()
    digest = hashlib.sha256(key.encode()).hexdigest()
    kept = {"name": "alice", "sha256": digest, "max_requests_per_s": 5.0, "max_queued_samples": 7}
    assert json.loads(file.read_text()) == kept
    listed = run("list", "--file", str(file))
    assert listed.stdout.split() == ["alice", digest[:12], "max_requests_per_s=5.0", "max_queued_samples=7"]
    again = run("add", "alice", "--file", str(file))
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("tx: NAME: got 'alice'")


def test_keys_are_random_and_revoked_by_name(file):
    made = {keys.add(file, name) for name in ("a", "b", "c")}
    assert len(made) == 3
    keys.revoke(file, "b")
    assert list(keys.read_keys(file)) == ["a", "c"]
    with pytest.raises(InvalidInput, match="accepted: one of a, c"):
        keys.revoke(file, "b")
    assert [path.name for path in file.parent.iterdir()] == ["keys"]  # no half-written file stays


def test_commands_at_the_same_time_lose_nothing(file):
    threads = [threading.Thread(target=keys.add, args=(file, f"k{n}")) for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert set(keys.read_keys(file)) == {f"k{n}" for n in range(8)}


@pytest.mark.parametrize("name", ["", "a/b", "../a", " a", ".a", "-a", "ä", "a" * 64, "a\n"])
def test_a_name_that_could_be_taken_for_something_else_is_refused(file, name):
    with pytest.raises(InvalidInput, match="NAME"):
        keys.add(file, name)
    assert not file.exists()


@pytest.mark.parametrize("limits", [{"max_requests_per_s": 0}, {"max_queued_samples": 0}, {"max_requests_per_s": -1}])
def test_a_limit_out_of_range_is_refused_by_its_flag(file, limits):
    with pytest.raises(InvalidInput, match="--max-"):
        keys.add(file, "a", **limits)


def line(name: str = "a", sha256: str = "0" * 64, **more) -> str:
    return json.dumps({"name": name, "sha256": sha256} | more)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        line(name="a/b"),
        line(sha256="0" * 63),
        line(sha256="G" * 64),
        line(max_request_per_s=1),
        line() + "\n" + line(sha256="1" * 64),
        line() + "\n" + line(name="b"),
        "[]",
    ],
)
def test_a_broken_file_is_refused_with_its_line(file, text):
    file.write_text(text)
    with pytest.raises(InvalidInput, match=rf"api_keys_file: got .*{file}:[12]"):
        keys.read_keys(file)
    before = file.read_bytes()
    with pytest.raises(InvalidInput):
        keys.add(file, "new")
    assert file.read_bytes() == before


def test_empty_lines_are_none_and_a_missing_file_is_an_error(file):
    file.write_text("\n" + line() + "\n\n")
    assert list(keys.read_keys(file)) == ["a"]
    with pytest.raises(InvalidInput, match="No such file"):
        keys.read_keys(file.with_name("other"))
