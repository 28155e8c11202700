"""Computes the published differences in accuracy again, with the prompts of held-out pairs resampled.

The files of results/ were written when a comparison still took held-out pairs for independent. They are not: pairs of
one prompt share completions. Each file says which held-out pairs a run has right, so the intervals can be had without
a model:

    python results/recompute.py FOLDER          # a check: prints old and new intervals, changes nothing
    python results/recompute.py FOLDER --write  # puts the new ones into the files

FOLDER has `gsm8k_pairs.test.jsonl` and `pandalm.test.jsonl`, a JSON object a line, of which `prompt` is read. Their
origin stands in results/qwen2.5-0.5b/protocol.md.

In `contrasts` and `areas` of a file `low`, `high`, `p_value` and `p_holm` become those over seeds and prompts, and
`by_pairs` has what they were. Pairs of the built-in task have a prompt each: nothing changes there.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from prm_hf.compare import statistics
from prm_hf.compare.comparison import build_comparison
from prm_hf.compare.contrasts import frontier_difference, interval_of
from prm_hf.compare.rows import Row, make_rows
from prm_hf.compare.statistics import Interval
from prm_hf.runs.comparable import numbered
from prm_hf.runs.run import Run


HERE = Path(__file__).parent
GSM8K, PANDALM = "gsm8k_pairs.test.jsonl", "pandalm.test.jsonl"
FILES = {
    **{f"qwen2.5-0.5b/gsm8k_pairs_{name}.json": GSM8K for name in ("0", "10", "30", "40", "lora_30")},
    **{f"qwen2.5-0.5b/{name}.json": PANDALM for name in ("pandalm", "pandalm_lora")},
    "smollm2-135m/gsm8k_pairs_30.json": GSM8K,
}
# What `rows` and `contrasts` of a file are of, where that is not all runs: methods, the first seed and the last.
TABLES = {
    "qwen2.5-0.5b/gsm8k_pairs_30.json": (("adamw_eps:10", "prm_rows_eps:10"), 0, 99),
    "qwen2.5-0.5b/gsm8k_pairs_40.json": ((), 3, 10),
    "qwen2.5-0.5b/gsm8k_pairs_lora_30.json": (("adamw", "adamw_eps:10", "prm_rows", "prm_rows_eps:10"), 0, 2),
}
# Differences that a page has and its file had not.
MORE_AREAS = {
    "qwen2.5-0.5b/gsm8k_pairs_40.json": [("prm_rows_eps:10", "adamw_eps:10", {"seeds": list(range(11))})],
}
AT_RATES = {
    "qwen2.5-0.5b/gsm8k_pairs_30.json": [
        {"of": "constant_q", "of_rate": None, "minus": "prm_rows_eps:10", "minus_rate": 4e-7},
        {"of": "adamw_matched", "of_rate": None, "minus": "prm_rows_eps:10", "minus_rate": 4e-7},
    ],
    "qwen2.5-0.5b/gsm8k_pairs_10.json": [
        {"of": "prm_stopping", "of_rate": 4e-5, "minus": "prm_debiased", "minus_rate": 4e-5}
    ],
}
NOTE = (
    "low, high, p_value and p_holm of contrasts and areas: over seeds and prompts, by results/recompute.py; by_pairs: "
    "what they were with held-out pairs taken for independent"
)
# The table of results/README.md: of each row its file, the method, and that which is subtracted.
OVERVIEW = (
    *((f"qwen2.5-0.5b/gsm8k_pairs_{p}.json", "prm_rows_eps:10", "adamw_eps:10") for p in ("30", "40", "10", "0")),
    ("qwen2.5-0.5b/pandalm.json", "prm_rows_eps:10", "adamw_eps:10"),
    ("qwen2.5-0.5b/gsm8k_pairs_lora_30.json", "prm_rows", "adamw"),
    ("qwen2.5-0.5b/gsm8k_pairs_lora_30.json", "prm_debiased", "adamw"),
    ("qwen2.5-0.5b/pandalm_lora.json", "prm_rows", "adamw"),
    ("smollm2-135m/gsm8k_pairs_30.json", "prm_rows_eps:10", "adamw_eps:10"),
    ("built_in/baselines.json", "prm_rows_eps:10", "adamw_eps:10"),
    ("built_in/noise_rates.json", "prm_rows_eps:10", "adamw_eps:10"),
    ("built_in/lora.json", "prm_rows", "adamw"),
)


def groups_of(file: Path) -> np.ndarray:
    """A number for each row, equal where the prompts are."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return np.array(numbered(json.loads(line)["prompt"] for line in lines))


