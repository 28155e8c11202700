"""`python -m tests.trainers.tracked_runs FOLDER`: two short runs that report to all three trackers, in one process.

One is of a trainer of this package, the other one of TRL's with `PRMCallback` and `MemorizationCallback`. Their
histories go to FOLDER/histories.json.
"""

import json
import sys
from pathlib import Path

from trl import SFTConfig, SFTTrainer

from prm_hf import PRM
from prm_hf.experiments.progress import end_reports
from prm_hf.noise import corrupt
from prm_hf.trainers import MemorizationCallback, PRMCallback

from ..tiny import make_model, make_tokenizer
from .trainer_runs import HELDOUT, SENTENCES, dpo_trainer, settings


TRACKERS = ["tensorboard", "wandb", "trackio"]


def own(folder: Path):
    return dpo_trainer(folder, eval_dataset=HELDOUT, report_to=TRACKERS, run_name="own", project="tests")


def other(folder: Path):
    more = {"eval_strategy": "steps", "eval_steps": 3, "report_to": TRACKERS, "run_name": "other", "project": "tests"}
    trainer = SFTTrainer(
        make_model(),
        SFTConfig(**settings(folder, **more)),
        train_dataset=corrupt(SENTENCES, "partial_labels", 0.3),
        eval_dataset=SENTENCES,
        processing_class=make_tokenizer(),
        optimizer_cls_and_kwargs=(PRM, {"lr": 1e-2}),
        callbacks=[PRMCallback()],
    )
    trainer.add_callback(MemorizationCallback(trainer))
    return trainer


def main(folder: Path) -> None:
    histories = {}
    for make in (own, other):
        trainer = make(folder / make.__name__)
        trainer.train()
        histories[make.__name__] = trainer.state.log_history
        end_reports()
    (folder / "histories.json").write_text(json.dumps(histories))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
