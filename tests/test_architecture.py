"""The rooms of the package: which of them may import which, and how large a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prm_hf


ROOT = Path(__file__).parents[1]
# By room, the rooms of the package that its files may import, beside itself. A script like `cli.py` is a room too.
ALLOWED = {
    "sharding": set(),
    "optim": {"sharding"},
    "noise": set(),
    "metrics": set(),
    "demo": {"noise"},
    "runs": set(),
    "compare": {"runs"},
    "trainers": {"optim", "sharding", "metrics", "noise"},
    "experiments": {"optim", "sharding", "trainers", "metrics", "noise", "demo", "runs", "compare"},
    "cli": {"experiments", "runs", "compare"},
    "__main__": {"cli"},
}
# Files beside the rooms, which know nothing of them and which every room may import.
HELPERS = {"_extras", "_names"}
PACKAGE = ROOT / "prm_hf"
PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("prm_hf", "recipes", "benchmarks", "research", "tests", "examples")
ALL_FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    """The full names of all that a file imports, wherever it does, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [path for path in PACKAGE_FILES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    names = {name.split(".")[1] for name in imported_modules(path) if name.startswith("prm_hf.")}
    # A name of the package itself, as in `from .. import PRM`, counts as an import from its room.
    names |= {getattr(prm_hf, name).__module__.split(".")[1] for name in names & {*prm_hf.__all__}}
    allowed = set() if room in HELPERS else ALLOWED[room] | HELPERS | {room}
    assert names & {*ALLOWED, *HELPERS} <= allowed


def test_every_room_is_known():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE_FILES} <= {
        "__init__",
        *ALLOWED,
        *HELPERS,
    }


@pytest.mark.parametrize("room", ["runs", "cli"])
def test_imports_without_torch(room):
    code = f"import sys, prm_hf.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_no_file_changes_the_path_of_imports():
    words = ("sys.path", "site.addsitedir")
    found = [
        name_of(path)
        for path in ALL_FILES
        if path != Path(__file__) and any(word in path.read_text() for word in words)
    ]
    assert not found


def test_files_are_one_idea():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE_FILES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}
