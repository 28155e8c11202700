"""Folds of prompts, and the margins of rows that a run was not trained on."""

import json

import numpy as np
import pytest

from prm_hf import PRMDPOConfig, PRMDPOTrainer
from prm_hf.experiments.folds import ROW, assign_folds, hold_out, join_margins, numbered
from prm_hf.metrics import reward_margins

from ..tiny import make_model, make_tokenizer, preference_dataset


def test_rows_of_a_group_share_a_fold_and_folds_are_about_as_large():
    groups = [f"p{i % 37}" for i in range(100)]
    folds = assign_folds(groups, 5, seed=3)
    assert all(len({fold for fold, g in zip(folds, groups, strict=True) if g == group}) == 1 for group in groups)
    assert set(folds) == set(range(5)) and np.ptp(np.bincount(folds)) <= 3
    assert (folds == assign_folds(groups, 5, seed=3)).all() and (folds != assign_folds(groups, 5, seed=4)).any()


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_there_must_be_as_many_groups_as_folds(folds):
    with pytest.raises(ValueError, match=f"no more than the 3 different prompts; got {folds}"):
        assign_folds(["a", "b", "c", "a"], folds, seed=0)


def make_trainer(folder, rows):
    args = PRMDPOConfig(
        str(folder), max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2,
        optim="adamw_torch", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return PRMDPOTrainer(make_model(), make_model(), args, train_dataset=rows, processing_class=make_tokenizer())


def test_a_held_out_fold_is_not_trained_on_and_is_measured_each_epoch(tmp_path):
    rows = numbered(preference_dataset(12))
    folds, folders = assign_folds(rows["prompt"], 3, seed=0), []
    for fold in range(3):
        folder = tmp_path / str(fold)
        folder.mkdir()
        trainer = make_trainer(folder, rows)
        recorder = hold_out(trainer, folds, fold)
        assert [folds[row] for row in trainer.train_dataset[ROW]] == [f for f in folds if f != fold]
        trainer.train()
        metrics, found = recorder.outcomes()
        assert found["rows"] == np.flatnonzero(folds == fold).tolist() and len(found["label_margins"]) == 2
        again = reward_margins(trainer.evaluate_pairs(rows.select(found["rows"])), trainer.beta)
        assert found["label_margins"][-1] == pytest.approx(again.tolist(), rel=1e-4, abs=1e-7)
        last = np.array(found["label_margins"][-1])
        assert metrics["agreement"] == np.mean(last > 0) and metrics["margin"] == pytest.approx(last.mean())
        assert metrics["loss"] == pytest.approx(np.log1p(np.exp(-last)).mean())
        (folder / "margins.json").write_text(json.dumps(found))
        folders.append(folder)
    joined = join_margins(folders, 13)
    assert joined.shape == (2, 13) and np.isnan(joined[:, 12]).all() and np.isfinite(joined[:, :12]).all()
    assert joined[1, found["rows"]].tolist() == found["label_margins"][1]
    assert (joined[0, :12] != joined[1, :12]).any()


def test_without_a_fold_all_rows_are_trained_on_and_measured(tmp_path):
    trainer = make_trainer(tmp_path, numbered(preference_dataset(8)))
    recorder = hold_out(trainer, None, None)
    assert len(trainer.train_dataset) == len(recorder.rows) == 8
