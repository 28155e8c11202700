"""What a step of PRM sends between processes: a model of it by path, model and number of processes, and a counter.

    python benchmarks/traffic.py                                 # the table of results/sharding_tables.md
    python benchmarks/traffic.py --figure results/sharding.png    # its curves, with the points that were counted

Only units that a border between two processes cuts are added up, 16 bytes each: Σ(g - center)² and Σm² in float64.
(With `signal_beta` Σa² takes the place of Σm².) The model knows the shapes and how each path divides them, and nothing
of the optimizer; `tests/distributed/test_traffic.py` compares it with what is counted.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prm_hf.compare.plots import house_style, new_figure, to_png


Shape = tuple[int, ...]
SUMS = 16  # bytes a unit
VARIANCE = 8  # bytes of `grad_var` a unit
SUB_GROUP = 10**9  # elements of a process in a sub-group of stage 3, DeepSpeed's default
# Hidden size, size of the MLP, layers, width of keys, vocabulary, whether embeddings are tied: Qwen2.5's
MODELS = {
    "0.5B": (896, 4864, 24, 128, 151936, True),
    "7B": (3584, 18944, 28, 512, 152064, False),
    "72B": (8192, 29568, 80, 1024, 152064, False),
}
# That on which `tests/distributed/points.py` counts
COUNTED = (180, 499, 2, 60, 5001, True)
PATHS = {"fsdp2": "FSDP2", "zero2": "ZeRO-1 and ZeRO-2", "zero3": "ZeRO-3"}
PROCESSES = (1, 2, 8, 64, 1024)
POINTS = Path(__file__).parents[1] / "results" / "sharding_points.json"


class Traffic(NamedTuple):
    """What a step sends.

    Attributes:
        messages: all-reduces.
        bytes: that each process puts into them.
        kept: bytes of `grad_var` on the process that keeps the most.
    """

    messages: int
    bytes: int
    kept: int


def step_traffic(groups: list[list[Shape]], path: str, processes: int, reduction: str) -> Traffic:
    """What a step sends.

    Args:
        groups: by parameter group, the shapes of its tensors, in their order.
        path: `"ddp"`, `"fsdp2"` (one mesh dimension, sharded by rows), or `"zero0"` to `"zero3"`.
        processes: how many share the tensors.
        reduction: `"per_tensor"` or `"per_row"`.

    Raises:
        ValueError: an unknown path.
    """
    shapes = list(itertools.chain(*groups))
    if path in ("ddp", "zero0") or processes == 1:
        return Traffic(0, 0, VARIANCE * sum(_units(shape, reduction) for shape in shapes))
    if path == "fsdp2":
        # A tensor is sharded by its rows, so none is cut; one number a tensor is kept by all
        apart = [shape for shape in shapes if reduction == "per_row" and len(shape) > 1]
        cut = len(shapes) - len(apart)
        kept = cut + sum(math.ceil(shape[0] / processes) for shape in apart)
        return Traffic(int(cut > 0), SUMS * cut, VARIANCE * kept)
    if path not in ("zero1", "zero2", "zero3"):
        raise ValueError(f"Unknown path {path!r}: it is 'ddp', 'fsdp2' or 'zero0' to 'zero3'.")
    steps, kept = [], Counter()
    for group in groups:
        if path == "zero3":
            steps += _steps_of_stage_3(group, processes, reduction, kept)
        else:
            steps.append(_cut_of_a_buffer(group, processes, reduction, kept))
    return Traffic(sum(cut > 0 for cut in steps), SUMS * sum(steps), VARIANCE * max(kept.values()))


def _units(shape: Shape, reduction: str) -> int:
    return shape[0] if reduction == "per_row" and len(shape) > 1 else 1


def _divide(numel: int, units: int, begin: int, share: int, kept: Counter) -> int:
    """How many units of a tensor are cut that begins at an element of a buffer in shares; adds to those kept."""
    in_unit, cut = max(numel // units, 1), set()
    for process in range(begin // share, -(-(begin + numel) // share)):
        first, end = max(process * share - begin, 0), min((process + 1) * share - begin, numel)
        kept[process] += -(-end // in_unit) - first // in_unit
        if first and first % in_unit:
            cut.add(first // in_unit)
    return len(cut)


def _cut_of_a_buffer(group: list[Shape], processes: int, reduction: str, kept: Counter) -> int:
    """Stages 1 and 2 put the tensors of a group end to end, and give each process one slice."""
    numels = [math.prod(shape) for shape in group]
    alignment = 2 * processes
    share = -(-sum(numels) // alignment) * 2
    begins = itertools.accumulate(numels, initial=0)
    parts = zip(group, numels, begins, strict=False)
    return sum(_divide(numel, _units(shape, reduction), begin, share, kept) for shape, numel, begin in parts)


def _steps_of_stage_3(group: list[Shape], processes: int, reduction: str, kept: Counter) -> list[int]:
    """Stage 3 gives each process a share of each tensor, and steps one sub-group of tensors at a time."""
    steps, filled = [0], 0
    for shape in group:
        if filled >= SUB_GROUP:
            steps.append(0)
            filled = 0
        numel = math.prod(shape)
        share = -(-numel // processes)
        steps[-1] += _divide(numel, _units(shape, reduction), 0, share, kept)
        filled += share
    return steps


def shapes_of(model: str) -> list[list[Shape]]:
    """The tensors of a model by group: those with weight decay, and biases and the weights of norms without."""
    hidden, inner, layers, keys, vocabulary, is_tied = COUNTED if model == "1.6M" else MODELS[model]
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    matrices = [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]
    vectors = [(hidden,), (keys,), (keys,), (hidden,), (hidden,)]
    embeddings = [(vocabulary, hidden)] * (1 if is_tied else 2)
    return [embeddings[:1] + matrices * layers + embeddings[1:], vectors * layers + [(hidden,)]]


class SentMode(TorchDispatchMode):
    """Counts what is handed to `torch.distributed` while it is entered.

    Attributes:
        messages: by the name of a collective, how many there were.
        bytes: by the same, what this process put into them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            name = func.name().split("::")[1]
            self.messages[name] += 1
            self.bytes[name] += sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


