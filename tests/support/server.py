"""A real server for tests: ``python -m tx.tinker.api`` as its own process, on a free port, with its own data folder."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

BASE_MODEL = "tiny/qwen3"
"""The id under which the tests' server lists its model."""

START_LIMIT_S = 120.0
"""Two busy cores load JAX and compile nothing until the first job: seconds, but a loaded machine takes its time."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """This process's environment without the server's own variables, on CPU; what tests wait for is compiled first."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TX_")}
    return kept | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TX_COMPILE_AHEAD": "no"}


COMPILE_CACHE = Path(__file__).parents[2] / ".pytest_cache" / "xla"
"""Compiled programs are most of a server's first minute; the tests' servers, and the next run, share them."""


class Server:
    """Start with ``with``; ``kill``, ``interrupt`` and ``start`` again as often as a test likes."""

    def __init__(
        self, model: Path, folder: Path, *flags: str, rank: int = 16, variables: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        COMPILE_CACHE.mkdir(parents=True, exist_ok=True)
        (folder / "xla-cache").symlink_to(COMPILE_CACHE)
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = environment() | (variables or {})
        self._command = [sys.executable, "-m", "tx.tinker.api", "--base-model", str(model)]
        self._command += ["--served-model-name", BASE_MODEL, "--port", str(self.port), "--data-dir", str(folder)]
        self._command += ["--max-lora-rank", str(rank), *flags]

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and wait until the engine is ready."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start the process."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                env=self._environment | {"SERVER_UNDER_TEST": str(self.folder)},
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Poll /healthz until it says that the engine is ready; the log's end in the error if it never does."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/api/v1/healthz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"the server did not become ready:\n{self.log.read_text()[-4000:]}")

    def client(self, **options: object) -> httpx.Client:
        """An HTTP client whose relative paths start at /api/v1."""
        return httpx.Client(base_url=f"{self.url}/api/v1", headers={"X-API-Key": "tml-test"}, timeout=60, **options)

    def pids(self) -> list[int]:
        """Every live process of this server: they inherit its marker through the environment, orphans too."""
        marker = f"SERVER_UNDER_TEST={self.folder}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and marker in _environ(entry):
                found.append(int(entry.name))
        return found

    def engine_pids(self) -> list[int]:
        """The server's processes other than the API itself."""
        return [pid for pid in self.pids() if self.process is None or pid != self.process.pid]

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: SIGINT to every process of the group."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGINT)

    def kill_api(self) -> None:
        """kill -9 of the API alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop everything, the hard way if it must be."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in self.engine_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process = None


def _environ(process: Path) -> list[bytes]:
    """Environment of a live process; a zombie's is empty."""
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
