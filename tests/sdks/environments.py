"""One environment per version of the SDK, made by uv once and kept.

Everything else in an environment is pinned by date, the same as the repository's own. Without torch: it is gigabytes,
and the SDK uses it for custom losses only (``stand_in/torch.py``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]

VERSIONS = (
    "0.3.0", "0.7.0", "0.14.0", "0.18.0", "0.18.2", "0.20.0", "0.24.1", "0.25.0", "0.26.0", "0.30.0", "0.36.0",
    "0.38.0",
)  # fmt: skip
"""Both sides of every change of the protocol, oldest first."""

UNDECLARED = {"0.18.0": ("orjson",)}
"""Packages that a version imports without asking for them."""

WITHOUT_TORCH = 'torch ; sys_platform == "never"\n'


class Unreachable(Exception):
    """uv is missing, or it cannot reach the package index."""


def folder() -> Path:
    """Where environments are kept: ``TX_SDK_ENVS``, or in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TX_SDK_ENVS") or cache / "tx" / "sdks")


def environment(version: str) -> Path:
    """The Python of the environment of one version, which is made if it doesn't exist; raises Unreachable."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    date = project["tool"]["uv"]["exclude-newer"]
    packages = [f"tinker=={version}", *UNDECLARED.get(version, ())]
    recipe = " ".join([*packages, date, sys.version.split()[0], WITHOUT_TORCH])
    target = folder() / f"{version}-{hashlib.blake2b(recipe.encode(), digest_size=4).hexdigest()}"
    python = Path("bin", "python")
    if (target / python).exists():
        return target / python
    folder().mkdir(parents=True, exist_ok=True)
    # Made under another name and moved, so that a half-made one is never used and two may be made at once.
    made = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=folder()))
    try:
        overrides = made / "overrides.txt"
        _uv("venv", "--clear", "--relocatable", "--python", sys.executable, str(made))
        overrides.write_text(WITHOUT_TORCH)
        options = ["--exclude-newer", date, "--override", str(overrides), "--python", str(made / python)]
        _uv("pip", "install", *options, *packages)
        made.rename(target)
    except OSError:
        if not (target / python).exists():  # somebody else's may be in place by now
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target / python


def _uv(*arguments: str) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` says where it is
    if uv is None:
        raise Unreachable("uv is not installed")
    result = subprocess.run([uv, "--quiet", *arguments], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise Unreachable(f"uv {arguments[0]}: {result.stderr.strip()}")
