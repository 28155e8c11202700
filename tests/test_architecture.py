"""The rooms of the package: which of them may import which, how large a file may be, and what no file may have."""

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
    "suspects": {"noise", "metrics", "runs"},
    "diagnostics": {"compare", "runs", "metrics", "sven"},  # of sven the per-sample gradients, which need torch alone
    "trainers": {"optim", "sharding", "metrics", "noise"},
    "sven": {"optim", "sharding", "trainers", "metrics", "noise"},
    "integrations": {"optim", "trainers"},
    "experiments": {
        "optim",
        "sharding",
        "trainers",
        "metrics",
        "noise",
        "demo",
        "runs",
        "compare",
        "suspects",
        "diagnostics",
        "sven",
    },
    "doctor": {"optim", "sharding"},
    "cli": {"experiments", "integrations", "runs", "compare", "doctor"},
    "__main__": {"cli"},
}
# Files beside the rooms, which know nothing of them and which every room may import.
HELPERS = {"_extras", "_files", "_names", "_page"}
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


LONGEST_FILE = 450
# What is to be read in one piece is held to less.
LONGEST = {"prm_hf/optim/prm.py": 350, "prm_hf/optim/reference.py": 150}
MOST_CODE_OF_A_RECIPE = 30


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_files_are_one_idea(path):
    longest = LONGEST.get(name_of(path), LONGEST_FILE)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= longest


def test_files_with_a_length_of_their_own_exist():
    assert {*LONGEST} <= {*map(name_of, PACKAGE_FILES)}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.py")), ids=name_of)
def test_recipes_are_scripts_of_a_few_lines(path):
    """Lines of code, without the docstring, comments and blank lines."""
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    has_docstring = isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant)
    code = statements[1:] if has_docstring else statements
    assert sum(node.end_lineno - node.lineno + 1 for node in code) <= MOST_CODE_OF_A_RECIPE


def hidden_ways(tree: ast.AST) -> set[str]:
    """What hides the arguments that a function takes or the cases that it lacks."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments) and node.kwarg is not None and node.kwarg.arg.startswith("_"):
            found.add(f"**{node.kwarg.arg}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "locals":
            found.add("locals()")
        elif isinstance(node, ast.Name) and node.id == "NotImplementedError":
            found.add("NotImplementedError")
    return found


def test_hidden_ways_are_found():
    code = "def f(a, **_):\n    g = lambda **_rest: locals()\n    raise NotImplementedError('later')"
    assert hidden_ways(ast.parse(code)) == {"**_", "**_rest", "locals()", "NotImplementedError"}


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_nothing_is_hidden(path):
    assert not hidden_ways(ast.parse(path.read_text(encoding="utf-8")))
