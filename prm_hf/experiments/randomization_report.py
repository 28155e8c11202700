"""What the runs of randomization.py say: tables, curves of the fit, and statements, from the runs' files alone."""

import json
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

from ..compare import page
from ..compare.report import align, wrap
from ..compare.statistics import proportion_standard_error
from ..runs.methods import find_method
from ..runs.read import Run, load_runs
from ..runs.schema import CLEAN_FIT, CORRUPTED_FIT, HELDOUT_FIT, TRAIN_FIT


FITTED = 0.99
EQUAL_CLEAN_FIT = 0.9

TABLE_NOTE = (
    f"Each entry: optimizer steps until {FITTED:.0%} of the training rows are fitted as they are labelled; fit of the "
    "training rows and of held-out rows at the end, which is at 100 % or after the last step. The fit is the share of "
    "right classes, of SFT of the completions' right tokens, of DPO of pairs ranked as labelled. Held-out rows have "
    "true labels, and inputs corrupted as in training."
)
MEMORY_NOTE = (
    "random/true: steps to fit random labels, as a multiple of those for true ones [between what the evaluations, "
    "which are some steps apart, and the seeds allow]. The next two are of partial_labels, where the fit of the clean "
    f"training rows first reaches {EQUAL_CLEAN_FIT:.0%} (interpolated between evaluations), so that a slower method "
    "is not taken for one that memorises less: fit of the corrupted training rows, ± at most one standard error over "
    "those rows, and fit of held-out rows. best held-out: the highest on the way."
)

Groups = dict[tuple[str, str, str], list[Run]]


def steps_to(points: Iterable[tuple[float, float]], level: float) -> float | None:
    """The first step of (step, fit) at which the fit is `level` or more."""
    return next((step for step, fit in points if fit >= level), None)


def grouped(runs: list[Run]) -> Groups:
    """The runs of all seeds by model, kind and method, in the order given."""
    groups: Groups = {}
    for run in runs:
        groups.setdefault((run.settings["model"], run.settings["kind"], run.method), []).append(run)
    return groups


def _unique(groups: Groups, part: int) -> list[str]:
    return list(dict.fromkeys(key[part] for key in groups))


def _mean(runs: list[Run], name: str) -> float:
    return float(np.mean([run.metrics[name] for run in runs]))


def steps_to_fit(runs: list[Run]) -> float:
    """Mean over seeds; infinite if a run does not get there."""
    return float(np.mean([run.metrics.get("steps_to_fit", math.inf) for run in runs]))


def _steps(runs: list[Run]) -> str:
    steps = steps_to_fit(runs)
    return f"{steps:.0f}" if math.isfinite(steps) else f">{max(run.metrics['steps'] for run in runs):.0f}"


def at_clean_fit(run: Run, name: str) -> float:
    """Value of a curve where the clean fit first reaches `EQUAL_CLEAN_FIT`; NaN if it does not."""
    _, clean = run.series(CLEAN_FIT)
    _, values = run.series(name)
    above = np.flatnonzero(clean >= EQUAL_CLEAN_FIT)
    if not above.size:
        return math.nan
    i = above[0]
    if i == 0:
        return float(values[0])
    share = (EQUAL_CLEAN_FIT - clean[i - 1]) / (clean[i] - clean[i - 1])
    return float(values[i - 1] + share * (values[i] - values[i - 1]))


def _corrupted_at_clean_fit(runs: list[Run]) -> tuple[float, float]:
    """Mean and the largest standard error that shares with this mean can have, over all corrupted rows."""
    mean = float(np.mean([at_clean_fit(run, CORRUPTED_FIT) for run in runs]))
    rows = sum(int(run.metrics["corrupted_rows"]) for run in runs)
    return mean, proportion_standard_error(mean, rows)


