"""A DPO run for `accelerate launch`, whose results each process writes into the folder given as argument."""

import dataclasses
import sys

import torch

from prm_hf.trainers import PRMDPOConfig, PRMDPOTrainer

from ..tiny import make_model, make_tokenizer, preference_dataset


def main(output_dir: str) -> None:
    args = PRMDPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        prm_boundary="empirical",
        memorization_max_rows=None,
    )
    assert args.world_size == 2, f"expected 2 processes, got {args.world_size}"
    trainer = PRMDPOTrainer(
        make_model(),
        make_model(),
        args,
        train_dataset=preference_dataset(14),
        eval_dataset={
            "clean": preference_dataset(7, seed=1, flipped=False),
            "other": preference_dataset(5, seed=2, flipped=False),
        },
        processing_class=make_tokenizer(),
    )
    trainer.train()
    passes = []
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    reference.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.evaluate()
    group = trainer.find_prm().param_groups[0]
    timings = ("_runtime", "_per_second")
    results = {
        "world_size": trainer.accelerator.num_processes,
        "sizes": (group["batch_size"], group["n_dataset"]),
        "passes": len(passes),
        "metrics": {k: v for k, v in trainer.last_eval_metrics.items() if not k.endswith(timings)},
        "tables": {name: dataclasses.asdict(pairs) for name, pairs in trainer.pair_evaluations.items()},
        "weights": trainer.accelerator.get_state_dict(trainer.model),
    }
    torch.save(results, f"{output_dir}/rank{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