def table() -> str:
    """Markdown: bytes and messages of a step, by model and path, for numbers of processes."""
    columns = [str(n) for n in PROCESSES]
    lines = [f"| model | path | reduction | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for model, path, reduction in itertools.product(MODELS, PATHS, ("per_tensor", "per_row")):
        found = [step_traffic(shapes_of(model), path, n, reduction) for n in PROCESSES]
        cells = [f"{_readable(x.bytes)} in {x.messages}" if x.messages else "0" for x in found]
        lines.append(f"| {model} | {path} | {reduction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _readable(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000 or unit == "MB":
            break
        n /= 1000
    return f"{n:.3g} {unit}"


# ---- The figure ----

# By the name of a model its colour and line, told apart by colour-blind readers too
STYLES = {"72B": ("#D55E00", "-"), "7B": ("#0072B2", "--"), "0.5B": ("#009E73", "-."), "1.6M": ("#333333", "-")}
COUNTS = [2**i for i in range(11)]  # of processes


def figure(counted: list[dict]) -> bytes:
    """A PNG: bytes a step over the number of processes, a column a path and a row a reduction.

    Args:
        counted: points of `results/sharding_points.json`, which are marked.
    """
    with house_style():
        drawn, panels = new_figure(10.0, 6.4, columns=len(PATHS), rows=2, sharex=True, sharey=True)
        for line, reduction in zip(panels, ("per_tensor", "per_row"), strict=True):
            for axes, path in zip(line, PATHS, strict=True):
                _draw_curves(axes, path, reduction)
                mine = [x for x in counted if (x["path"], x["reduction"]) == (path, reduction)]
                found = [x["processes"] for x in mine], [x["bytes"] for x in mine]
                marks = {"markersize": 7, "color": "#333333", "markerfacecolor": "#F0E442"}
                axes.plot(*found, "o", **marks, label="1.6M, counted on a CPU")
                axes.set_title(f"{PATHS[path]}, {reduction}", loc="left")
        for axes in panels[1]:
            axes.set_xlabel("processes")
        for line in panels:
            line[0].set_ylabel("bytes a process sends in a step")
        drawn.legend(*panels[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        title = "What a step of PRM sends between processes, by the number of parameters (shapes of Qwen2.5)"
        drawn.suptitle(title, fontsize=11)
    return to_png(drawn)


def _draw_curves(axes, path: str, reduction: str) -> None:
    for model, (color, line) in STYLES.items():
        shapes = shapes_of(model)
        sent = [step_traffic(shapes, path, n, reduction).bytes for n in COUNTS]
        axes.plot(COUNTS, sent, line, color=color, linewidth=1.6, label=model)
    if reduction == "per_row":
        units = sum(_units(shape, reduction) for group in shapes_of("7B") for shape in group)
        axes.plot(COUNTS[1:], [SUMS * units] * 10, ":", color=STYLES["7B"][0], label="7B, were all rows added up")
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS[::2], [f"{n:,}" for n in COUNTS[::2]])
    axes.set_yscale("symlog", linthresh=10)
    axes.set_yticks([0, 10**2, 10**4, 10**6, 10**8], ["0", "100 B", "10 kB", "1 MB", "100 MB"])
    axes.set_ylim(-2, 3e8)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", help="a PNG file to write in place of the table")
    file = parser.parse_args(arguments).figure
    if file is None:
        print(table())
    else:
        Path(file).write_bytes(figure(json.loads(POINTS.read_text(encoding="utf-8"))["counted"]))


if __name__ == "__main__":
    main()
