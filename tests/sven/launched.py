"""Runs that `test_processes.py` launches on two processes, and makes alone too; each saves what training added."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from prm_hf.sven.distributed import concatenate, gather_jacobians, gather_rows

from .models import Tied, jacobian_of, llama, padded_batch, seeded, token_losses, true_rows
from .trainer_runs import dpo_trainer_of, trained, trainer_of


def runs(output_dir: Path, processes: int) -> dict[str, torch.Tensor]:
    """Steps of the same eight rows each, by name, with the rows of a step spread over the processes."""
    own = {"per_device_train_batch_size": 8 // processes}
    accumulated = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    made = {
        "plain": trainer_of(output_dir, rows=24, **own),
        "accumulated": trainer_of(output_dir, rows=24, **accumulated),
        "svd": trainer_of(output_dir, rows=24, svd="svd", **own),
        "microbatches": trainer_of(output_dir, rows=24, microbatch_size=3, **own),
        "drawn": trainer_of(output_dir, rows=24, param_fraction=0.5, **own),
        "variable_k": trainer_of(output_dir, rows=24, variable_k=True, k=8, learning_rate=0.5, **accumulated),
        "dpo_lora": dpo_trainer_of(output_dir, True, max_steps=1, **own),
    }
    return {name: trained(trainer) for name, trainer in made.items()}


def check_gathering(rank: int) -> None:
    """Rows of unequal numbers and lengths, and a parameter that one process has without influence."""
    model, data = llama().double(), padded_batch(5)
    mine = slice(0, 2) if rank == 0 else slice(2, 5)

    def losses(batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return lambda: token_losses(model(**inputs).logits, batch["labels"])

    part = {name: values[mine, : 9 - rank] for name, values in data.items()}
    whole = {name: values[mine] for name, values in data.items()}
    local = jacobian_of(model, losses(part))
    expected = torch.cat(gather_rows(true_rows(model, losses(part))))
    gathered = concatenate(gather_jacobians(local))
    torch.testing.assert_close(gathered.rows(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(local.gram(gathered), expected[mine] @ expected.T, rtol=1e-5, atol=1e-7)
    assert len(expected) == 5 and whole["input_ids"].shape[1] == 9

    tied = seeded(Tied).double()
    local = jacobian_of(tied, lambda: tied(data["input_ids"][mine] % 7).square().mean((1, 2)))
    if rank == 0:
        del local.uses[tied.norm.weight]
    gathered = concatenate(gather_jacobians(local))
    torch.testing.assert_close(gathered.rows()[mine], local.rows())


def main() -> None:
    output_dir = Path(sys.argv[1])
    found = runs(output_dir / "runs", 2)
    state = PartialState()
    check_gathering(state.process_index)
    record = {"world_size": state.num_processes, "runs": found}
    torch.save(record, output_dir / f"rank{state.process_index}.pt")


if __name__ == "__main__":
    main()
