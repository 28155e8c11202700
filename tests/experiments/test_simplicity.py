"""`--effective_dimension`, `--bound` and `--unilora_dim` of comparisons: what is refused, and what is measured."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model

from prm_hf.demo.model import make_model, make_tokenizer
from prm_hf.demo.task import preference_pairs
from prm_hf.diagnostics import compression_bound, effective_dimension
from prm_hf.experiments.checks import check_experiment
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.sft import SFTExperiment
from prm_hf.experiments.simplicity import DIAGNOSTICS_FILE, check_size, check_units, measure_simplicity, unilora

from .fakes import comparison_grid


DIMENSION, BOUND = ["--effective_dimension", "1"], ["--use_peft", "--unilora_dim", "8", "--bound"]
REFUSED = [
    (["--effective_dimension", "0"], "`effective_dimension` must be a positive number, the alpha, got 0"),
    (["--use_peft", "--unilora_dim", "0"], "`unilora_dim` must be at least 1, got 0"),
    (["--unilora_dim", "8"], "`unilora_dim` is 8, the size of an adapter: add `--use_peft`"),
    (["--bound"], "`bound` compresses an adapter, .*: add `--use_peft`"),
    ([*DIMENSION, "--dtype", "bfloat16"], "`effective_dimension` is measured in float32, and there is `dtype` 'bfl"),
    ([*BOUND, "--load_in_4bit", "True"], "`bound` is measured in float32, and there is a quantized model"),
    ([*DIMENSION, "--attn_implementation", "flash_attention_2"], "`attn_implementation` is 'flash_attention_2'"),
    (
        [*DIMENSION, "--methods", "adamw", "early_stopping"],
        "`early_stopping` reports on weights that it does not keep",
    ),
    ([*BOUND, "--methods", "adamw", "relabel:prm_rows"], "`relabel:prm_rows` repairs labels by models of the same"),
]
OF_SFT = [
    (BOUND, r"`noise_rate` is \[0.3\]: wrong completions are those of other rows"),
    ([*DIMENSION, "--packing", "True"], "`packing` is True, and `effective_dimension` is measured row by row"),
]


@pytest.mark.parametrize(
    ("experiment", "arguments", "message"),
    [*((DPOExperiment, *case) for case in REFUSED), *((SFTExperiment, *case) for case in OF_SFT)],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_measured_is_refused_first(experiment, arguments, message):
    with pytest.raises(ValueError, match=message):
        check_experiment(experiment.parse(arguments))


def test_missing_packages_and_several_processes_are_refused_first(monkeypatch):
    asked = DPOExperiment.parse(BOUND)
    with monkeypatch.context() as patched:
        patched.setattr("prm_hf._extras.importlib.util.find_spec", lambda name: None if name == "kmeans1d" else name)
        with pytest.raises(ImportError, match=r'`--bound` needs kmeans1d: pip install "prm-hf\[diagnostics\]"'):
            check_experiment(asked)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`bound` is measured in one process with whole weights"):
        check_experiment(asked)


def test_rows_that_share_a_prompt():
    asked = SimpleNamespace(bound=True)
    check_units(asked, [0, 1, 1, 2], has_units=True)
    check_units(SimpleNamespace(bound=False), [0, 0], has_units=False)
    with pytest.raises(ValueError, match="the 4 training rows are of 3 prompts: .* `--pairs_per_prompt 1`"):
        check_units(asked, [0, 1, 1, 2], has_units=False)
    with pytest.raises(ValueError, match="the 2 training rows are of 1 prompts"):
        check_units(asked, [0, 0], has_units=True)


def test_a_model_that_is_too_large():
    with torch.device("meta"):
        large = torch.nn.Linear(10_000, 10_000)
    trainer = SimpleNamespace(model=large, train_dataset=range(100), beta=0.1)
    check_size(trainer, SimpleNamespace(effective_dimension=None))
    with pytest.raises(ValueError, match="of 100,010,000 trained parameters takes 37 GiB: .* `--use_peft`"):
        check_size(trainer, SimpleNamespace(effective_dimension=1.0))


def test_a_run_without_them_is_another_run(tmp_path):
    (plain,) = comparison_grid(tmp_path, "adamw", arguments=("--learning_rates", "1e-3")).specify_runs()
    assert not {"effective_dimension", "bound", "unilora_dim"} & {*plain.settings}
    given = ("--learning_rates", "1e-3", *DIMENSION, *BOUND)
    (measured,) = comparison_grid(tmp_path, "adamw", arguments=given).specify_runs()
    info = {"method": "adamw", "learning_rate": 1e-3, "seed": 0, "settings": plain.settings}
    assert measured.changes_from(info) == ["bound", "effective_dimension", "model_use_peft", "unilora_dim"]
    assert plain.changes_from(info) == []


def test_the_adapter_is_one_vector():
    asked = DPOExperiment.parse([*BOUND, "--lora_r", "3", "--lora_target_modules", "q_proj", "v_proj"])
    config = asked.model_settings()["peft_config"]
    assert (config.theta_d_length, config.r, config.target_modules) == (8, 3, {"q_proj", "v_proj"})
    check_experiment(asked)


# ---- What is measured ----


def trainer_of(folder, columns, **more):
    """What a trainer with a trained adapter has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(make_model(1), unilora(2, 8, start=1.0))
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
    model.enable_input_require_grads()  # as with gradient checkpointing
    rows = Dataset.from_list(columns)
    args = SimpleNamespace(output_dir=str(folder), per_device_eval_batch_size=20)
    return SimpleNamespace(accelerator=Accelerator(), model=model, train_dataset=rows, args=args, **more)


