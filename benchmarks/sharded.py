"""Masks under data parallelism: do they agree with one GPU, and what does a step cost beside AdamW's?

On one GPU, which takes the halves of a batch that two GPUs take one after the other, and then on two:

    launch="accelerate launch --config_file accelerate_configs/fsdp2.yaml"
    $launch --num_processes 1 benchmarks/sharded.py --gradient_accumulation_steps 2 --output fsdp2_1.json
    $launch --num_processes 2 benchmarks/sharded.py --reference fsdp2_1.json --output fsdp2.json

`bash results/sharding.sh gpu` does so for every path. The reference has to round as the path does, and DeepSpeed's
stage 3 has linear layers of its own. So it is the same path on one GPU; of `ddp` it is `single`. The model is a Qwen2
of random weights, by default of the size of Qwen2.5-0.5B, the batches are random tokens: nothing is downloaded. Each
run prints, and writes, one JSON object:

- `agreement`: of `steps` training steps. `mask_replay` is the largest relative difference between the masks (their
  means over each tensor, by `PRM.get_tensor_masks`) and those of PRM on whole tensors in one process, fed with the
  gradients that the processes saw; `weight_replay` the largest difference of a weight. In these two is all that
  sharding could do wrong. `mask_reference` is, step by step, the largest relative difference to the masks of the
  `--reference` run. Two halves add up to the same gradient on one GPU and on two, bit for bit where kernels are
  deterministic, as they are made to be here; but not the norm for `--max_grad_norm`, which each path adds up in
  another order.
  `sent` are messages and bytes of the optimizer's last step, counted and as `traffic.py` says, and the bytes of
  `grad_var` on the first process.
- `optimizer_step_ms`: median time of the optimizer's step under this wrapper (under DeepSpeed of the engine's, which
  clips and gathers parameters too), by optimizer; `relative_to_adamw` the ratio; `train_step_ms` of the whole step.
- `peak_memory_gib`: what torch allocated at most on the first GPU in these steps, by optimizer.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from prm_hf import PRM
from prm_hf.sharding import Locator, Segment, local_tensor


SIZES = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}  # of the model, by flag
SIZES |= {"num_layers": 24, "num_heads": 14, "num_key_value_heads": 2}
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
TENSOR, ROW = {"reduction": "per_tensor"}, {"reduction": "per_row"}
EMA, DEBIASED = {"estimator": "ema"}, {"estimator": "debiased"}
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw_fused": (torch.optim.AdamW, {"fused": True}),
    "prm_per_tensor": (PRM, TENSOR | EMA),
    "prm_debiased": (PRM, TENSOR | DEBIASED),
    "prm_per_param": (PRM, {"reduction": "per_param"} | EMA),
    "prm_per_row": (PRM, ROW | DEBIASED | {"signal_beta": 0.98}),
}
# By `--reduction`, the settings of which the agreement is measured
AGREEMENT = {"per_tensor": TENSOR | EMA, "per_row": ROW | DEBIASED | {"signal_beta": 0.98}}


class StepRecorder:
    """Keeps what each step of an optimizer saw and did, as slices of the original tensors.

    Args:
        optimizer: before its parameters are sharded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.locator = optimizer, Locator()
        for group in optimizer.param_groups:
            group["recorded_as"] = self.locator.register(group["params"])
        self.shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
        self.weight_decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
        self.slices: list[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_) -> None:
        groups = [(group["recorded_as"], group["params"]) for group in self.optimizer.param_groups]
        self.locator.locate(groups)
        params = (p for _, params in groups for p in params)
        self._stepped = [(p, _flat(p.grad), _flat(p)) for p in params if p.grad is not None]

    def _after(self, *_) -> None:
        for p, *seen in self._stepped:
            seen.append(_flat(p))
            segments = self.locator.layout.segments[id(p)]
            if not self.locator.flat:  # what was seen is whole
                segments = [Segment(segments[0].tensor, 0, len(seen[0]))]
            for tensor, start, length, offset in segments:
                self.slices.append((tensor, offset, *(x[start : start + length] for x in seen)))
        self._stepped = []

    def whole_tensors(self) -> list[list[torch.Tensor]]:
        """Gradient and weights before and after the last step of each tensor, put together. Collective."""
        device = self.slices[0][2].device
        tensors = [[torch.zeros(shape.numel(), device=device) for _ in range(3)] for shape in self.shapes]
        for number, offset, *slices in self.slices:
            for whole, part in zip(tensors[number], slices, strict=True):
                whole[offset : offset + len(part)] = part.float()
        self.slices = []
        if self.locator.flat:  # each process has slices of its own
            for whole in itertools.chain(*tensors):
                torch.distributed.all_reduce(whole)
        return [[whole.view(shape) for whole in own] for shape, own in zip(self.shapes, tensors, strict=True)]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, whole if it is a shard, flattened."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().flatten()


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    accelerator = Accelerator(mixed_precision="bf16" if args.precision == "bf16" else "no")
    if args.batch_size % (accelerator.num_processes * args.gradient_accumulation_steps):
        raise ValueError(
            f"`--batch_size {args.batch_size}` cannot be shared evenly by {accelerator.num_processes} processes in "
            f"`--gradient_accumulation_steps {args.gradient_accumulation_steps}`."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": share_of(args, accelerator),
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
        }
    return accelerator


