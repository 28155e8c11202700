"""`bound_of_run`: the bound of a folder with a trained model, of the built-in task."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from prm_hf.demo import build_demo
from prm_hf.demo.model import make_model, make_tokenizer
from prm_hf.demo.task import preference_pairs
from prm_hf.diagnostics import effective_dimension
from prm_hf.diagnostics.compression import compression_bound
from prm_hf.diagnostics.run_bound import bound_of_run, load_model


OPTIONS = {"levels": 3, "batch_size": 50}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Pairs of the built-in task as a DPOTrainer tokenizes them."""
    tokenizer = make_tokenizer()

    def tokenize(row):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = (tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False) for side in SIDES)
        return {"prompt_ids": prompt, **{f"{s}_ids": ids[len(prompt) :] for s, ids in zip(SIDES, whole, strict=True)}}

    pairs = preference_pairs(50, 0)
    return Dataset.from_list([tokenize(row) for row in pairs])


SIDES = ("chosen", "rejected")


def moved(model):
    """A model whose trainable parameters are not those that it started from."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=generator)
    return model


def write_run(folder, model, task="preferences"):
    model.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"task": task, "settings": {"beta": 0.3}}))
    return folder


def test_a_run_with_an_adapter(rows, tmp_path):
    make_model(1).save_pretrained(tmp_path / "base")
    base = type(make_model(1)).from_pretrained(tmp_path / "base")
    model = moved(get_peft_model(base, LoraConfig(r=1, target_modules=["q_proj"])))
    folder = write_run(tmp_path / "run", model)
    found = bound_of_run(folder, rows, **OPTIONS)
    assert found.task == "preference" and found.n == len(rows)
    assert found.dim == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.path == str(folder / "bound" / "weights-1.bin")
    assert found.vacuous  # 50 pairs say nothing about so many values
    again = compression_bound(model, rows, "preference", beta=0.3, **OPTIONS)
    assert found.unquantized_risk == again.unquantized_risk
    assert found.empirical_risk == again.empirical_risk
    assert found.misc_bits == again.misc_bits + 1
    assert bound_of_run(folder, rows, model=model, **OPTIONS).empirical_risk == found.empirical_risk


@pytest.mark.slow
def test_a_run_without_an_adapter_is_compressed_as_differences(rows, tmp_path):
    base = make_model(1)
    folder = write_run(tmp_path / "run", moved(make_model(1)))
    with pytest.raises(ValueError, match="`base` is missing: .* has no adapter"):
        bound_of_run(folder, rows)
    found = bound_of_run(folder, rows, base=base, **OPTIONS)
    values = compression_bound(
        load_model(folder), rows, "preference", ref_model=base, **OPTIONS, output_dir=tmp_path / "values"
    )
    assert found.unquantized_risk == values.unquantized_risk
    assert found.dim == values.dim == sum(p.numel() for p in base.parameters())
    with pytest.raises(ValueError, match="`base` has no .* which `model` trains"):
        bound_of_run(folder, rows, base=torch.nn.Linear(2, 2))


def test_a_run_of_completions(tmp_path):
    folder = write_run(tmp_path / "run", moved(make_model(1)), task="sft")
    texts = Dataset.from_dict({"input_ids": [[i % 20 + 4, i // 20 + 4, 5, 6] for i in range(40)]})
    found = bound_of_run(folder, texts, base=make_model(1), **OPTIONS, alphas=(0.5,))
    assert found.task == "lm" and found.guess == math.log2(len(make_tokenizer()))
    with pytest.raises(ValueError, match="no column 'prompt' or 'prompt_ids'"):
        bound_of_run(folder, texts, base=make_model(1), task="preference")


def test_a_folder_without_a_model_or_task_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="has no run.json with a task"):
        bound_of_run(tmp_path, rows)
    with pytest.raises(FileNotFoundError, match="--save_strategy epoch"):
        bound_of_run(tmp_path, rows, task="preference")


@pytest.mark.slow
def test_a_run_of_the_command(tmp_path, monkeypatch):
    """A DPO run with a UniLora adapter: measured by the command, and afterwards from its folder."""
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from prm_hf.cli import main

    monkeypatch.chdir(tmp_path)
    arguments = ["--methods", "adamw", "--max_steps", "3", "--eval_steps", "3", "--seeds", "0", "--workers", "1"]
    arguments += ["--learning_rates", "1e-1", "--use_peft", "--lora_r", "2", "--max_extensions", "0"]
    arguments += ["--unilora_dim", "8", "--noise_rate", "0", "--effective_dimension", "1", "--bound"]
    assert main(["dpo", *arguments, "--save_strategy", "epoch", "--output_dir", "runs"]) == 0
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/adapter_config.json"))
    model = load_model(folder)
    settings = DPOConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = DPOTrainer(model, args=settings, train_dataset=build_demo().train, processing_class=tokenizer)
    model.delete_adapter("ref")  # TRL's copy of the trained adapter
    found = bound_of_run(folder, trainer.train_dataset, model=model, data_collator=trainer.data_collator)
    assert found.n == 256 and 0 <= found.empirical_risk < found.bound <= 1
    bounds = [json.loads((folder / "bound" / f"bound-{i}.json").read_text()) for i in (1, 2)]
    assert bounds[0] == {**bounds[1], "path": bounds[0]["path"]}  # what was tried is the same
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["bound/certified_accuracy"] == 1 - found.bound and metrics["bound/n"] == 256
    own = effective_dimension(model, trainer.train_dataset, reduction="sum", method="exact", loss="dpo")
    assert metrics["effective_dimension/value"] == pytest.approx(own.value, rel=1e-3)
    assert "certified" in (tmp_path / "runs" / "report.html").read_text()
