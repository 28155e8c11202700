"""A short training under `accelerate launch` that notes down what the optimizer saw and did, for the tests beside it.

    accelerate launch … tests/distributed/worker.py '{"output_dir": …, "world_size": 2, …}'

Every rank writes `rank<i>.pt` with a dict a step: for each slice of an original tensor that this rank holds its
gradient and its weights before and after, the masks, and `get_mask_stats()`.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.data import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from prm_hf import PRM


VOCAB, LENGTH, ROWS = 257, 11, 64  # odd sizes, so that no border falls on another


class RecordingPRM(PRM):
    """PRM that notes down its steps. It changes nothing, and calls nothing that PRM would not call.

    DeepSpeed calls `step()` once for each parameter group or sub-group: all of them go into one record.
    """

    steps: list[dict] = []

    def _parts(self, group):
        parts = super()._parts(group)
        for part in parts:
            part.group = group["prm_group"]
        return parts

    def _tensor_masks(self, parts, sums):
        masks = super()._tensor_masks(parts, sums)
        for part, q in zip(parts, masks, strict=True):
            base = sum(self.sizes[: part.group]) if self._locator.layout is None else 0
            for owner, value in zip(part.owners, [] if q is None else q.tolist(), strict=q is not None):
                self.steps[-1]["q"][base + owner] = value
        return masks

    def _step(self):
        if not self.steps:  # DeepSpeed's stage 0 allocates the state with a step before training
            return super()._step()
        self.sizes = [len(refs) for refs in self._locator._originals]
        stepped = []
        for group in self.param_groups:
            for position, p in enumerate(group["params"]):
                if p.grad is not None:
                    copies = [_local(x).detach().clone().flatten() for x in (p.grad, p)]
                    stepped.append((p, sum(self.sizes[: group["prm_group"]]) + position, *copies))
        super()._step()
        for p, number, grad, before in stepped:
            after = _local(p).detach().clone().flatten()
            if self._locator.flat:
                pieces = self._locator.layout.pieces[id(p)]
                slices = [(x.tensor, x.offset, slice(x.start, x.start + x.length)) for x in pieces]
            else:
                slices = [(number, _offset(p), slice(None))]
            for number, offset, part in slices:
                self.steps[-1]["slices"].append((number, offset, grad[part], before[part], after[part]))


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _offset(p):
    if not isinstance(p, DTensor):
        return 0
    _, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return sum(i * stride for i, stride in zip(start, p.stride(), strict=True))


class Rows(Dataset):
    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def make_model(tied: bool, dtype: str) -> Qwen2ForCausalLM:
    set_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=65,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        use_cache=False,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config).to(getattr(torch, dtype))


class StatsCallback(TrainerCallback):
    def __init__(self, options):
        self.stats, self.options = [], options

    def on_step_begin(self, args, state, control, **kwargs):
        RecordingPRM.steps.append({"q": {}, "slices": []})

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        while not isinstance(optimizer, PRM):
            optimizer = optimizer.optimizer
        self.stats.append(optimizer.get_mask_stats())
        if self.options.get("die_after") == state.global_step:
            time.sleep(600)  # until the test kills it


def main(options: dict) -> None:
    world_size = options["world_size"]
    per_device = options.get("batch_size", 4) // world_size // options.get("accumulation", 1)
    args = TrainingArguments(
        output_dir=options["output_dir"],
        use_cpu=True,
        max_steps=options.get("steps", 5),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=options.get("accumulation", 1),
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="linear",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="steps" if "save_steps" in options else "no",
        save_steps=options.get("save_steps", 500),
        bf16=options.get("bf16", False),
        fp16=options.get("fp16", False),
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )
    assert args.world_size == world_size, f"expected {world_size} processes, got {args.world_size}"
    if os.environ.get("DS_ACCELERATOR") == "cpu" and args.deepspeed_plugin is not None:
        # Gloo does the work; DeepSpeed would compile a shared-memory transport for three minutes first.
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if options.get("fsdp"):
        # accelerate knows FSDP for accelerators alone. These two names are all that keeps it from a CPU with gloo.
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        _ = args.device
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = make_model(options.get("tied", True), options.get("dtype", "float32"))
    if options.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "up_proj", "down_proj"]))
        set_seed(1)
        for name, p in model.named_parameters():  # B = 0 would leave half of the gradients zero at the first step
            if "lora_B" in name:
                p.data.normal_(std=0.1)
    if options.get("frozen"):
        model.model.embed_tokens.weight.requires_grad_(False)
    settings = {"rho": 0.9, "lr": 1e-2, **options.get("prm", {})}
    stats = StatsCallback(options)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=(RecordingPRM, settings),
        callbacks=[stats],
    )
    trainer.train(resume_from_checkpoint=options.get("resume"))
    result = {"steps": RecordingPRM.steps, "stats": stats.stats, "sizes": None}
    optimizer = trainer.optimizer
    while not isinstance(optimizer, PRM):
        optimizer = optimizer.optimizer
    result["path"] = None if optimizer._locator.layout is None else optimizer._locator.layout.path
    result["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(result, os.path.join(options["output_dir"], f"rank{rank}.pt"))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
