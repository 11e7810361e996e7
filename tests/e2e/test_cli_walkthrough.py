"""docs/cli.md as its reader follows it: each block in a shell, with the real command, and what it says it prints."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hub import Hub
from tests.support.server import BASE_MODEL, Server, environment

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python|text)\n(.*?)```", DOCUMENT, re.DOTALL)

# Once in some fifty runs the SDK's transport aborts, or hangs, while its interpreter shuts down, with all work done.
ENDS = 'tinker() {{ timeout 60 tinker "$@" || {{ code=$?; [ $code = 134 ] || [ $code = 124 ] || return $code; }}; }}'

SHELL = {
    "bash": f"if [ -f .variables ]; then . ./.variables; fi\n{ENDS}\nset -aeuo pipefail\n"
    "{block}\nunset -f tinker; export -p > .variables",
    "python": '. ./.variables; exec python -c "$0"',
}
"""Blocks are parts of one session in a shell: what one sets, the next has."""


def plain(text: str) -> str:
    """Without the lines of tables, and any white space as one space."""
    return re.sub(r"\s+", " ", re.sub(r"[\u2500-\u257f]", " ", text)).strip()


def matches(pattern: str, said: str) -> bool:
    """``…`` in the pattern is any text."""
    parts = [re.escape(part.strip()) for part in plain(pattern).split("…")]
    return re.fullmatch(r"[\s\S]*?".join(parts), plain(said)) is not None


def test_a_pattern_can_fail() -> None:
    assert matches("Status OK …", "┃ Status │ OK ┃\nmore")
    assert not matches("Status OK", "Status Failed")
    assert not matches("Status OK", "Status OK and more")


@pytest.mark.timeout(400)
def test_the_walk_through(server: Server, tmp_path: Path) -> None:
    told = {"http://localhost:8000": server.url, "HuggingFaceTB/SmolLM2-135M-Instruct": BASE_MODEL}
    blocks = [(language, _replaced(text, told)) for language, text in BLOCKS]
    (tmp_path / "home").mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with Hub() as hub:
        user = {"HOME": str(tmp_path / "home"), "PATH": path, "COLUMNS": "200"}
        user |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        wrong = []
        for (language, text), (after, expected) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
            if language == "text":
                continue
            words = ["bash", "-c", SHELL[language].format(block=text), text]
            done = subprocess.run(
                words, cwd=tmp_path, env=environment() | user, capture_output=True, text=True, timeout=120
            )
            said = done.stdout + "".join(line for line in done.stderr.splitlines(True) if line.startswith("Error"))
            if done.returncode not in (0, -signal.SIGABRT) or (after == "text" and not matches(expected, said)):
                wrong.append(
                    f"$ {text}\n{done.stdout}\n{done.stderr}\nexpected:\n{expected if after == 'text' else ''}"
                )
        assert not wrong, "\n\n".join(wrong)
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.pushed["me/my-adapter"])


def _replaced(text: str, told: dict[str, str]) -> str:
    for old, new in told.items():
        text = text.replace(old, new)
    return text


def test_every_command_is_walked_through() -> None:
    from tests.compatibility.introspect import targets

    commands = [target for target in targets() if target.startswith("tinker ")]
    shown = re.sub(
        r"tinker --format json", "tinker", "\n".join(text for language, text in BLOCKS if language == "bash")
    )
    assert [command for command in commands if command not in shown] == []