def read_runs(file: dict[str, Any], groups: np.ndarray | None, noise_rate: float | None = None) -> list[Run]:
    """The runs of a file, without those that repeat another."""
    runs = []
    for entry in file["runs"]:
        if entry.get("repeat") or entry.get("noise_rate") != noise_rate:
            continue
        run = Run(HERE / entry["name"], *(entry[key] for key in ("name", "method", "learning_rate", "seed")), "prm_hf")
        run.metrics = entry["metrics"]
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(entry["heldout_right"]), np.uint8))
        run.heldout = 2.0 * bits[: len(bits) if groups is None else len(groups)] - 1
        run.heldout_groups = groups
        runs.append(run)
    return runs


def rows_of(runs: Iterable[Run], method: str, entry: dict[str, Any]) -> list[Row]:
    """The rows of a method that an area is of."""
    rows = make_rows([run for run in runs if run.method == method and run.seed in entry["seeds"]], [])
    return sorted(rows, key=lambda row: row.learning_rate)[: 3 if "rates" in entry else None]


def area(runs: list[Run], entry: dict[str, Any]) -> tuple[Interval, tuple[float, float]]:
    return frontier_difference(*(rows_of(runs, entry[side], entry) for side in ("of", "minus")))


def at_rates(runs: list[Run], entry: dict[str, Any]) -> Interval:
    """The difference of two methods, each at one rate; of a control, whose rate follows its run, at all it has."""
    of, minus = (
        {run.seed: run for run in runs if run.method == entry[side] and entry[rate] in (None, run.learning_rate)}
        for side, rate in (("of", "of_rate"), ("minus", "minus_rate"))
    )
    seeds = sorted(of.keys() & minus.keys())
    values = np.stack([of[seed].outcomes() - minus[seed].outcomes() for seed in seeds])
    return interval_of(values, make_rows([of[seed] for seed in seeds], []))


def as_entry(found: Interval) -> dict[str, Any]:
    numbers = {"difference": found.mean, "low": found.low, "high": found.high, "p_value": found.p_value}
    return {**{key: float(f"{x:.5g}") for key, x in numbers.items()}, "seeds": found.seeds, "prompts": found.groups}


def update(entry: dict[str, Any], found: Interval, digits: int = 17, **more: Any) -> None:
    """Puts an interval into a file's entry, and what was there beside it."""
    new = {"low": found.low, "high": found.high, "p_value": found.p_value}
    old = {} if "prompts" in entry else {key: entry[key] for key in (*new, "p_holm", *more) if key in entry}
    if abs(entry.get("difference", found.mean) - found.mean) > 1e-4:
        raise ValueError(f"{entry} is {found.mean} now: the runs are not those that it is of.")
    entry.setdefault("difference", float(f"{found.mean:.{digits}g}"))
    rounded = {key: float(f"{value:.{digits}g}") if math.isfinite(value) else None for key, value in new.items()}
    entry.update(rounded, **more, prompts=found.groups)
    if old:
        entry["by_pairs"] = old


