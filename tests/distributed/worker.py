"""Short trainings under `accelerate launch` that note down what the optimizer saw and did, for the tests beside it.

    accelerate launch … -m tests.distributed.worker plan.json

The plan is `{"world_size": …, "output_dir": …, "runs": {name: options, …}}`; starting Python takes longer than a run,
so one launch makes several. Every rank writes `<output_dir>/<name>/rank<i>.pt` with a record of each step: for each
slice of an original tensor that this rank holds its gradient, its weights before and after and, where it is known of
the slice alone, its mask; the masks of `per_tensor`, and of rows that may lie in several processes; what the optimizer
sent; and `get_mask_stats()`. Or with the error that ended the run.
"""

import json
import os
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.data import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from benchmarks.traffic import SentMode
from prm_hf import PRM
from prm_hf.optim import masks
from prm_hf.optim.hyperparameters import Hyperparameters
from prm_hf.optim.quantized import MOMENTS, moment_of, requantize
from prm_hf.optim.reductions import row_mean_squares
from prm_hf.trainers.checkpoints import CheckpointMixin


VOCAB, LENGTH, ROWS = 257, 11, 64  # odd sizes, so that no border falls on another


class RecordingPRM(PRM):
    """PRM that notes down its steps. It changes nothing, and calls nothing that PRM would not call.

    DeepSpeed calls `step()` once for each parameter group or sub-group: all of them go into one record.
    """

    steps: ClassVar[list[dict]] = []

    def _sizes(self):
        return [len(refs) for refs in self._locator._originals]

    def _step(self):
        if not self.steps:  # DeepSpeed's stage 0, and FSDP2 to load a checkpoint, allocate the state with a step
            return super()._step()
        stepped = []
        for group in self.param_groups:
            for position, p in enumerate(group["params"]):
                if p.grad is not None:
                    number = sum(self._sizes()[: group["prm_group"]]) + position
                    grad, before = (_local(x).detach().clone().flatten() for x in (p.grad, p))
                    stepped.append((group, p, number, grad, before))
        with SentMode() as sent:
            super()._step()
        for name, count in sent.messages.items():
            messages, n_bytes = self.steps[-1]["sent"].get(name, (0, 0))
            self.steps[-1]["sent"][name] = messages + count, n_bytes + sent.bytes[name]
        self._note_unit_masks()
        for group, p, number, grad, before in stepped:
            after = _local(p).detach().clone().flatten()
            q, kept = self._elementwise_masks(group, p), self._kept_moments(group, p)
            if self._locator.flat:
                segments = self._locator.layout.segments[id(p)]
                slices = [(x.tensor, x.offset, slice(x.start, x.start + x.length)) for x in segments]
            else:
                slices = [(number, _offset(p), slice(None))]
            for number, offset, part in slices:
                self.steps[-1]["slices"].append(
                    {
                        "tensor": number,
                        "offset": offset,
                        "shape": self._shape(p, number),
                        "grad": grad[part],
                        "before": before[part],
                        "after": after[part],
                        "q": None if q is None else q[part],
                        **{name: values[part] for name, values in kept.items()},
                        "lr": group["lr"],
                        "weight_decay": group["weight_decay"],
                    }
                )

    def _kept_moments(self, group, p):
        """In 8 bits, what is kept of the moments of a local tensor."""
        kept = {}
        for name in MOMENTS if group["state_dtype"] == "8bit" else ():
            if name in self.state[p]:
                kept[name] = torch.zeros_like(_local(p).detach(), dtype=torch.float32)
                moment = moment_of(self.state[p], name)
                requantize(moment, kept[name], torch.float32, self._locator.buffer(p))
        return {name: x.flatten() for name, x in kept.items()}

    def _note_unit_masks(self):
        per_row = self.param_groups[0]["reduction"] == "per_row"
        if not self._locator.sharded:
            if self.param_groups[0]["reduction"] != "per_tensor":
                return
            for group, values in zip(self.param_groups, self.get_tensor_masks(), strict=True):
                before = sum(self._sizes()[: group["prm_group"]])
                numbers = [before + i for i, p in enumerate(group["params"]) if self.state.get(p)]
                self.steps[-1]["q"] |= dict(zip(numbers, values, strict=True))
        for unit_masks in (x for plan in self._plans.values() for x in plan._masks.values()):
            held = unit_masks.table.held
            parts = unit_masks.q.split([units.count for units in held.values()])
            for (number, units), q in zip(held.items(), parts, strict=True):
                if number in self._locator.layout._padding:
                    continue
                if per_row:
                    self.steps[-1]["row_q"].setdefault(number, {}).update(enumerate(q.tolist(), units.first))
                elif units.count:
                    self.steps[-1]["q"][number] = q.item()

    def _shape(self, p, number):
        if not self._locator.sharded:
            return tuple(p.shape)
        rows = self._locator.layout.rows[number]
        return (rows, -1) if rows > 1 else None

    def _has_unit_masks(self, group):
        return group["reduction"] == "per_row" and self._locator.sharded

    def _elementwise_masks(self, group, p):
        if group["reduction"] == "per_tensor" or self._has_unit_masks(group) or p.numel() == 0:
            return None
        if group["state_dtype"] == "8bit":  # of what is kept they cannot be told
            return None
        state = {name: _local(value).double() for name, value in self.state[p].items()}
        h = Hyperparameters.of_group(group)
        average = state.get("exp_avg_signal", state["exp_avg"])
        squares = average.square() if h.reduction == "per_param" else row_mean_squares([average])[0]
        q = masks.compute_mask(squares, state["grad_var"], masks.step_scalars(state["step"], h, p.numel()), h)[0]
        if group["reduction"] == "per_row":
            q = masks.over_rows(q, state["exp_avg"]).expand_as(state["exp_avg"])
        return q.flatten()


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _offset(p):
    if getattr(p, "_fsdp_flattened", False):  # FSDP1 keeps the offsets to itself: what counts is the order
        return dist.get_rank()
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


