"""Time and memory of an optimizer step: PRM beside AdamW and its relatives, in one run on one device.

    python benchmarks/step.py                       # a GPU if there is one, else the small sizes on the CPU
    python benchmarks/step.py --shapes lora --dtypes float32 --output runs/bench_step
    python benchmarks/step.py --dpo_steps 12        # then also what the step costs of a DPO training step
    python benchmarks/step.py --shapes --dpo_steps 12                                       # and that alone

Prints a Markdown table and writes `bench_step.json` and `bench_step.png`. A row's floor is the time in which a copy
would move the bytes that the step has to: every gradient read once, every weight and every state read and written
once. For `per_tensor` the statistics need g and m a second time, since no weight can change before the sums over its
tensor are known; the floor does not count that. "Peak" is what the step allocates beside weights, gradients and state.

"ms" is a step from an idle device, with what the host does before its first launch. "queued" is one of ten steps that
wait in the device's queue, so that the kernels alone count (CUDA only). "clip + step" is `clip_grad_norm_` and the
step. "GB/s" are the bytes of the floor by the time of a queued step, or where there is none of an idle one.

The whole table of state dtypes and peers, in one call on one GPU:

    python benchmarks/step.py --time_limit 550 --optimizers AdamW "PRM per_tensor" "PRM per_row" --skip foreach

torch's AdamW keeps its state in the dtype of the parameters, PRM in float32 unless `state_dtype` says otherwise: with
bfloat16 parameters their floors differ.
"""

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from prm_hf import PRM
from prm_hf.compare.plots import new_figure, to_png


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASE = "AdamW fused"


def transformer(vocabulary: int, hidden: int, inner: int, layers: int, key_value: int, bias: bool) -> list[tuple]:
    """The parameter shapes of a Qwen2 or Llama model with tied embeddings."""
    layer = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    layer += [(hidden,), (key_value,), (key_value,)] if bias else []
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *(layer * layers), (hidden,)]


def lora(hidden: int, inner: int, layers: int, key_value: int, rank: int) -> list[tuple]:
    """A and B of LoRA adapters on every linear layer."""
    linear = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden)]
    linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
    return [shape for i, o in linear for shape in ((rank, i), (o, rank))] * layers


SHAPES = {  # title and shapes
    "tiny": ("0.1 M parameters", transformer(300, 64, 192, 2, 32, True)),
    "10m": ("10 M parameters", transformer(8_000, 320, 1024, 6, 320, False)),
    "100m": ("100 M parameters", transformer(32_000, 768, 2048, 10, 768, False)),
    "lora": ("LoRA r=16 on Qwen2.5-0.5B", lora(896, 4864, 24, 128, 16)),
    "0.5b": ("Qwen2.5-0.5B, full", transformer(151_936, 896, 4864, 24, 128, True)),
    "7b": ("Qwen2.5-7B's shapes", transformer(152_064, 3584, 18_944, 28, 512, True)),
}
LARGE = ("7b",)  # in bfloat16 alone
PER_TENSOR = {"reduction": "per_tensor", "estimator": "ema"}
PER_ROW = {"reduction": "per_row", "estimator": "debiased", "signal_beta": 0.98}
PRM_SETTINGS = {
    "per_tensor": PER_TENSOR,
    "per_param": {"reduction": "per_param", "estimator": "ema"},
    "per_tensor bf16 state": {**PER_TENSOR, "state_dtype": "bf16"},
    "per_row": PER_ROW,
    "per_row bf16 state": {**PER_ROW, "state_dtype": "bf16"},
    "per_tensor 8bit state": {**PER_TENSOR, "state_dtype": "8bit"},
    "per_row 8bit state": {**PER_ROW, "state_dtype": "8bit"},
}
QUEUED = 10  # steps that wait in the queue, behind a kernel that waits for so many cycles
SLEEP = 200_000_000


def installed(name: str, module: str, optimizer: str) -> dict[str, Callable]:
    """Another package's optimizer under a name; nothing where the package is not installed."""
    found = importlib.util.find_spec(module.split(".")[0])
    return {name: getattr(importlib.import_module(module), optimizer)} if found else {}


