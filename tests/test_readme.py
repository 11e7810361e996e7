"""The README and the docs tell the truth: the script is the example's, the flags are the program's, paths exist."""

import ast
import re
from pathlib import Path

import pytest

from tx.loss_specs import LOSSES
from tx.tinker.config import TxConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def tree_paths() -> list[str]:
    """The paths of the README's tree: two spaces of indentation per level, a comment after two spaces."""
    block = README.split("## The tree")[1].split("```")[1]
    paths, parents = [], []
    for line in block.strip("\n").splitlines():
        entry, level = line.strip().split("  ")[0], (len(line) - len(line.lstrip())) // 2
        del parents[level:]
        paths += ["".join(parents) + name for name in entry.split(" ")]
        if entry.endswith("/"):
            parents.append(entry)
    return paths


def test_each_path_of_the_tree_exists():
    paths = tree_paths()
    assert len(paths) > 60
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_tree_has_every_module():
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tx").rglob("*.py")
        if (path.name != "__init__.py" or path.parent == ROOT / "tx") and "migrations" not in path.parts
    }
    assert modules - set(tree_paths()) == set()


def test_the_script_is_the_example():
    example = (ROOT / "examples" / "quickstart.py").read_text()
    assert f"```python\n{example}```" in README
    assert len(ast.parse(example).body) <= 20
    assert len(example.splitlines()) <= 22


def test_the_flag_table_is_the_programs():
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    assert [name.replace("-", "_") for name, _, _ in rows] == list(TxConfig.model_fields)
    for name, default, _ in rows:
        declared = TxConfig.model_fields[name.replace("-", "_")].default
        if isinstance(declared, bool):
            assert default == ("on" if declared else "off"), name
        elif isinstance(declared, int | str | Path) and declared != ():
            assert default == f"`{declared}`", name


def test_the_test_command_is_the_one_that_ci_runs():
    command = re.search(r"## Test\n\n```bash\n(.*?)\n```", README).group(1)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == command


def test_every_loss_is_documented():
    text = (ROOT / "docs" / "guides" / "training.md").read_text()
    table = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    assert set(LOSSES) <= set(table)
    for name, spec in LOSSES.items():
        for key, entry in spec.config.items():
            if name != "gspo":  # its row refers to ppo's
                assert f"`{key}` ({entry.default:g})" in table[name]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_commands_exist(document):
    named = re.findall(r"(?:examples|benchmarks|docs|tests)/[\w/]+\.(?:py|md)", document.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []
