"""What the runs of a randomization test say: tables, curves of the fit, and statements, from the runs' files alone."""

import math
from pathlib import Path

import numpy as np

from .._files import write_whole
from ..compare import page, plots
from ..compare.findings import Case, say
from ..compare.report import align, wrap
from ..compare.statistics import proportion_standard_error
from ..runs.methods import find_method
from ..runs.read import Run, load_runs
from ..runs.schema import CLEAN_FIT, CORRUPTED_FIT, HELDOUT_FIT, TRAIN_FIT
from ..runs.write import write_json


FITTED = 0.99
EQUAL_CLEAN_FIT = 0.9
TRUE, PARTIAL, RANDOM = "true_labels", "partial_labels", "random_labels"

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

Groups = dict[tuple[str, str, str], list[Run]]  # by model, kind and method
Range = tuple[float, float, float]  # a value, and the least and the most that it can be


def grouped(runs: list[Run]) -> Groups:
    """The runs of all seeds by model, kind and method, in the order given."""
    groups: Groups = {}
    for run in runs:
        groups.setdefault((run.settings["model"], run.settings["kind"], run.method), []).append(run)
    return groups


def _label(method: str) -> str:
    return find_method(method).label


def _unique(groups: Groups, part: int) -> list[str]:
    return list(dict.fromkeys(key[part] for key in groups))


# ---- Numbers ----


def _mean(runs: list[Run], name: str) -> float:
    return float(np.mean([run.metrics[name] for run in runs]))


def steps_to_fit(runs: list[Run]) -> float:
    """Mean over seeds; infinite if a run does not get there."""
    return float(np.mean([run.metrics.get("steps_to_fit", math.inf) for run in runs]))


def _steps(runs: list[Run]) -> str:
    steps = steps_to_fit(runs)
    return f"{steps:.0f}" if math.isfinite(steps) else f">{max(run.metrics['steps'] for run in runs):.0f}"


def at_clean_fit(runs: list[Run], name: str) -> float:
    """Mean over seeds of a curve where the clean fit first reaches `EQUAL_CLEAN_FIT`; NaN if one never does."""
    values = []
    for run in runs:
        clean, curve = run.series(CLEAN_FIT)[1], run.series(name)[1]
        reached = np.flatnonzero(clean >= EQUAL_CLEAN_FIT)
        if not reached.size:
            return math.nan
        until = slice(max(reached[0] - 1, 0), reached[0] + 1)  # the evaluation before it, and that one
        values.append(np.interp(EQUAL_CLEAN_FIT, clean[until], curve[until]))
    return float(np.mean(values))


def corrupted_at_clean_fit(runs: list[Run]) -> tuple[float, float]:
    """Mean and the largest standard error that shares with this mean can have, over all corrupted rows."""
    mean = at_clean_fit(runs, CORRUPTED_FIT)
    return mean, proportion_standard_error(mean, sum(int(run.metrics["corrupted_rows"]) for run in runs))


def relative_steps(true: list[Run], random: list[Run]) -> Range:
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


def _ratio_text(ratio: Range) -> str:
    mean, least, most = ratio
    if not math.isfinite(least):
        return "-"
    return f"{mean:.1f} [{least:.1f}, {most:.1f}]" if math.isfinite(mean) else f">{least:.1f}"


# ---- Tables ----


def fit_table(groups: Groups) -> tuple[list[str], list[list[str]]]:
    methods = _unique(groups, 2)

    def cell(runs: list[Run] | None) -> str:
        return f"{_steps(runs):>4} {_mean(runs, TRAIN_FIT):.2f} {_mean(runs, HELDOUT_FIT):.2f}" if runs else ""

    body = [
        [model, kind, *(cell(groups.get((model, kind, method))) for method in methods)]
        for model, kind in dict.fromkeys(key[:2] for key in groups)
    ]
    return ["model", "kind", *(_label(method) for method in methods)], body


def memory_table(groups: Groups) -> tuple[list[str], list[list[str]]]:
    """What does not depend on the size of a method's steps."""
    body = []
    for model in _unique(groups, 0):
        for method in _unique(groups, 2):
            true, partial, random = (groups.get((model, kind, method)) for kind in (TRUE, PARTIAL, RANDOM))
            cells = [_ratio_text(relative_steps(true, random)) if true and random else "-", "-", "-", "-"]
            if partial:
                mean, error = corrupted_at_clean_fit(partial)
                best = np.mean([run.series(HELDOUT_FIT)[1].max() for run in partial])
                if math.isfinite(mean):
                    cells[1:3] = f"{mean:.2f} ± {error:.2f}", f"{at_clean_fit(partial, HELDOUT_FIT):.2f}"
                cells[3] = f"{best:.2f}"
            body.append([model, _label(method), *cells])
    heads = ["model", "method", "random/true", "corrupted fit", "held-out fit", "best held-out"]
    return heads, body


# ---- Statements ----


ByKind = dict[str, dict[str, list[Run]]]  # the runs of one model by kind and method


def _chance(runs: ByKind) -> str:
    random = list(runs[RANDOM].values())
    if not random:
        return ""
    run, heldout = random[0][0], [_mean(found, HELDOUT_FIT) for found in random]
    chance, between = run.metrics["chance"], f"{min(heldout):.2f} to {max(heldout):.2f}"
    if run.settings["model"] == "sft":
        return f"{between}; another row's completion has a share of {chance:.2f} of the tokens in common"
    error = proportion_standard_error(chance, run.settings["heldout_rows"])  # the same rows for all seeds
    is_chance = max(abs(fit - chance) for fit in heldout) <= 3 * error
    return f"{between}, {'which is chance' if is_chance else 'not all of it by chance'} ({chance:.2f} ± {error:.2f})"


def _rising(runs: ByKind) -> list[str]:
    found = {"rising": [], "not throughout": []}
    for method in runs[TRUE]:
        three = [runs[kind].get(method) for kind in (TRUE, PARTIAL, RANDOM)]
        if all(three):
            a, b, c = map(steps_to_fit, three)
            text = f"{_label(method)} ({', '.join(map(_steps, three))})"
            found["rising" if a < b < c else "not throughout"].append(text)
    return _listed(found)


def _slowed(runs: ByKind) -> list[str]:
    both = [method for method in runs[TRUE] if method in runs[RANDOM]]
    ratios = {method: relative_steps(runs[TRUE][method], runs[RANDOM][method]) for method in both}
    return _beside_adamw({method: (ratio, _ratio_text(ratio)) for method, ratio in ratios.items()})


def _memorised(runs: ByKind) -> list[str]:
    fits = {method: corrupted_at_clean_fit(found) for method, found in runs[PARTIAL].items()}
    reference = fits.get("adamw", (math.nan, math.nan))[1]
    ranges = {}
    for method, (mean, error) in fits.items():
        reach = 0 if method == "adamw" else 2 * math.hypot(error, reference)
        ranges[method] = (mean, mean - reach, mean + reach), f"{mean:.2f} ± {error:.2f}"
    return _beside_adamw(ranges)


def _beside_adamw(values: dict[str, tuple[Range, str]]) -> list[str]:
    """Methods, with the texts of their values, by whether they lie above or below AdamW; empty without AdamW."""
    if len(values) < 2 or "adamw" not in values:
        return []
    (reference, low, high), text = values["adamw"]
    if math.isnan(reference):
        return ["AdamW does not get there"]
    found: dict[str, list[str]] = {"more": [], "less": [], "no sure difference": [], "not there": []}
    for method, ((mean, least, most), text_of) in values.items():
        where = "more" if least > high else "less" if most < low else "no sure difference"
        if method != "adamw":
            found["not there" if math.isnan(mean) else where].append(f"{_label(method)} {text_of}")
    return [f"AdamW {text}", *_listed(found)]


def _listed(found: dict[str, list[str]]) -> list[str]:
    return [f"{where}: {', '.join(texts)}" for where, texts in found.items() if texts]


CASES = (
    Case("chance", _chance, "after training on random labels, the held-out fit is {it}."),
    Case("rising", _rising, "do steps rise from true to partly random to random labels? {it}."),
    Case("slowed", _slowed, "steps for random labels, as a multiple of those for true ones: {it}."),
    Case(
        "memorised",
        _memorised,
        f"corrupted rows of partial_labels that are fitted when {EQUAL_CLEAN_FIT:.0%} of the clean ones are: {{it}}.",
    ),
)


def statements(groups: Groups) -> dict[str, str]:
    """Which of the known results show, and where PRM changes them, by the model and the case: `"vit: rising"`."""
    found = {}
    for model in _unique(groups, 0):
        kinds = (TRUE, PARTIAL, RANDOM)
        runs = {kind: {m: runs for (*place, m), runs in groups.items() if place == [model, kind]} for kind in kinds}
        found |= {f"{model}: {key}": f"{model}: {text}" for key, text in say(CASES, runs)}
    found["one_rate"] = (
        "Each method has one learning rate, at which it had learnt random labels soonest. Where PRM differs from "
        "AdamW, it can be by the mask or by the rate; the comparisons of DPO and SFT have the grids and controls."
    )
    if all(len(runs) == 1 for runs in groups.values()):
        found["one_seed"] = "One seed: the spread over seeds is not measured, and another seed may say otherwise."
    return found


