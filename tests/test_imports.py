"""The import contracts in pyproject.toml hold, and the API process really starts without JAX."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_import_contracts_hold():
    linter = Path(sys.executable).with_name("lint-imports")
    result = run(str(linter), "--no-cache")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_the_api_loads_neither_jax_nor_torch():
    """The contract sees only our own imports; a library could still bring JAX in."""
    code = "import sys, tx.tinker.api; print(sorted({'jax', 'flax', 'torch', 'transformers'} & set(sys.modules)))"
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == "[]", result.stderr


def test_every_package_init_but_the_root_is_empty():
    inits = [path for path in (ROOT / "tx").rglob("__init__.py") if path.parent != ROOT / "tx"]
    assert inits
    assert [str(path) for path in inits if path.read_text().strip()] == []


def test_every_module_has_its_test_file():
    """tests/ mirrors tx/; entry points and generated code are covered by the protocol and e2e tests."""
    exempt = {"tx/tinker/wire/tinker_pb2.py", "tx/tinker/import.py"}
    missing = []
    for module in sorted((ROOT / "tx").rglob("*.py")):
        path = module.relative_to(ROOT)
        if module.name == "__init__.py" or "migrations" in path.parts or str(path) in exempt:
            continue
        if not (ROOT / "tests" / path.relative_to("tx").with_name(f"test_{module.name}")).is_file():
            missing.append(str(path))
    assert missing == []