def optimizers(device: str) -> list[dict[str, Callable]]:
    """What is compared: name → constructor, in two halves, the second of which takes long to start or to run."""
    quick = {BASE: partial(torch.optim.AdamW, fused=True), "AdamW foreach": partial(torch.optim.AdamW, foreach=True)}
    for implementation in ("fused", "foreach") if device == "cuda" else ("foreach",):
        for name, settings in PRM_SETTINGS.items():
            quick[f"PRM {name} {implementation}"] = partial(PRM, **settings, **{implementation: True})
    if device == "cuda":
        quick["PRM per_tensor debiased fused"] = partial(PRM, reduction="per_tensor", estimator="debiased", fused=True)
        quick |= installed("AdamW8bit (bitsandbytes)", "bitsandbytes.optim", "AdamW8bit")
        quick |= installed("PagedAdamW8bit (bitsandbytes)", "bitsandbytes.optim", "PagedAdamW8bit")
    slow = installed("MSVAG (pytorch-optimizer)", "pytorch_optimizer", "MSVAG")
    slow |= installed("AdamW8bit (torchao)", "torchao.optim", "AdamW8bit")  # compiles for each shape of a tensor
    return [quick, slow]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(
    function: Callable[[], None], device: str, repeats: int, seconds: float, prepare: Callable[[], None] = lambda: None
) -> list[float]:
    """Times of single calls after a warm-up: of the device, by events, or of the clock on a CPU.

    The device is idle when a call begins, so that what the host does before the first launch counts too. Ends after
    `seconds`, but not before five calls.
    """
    for _ in range(2):
        prepare()
        function()
    synchronize(device)
    times, begun = [], time.perf_counter()
    while len(times) < repeats and (len(times) < 5 or time.perf_counter() - begun < seconds):
        prepare()
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            clock = time.perf_counter()
            function()
            times.append((time.perf_counter() - clock) * 1e3)
    return times


def queued_milliseconds(function: Callable[[], None], prepare: Callable[[], None], repeats: int = 5) -> float:
    """The time of a call on a CUDA device whose queue is never empty: the median of `repeats` times ten calls."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        begin.record()
        for _ in range(QUEUED):
            prepare()
            function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / QUEUED)
    return statistics.median(times)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written by a copy, a second."""
    size = 2**30 if device == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), device, 20, 2))
    return 2 * size / best * 1e3


def measure(
    shapes: list[tuple], dtype: torch.dtype, make: Callable, device: str, repeats: int, seconds: float
) -> dict:
    """Time, state and peak memory of a step. Two sets of gradients take turns, as a training's do."""
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.randn(s, device=device, generator=generator).mul_(0.02).to(dtype) for s in shapes]
    params = [p.requires_grad_() for p in params]
    count = sum(p.numel() for p in params)
    sets = 2 if count * dtype.itemsize < 4e9 else 1
    grads = [[torch.randn(p.shape, device=device, generator=generator).mul_(1e-3).to(dtype) for p in params]]
    grads += [[g.neg() for g in grads[0]] for _ in range(sets - 1)]
    optimizer = make(params)
    calls = 0

    def backward() -> None:
        nonlocal calls
        for p, g in zip(params, grads[calls % sets], strict=True):
            p.grad = g
        calls += 1

    backward()
    optimizer.step()
    states = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    state_bytes = sum(_bytes(x) for x in states)
    peak = None
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        backward()
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() - before
    times = milliseconds(optimizer.step, device, repeats, seconds, prepare=backward)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    clipped = milliseconds(clip_and_step, device, repeats, seconds, prepare=backward)
    queued = queued_milliseconds(optimizer.step, backward) if device == "cuda" else None
    bytes_moved = count * dtype.itemsize * 3 + 2 * state_bytes
    return {
        "parameters": count,
        "tensors": len(params),
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "repeats": len(times),
        "state_bytes": state_bytes,
        "step_peak_bytes": peak,
        "clip_step_ms": statistics.median(clipped),
        "queued_ms": queued,
        "bytes_moved": bytes_moved,
        "bytes_per_second": bytes_moved / (queued or statistics.median(times)) * 1e3,
    }


def _bytes(tensor: torch.Tensor) -> int:
    if type(tensor) is not torch.Tensor and hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def parse(argv: list[str] | None, device: str) -> argparse.Namespace:
    cuda = device == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=["0.5b", "lora", "7b"] if cuda else ["10m", "100m"]
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES) if cuda else ["float32"])
    parser.add_argument("--optimizers", nargs="+", help="names, or parts of names, as the table shows them")
    parser.add_argument("--skip", nargs="+", default=[], help="names or parts of names to leave out")
    parser.add_argument("--repeats", type=int, default=30 if cuda else 10)
    parser.add_argument("--seconds", type=float, default=0.5 if cuda else 10, help="of timing a row, at most")
    parser.add_argument("--time_limit", type=float, default=60 if cuda else 1e9, help="s, then no new row begins")
    parser.add_argument("--dpo_steps", type=int, default=0, help="DPO training steps of each optimizer to time")
    parser.add_argument("--dpo_model", default="0.5b" if cuda else "tiny", help="'0.5b' or 'tiny'")
    parser.add_argument("--output", default="runs/bench_step")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    begun = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = parse(argv, device)
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads; copy {bandwidth / 1e9:.0f} GB/s\n")
    print(
        f"| parameters | optimizer | ms | × {BASE} | queued ms | × {BASE} | clip + step ms | × {BASE} | floor ms | "
        "GB/s | state GB | peak + GB |"
    )
    print("|---" * 12 + "|")
    rows = []
    for half in optimizers(device):
        for shapes in arguments.shapes:
            for dtype in arguments.dtypes:
                if shapes in LARGE and dtype != "bfloat16":
                    continue
                for optimizer, make in half.items():
                    wanted = not arguments.optimizers or any(part in optimizer for part in arguments.optimizers)
                    if not wanted or (optimizer != BASE and any(part in optimizer for part in arguments.skip)):
                        continue
                    row = {"shapes": shapes, "dtype": dtype, "optimizer": optimizer}
                    if time.perf_counter() - begun > arguments.time_limit:
                        row["error"] = "left out: time limit"
                    else:
                        row |= attempt(SHAPES[shapes][1], DTYPES[dtype], make, device, arguments)
                    rows.append(row)
                    print_row(rows, bandwidth)
    dpo = None
    if arguments.dpo_steps:
        from benchmarks import dpo_step

        dpo = dpo_step.measure(arguments.dpo_model, arguments.dpo_steps, device)
        dpo_step.print_row(dpo)
    write(Path(arguments.output), rows, dpo, name, bandwidth)


