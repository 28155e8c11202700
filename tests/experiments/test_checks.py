"""What cannot be run, or would have no effect, is an error before anything is loaded or written."""

import inspect
import re
import sys

import pytest
import yaml
from trl import DPOTrainer

from prm_hf.experiments import dpo, runner, sft
from prm_hf.experiments.checks import check_experiment, folder_of_data, folder_of_rate
from prm_hf.experiments.controls import THIRD_PARTY
from prm_hf.experiments.dpo import DIVERGENCES, DPOExperiment
from prm_hf.experiments.sft import SFTExperiment

from .comparisons import ON_CPU, ROOT


MODEL = ["--model_name_or_path", "m", *ON_CPU]

REFUSED = [
    # what the runner has its own way with
    (["--seed", "7"], "`seed` is 7, which a comparison does not use: `seeds` has those of the runs"),
    (["--resume_from_checkpoint", "x"], "`resume_from_checkpoint` is 'x', .* when the same command is given again"),
    (["--hub_model_id", "me/x"], "`hub_model_id` is 'me/x', .* all runs would be pushed to one repository"),
    (["--auto_find_batch_size", "True"], "`auto_find_batch_size` is True, .* different batch sizes"),
    (["--do_predict", "True"], "`do_predict` is True"),
    (["--batch_eval_metrics", "True"], "`batch_eval_metrics` is True"),
    (["--optim_target_modules", "q_proj"], "`optim_target_modules` is 'q_proj'"),
    (["--optimizer_name", "adamw"], "`methods` choose the optimizers, and `optim` is .*: leave it unset"),
    (["--optim", "sgd"], "`methods` choose the optimizers, and `optim` is .*: leave it unset"),
    (
        ["--learning_rate", "5e-5", "--learning_rates", "1e-3"],
        "`learning_rate` is 5e-05, and `learning_rates` are ",
    ),
    # what belongs to something that is not there
    (["--dataset_config", "x"], "`dataset_config` is 'x', which is for a `dataset_name`, and there is none"),
    (["--dataset_test_split", "dev"], "`dataset_test_split` is 'dev', which is for a `dataset_name`"),
    (["--eval_dataset_name", "x"], r"`eval_dataset_name` is \['x'\], which is for a `dataset_name`"),
    (["--drop_overlap"], "`drop_overlap` is True, which is for a `dataset_name`"),
    (["--methods", "adamw", "--prm_softness", "0.5"], "`prm_softness` is 0.5, and no method in `methods` has it"),
    (["--methods", "adamw", "prm_debiased", "--prm_reduction", "per_param"], "`prm_reduction` is 'per_param', and no"),
    (["--methods", "ipo", "--loss_type", "hinge"], r"`loss_type` is \['hinge'\], and no method in `methods` has it"),
    # what a method does not go with
    (["--drift_metrics", "False"], "`drift_metrics` is False, and a comparison is of what it measures"),
    (["--no_drift_metrics", "True"], "`drift_metrics` is False"),
    (["--methods", "msvag", "--weight_decay", "0.1"], "`msvag` has no weight decay, and `weight_decay` is 0.1"),
    (["--methods", "prm_debiased", "--prm_signal_beta", "0.98"], "`prm_debiased` of `methods`: Invalid prm_signal_b"),
    (["--methods", "adamw_eps:10", "--adam_epsilon", "1e-6"], "`adamw_eps:10` of `methods`: `adam_epsilon=1e-06` and"),
    (["--loss_type", "sigmod"], "`adamw` of `methods`: `loss_type` has 'sigmod', and TRL knows sigmoid, hinge"),
    (["--loss_type", "sigmoid", "exo_pair"], "`loss_type` is 'exo_pair', which needs a `label_smoothing` above 0"),
    (["--f_divergence_type", "kl"], "`f_divergence_type` is 'kl': it must be reverse_kl"),
    # what becomes a path
    (["--seeds", "-1"], r"`seeds` must be integers in \[0, 2\*\*32\), got -1"),
    (["--seeds", "4294967296"], r"`seeds` must be integers in \[0, 2\*\*32\), got 4294967296"),
    ([*MODEL, "--dataset_name", "..", "x"], "`dataset_name` becomes the name of a folder, and is '..'"),
    ([*MODEL, "--dataset_name", "a/.locks", "x"], "`dataset_name` becomes the name of a folder, and is '.locks'"),
]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*args):
        pytest.fail("data were loaded")

    monkeypatch.setattr(runner, "load_data", load)


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_it_is_said_before_anything_is_loaded(tmp_path, nothing_is_loaded, arguments, message):
    output_dir = tmp_path / "runs"
    with pytest.raises(ValueError, match=message):
        dpo.main(["--output_dir", str(output_dir), *arguments])
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("seeds", ["0/../../x"], r"`seeds` must be integers in \[0, 2\*\*32\), got '0/../../x'"),
        ("seeds", [True], "got True"),
        ("seeds", [0.5], "got 0.5"),
        ("noise_rate", ["../x"], r"`noise_rate` must be in \[0, 1\), got '../x'"),
        ("noise_rate", [True], "got True"),
        ("truncation_mode", "keep", "`truncation_mode` is 'keep': it must be keep_start or keep_end"),
    ],
)
def test_values_are_of_their_type(tmp_path, nothing_is_loaded, setting, value, message):
    """Python gives any type, and so does a YAML file, which argparse does not see."""
    parsed = DPOExperiment.parse(["--output_dir", str(tmp_path / "runs")])
    setattr(parsed.script_args if hasattr(parsed.script_args, setting) else parsed.training_args, setting, value)
    with pytest.raises(ValueError, match=message):
        check_experiment(parsed)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({setting: value}))
    with pytest.raises(ValueError, match=f"`{setting}` in {file} must be "):
        runner.run_comparisons(DPOExperiment, ["--config", str(file), "--output_dir", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_a_loss_of_sft_that_trl_does_not_know(nothing_is_loaded):
    parsed = SFTExperiment.parse([])
    parsed.training_args.loss_type = "dpo"
    with pytest.raises(ValueError, match="`adamw` of `methods`: `loss_type` is 'dpo': TRL knows nll and dft"):
        check_experiment(parsed)
    with pytest.raises(ValueError, match="`--loss_type` has no choice 'dpo'"):
        runner.run_comparisons(SFTExperiment, ["--loss_type", "dpo"])


@pytest.mark.parametrize(
    ("method", "package"),
    [
        *((method, "pytorch_optimizer") for method in ("cautious", "msvag", "grokfast")),
        *((method, method) for method in ("casmo", "grokadamw")),
    ],
)
def test_a_missing_package_is_named_first(nothing_is_loaded, monkeypatch, method, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "prm-hf\[controls\]"'):
        dpo.main(["--methods", "adamw", method])


@pytest.mark.parametrize("method", ["adamw_embedding:3", *THIRD_PARTY, "interpolate:0.5"])
def test_whole_tensors_are_not_sharded(nothing_is_loaded, monkeypatch, method):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=f"`{method}` runs on whole tensors"):
        runner.run_comparisons(DPOExperiment, ["--methods", method])


def test_processes_that_share_a_run_have_no_workers(nothing_is_loaded, monkeypatch):
    monkeypatch.setattr(DPOExperiment.config_class, "world_size", 2)
    with pytest.raises(ValueError, match="`workers` is 3, and 2 processes were launched, .*: leave `workers` out, or"):
        runner.run_comparisons(DPOExperiment, ["--workers", "3"])
    check_experiment(DPOExperiment.parse(["--workers", "1"]))


def test_workers_that_are_not_given(monkeypatch):
    assert DPOExperiment.parse([]).script_args.workers == SFTExperiment.parse([]).script_args.workers == 2
    assert DPOExperiment.parse([*MODEL, "--dataset_name", "x"]).script_args.workers == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    for experiment in (DPOExperiment, SFTExperiment):
        settings = experiment._built_in_settings()
        assert settings["workers"] == 1 and settings["per_device_train_batch_size"] == 8


def test_an_output_dir_that_is_a_file(tmp_path, nothing_is_loaded):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ValueError, match="`output_dir` is '.*runs', a file: name a folder"):
        dpo.main(["--output_dir", str(tmp_path / "runs")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_new_tokens", "9"], "`max_new_tokens` is 9, which is for an `answer_pattern`"),
        (["--drift_metrics", "False"], "`drift_metrics` is False"),
    ],
)
def test_sft_too(nothing_is_loaded, arguments, message):
    with pytest.raises(ValueError, match=message):
        sft.main(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prm_softness", "0.5", "--disable_tqdm", "True", "--run_name", "mine", "--logging_steps", "3"],
        ["--methods", "prm_stopping", "early_stopping"],
        ["--methods", "adamw", "ipo", "cdpo", "robust", "--loss_type", "hinge", "--label_smoothing", "0.1"],
        ["--methods", "adamw", "prm_rows", "--prm_signal_beta", "0.98", "--relative_eps", "3"],
        ["--methods", "cautious", "msvag", "adamw_embedding:3"],
    ],
    ids=" ".join,
)
def test_what_has_an_effect_passes(arguments):
    check_experiment(DPOExperiment.parse(arguments))
    check_experiment(SFTExperiment.parse([]))


RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_recipes_have_no_arguments_without_effect(path):
    experiment = SFTExperiment if path.stem.startswith("sft") else DPOExperiment
    check_experiment(experiment.parse(["--config", str(path), "--dataset_name", "a", *ON_CPU]))


def test_names_of_divergences_are_those_of_trl():
    source = inspect.getsource(sys.modules[DPOTrainer.__module__])
    assert set(re.findall(r'f_divergence_type == "(\w+)"', source)) == set(DIVERGENCES)


def test_rates_have_folders_of_their_own():
    assert [folder_of_rate(x) for x in (0, 0.0, 0.3, 1e-3, 0.0010001, 0.30000001)] == [
        *("noise0", "noise0", "noise0.3", "noise0.001", "noise0.0010001", "noise0.30000001")
    ]
    assert folder_of_data("trl-lib/ultrafeedback_binarized") == "ultrafeedback_binarized"