def _share(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def fit_table(groups: Groups) -> tuple[list[str], list[list[str]]]:
    methods = _unique(groups, 2)
    body = []
    for model, kind in dict.fromkeys(key[:2] for key in groups):
        cells = []
        for method in methods:
            runs = groups.get((model, kind, method))
            shares = "" if runs is None else f"{_mean(runs, TRAIN_FIT):.2f} {_mean(runs, HELDOUT_FIT):.2f}"
            cells.append("" if runs is None else f"{_steps(runs):>4} {shares}")
        body.append([model, kind, *cells])
    return ["model", "kind", *(find_method(method).label for method in methods)], body


def memory_table(groups: Groups) -> tuple[list[str], list[list[str]]]:
    """What does not depend on the size of a method's steps."""
    body = []
    for model in _unique(groups, 0):
        for method in _unique(groups, 2):
            true, partial, random = (
                groups.get((model, kind, method)) for kind in ("true_labels", "partial_labels", "random_labels")
            )
            ratio = corrupted = heldout = best = "-"
            if true and random:
                ratio = _relative_steps_text(relative_steps(true, random))
            if partial:
                mean, error = _corrupted_at_clean_fit(partial)
                corrupted = f"{mean:.2f} ± {error:.2f}" if math.isfinite(mean) else "-"
                heldout = _share(float(np.mean([at_clean_fit(run, HELDOUT_FIT) for run in partial])))
                best = _share(float(np.mean([run.series(HELDOUT_FIT)[1].max() for run in partial])))
            body.append([model, find_method(method).label, ratio, corrupted, heldout, best])
    heads = ["model", "method", "random/true", "corrupted fit", "held-out fit", "best held-out"]
    return heads, body


def relative_steps(true: list[Run], random: list[Run]) -> tuple[float, float, float]:
    """Steps to fit random labels as a multiple of those for true ones, and the least and the most that it can be.

    The fit is known at the evaluations alone, so steps are known to within one interval between them; and seeds
    differ. Infinite where random labels are not fitted, NaN where true ones are not.
    """
    ratios = []
    for t, r in zip(true, random, strict=True):
        every = t.settings["eval_steps"]
        fast, slow = (run.metrics.get("steps_to_fit", math.inf) for run in (t, r))
        if not math.isfinite(fast):
            return math.nan, math.nan, math.nan
        least = (slow - every if math.isfinite(slow) else r.metrics["steps"]) / fast
        ratios.append((slow / fast, least, slow / (fast - every) if fast > every else math.inf))
    means, least, most = zip(*ratios, strict=True)
    return float(np.mean(means)), min(least), max(most)


def _relative_steps_text(ratio: tuple[float, float, float]) -> str:
    mean, least, most = ratio
    if not math.isfinite(least):
        return "-"
    return f"{mean:.1f} [{least:.1f}, {most:.1f}]" if math.isfinite(mean) else f">{least:.1f}"


def statements(groups: Groups) -> list[str]:
    """Which of the known results show, and where PRM changes them: from the numbers alone."""
    found = []
    for model in _unique(groups, 0):
        by_method = {
            method: {kind: runs for (m, kind, name), runs in groups.items() if (m, name) == (model, method)}
            for method in _unique(groups, 2)
        }
        texts = _known_results(by_method) + _where_prm_slows(by_method) + _where_prm_memorises(by_method)
        found += [f"{model}: {text}" for text in texts]
    found.append(
        "Each method has one learning rate, at which it had learnt random labels soonest. Where PRM differs from "
        "AdamW, it can be by the mask or by the rate; dpo_noisy.py and sft_noisy.py have the grids and controls."
    )
    if all(len(runs) == 1 for runs in groups.values()):
        found.append("One seed: the spread over seeds is not measured, and another seed may say otherwise.")
    return found


def _known_results(by_method: dict[str, dict[str, list[Run]]]) -> list[str]:
    found = []
    random = {
        find_method(m).label: kinds["random_labels"] for m, kinds in by_method.items() if "random_labels" in kinds
    }
    fitted = [f"{name} ({_steps(runs)})" for name, runs in random.items() if math.isfinite(steps_to_fit(runs))]
    others = [
        f"{name} ({_mean(runs, TRAIN_FIT):.2f} after {_steps(runs)[1:]})"
        for name, runs in random.items()
        if not math.isfinite(steps_to_fit(runs))
    ]
    if fitted:
        found.append(f"random labels are learnt by heart; steps of {', '.join(fitted)}.")
    if others:
        found.append(f"random labels are not learnt by heart within the steps given by {', '.join(others)}.")
    if random:
        run = next(iter(random.values()))[0]
        chance, heldout = run.metrics["chance"], [_mean(runs, HELDOUT_FIT) for runs in random.values()]
        low, high = min(heldout), max(heldout)
        beside = f"after training on random labels, the held-out fit is {low:.2f} to {high:.2f}"
        if run.settings["model"] == "sft":
            found.append(f"{beside}; another row's completion has a share of {chance:.2f} of the tokens in common.")
        else:
            error = proportion_standard_error(chance, run.settings["heldout_rows"])  # the same rows for all seeds
            is_chance = max(abs(low - chance), abs(high - chance)) <= 3 * error
            words = "which is chance" if is_chance else "and not all of it is chance"
            found.append(f"{beside}, {words} ({chance:.2f} ± {error:.2f}).")
    rising, not_rising = [], []
    for method, kinds in by_method.items():
        if not {"true_labels", "partial_labels", "random_labels"} <= kinds.keys():
            continue
        runs = [kinds[kind] for kind in ("true_labels", "partial_labels", "random_labels")]
        a, b, c = map(steps_to_fit, runs)
        text = f"{find_method(method).label} ({', '.join(map(_steps, runs))})"
        (rising if a < b < c else not_rising).append(text)
    if rising:
        found.append(
            "the more labels are random, the longer they take; steps for true, partly random and random labels of "
            f"{', '.join(rising)}."
        )
    if not_rising:
        found.append(
            f"the steps for true, partly random and random labels do not rise throughout with {', '.join(not_rising)}."
        )
    return found


def _where_prm_slows(by_method: dict[str, dict[str, list[Run]]]) -> list[str]:
    ratios = {
        method: relative_steps(kinds["true_labels"], kinds["random_labels"])
        for method, kinds in by_method.items()
        if {"true_labels", "random_labels"} <= kinds.keys()
    }
    if "adamw" not in ratios or len(ratios) < 2 or math.isnan(ratios["adamw"][0]):
        return []
    reference = ratios.pop("adamw")
    longer, shorter, alike = [], [], []
    for method, ratio in ratios.items():
        text = f"{find_method(method).label} {_relative_steps_text(ratio)}"
        (longer if ratio[1] > reference[2] else shorter if ratio[2] < reference[1] else alike).append(text)
    parts = _parts(("longer:", longer), ("shorter:", shorter), ("no difference that is sure:", alike))
    start = f"relative to true labels, random ones take AdamW {_relative_steps_text(reference)} times the steps"
    return [f"{start}; {parts}."]


def _where_prm_memorises(by_method: dict[str, dict[str, list[Run]]]) -> list[str]:
    partial = {m: kinds["partial_labels"] for m, kinds in by_method.items() if "partial_labels" in kinds}
    if "adamw" not in partial or len(partial) < 2:
        return []
    reference, reference_error = _corrupted_at_clean_fit(partial.pop("adamw"))
    if not math.isfinite(reference):
        return [f"AdamW does not fit {EQUAL_CLEAN_FIT:.0%} of the clean rows of partial_labels: nothing to compare."]
    fewer, more, alike, without = [], [], [], []
    for method, runs in partial.items():
        mean, error = _corrupted_at_clean_fit(runs)
        if not math.isfinite(mean):
            without.append(find_method(method).label)
            continue
        is_alike = abs(mean - reference) <= 2 * math.hypot(error, reference_error)
        (alike if is_alike else fewer if mean < reference else more).append(
            f"{find_method(method).label} ({mean:.2f})"
        )
    parts = _parts(
        ("fewer:", fewer),
        ("more:", more),
        ("no difference beyond two standard errors:", alike),
        ("not there within the steps given:", without),
    )
    start = f"when {EQUAL_CLEAN_FIT:.0%} of the clean rows of partial_labels are fitted, AdamW fits"
    return [f"{start} {reference:.2f} ± {reference_error:.2f} of the corrupted ones; {parts}."]


def _parts(*parts: tuple[str, list[str]]) -> str:
    return "; ".join(f"{words} {', '.join(names)}" for words, names in parts if names)


def plot_fits(groups: Groups) -> bytes:
    """Fit of training rows (lines) and of held-out rows (dashes) over the steps: a row a model, a column a kind."""
    from ..compare import plots

    models, kinds, methods = (_unique(groups, part) for part in range(3))
    styles = plots.method_styles(methods)
    with plots.house_style():
        figure, axes = plots.new_figure(2.5 * len(kinds) + 0.6, 2.1 * len(models) + 1.0, len(kinds), len(models))
        lines = {}
        for (model, kind, method), runs in groups.items():
            ax = axes[models.index(model)][kinds.index(kind)]
            for run in runs:
                for name, dashes in ((HELDOUT_FIT, (0, (3, 1.5))), (TRAIN_FIT, "-")):
                    steps, values = run.series(name)
                    look = {"color": styles[method][0], "linestyle": dashes, "linewidth": 1.2, "markersize": 2.5}
                    (line,) = ax.plot(steps[steps > 0], values[steps > 0], marker=".", **look)
            lines[find_method(method).label] = line
        for i, model in enumerate(models):
            runs = [run for (name, *_), members in groups.items() for run in members if name == model]
            steps = [run.series(TRAIN_FIT)[0] for run in runs]
            shortest, longest = min(each[each > 0][0] for each in steps), max(each[-1] for each in steps)
            ticks = 2 ** np.arange(np.floor(np.log2(shortest)), np.ceil(np.log2(longest)) + 1)
            for j, kind in enumerate(kinds):
                ax = axes[i][j]
                ax.axhline(runs[0].metrics["chance"], color="#999999", linestyle=":", linewidth=1.2, zorder=1)
                ax.set_xscale("log")
                ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                ax.set_xticks([], minor=True)
                ax.set_xlim(shortest / 1.15, longest * 1.15)
                ax.set_ylim(-0.03, 1.03)
                ax.set_yticks([0, 0.5, 1])
                ax.tick_params(labelleft=j == 0)
                if i == 0:
                    ax.set_title(kind, fontsize=10)
            axes[i][0].set_ylabel(f"{model}: fit")
        figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=len(lines))
        figure.supxlabel(
            "Optimizer step, log scale. Lines: training rows as labelled. Dashes: held-out rows. Dots: chance.",
            fontsize=8.5,
            color="#666666",
        )
    return plots.to_png(figure, dpi=110)


