"""Time and memory of Sven's step on a Llama of random weights, beside the whole Jacobian and beside torchjd.

    python benchmarks/sven.py --output speed.json

For each batch size and model it measures, as the median of a few calls, the seconds until `p.grad` is the step.
They are CPU seconds of one thread, so that other programs on the machine count little:

- `gram`: Sven as it is, by the inner products of per-sample gradients and one weighted backward pass;
- `svd`: Sven with `svd="svd"`, which keeps the gradients of all samples;
- `jacrev`: `torch.func.jacrev` of the batch's losses and a full singular value decomposition;
- `torchjd`: the Gram matrix by torchjd's `Engine` (`pip install torchjd`) and the same weighted backward pass, if it
  is installed;
- `backward`: an ordinary training step's forward and backward pass.

Memory is the peak of what a call allocates beyond what was there before, on a CPU by torch's profiler.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import LlamaConfig, LlamaForCausalLM

from prm_hf.sven import Sven
from prm_hf.sven.pseudoinverse import solve_gram, solve_rows


LENGTH, VOCAB, RTOL = 32, 256, 1e-3
WIDTHS = (64, 128)  # of the hidden states; the first model has 115,008 parameters
BATCHES = (8, 16, 32)


def make_model(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",  # `jacrev` needs it
    )
    return LlamaForCausalLM(config)


def losses_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def steps(model: LlamaForCausalLM, ids: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    """By name a function that computes the step, and returns it flat."""
    params = dict(model.named_parameters())
    k = max(1, len(ids) // 2)
    attended = {"input_ids": ids}

    def losses() -> Tensor:
        return losses_of(model(**attended).logits, ids)

    def collected() -> Tensor:
        return torch.cat([p.grad.flatten() for p in params.values()])

    def by_sven(svd: str) -> Callable[[], Tensor]:
        optimizer = Sven(model, lambda outputs, y: losses_of(outputs.logits, y), k=k, rtol=RTOL, svd=svd)

        def step() -> Tensor:
            optimizer.backward((attended, ids))
            return collected()

        return step

    def by_jacrev() -> Tensor:
        def function(values: dict[str, Tensor]) -> Tensor:
            return losses_of(functional_call(model, values, (), attended).logits, ids)

        rows = torch.cat(
            [rows.flatten(1) for rows in jacrev(function)({n: p.detach() for n, p in params.items()}).values()], 1
        )
        solution = solve_rows(rows, losses().detach(), k, RTOL)
        return rows.T @ solution.coefficients.to(rows)

    def weighted(gram: Tensor, found: Tensor) -> Tensor:
        solution = solve_gram(gram, found.detach(), k, RTOL)
        model.zero_grad()
        (solution.coefficients.to(found) * found).sum().backward()
        return collected()

    def by_torchjd() -> Tensor:
        from torchjd.autogram import Engine

        engine = Engine(model, batch_dim=0)
        found = losses()
        return weighted(engine.compute_gramian(found), found)

    def backward() -> None:
        model.zero_grad()
        losses().mean().backward()

    found = {"gram": by_sven("gram"), "svd": by_sven("svd"), "jacrev": by_jacrev, "backward": backward}
    if importlib.util.find_spec("torchjd"):
        found["torchjd"] = by_torchjd
    return found


def measure(step: Callable[[], Tensor | None], repeats: int) -> dict[str, float]:
    """Median CPU seconds of some calls after the first, and the peak of allocated MiB in another one."""
    step()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    return {"seconds": round(statistics.median(seconds), 4), "peak_mib": round(peak_memory(step), 1)}


def peak_memory(step: Callable[[], Tensor | None]) -> float:
    """MiB, from the allocations and releases that torch's profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    kinds = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    for event in sorted(kinds, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width in args.widths:
        model = make_model(width)
        numel = sum(p.numel() for p in model.parameters())
        for batch in args.batches:
            ids = torch.randint(VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
            functions = steps(model, ids)
            reference = functions["svd"]()
            for name, step in functions.items():
                found = step()
                distance = None if found is None else ((found - reference).norm() / reference.norm()).item()
                rows.append({"parameters": numel, "batch": batch, "name": name, "distance": distance})
                rows[-1] |= measure(step, args.repeats)
                print(rows[-1], flush=True)
    if args.output is not None:
        about = {"torch": torch.__version__, "length": LENGTH, "threads": 1}
        args.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