def tokenized(n):
    tokenizer = make_tokenizer()

    def ids(messages):
        return tokenizer.apply_chat_template(messages, return_dict=False)

    for row in preference_pairs(n, 0):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        sides = {f"{s}_ids": ids(row["prompt"] + row[s])[len(prompt) :] for s in ("chosen", "rejected")}
        yield {"prompt_ids": prompt, **sides}


def asked_for(**values):
    return SimpleNamespace(**{"effective_dimension": None, "bound": False, **values})


def test_preferences(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collate = DataCollatorForPreference(pad_token_id=0)
    trainer = trainer_of(tmp_path, [*tokenized(30)], beta=0.5, ref_model=None, data_collator=collate)
    assert measure_simplicity(trainer, asked_for()) == {} and not [*tmp_path.iterdir()]
    found = measure_simplicity(trainer, asked_for(effective_dimension=0.1, bound=True))
    rows, model = trainer.train_dataset, trainer.model
    own = effective_dimension(model, rows.to_list(), 0.1, reduction="sum", method="exact", loss="dpo", beta=0.5)
    assert found["effective_dimension/value"] == pytest.approx(own.value, rel=1e-4) and 0 < own.value < 8
    assert found["effective_dimension/largest"] == pytest.approx(own.eigenvalues[0], rel=1e-4)
    assert found["effective_dimension/loss"] == pytest.approx(own.loss / 30, rel=1e-5)
    bound = compression_bound(model, rows, "preference", beta=0.5, output_dir=tmp_path / "again")
    assert found["bound/value"] == bound.bound and found["bound/n"] == 30
    assert found["bound/certified_accuracy"] == 1 - bound.bound
    whole = json.loads((tmp_path / DIAGNOSTICS_FILE).read_text())
    assert len(whole["effective_dimension"]["eigenvalues"]) == 8
    assert whole["bound"]["path"] == str(tmp_path / "bound" / "weights-1.bin")
    assert all(isinstance(value, float) for value in found.values())
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0] = torch.nan
    assert measure_simplicity(trainer, asked_for(effective_dimension=0.1)) == {}


def test_completions(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": row["prompt_ids"] + row["chosen_ids"]} for row in tokenized(12)]
    trainer = trainer_of(tmp_path, rows, data_collator=DataCollatorForLanguageModeling(pad_token_id=0))
    trainer.model.requires_grad_(False)
    next(p for name, p in trainer.model.named_parameters() if "layers.0.input_layernorm" in name).requires_grad_(True)
    found = measure_simplicity(trainer, asked_for(effective_dimension=1.0, bound=True))
    own = effective_dimension(trainer.model, rows, 1.0, reduction="sum", method="exact")
    assert found["effective_dimension/lower"] <= own.value <= found["effective_dimension/upper"]
    assert found["effective_dimension/n_params"] == own.n_params == 64
    assert found["bound/value"] > found["bound/guess"] > found["bound/empirical_risk"] * 0.5
    assert "bound/certified_accuracy" not in found