def build(
    args: argparse.Namespace,
    accelerator: Accelerator,
    optimizer_class: type,
    settings: dict,
    is_recorded: bool = False,
) -> tuple:
    """The wrapped model, the wrapped optimizer, the optimizer inside, and what records its steps."""
    set_seed(0)
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    sizes = {names.get(flag, flag): getattr(args, flag) for flag in SIZES}
    config = Qwen2Config(**sizes, tie_word_embeddings=True, use_cache=False)
    with accelerator.device:  # where random weights are made sooner
        model = Qwen2ForCausalLM(config)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = optimizer_class(groups, lr=LEARNING_RATE, **settings)
    recorder = StepRecorder(optimizer) if is_recorded else None
    return *accelerator.prepare(model, optimizer), optimizer, recorder


def share_of(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Sequences of one forward pass of one process."""
    return args.batch_size // (accelerator.num_processes * args.gradient_accumulation_steps)


def train_step(
    args: argparse.Namespace, accelerator: Accelerator, model, optimizer, batch: list[torch.Tensor]
) -> float:
    """One training step on the accumulated gradients of a batch in parts; returns the optimizer's milliseconds."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        for tokens in batch:
            model.backward(model(input_ids=tokens, labels=tokens).loss)
            begin = now()
            model.step()  # does nothing until the last part
        return now() - begin
    for i, tokens in enumerate(batch):
        last = i == len(batch) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss / len(batch))
    if args.max_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    begin = now()
    optimizer.step()
    milliseconds = now() - begin
    optimizer.zero_grad()
    return milliseconds


def now() -> float:
    """Milliseconds, when the device has done all it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def batches(args: argparse.Namespace, accelerator: Accelerator, steps: int):
    """The same global batches whatever the number of processes, of this one's share the parts."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(args.vocab_size, (args.batch_size, args.length), generator=generator)
        mine = tokens.chunk(accelerator.num_processes)[accelerator.process_index].to(accelerator.device)
        yield mine.split(share_of(args, accelerator))


def count_sent(prm: PRM) -> list:
    """Makes an optimizer count what it sends; returns the list that gets an entry at each call of its step."""
    from benchmarks.traffic import SentMode

    step, sent = prm._step, []

    def counted() -> None:
        with SentMode() as mode:
            step()
        sent.append(mode)

    prm._step = counted
    return sent


def describe_sent(args: argparse.Namespace, accelerator: Accelerator, prm: PRM, recorder: StepRecorder, sent) -> dict:
    """What the optimizer's calls of one step sent, what the model says, and the bytes of `grad_var`."""
    from benchmarks.traffic import step_traffic

    path = "fsdp2" if prm._locator.sharded else "ddp"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        path = f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    decays = [[shape for shape in recorder.shapes if (len(shape) > 1) is flag] for flag in (True, False)]
    expected = step_traffic(
        [list(map(tuple, group)) for group in decays], path, accelerator.num_processes, args.reduction
    )
    kept = [local_tensor(state["grad_var"]) for state in prm.state.values() if "grad_var" in state]
    kept += prm._deepspeed.variances.tables.values()
    return {
        "messages": sum(sum(mode.messages.values()) for mode in sent),
        "bytes": sum(sum(mode.bytes.values()) for mode in sent),
        "model": expected._asdict(),
        "grad_var": sum(x.nbytes for x in kept),
    }


