"""The pages: links lead somewhere, pages are short, and the README's snippets run."""

import re
from pathlib import Path

import datasets
import pytest
import transformers
from accelerate.state import AcceleratorState

from .tiny import make_model, make_tokenizer, preference_dataset


ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "results", "recipes", "benchmarks", "research")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
LONGEST = {"README.md": 130, "CHANGELOG.md": 1000}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_short(page):
    length = len(page.read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST.get(name_of(page), 150)


def table_rows(page: Path) -> list[list[str]]:
    """The cells of the rows of all tables of a page whose first cell has code."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("row", table_rows(ROOT / "docs" / "architecture.md"), ids=lambda row: row[0])
def test_the_architecture_names_what_is_there(row):
    files = [ROOT / "prm_hf" / name for name in code_in(row[0])]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for name in code_in(row[1]) if len(row) == 3 else []:
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b", text), name


SNIPPETS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_the_readme_has_snippets():
    assert len(SNIPPETS) == 2


@pytest.fixture
def no_bfloat16_for_others():
    """accelerate keeps the precision of the first trainer of a process for all later ones."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["optimizer", "dpo"])
def test_snippets_run(snippet, tmp_path, monkeypatch, quiet, no_bfloat16_for_others):
    """With a tiny model in the place of the hub's, and rows in the place of the dataset's."""
    monkeypatch.chdir(tmp_path)
    # TRL trains in bfloat16 unless it is told not to, and transformers then asks for a GPU.
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    make_model().save_pretrained("tiny")
    # From a folder the tokenizer would be read as a Qwen2 one, which knows none of the words
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **options: make_tokenizer())
    rows = preference_dataset(8, flipped=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": rows, "test": rows})
    code, count = re.subn(r'"Qwen/[^"]+"', '"tiny"', snippet)
    assert count == 1
    namespace = {"dataset": rows.rename_column("chosen", "completion").remove_columns("rejected")}
    exec(code, namespace)  # noqa: S102 - our own page
    history = namespace["trainer"].state.log_history
    assert "train_loss" in history[-1] or "train_loss" in history[-2]