def report(folders: list[Path], output_dir: Path) -> None:
    """Prints tables and statements, and writes `randomization.json` and `report.html`."""
    groups = grouped(load_runs(folders))
    tables = [(*fit_table(groups), TABLE_NOTE, {0, 1}), (*memory_table(groups), MEMORY_NOTE, {0, 1})]
    texts = statements(groups)
    for heads, body, note, left in tables:
        print("\n" + align(heads, body, left) + "\n\n" + wrap(note))
    print("\n" + "\n".join(wrap(text, "- ", "  ") for text in texts))

    summary = {
        "schema": 1,
        "runs": [
            {
                "folder": str(run.path.relative_to(output_dir)),
                **{key: run.settings[key] for key in ("model", "kind", "p")},
                **{key: getattr(run, key) for key in ("method", "learning_rate", "seed", "metrics")},
                "curve": [row for row in run.history if TRAIN_FIT in row],
            }
            for runs in groups.values()
            for run in runs
        ],
        "statements": texts,
    }
    (output_dir / "randomization.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    try:
        picture = plot_fits(groups)
    except ImportError as error:
        print(f"\nNo report.html was written: {error}")
        return
    sections = ["<h1>Randomization tests</h1>"]
    for heads, body, note, left in tables:
        rows = [
            ("first" if i and row[0] != body[i - 1][0] else "", [escape(c) for c in row]) for i, row in enumerate(body)
        ]
        sections += [page.table(heads, left, rows), f'<p class="quiet">{escape(note)}</p>']
    sections.append(page.figure(picture, "Fit over the steps of training."))
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    sections += ["<h2>What this shows, and what it does not</h2>", f"<ul>{items}</ul>"]
    (output_dir / "report.html").write_text(page.document("Randomization tests", sections), encoding="utf-8")
    print(f"\nReport: {output_dir / 'report.html'}")