# ---- The report ----


def plot_fits(groups: Groups) -> bytes:
    """Fit of training rows (lines) and of held-out rows (dashes) over the steps: a row a model, a column a kind."""
    models, kinds, methods = (_unique(groups, part) for part in range(3))
    styles, lines = plots.method_styles(methods), {}
    size = 2.5 * len(kinds) + 0.6, 2.1 * len(models) + 1.0
    with plots.house_style():
        figure, axes = plots.new_figure(*size, len(kinds), len(models), sharex="row", sharey=True)
        for (model, kind, method), runs in groups.items():
            ax = axes[models.index(model)][kinds.index(kind)]
            for run in runs:
                for name, dashes in ((HELDOUT_FIT, (0, (3, 1.5))), (TRAIN_FIT, "-")):
                    steps, values = run.series(name)
                    look = {"color": styles[method][0], "linestyle": dashes, "linewidth": 1.2, "markersize": 2.5}
                    (line,) = ax.plot(steps[steps > 0], values[steps > 0], marker=".", **look)
            lines[_label(method)] = line
        for model, row in zip(models, axes, strict=True):
            runs = [run for (name, *_), members in groups.items() for run in members if name == model]
            steps = np.concatenate([run.series(TRAIN_FIT)[0] for run in runs])
            shortest, longest = steps[steps > 0].min(), steps.max()
            for ax in row:
                ax.axhline(runs[0].metrics["chance"], color="#999999", linestyle=":", linewidth=1.2, zorder=1)
            row[0].set(ylabel=f"{model}: fit", ylim=(-0.03, 1.03), yticks=[0, 0.5, 1])
            row[0].set_xscale("log", base=2, subs=[])
            row[0].set_xlim(shortest / 1.15, longest * 1.15)
            row[0].xaxis.set_major_formatter("{x:g}")
        for ax, kind in zip(axes[0], kinds, strict=True):
            ax.set_title(kind, fontsize=10)
        figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=len(lines))
        note = "Optimizer step, log scale. Lines: training rows as labelled. Dashes: held-out rows. Dots: chance."
        figure.supxlabel(note, fontsize=8.5, color="#666666")
    return plots.to_png(figure, dpi=110)


def report(folders: list[Path], output_dir: Path) -> None:
    """Prints tables and statements, and writes `randomization.json` and `report.html`."""
    groups = grouped(load_runs(folders))
    tables = [(*fit_table(groups), TABLE_NOTE), (*memory_table(groups), MEMORY_NOTE)]
    texts = list(statements(groups).values())
    for heads, body, note in tables:
        print("\n" + align(heads, body, {0, 1}) + "\n\n" + wrap(note))
    print("\n" + "\n".join(wrap(text, "- ", "  ") for text in texts))
    runs = [
        {
            "folder": str(run.path.relative_to(output_dir)),
            **{key: run.settings[key] for key in ("model", "kind", "p")},
            **{key: getattr(run, key) for key in ("method", "learning_rate", "seed", "metrics")},
            "curve": [row for row in run.history if TRAIN_FIT in row],
        }
        for members in groups.values()
        for run in members
    ]
    summary = {"schema": 1, "runs": runs, "statements": texts}
    write_json(output_dir / "randomization.json", summary)
    try:
        picture = plot_fits(groups)
    except ImportError as error:
        print(f"\nNo report.html was written: {error}")
        return
    sections = [page.tag("h1", "Randomization tests")]
    for heads, body, note in tables:
        kinds = ["first" if i and row[0] != body[i - 1][0] else "" for i, row in enumerate(body)]
        rows = [(kind, list(map(page.escape, row))) for kind, row in zip(kinds, body, strict=True)]
        sections += [page.table(heads, {0, 1}, rows), page.quiet(note)]
    sections.append(page.figure(picture, "Fit over the steps of training."))
    sections.append(page.bullets("What this shows, and what it does not", texts))
    write_whole(output_dir / "report.html", [page.document("Randomization tests", sections)])
    print(f"\nReport: {output_dir / 'report.html'}")