def make_model(options: dict) -> torch.nn.Module:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 65, "num_attention_heads": 4} | options.get("model", {})
    config = Qwen2Config(
        vocab_size=VOCAB,
        num_hidden_layers=2,
        num_key_value_heads=2,
        tie_word_embeddings=options.get("tied", True),
        use_cache=False,
        initializer_range=0.1,
        **sizes,
    )
    model = Qwen2ForCausalLM(config).to(getattr(torch, options.get("dtype", "float32")))
    if options.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "up_proj", "down_proj"]))
        for name, p in model.named_parameters():  # B = 0 would leave half of the gradients zero at the first step
            if "lora_B" in name:
                p.data.normal_(std=0.1)
    if options.get("frozen"):
        model.model.embed_tokens.weight.requires_grad_(False)
        model.model.layers[0].unused = torch.nn.Parameter(torch.randn(7, 5))
    return model


class Watch(TrainerCallback):
    """Begins the record of a step and notes its statistics at the end; waits to be killed if the options say so."""

    def __init__(self, options, output_dir):
        self.options, self.output_dir = options, output_dir

    def on_step_begin(self, args, state, control, **kwargs):
        RecordingPRM.steps.append({"step": state.global_step + 1, "q": {}, "row_q": {}, "slices": [], "sent": {}})

    def spoil_loss(self, model, inputs, output):
        """Makes the gradients of one step infinite, on the last process alone."""
        state, args = self.trainer.state, self.trainer.args
        if state.global_step + 1 == self.options["overflow_at"] and args.process_index == args.world_size - 1:
            output.loss = output.loss * float("inf")
        return output

    def on_step_end(self, args, state, control, **kwargs):
        RecordingPRM.steps[-1]["stats"] = self.trainer.find_prm().get_mask_stats()
        if self.options.get("die_after") == state.global_step:
            (self.output_dir / f"waiting{args.process_index}").touch()
            time.sleep(600)


class RecordingTrainer(CheckpointMixin, Trainer):
    pass


@contextmanager
def environment(options: dict, folder: Path):
    """What the options change of what `accelerate launch` passed on in the environment."""
    before = dict(os.environ)
    os.environ.update(options.get("environment", {}))
    if "deepspeed" in options:
        config = json.loads(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text())
        path = folder / f"deepspeed{os.environ.get('RANK', '0')}.json"
        path.write_text(json.dumps(merged(config, options["deepspeed"])))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def merged(config: dict, changes: dict) -> dict:
    changes = {k: merged(config.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return {**config, **changes}


def prepare_cpu(args: TrainingArguments) -> None:
    """What keeps accelerate and DeepSpeed from a CPU with gloo, and has nothing to do with how tensors are sharded."""
    prepare_backends(args.deepspeed_plugin is not None)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _ = args.device
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def prepare_backends(deepspeed_is_used: bool) -> None:
    if deepspeed_is_used:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        # Gloo does the work; DeepSpeed would compile a shared-memory transport for three minutes first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        get_accelerator().is_fp16_supported = lambda: True  # only slow
    if os.environ.get("FSDP_VERSION") == "1":
        torch.distributed.fsdp._init_utils._get_device_from_device_id = lambda *_: torch.device("cpu")


def train(options: dict, world_size: int, folder: Path) -> dict:
    accumulation = options.get("accumulation", 1)
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=options.get("steps", 5),
        per_device_train_batch_size=4 // world_size // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="linear",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps" if "save_steps" in options else "no",
        save_steps=options.get("save_steps", 500),
        bf16=options.get("bf16", False),
        fp16=options.get("fp16", False),
        ddp_find_unused_parameters=options.get("frozen", False),
        parallelism_config=ParallelismConfig(**options["mesh"]) if "mesh" in options else None,
    )
    assert args.world_size == world_size, f"expected {world_size} processes, got {args.world_size}"
    prepare_cpu(args)
    watch = Watch(options, folder)
    watch.trainer = trainer = RecordingTrainer(
        model=make_model(options),
        args=args,
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=(RecordingPRM, {"variance_beta": 0.9, "lr": 1e-2, **options.get("prm", {})}),
        callbacks=[watch],
    )
    if "overflow_at" in options:
        trainer.model.register_forward_hook(watch.spoil_loss)
    resume = options.get("resume")
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder.parent / resume))
    locator = trainer.find_prm()._locator
    return {"path": locator.layout.path.value if locator.sharded else None, "world_size": args.world_size}


def main(plan: dict) -> None:
    for name, options in plan["runs"].items():
        folder = Path(plan["output_dir"], name)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"==== {name}", flush=True)
        RecordingPRM.steps = []
        begin = time.monotonic()
        with environment(options, folder):
            try:
                result = train(options, plan["world_size"], folder) | {"error": None}
            except Exception as error:  # noqa: BLE001 - every rank raises the same, or the launch runs into its time limit
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
        print(f"==== {name}: {time.monotonic() - begin:.1f} s", flush=True)
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.save(result | {"steps": RecordingPRM.steps}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))