def recompute(name: str, groups: np.ndarray) -> dict[str, Any]:
    """A file with the intervals over seeds and prompts."""
    file = json.loads((HERE / name).read_text(encoding="utf-8"))
    runs = read_runs(file, groups)
    methods, first, last = TABLES.get(name, (None, 0, 99))
    labels = {row["name"] for row in file["rows"]}  # not the rates that were added for the question of one rate
    compared = [run for run in runs if (not methods or run.method in methods) and first <= run.seed <= last]
    compared = [run for run in compared if make_rows([run], [])[0].label in labels]
    contrasts = {(c.kind, c.left.label, c.against): c for c in build_comparison(compared).contrasts}
    for entry in file["contrasts"]:
        if entry["difference"] is not None:
            found = contrasts[entry["kind"], entry["left"], entry["right"]]
            update(entry, found.interval, verdict=found.verdict)
    adjusted = statistics.holm([entry["p_value"] or math.nan for entry in file["contrasts"]])
    for entry, p in zip(file["contrasts"], adjusted, strict=True):
        entry["p_holm"] = None if math.isnan(p) else p
    for of, minus, more in MORE_AREAS.get(name, ()):
        new = {"of": of, "minus": minus, **more}
        if not any(new.items() <= entry.items() for entry in file.setdefault("areas", [])):
            file["areas"].append(new)
    for entry in file.get("areas", ()):
        if "none" not in entry:
            found, span = area(runs, entry)
            entry["kl"] = [float(f"{x:.5g}") for x in span]
            update(entry.setdefault("accuracy", {}), found, 5)
    for entry in AT_RATES.get(name, ()):
        new = {**entry, **as_entry(at_rates(runs, entry))}
        if not any(entry.items() <= other.items() for other in file.setdefault("at_rates", [])):
            file["at_rates"].append(new)
    if file.pop("statements", None):
        file["note"] = f"{file.get('note', '')}; {NOTE}".removeprefix("; ")
    return file


def overview(data: Path) -> list[tuple[str, Interval]]:
    """The contrasts of the table in results/README.md, and of each what it is."""
    found = []
    for name, of, minus in OVERVIEW:
        groups = groups_of(data / FILES[name]) if name in FILES else None
        file = json.loads((HERE / name).read_text(encoding="utf-8"))
        runs = read_runs(file, groups, 0.0 if name == "built_in/noise_rates.json" else None)
        _, first, last = TABLES.get(name, (None, 0, 99))
        seeds = [seed for seed in dict.fromkeys(run.seed for run in runs) if first <= seed <= last]
        interval, _ = area(runs, {"of": of, "minus": minus, "seeds": seeds})
        found.append((f"{name}: {of} minus {minus}, {interval.seeds} seeds, {interval.groups} groups", interval))
    return found


def text_of(entry: dict[str, Any]) -> str:
    if entry["low"] is None:
        return f"{entry['difference']:+.4f}, no interval"
    return f"{entry['difference']:+.4f} [{entry['low']:+.4f}, {entry['high']:+.4f}] p {entry['p_value']:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="with the files of held-out pairs")
    parser.add_argument("--write", action="store_true", help="put the new intervals into the files")
    args = parser.parse_args()
    for name, pairs in FILES.items():
        file = recompute(name, groups_of(args.folder / pairs))
        print(f"\n{name}")
        for entry in (*file["contrasts"], *file.get("areas", ()), *file.get("at_rates", ())):
            numbers = entry.get("accuracy", entry)
            if numbers.get("difference") is not None:
                words = " | ".join(str(entry[key]) for key in ("kind", "left", "right", "of", "minus") if key in entry)
                before = {"difference": numbers["difference"], **numbers.get("by_pairs", {})}
                old = text_of(before) if "by_pairs" in numbers else "-"
                print(f"  {words} {entry.get('seeds', '')}{entry.get('rates', '')}: {old} -> {text_of(numbers)}")
        if args.write:
            text = json.dumps(file, indent=1, ensure_ascii=False)
            (HERE / name).write_text(text + "\n", encoding="utf-8")
    found = overview(args.folder)
    print("\nresults/README.md")
    for (words, interval), p in zip(found, statistics.holm([x.p_value for _, x in found]), strict=True):
        print(f"  {words}: {text_of(as_entry(interval))}, Holm {p:.4g}")


if __name__ == "__main__":
    main()
