"""`prm-hf diagnose`: of models in run folders, full or an adapter, on their own task or on a file; and wrong input."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from prm_hf.demo import build_demo
from prm_hf.diagnostics import effective_dimension
from prm_hf.experiments.diagnose import DIAGNOSTICS_FILE, DiagnoseArguments, load_trained, main


ROWS = 6


@pytest.fixture
def make_run(tmp_path, quiet):
    """Makes the folder of a run, whose model is the built-in reference, moved a little."""

    def make(task, lora=False, **info):
        folder, demo = tmp_path / f"{task}_{'lora' if lora else 'full'}", build_demo()
        model = AutoModelForCausalLM.from_pretrained(demo.model_path)
        if lora:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(demo.model_path).save_pretrained(folder)
        settings = {"beta": 0.5, "max_length": 64}
        info = {"task": task, "model": "built-in", "dataset": "built-in", "settings": settings, **info}
        (folder / "run.json").write_text(json.dumps(info))
        return folder

    return make


def diagnose(folder, *more):
    flags = ["--effective-dimension", "--max_rows", str(ROWS), "--max_length", "64", "--batch_size", "4"]
    assert main([str(folder), *flags, *more]) == 0
    return json.loads((folder / DIAGNOSTICS_FILE).read_text())["effective_dimension"]


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_preferences(make_run, capsys, lora):
    folder = make_run("preferences", lora)
    found = diagnose(folder, "--method", "exact", "--alpha", "1e-3", "1e-2", "--reduction", "sum")
    assert found["n_terms"] == ROWS and len(found["eigenvalues"]) == ROWS
    assert [each["alpha"] for each in found["by_alpha"]] == [1e-3, 1e-2]
    assert found["by_alpha"][0]["value"] > found["by_alpha"][1]["value"]
    # The same numbers by hand, with the run's beta and the reference that it started from
    trained = load_trained(folder, DiagnoseArguments([str(folder)], max_rows=ROWS, max_length=64, batch_size=2))
    assert trained.beta == 0.5 and trained.loss == "dpo"
    assert found["loss"] != pytest.approx(ROWS * np.log(2), rel=1e-6)  # the reference is not the trained model
    own = effective_dimension(
        trained.model,
        trained.batches,
        1e-3,
        reduction="sum",
        method="exact",
        loss="dpo",
        ref_model=trained.ref_model,
        beta=0.5,
    )
    np.testing.assert_allclose(found["eigenvalues"], own.eigenvalues, rtol=1e-3)
    assert found["loss"] == pytest.approx(own.loss, rel=1e-5)
    assert "effective dimension at α = 0.001" in capsys.readouterr().out


@pytest.mark.slow
def test_completions_of_a_file(make_run, tmp_path):
    rows = [{"prompt": f"casual sort up : {i} 2 1 0", "completion": f" answer 0 1 2 {i}"} for i in range(3, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = make_run("sft", lora=True)
    found = diagnose(folder, "--dataset", str(tmp_path / "rows.jsonl"), "--k", "3", "--kind", "hessian")
    assert found["n_terms"] == 6 * 6  # five words and the end of each completion
    assert len(found["eigenvalues"]) == 3 and found["kind"] == "hessian"
    assert found["dataset"].endswith("rows.jsonl")


@pytest.mark.slow
def test_measures_are_added_to_the_file(make_run):
    folder = make_run("sft")
    (folder / DIAGNOSTICS_FILE).write_text('{"another": {"value": 3}}')
    diagnose(folder, "--k", "1", "--max_rows", "2")
    assert json.loads((folder / DIAGNOSTICS_FILE).read_text())["another"] == {"value": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "lora", "guess"), [("preferences", True, 0.5), ("preferences", False, 0.5), ("sft", False, None)]
)
def test_bound(make_run, capsys, task, lora, guess):
    """Of an adapter, and of the differences from the model that the run started from."""
    folder = make_run(task, lora)
    assert main([str(folder), "--bound", "--max_rows", "6", "--max_length", "64", "--levels", "3", "5"]) == 0
    found = json.loads((folder / DIAGNOSTICS_FILE).read_text())["bound"]
    assert found["empirical_risk"] <= found["bound"] and found["vacuous"] and found["levels"] in (3, 5)
    assert guess is None or found["guess"] == guess
    assert 0 < found["n"] <= 6 and (folder / "bound").is_dir()
    assert "risk ≤" in capsys.readouterr().out


MISTAKES = [
    ([], "`runs` is missing"),
    (["RUN"], "Nothing is to be measured: add `--effective-dimension`, `--bound`"),
    (["nowhere", "--effective-dimension"], "'nowhere', which holds no model.*--save_strategy epoch"),
    (["RUN", "--effective-dimension", "--max_rows", "0"], "`max_rows` must be at least 1"),
    (["RUN", "--effective-dimension", "--kind", "gnn"], "`--kind` has no choice 'gnn'"),
    (["RUN", "--effective-dimension"], "has no run.json: say with `--task`"),
    (["RUN", "--effective-dimension", "--task", "sft"], "`dataset` is missing"),
    (["RUN", "--effective-dimension", "--task", "preferences", "--dataset", "x"], "`ref_model` is missing"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes(tmp_path, arguments, message):
    """Before the model is read: there is none."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        main([str(tmp_path) if word == "RUN" else word for word in arguments])
