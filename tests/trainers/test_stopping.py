"""`PopulationRiskStoppingCallback`."""

import math

import pytest
from trl import DPOConfig, DPOTrainer

from prm_hf.optim import PRM
from prm_hf.trainers import PopulationRiskStoppingCallback, PRMDPOConfig, PRMDPOTrainer

from ..tiny import make_model, make_tokenizer
from .trainer_runs import TRAIN, settings


pytestmark = pytest.mark.usefixtures("quiet")


class Ratios(PRMDPOTrainer):
    """Logs the ratios that it is given, an entry a step."""

    ratios: tuple[float, ...] = ()

    def log(self, logs, start_time=None):
        is_step = "loss" in logs
        super().log(logs, start_time)
        if is_step:
            self.state.log_history[-1]["mask/snr"] = self.ratios[self.state.global_step - 1]


def stopping_trainer(tmp_path, ratios=None, threshold=0.4, trainer_class=Ratios, **kwargs):
    """14 rows, 4 a step: 4 steps an epoch, of up to 4 epochs."""
    kwargs = {"max_steps": -1, "num_train_epochs": 4, "prm_estimator": "debiased", **kwargs}
    trainer = trainer_class(
        make_model(),
        make_model(),
        PRMDPOConfig(**settings(tmp_path, **kwargs)),
        train_dataset=TRAIN,
        processing_class=make_tokenizer(),
        callbacks=[PopulationRiskStoppingCallback(threshold)],
    )
    trainer.ratios = ratios
    return trainer


@pytest.mark.parametrize(
    "ratios, steps",
    [
        ([0.1, 0.1, 0.1, 1.4, *[0.5] * 4, 0.5, 0.4, 0.3, 0.2, *[0.1] * 4], 12),  # .425, .5, .35
        ([0.1, 0.1, 0.1, 1.0, *[9.0] * 12], 4),  # .325
        ([math.nan, 0.5, 0.5, 0.5, *[math.nan] * 4, *[0.4] * 8], 16),  # .5, unknown, .4, which is not below
    ],
)
def test_stops_after_an_epoch_of_noise(tmp_path, ratios, steps):
    trainer = stopping_trainer(tmp_path, ratios)
    trainer.train()
    assert trainer.state.global_step == steps


def test_the_warm_up_does_not_decide(tmp_path):
    """4 steps an epoch, of which 6 are the warm-up: the first epoch has no say, of the second only steps 7 and 8."""
    trainer = stopping_trainer(tmp_path, [*[0.1] * 6, 0.5, 0.5, 0.1, *[0.4] * 3, *[9.0] * 4], warmup_steps=6)
    trainer.train()
    assert trainer.state.global_step == 12


def test_stopping_goes_by_prms_own_statistics(tmp_path):
    trainer = stopping_trainer(tmp_path, threshold=1e-9, trainer_class=PRMDPOTrainer)
    trainer.train()
    assert trainer.state.global_step == 16
    logged = [entry["mask/snr"] for entry in trainer.state.log_history if "mask/snr" in entry]
    first = [ratio for ratio in logged[:4] if math.isfinite(ratio)]
    assert len(logged) == 16 and len(first) == 3
    trainer = stopping_trainer(tmp_path, threshold=sum(first) / 3 * 1.01, trainer_class=PRMDPOTrainer)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.epoch == 1


def test_a_resumed_run_stops_where_it_would_have(tmp_path):
    """The first two of the epoch's ratios come from the checkpoint."""
    ratios = [9.0] * 4 + [9.0, 0.1, 0.1, 0.1] + [0.1] * 8
    saving = {"save_strategy": "steps", "save_steps": 6}
    trainer = stopping_trainer(tmp_path, ratios, **saving)
    trainer.train()
    assert trainer.state.global_step == 12
    resumed = stopping_trainer(tmp_path, ratios, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 12


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"optim": "adamw_torch_fused"}, "the optimizer is AdamW: train with `optim='prm'`"),
        ({"prm_mask": "none"}, "`mask` is 'none'"),
        ({"logging_strategy": "epoch"}, "set it to 'steps', and `logging_steps` to several an epoch"),
        ({"logging_steps": 5}, "`logging_steps` is 5 and an epoch has 4 steps: log several times"),
    ],
)
def test_stopping_needs_ratios(tmp_path, kwargs, message):
    trainer = stopping_trainer(tmp_path, **kwargs)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_trainer_without_ratios_in_its_logs_raises(tmp_path):
    trainer = DPOTrainer(
        make_model(),
        make_model(),
        DPOConfig(**settings(tmp_path, max_steps=-1, num_train_epochs=1)),
        train_dataset=TRAIN,
        processing_class=make_tokenizer(),
        callbacks=[PopulationRiskStoppingCallback()],
    )
    trainer.optimizer = PRM(trainer.model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="this trainer does not log them: use `PRMDPOTrainer`"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("threshold", [0, -1.0, math.nan, math.inf, True])
def test_a_threshold_is_above_zero(threshold):
    with pytest.raises(ValueError, match="`threshold` is a signal-to-noise ratio and must be above 0, got"):
        PopulationRiskStoppingCallback(threshold)