def attempt(shapes: list[tuple], dtype: torch.dtype, make: Callable, device: str, args: argparse.Namespace) -> dict:
    """[`measure`], or what went wrong: another package's optimizer, or memory, must not end the run."""
    try:
        return measure(shapes, dtype, make, device, args.repeats, args.seconds)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # noqa: BLE001 - whatever a compiler or another package raises
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def print_row(rows: list[dict], bandwidth: float) -> None:
    row = rows[-1]
    start = f"| {SHAPES[row['shapes']][0]}, {row['dtype']} | {row['optimizer']} |"
    if "error" in row:
        print(f"{start} {row['error']} |" + " |" * 9, flush=True)
        return
    key = (BASE, row["shapes"], row["dtype"])
    base = [r for r in rows if (r["optimizer"], r["shapes"], r["dtype"]) == key and "median_ms" in r]
    times = {"median_ms": "ratio_to_adamw_fused", "queued_ms": "queued_ratio", "clip_step_ms": "clip_step_ratio"}
    row |= {ratio: row[ms] / base[0][ms] if base and row[ms] else None for ms, ratio in times.items()}
    row["floor_ms"] = row["bytes_moved"] / bandwidth * 1e3
    cells = [
        "" if row[name] is None else f"{row[name]:.{digits}f}"
        for pair in times.items()
        for name, digits in zip(pair, (3, 2), strict=True)
    ]
    peak = "" if row["step_peak_bytes"] is None else f"{row['step_peak_bytes'] / 1e9:.3f}"
    print(
        f"{start} {' | '.join(cells)} | {row['floor_ms']:.3f} | {row['bytes_per_second'] / 1e9:.0f} "
        f"| {row['state_bytes'] / 1e9:.3f} | {peak} |",
        flush=True,
    )


def write(folder: Path, rows: list[dict], dpo: dict | None, name: str, bandwidth: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "triton", "torchao", "bitsandbytes", "pytorch-optimizer", "transformers", "trl")
    versions = {x.name.replace("_", "-"): x.version for x in importlib.metadata.distributions()}
    versions = {package: versions[package] for package in packages if package in versions}
    record = {"device": name, "threads": torch.get_num_threads(), "copy_bytes_per_second": bandwidth}
    record |= {"versions": versions, "rows": rows, "dpo": dpo}
    (folder / "bench_step.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    try:
        picture(folder / "bench_step.png", rows, f"{name}, copy {bandwidth / 1e9:.0f} GB/s")
    except ImportError:
        print('No picture: matplotlib is not installed (pip install "prm-hf[report]").')
    print(f"\nWritten to {folder}")


def picture(path: Path, rows: list[dict], title: str) -> None:
    """Bars of the times with a mark at each floor, a panel for each size and dtype."""
    panels = {}
    for row in rows:
        if "median_ms" in row:
            panels.setdefault((row["shapes"], row["dtype"]), []).append(row)
    if not panels:
        return
    longest = max(map(len, panels.values()))
    figure, axes = new_figure(6.5, (0.9 + 0.28 * longest) * len(panels), 1, len(panels))
    axes = [axis for line in axes for axis in line]
    for axis, ((shapes, dtype), mine) in zip(axes, panels.items(), strict=True):
        times, floors = [row["median_ms"] for row in mine], [row["floor_ms"] for row in mine]
        names, places = [row["optimizer"] for row in mine], range(len(mine))
        colors = ["#0072b2" if name.startswith("PRM") else "#999999" for name in names]
        bars = axis.barh(names, times, color=colors, height=0.7)
        axis.bar_label(bars, [f"{t:.3g}" for t in times], padding=3, fontsize=8)
        axis.scatter(floors, places, marker="|", s=200, color="#d55e00", label="time to copy the bytes")
        axis.set_xscale("log")  # on another one the slowest would leave nothing of the others to see
        axis.margins(x=0.1)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{SHAPES[shapes][0]}, {dtype}", fontsize=10, loc="left")
        axis.set_xlabel("ms a step (median)")
    axes[0].legend(frameon=False, fontsize=8, loc="upper right")
    figure.suptitle(title, fontsize=10)
    path.write_bytes(to_png(figure, dpi=130))


if __name__ == "__main__":
    main()