def measure_agreement(args: argparse.Namespace, accelerator: Accelerator) -> tuple[dict, list[list[float]]]:
    settings = AGREEMENT[args.reduction]
    model, wrapped, prm, recorder = build(args, accelerator, PRM, settings, is_recorded=True)
    sent = count_sent(prm)
    replayed, masks, mask_difference, weight_difference = None, [], 0.0, 0.0
    for batch in batches(args, accelerator, args.steps):
        sent.clear()
        train_step(args, accelerator, model, wrapped, batch)
        tensors = recorder.whole_tensors()
        if replayed is None:
            params = [before.clone().requires_grad_() for _, before, _ in tensors]
            groups = [{"params": [p], "weight_decay": x} for p, x in zip(params, recorder.weight_decays, strict=True)]
            # On a CPU shards are stepped by the multi-tensor code, whose rounding whole tensors then have to share.
            foreach = None if torch.cuda.is_available() else True
            replayed = PRM(groups, lr=LEARNING_RATE, foreach=foreach, **settings)
        for p, (gradient, _, _) in zip(params, tensors, strict=True):
            p.grad = gradient
        replayed.step()
        masks.append(list(itertools.chain(*prm.get_tensor_masks())))
        mask_difference = max(mask_difference, _relative(masks[-1], itertools.chain(*replayed.get_tensor_masks())))
        for p, (_, _, after) in zip(params, tensors, strict=True):
            weight_difference = max(weight_difference, (p.detach() - after).abs().max().item())
    result = {
        "steps": args.steps,
        "path": prm.describe_sharding(),
        "parameters": sum(p.numel() for p in params),
        "mask_replay": mask_difference,
        "weight_replay": weight_difference,
        "sent": describe_sent(args, accelerator, prm, recorder, sent),
    }
    if args.reference:
        reference = json.loads(Path(args.reference).read_text(encoding="utf-8"))
        if reference["model"] != model_of(args, accelerator) or len(reference["masks"]) < args.steps:
            raise ValueError(
                f"`--reference {args.reference}` is of another model, of fewer steps or of forward passes of another "
                f"size: write it with {model_of(args, accelerator)}."
            )
        result["mask_reference"] = [_relative(a, b) for a, b in zip(masks, reference["masks"], strict=False)]
    return result, masks


def _relative(values: Iterable[float], expected: Iterable[float]) -> float:
    return max(abs(a - b) / abs(b) if a != b else 0.0 for a, b in zip(values, expected, strict=True))


def measure_time(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    optimizer_ms, train_ms, memory = {}, {}, {}
    for name in args.optimizers:
        with released_memory(accelerator):
            model, wrapped, *_ = build(args, accelerator, *OPTIMIZERS[name])
            times, wholes = [], []
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            for batch in batches(args, accelerator, args.warmup + args.timed_steps):
                begin = now()
                times.append(train_step(args, accelerator, model, wrapped, batch))
                wholes.append(now() - begin)
            optimizer_ms[name] = round(statistics.median(times[args.warmup :]), 3)
            train_ms[name] = round(statistics.median(wholes[args.warmup :]), 3)
            if torch.cuda.is_available():
                memory[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            del model, wrapped
    result = {"optimizer_step_ms": optimizer_ms, "train_step_ms": train_ms, "peak_memory_gib": memory}
    if "adamw" in optimizer_ms:
        result["relative_to_adamw"] = {k: round(v / optimizer_ms["adamw"], 3) for k, v in optimizer_ms.items()}
    return result


@contextlib.contextmanager
def released_memory(accelerator: Accelerator):
    yield
    accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def model_of(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    settings = {name: getattr(args, name) for name in (*SIZES, "batch_size", "length", "precision")}
    return settings | {"sequences_a_pass": share_of(args, accelerator)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    for flag, size in SIZES.items():
        parser.add_argument(f"--{flag}", type=int, default=size)
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in a global batch")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forward passes a step and process")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--max_grad_norm", type=float, default=0.0, help="0 for no clipping: see above")
    parser.add_argument("--reduction", choices=("per_tensor", "per_row"), default="per_tensor", help="agreement of")
    parser.add_argument("--steps", type=int, default=5, help="steps of which masks are compared; 0 for none")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones")
    parser.add_argument("--timed_steps", type=int, default=20)
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="to be timed")
    parser.add_argument("--reference", help="output of a run on one GPU, to compare the masks with")
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to be deterministic
    accelerator = make_accelerator(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"distributed_type": accelerator.distributed_type.value, "processes": accelerator.num_processes}
    result |= {"device": device, "torch": torch.__version__, "model": model_of(args, accelerator)}
    masks = None
    if args.steps:
        torch.use_deterministic_algorithms(True, warn_only=True)
        with released_memory(accelerator):
            result["agreement"], masks = measure_agreement(args, accelerator)
        torch.use_deterministic_algorithms(False)
    if args.optimizers:
        result |= measure_time(args, accelerator)
    if accelerator.is_main_process:
        print(json.dumps(result, indent=2))
        if args.output:
            Path(args.output).write_text(json.dumps(result | {"masks": masks}), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main()
