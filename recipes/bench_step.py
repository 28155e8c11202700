"""Time and memory of an optimizer step: PRM beside AdamW and its relatives, in one run on one device.

    python recipes/bench_step.py                       # a GPU if there is one, else the small sizes on the CPU
    python recipes/bench_step.py --shapes lora --dtypes float32 --output runs/bench_step

Prints a table and writes `bench_step.json` and `bench_step.png`. A row's floor is the time in which a copy would
move the bytes that the step has to: every gradient read once, every weight and every state read and written once. For
`per_tensor` the statistics need g and m a second time, since no weight can change before the sums over its tensor are
known; the floor does not count that.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from prm_hf import PRM


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


SHAPES = {
    "10m": lambda: transformer(8_000, 320, 1024, 6, 320, False),
    "100m": lambda: transformer(32_000, 768, 2048, 10, 768, False),
    "lora": lambda: lora(896, 4864, 24, 128, 16),
    "0.5b": lambda: transformer(151_936, 896, 4864, 24, 128, True),
    "7b": lambda: transformer(152_064, 3584, 18_944, 28, 512, True),
}
TITLES = {
    "10m": "10 M parameters",
    "100m": "100 M parameters",
    "lora": "LoRA r=16 on Qwen2.5-0.5B",
    "0.5b": "Qwen2.5-0.5B, full",
    "7b": "Qwen2.5-7B's shapes",
}


def optimizers(device: str) -> dict[str, Callable]:
    """What is compared: name → constructor. Packages that are not installed are left out."""
    cuda = device == "cuda"
    found = {
        "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
        "PRM per_tensor foreach": lambda p: PRM(p, reduction="per_tensor", foreach=True),
        "PRM per_param foreach": lambda p: PRM(p, foreach=True),
    }
    if cuda:
        found |= {
            "PRM per_tensor fused": lambda p: PRM(p, reduction="per_tensor", fused=True),
            "PRM per_param fused": lambda p: PRM(p, fused=True),
            "PRM per_tensor debiased fused": lambda p: PRM(
                p, reduction="per_tensor", estimator="debiased", fused=True
            ),
        }
    try:
        from pytorch_optimizer import MSVAG

        found["MSVAG (pytorch-optimizer)"] = MSVAG
    except ImportError:
        pass
    try:
        from torchao.optim import AdamW8bit

        found["AdamW8bit (torchao)"] = AdamW8bit
    except ImportError:
        pass
    if cuda:
        try:
            from bitsandbytes.optim import AdamW8bit as BnbAdamW8bit

            found["AdamW8bit (bitsandbytes)"] = BnbAdamW8bit
        except ImportError:
            pass
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(
    function: Callable[[], None], device: str, repeats: int, prepare: Callable[[], None] = lambda: None
) -> list[float]:
    """Times of single calls after a warm-up: of the device, by events, or of the clock on a CPU.

    The device is idle when a call begins, so that what the host does before the first launch counts too.
    """
    for _ in range(3):
        prepare()
        function()
    synchronize(device)
    times = []
    for _ in range(repeats):
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


def copy_bandwidth(device: str) -> float:
    """Bytes read and written by a copy, a second."""
    size = 2**30 if device == "cuda" else 2**28
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = statistics.median(milliseconds(lambda: target.copy_(source), device, 20))
    return 2 * size / best * 1e3


def memory(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def measure(shapes: list[tuple], dtype: torch.dtype, make: Callable, device: str, repeats: int) -> dict:
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
    synchronize(device)
    before = memory(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    backward()
    optimizer.step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    times = milliseconds(optimizer.step, device, repeats, prepare=backward)
    moved = count * dtype.itemsize * 3 + 2 * state_bytes
    return {
        "parameters": count,
        "tensors": len(params),
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "state_bytes": state_bytes,
        "step_peak_bytes": peak,
        "bytes_moved": moved,
    }


def _bytes(tensor: torch.Tensor) -> int:
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None or type(tensor) is torch.Tensor:
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in inner()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = ["0.5b", "lora", "7b"] if device == "cuda" else ["10m", "100m"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=default)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES) if device == "cuda" else ["float32"]
    )
    parser.add_argument("--optimizers", nargs="+", help="names, or parts of names, as the table shows them")
    parser.add_argument("--repeats", type=int, default=30 if device == "cuda" else 10)
    parser.add_argument("--output", default="runs/bench_step")
    arguments = parser.parse_args()

    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads; copy {bandwidth / 1e9:.0f} GB/s\n")
    rows = []
    for shapes in arguments.shapes:
        for dtype in arguments.dtypes:
            print(f"{TITLES[shapes]}, {dtype}")
            print(
                f"{'':<32}{'ms':>9}{'× AdamW fused':>15}{'floor ms':>10}{'× floor':>9}{'state GB':>10}{'peak +GB':>10}"
            )
            for optimizer, make in optimizers(device).items():
                if arguments.optimizers and not any(part in optimizer for part in arguments.optimizers):
                    continue
                try:
                    result = measure(SHAPES[shapes](), DTYPES[dtype], make, device, arguments.repeats)
                except torch.OutOfMemoryError:
                    result = {"error": "out of memory"}
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
                rows.append({"shapes": shapes, "dtype": dtype, "optimizer": optimizer, **result})
                print_row(rows, bandwidth)
            print()
    write(Path(arguments.output), rows, name, bandwidth)


def print_row(rows: list[dict], bandwidth: float) -> None:
    row = rows[-1]
    if "error" in row:
        print(f"{row['optimizer']:<32}{row['error']:>9}")
        return
    base = [
        r
        for r in rows
        if r["optimizer"] == "AdamW fused" and (r["shapes"], r["dtype"]) == (row["shapes"], row["dtype"])
    ]
    ratio = row["median_ms"] / base[0]["median_ms"] if base and "median_ms" in base[0] else math.nan
    row["ratio_to_adamw_fused"] = None if math.isnan(ratio) else ratio
    row["floor_ms"] = row["bytes_moved"] / bandwidth * 1e3
    peak = "" if row["step_peak_bytes"] is None else f"{row['step_peak_bytes'] / 1e9:.3f}"
    print(
        f"{row['optimizer']:<32}{row['median_ms']:>9.3f}{ratio:>15.2f}{row['floor_ms']:>10.3f}"
        f"{row['median_ms'] / row['floor_ms']:>9.2f}{row['state_bytes'] / 1e9:>10.3f}{peak:>10}"
    )


def write(folder: Path, rows: list[dict], name: str, bandwidth: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in ("torch", "triton", "torchao", "bitsandbytes", "pytorch-optimizer"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    record = {"device": name, "copy_bytes_per_second": bandwidth, "versions": versions, "rows": rows}
    (folder / "bench_step.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print('No picture: matplotlib is not installed (pip install "prm-hf[report]").')
        return
    groups = list(dict.fromkeys((row["shapes"], row["dtype"]) for row in rows))
    figure, axes = plt.subplots(1, len(groups), figsize=(5.5 * len(groups), 4), squeeze=False, layout="constrained")
    for axis, (shapes, dtype) in zip(axes[0], groups, strict=True):
        mine = [r for r in rows if (r["shapes"], r["dtype"]) == (shapes, dtype) and "median_ms" in r][::-1]
        colors = ["#0072b2" if r["optimizer"].startswith("PRM") else "#555555" for r in mine]
        axis.barh([r["optimizer"] for r in mine], [r["median_ms"] for r in mine], color=colors)
        axis.plot([r["floor_ms"] for r in mine], range(len(mine)), "|", color="#d55e00", markersize=16, label="floor")
        axis.set(title=f"{TITLES[shapes]}, {dtype}", xlabel="ms a step (median)")
        axis.legend(frameon=False)
    figure.suptitle(f"{name}, copy {bandwidth / 1e9:.0f} GB/s")
    figure.savefig(folder / "bench_step.png", dpi=130)
    print(f"Written: {folder}/bench_step.json, {folder}/bench_step.png")


if __name__ == "__main__":
    main()
