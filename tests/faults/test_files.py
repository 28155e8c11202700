"""Whether files are whole, setting aside those that are not, and that nothing loaded from a file can run code."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import prm_hf.demo.model
from prm_hf._files import problem_with, problems_in, set_aside
from prm_hf.demo import build_demo


ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("prm_hf", "recipes", "benchmarks", "research", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.fixture
def folder(tmp_path):
    torch.save({"a": torch.ones(300)}, tmp_path / "state.pt")
    save_file({"a": torch.ones(300), "b": torch.ones(2, 3)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"a": list(range(300))}))
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "config.json"])
def test_no_beginning_of_a_file_passes_for_it(folder, name):
    assert problems_in(folder) == []
    content = (folder / name).read_bytes()
    for length in {*range(0, len(content), 37), len(content) - 1}:
        (folder / name).write_bytes(content[:length])
        assert problem_with(folder / name) is not None, length
    assert [problem.split()[0] for problem in problems_in(folder)] == [name]


def test_weights_with_more_than_their_header_says(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"0")
    assert "has 1,385 bytes in place of 1,384" in problem_with(folder / "model.safetensors")


def test_nothing_that_is_set_aside_is_written_over(tmp_path):
    for content in ("first", "second", "third"):
        (tmp_path / "metrics.json").write_text(content)
        set_aside(tmp_path / "metrics.json")
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names == {
        "metrics.json.corrupt": "first",
        "metrics.json.corrupt2": "second",
        "metrics.json.corrupt3": "third",
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prm_hf.demo.model, "SFT_STEPS", 2)
        folder = tmp_path_factory.mktemp("cache")
        build_demo(cache_dir=folder)
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "model.safetensors has"),
        ("config.json", "config.json is not JSON"),
        ("tokenizer.json", "tokenizer.json is not JSON"),
        ("chat_template.jinja", "chat_template.jinja is not what was written"),
        ("digests.json", "digests.json is not JSON"),
    ],
)
def test_a_cached_model_that_is_cut_off_is_made_again(cache, tmp_path, monkeypatch, caplog, name, words):
    monkeypatch.setattr(prm_hf.demo.model, "SFT_STEPS", 2)
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    model_path = Path(build_demo(cache_dir=tmp_path).model_path)
    whole = (model_path / name).read_bytes()
    (model_path / name).write_bytes(whole[: len(whole) // 2])
    assert build_demo(cache_dir=tmp_path).model_path == str(model_path)
    assert words in caplog.text and f"lies in {model_path.name}.corrupt now" in caplog.text
    assert (model_path / name).read_bytes() == whole
    assert (model_path.with_name(f"{model_path.name}.corrupt") / name).read_bytes() == whole[: len(whole) // 2]
    AutoModelForCausalLM.from_pretrained(model_path)


def test_a_file_that_is_missing_from_the_cache(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(prm_hf.demo.model, "SFT_STEPS", 2)
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    model_path = Path(build_demo(cache_dir=tmp_path).model_path)
    (model_path / "model.safetensors").unlink()
    build_demo(cache_dir=tmp_path)
    assert "model.safetensors is missing" in caplog.text and (model_path / "model.safetensors").is_file()


# ---- Loading ----


def unsafe_loads(tree: ast.AST) -> list[int]:
    """The lines of a file that unpickle more than tensors, or leave that to a default that changed with time."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            function = ast.unparse(node.func)
            is_torchs = function == "torch.load" and named.get("weights_only") is not True
            if is_torchs or named.get("allow_pickle") or function in ("pickle.load", "joblib.load", "dill.load"):
                found.append(node.lineno)
    return sorted(found)


def test_unsafe_loads_are_found():
    code = "torch.load(f)\ntorch.load(f, weights_only=False)\npickle.load(f)\nnp.load(f, allow_pickle=True)\n"
    assert unsafe_loads(ast.parse(f"{code}torch.load(f, weights_only=True)")) == [1, 2, 3, 4]


def test_nothing_that_is_loaded_can_run_code():
    found = {str(path.relative_to(ROOT)): unsafe_loads(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}
