"""Which mask is worth its place? Variants of PRM's debiased per_tensor mask, each with one thing changed.

    python research/mask_search.py --seeds 0 1 2 3 4     # DPO on the built-in task, hours on one core; resumable
    python research/mask_search.py recipes/sft_noisy.py  # SFT

All flags, folders and statistics are those of `dpo_noisy.py`, or of the recipe that is named first; its methods may be
named beside the variants. At the end it prints a table: of each method the area of accuracy over log KL, against AdamW
and against the best baseline.

`SearchedPRM` is for whole tensors in one process, and for variants that are thrown away again. What is worth keeping
belongs into `prm_hf.PRM`: what was `search_prm_rows_signal0.98` is its `reduction="per_row"` with `signal_beta=0.98`,
the method `prm_rows`, and with the larger eps `prm_rows_eps:10`. The parts of it and its controls are variants here.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from prm_hf.compare import Comparison, Interval, Row, compare_runs
from prm_hf.compare.comparison import display_name, frontier_difference
from prm_hf.compare.statistics import holm
from prm_hf.experiments import dpo as dpo_noisy
from prm_hf.experiments import sft as sft_noisy
from prm_hf.experiments.controls import OPTIMIZERS, enlarge_eps, gradient_scale, is_sharded, scale_embedding
from prm_hf.experiments.runner import Data, Recipe, RunSpec, run_comparisons
from prm_hf.optim import masks
from prm_hf.optim.parts import hyperparameters
from prm_hf.optim.statistics import local_masks
from prm_hf.runs.methods import BASELINE, CONTROL, OTHER, PRM, Method, find_method, register
from prm_hf.trainers.callbacks import innermost_optimizer


# What each variant changes: `eps` as in `adamw_eps`, `embedding` as in `adamw_embedding`, `modules` one of the `pools`
# for each LoRA layer; the rest are arguments of `SearchedPRM`.
VARIANTS: dict[str, dict[str, Any]] = {
    "search_prm_rows": {"rows": True},
    "search_prm_rows_eps10": {"rows": True, "eps": 10},
    "search_prm_softness0.3": {"softness": 0.3},
    "search_prm_softness3": {"softness": 3.0},
    "search_prm_softness0.3_eps10": {"softness": 0.3, "eps": 10},
    "search_prm_softness3_eps10": {"softness": 3.0, "eps": 10},
    "search_prm_signal0.95": {"signal_beta": 0.95},
    "search_prm_signal0.98": {"signal_beta": 0.98},
    "search_prm_signal0.98_eps10": {"signal_beta": 0.98, "eps": 10},
    # The control of `prm_rows_eps:10`: as many rows are as open, but others.
    "search_prm_rows_signal0.98_eps10_shuffled": {"rows": True, "signal_beta": 0.98, "eps": 10, "shuffle": True},
    "search_prm_within": {"within_step": True},
    "search_prm_within_eps10": {"within_step": True, "eps": 10},
    # With the learning rates of AdamW, whose mean step they have.
    "search_selection": {"keep_mean": True},
    "search_selection_eps10": {"keep_mean": True, "eps": 10},
    # No mask: another learning rate for the embedding on top of the larger eps, two baselines in one.
    "search_embedding3_eps10": {"embedding": 3.0, "eps": 10},
    "search_embedding0.3_eps10": {"embedding": 0.3, "eps": 10},
}
METHODS = ["adamw", "adamw_eps:3", "adamw_eps:10", "adamw_eps:30", "prm_debiased", "prm_debiased_eps:10"]
METHODS += ["prm_rows", "prm_rows_eps:10", *VARIANTS]
# Is it the measuring, or only the allocation? AdamW with the same eps and each row's learning rate multiplied by the
# row's mean mask in the run of another seed, which has to be there. Not among `METHODS`, as it comes after them.
FIXED, FIXED_FROM = "search_prm_rows_fixed_eps10", "prm_rows_eps:10"
VARIANTS[FIXED] = {"rows": True, "eps": 10}
# For LoRA alone: one mask for A and B of a layer. Not among `METHODS` either.
VARIANTS |= {"search_prm_modules": {"modules": True}, "search_prm_modules_eps10": {"modules": True, "eps": 10}}
for _name, _options in VARIANTS.items():
    _masked = not {"keep_mean", "embedding"} & set(_options)
    _group = CONTROL if _name == FIXED or "shuffle" in _options else PRM if _masked else OTHER
    register(Method(_name, _name, _group, find_method("adamw").settings, has_mask=_masked))
ROW_MASKS = "row_masks.pt"
RECIPES = {"dpo_noisy": dpo_noisy, "sft_noisy": sft_noisy}
MICRO_BATCHES = 4  # a step's, for noise that is measured within it


class SearchedPRM(torch.optim.Optimizer):
    """PRM with the debiased estimator and one q a tensor, and options that PRM does not have, or not together.

    State of a parameter: `step` (0-dim), `exp_avg`, `exp_avg_sq` (its shape), `grad_var` and
    `signal_avg` (`[rows]` or `[1]`, the second for `within_step`), with `signal_beta` `wide_avg` (its shape).

    Args:
        params: parameters or groups of them, whole tensors.
        lr, betas, rho, eps, weight_decay, softness: as of `PRM`.
        rows: one q an output row, dimension 0, for tensors that have rows.
        signal_beta: decay rate of a gradient average of its own, from which the signal is estimated; a slower one
            sees smaller signals. The mask weighs it against the noise of the average that is stepped with.
        keep_mean: q divided by its mean over all parameters, so that the mean step is AdamW's and selection remains.
        shuffle: the masks of a step dealt out anew, at random, to the rows of each tensor.
        fixed: masks to step with instead of those that are measured, one vector for each of `params`.
        pools: for each of `params` a number; those of the same number have one q, from their means together.
        within_step: signal and noise from the gradients of the step's micro-batches, two or more. Of K such gradients,
            each divided by K, Σ|g|² gives the unbiased variance N of their sum; S is the sum's square less N.

    Raises:
        ValueError: options that exclude each other, or at the first step a single micro-batch with `within_step`.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        rho: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        softness: float = 1.0,
        rows: bool = False,
        signal_beta: float | None = None,
        keep_mean: bool = False,
        shuffle: bool = False,
        fixed: list[Tensor] | None = None,
        pools: list[int] | None = None,
        within_step: bool = False,
    ) -> None:
        if within_step and (rows or signal_beta is not None):
            raise ValueError(
                "`within_step` measures its own signal, one q a tensor: leave out `rows` and `signal_beta`, got "
                f"{rows} and {signal_beta}."
            )
        if pools is not None and (rows or within_step):
            raise ValueError("`pools` have one q for several tensors: leave out `rows` and `within_step`.")
        super().__init__(params, dict(lr=lr, betas=betas, rho=rho, eps=eps, weight_decay=weight_decay))
        self.softness, self.rows, self.signal_beta = softness, rows, signal_beta
        self.keep_mean, self.shuffle, self.within_step = keep_mean, shuffle, within_step
        every = [p for group in self.param_groups for p in group["params"]]
        self.fixed = {} if fixed is None else dict(zip(every, fixed, strict=True))
        self.pools = {} if pools is None else dict(zip(every, pools, strict=True))
        self.mean_qs: list[Tensor] = []  # of each step, over all parameters, as it was before `keep_mean`
        self._micro: dict[Tensor, tuple[Tensor, float, int]] = {}  # gradient so far, sum of squares, micro-batches
        if within_step:
            for p in every:
                p.register_post_accumulate_grad_hook(self._see)

    def _see(self, p: Tensor) -> None:
        before, squares, count = self._micro.get(p, (torch.zeros_like(p), 0.0, 0))
        squares += (p.grad - before).double().square().sum().item()
        self._micro[p] = p.grad.detach().clone(), squares, count + 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        qs = [
            self._masks(params, group) if params else []
            for params, group in zip(stepped, self.param_groups, strict=True)
        ]
        if self.fixed:
            qs = [[self.fixed[p].to(p.device) for p in params] for params in stepped]
        sizes = [p.numel() for params in stepped for p in params]
        mean = sum(q.mean() * n for q, n in zip((q for own in qs for q in own), sizes, strict=True)) / sum(sizes)
        self.mean_qs.append(mean)
        generator = torch.Generator().manual_seed(len(self.mean_qs))
        for params, group, own in zip(stepped, self.param_groups, qs, strict=True):
            if self.keep_mean:
                own = [q / torch.where(mean > 0, mean, 1) for q in own]
            if self.shuffle:
                own = [q[torch.randperm(len(q), generator=generator).to(q.device)] for q in own]
            if params:
                self._update(params, group, own)
        self._micro.clear()
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any], qs: list[Tensor]) -> None:
        states, t = [self.state[p] for p in params], self.state[params[0]]["step"].item()
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        denominators = torch._foreach_div([state["exp_avg_sq"] for state in states], 1 - beta2**t)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = [
            state["exp_avg"] * (q.to(p.dtype).view(-1, *[1] * (p.dim() - 1)) if p.dim() else q.to(p.dtype)[0])
            for p, state, q in zip(params, states, qs, strict=True)
        ]
        torch._foreach_addcdiv_(params, updates, denominators, value=-group["lr"] / (1 - beta1**t))

    def _mean_sq(self, tensors: list[Tensor]) -> Tensor:
        """Mean squares of all rows, or of all tensors, in one vector; float64."""
        rows = [x.reshape(x.shape[0] if self.rows and x.dim() > 1 else 1, -1) for x in tensors]
        norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) / x.shape[1] ** 0.5 for x in rows]
        return torch.cat(norms).square()

    def _masks(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Advances the moments of tensors and returns their masks, `[rows]` or `[1]` each."""
        grads, (beta1, beta2), rho = [p.grad for p in params], group["betas"], group["rho"]
        for p in params:
            if not self.state[p]:
                rows = p.shape[0] if self.rows and p.dim() > 1 else 1
                averages = ["exp_avg", "exp_avg_sq"] + ["wide_avg"] * (self.signal_beta is not None)
                self.state[p] = {name: torch.zeros_like(p) for name in averages} | {
                    "step": torch.zeros(()),
                    "grad_var": torch.zeros(rows, dtype=torch.float64, device=p.device),
                    "signal_avg": torch.zeros(rows, dtype=torch.float64, device=p.device),
                }
            self.state[p]["step"] += 1
        states = [self.state[p] for p in params]
        steps = {state["step"].item() for state in states}
        if len(steps) > 1:
            raise ValueError(
                "`SearchedPRM` steps all tensors of a group equally often: give each a gradient, or none."
            )
        t = steps.pop()
        m, v = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        s = torch.cat([state["grad_var"] for state in states])
        c = masks.step_scalars(
            t, beta1=beta1, beta2=beta2, rho=rho, estimator="debiased", bias_correction=True, warmup_steps=0
        )
        deviations = self._mean_sq(torch._foreach_sub(grads, torch._foreach_mul(m, c.center)))
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        if self.within_step:
            pairs = torch.tensor([self._of_micro_batches(p) for p in params], dtype=s.dtype, device=s.device)
            s.lerp_(pairs[:, 1], 1 - rho)
            average = torch.cat([state["signal_avg"] for state in states]).lerp_(pairs[:, 0] - pairs[:, 1], 1 - beta1)
            self._keep("signal_avg", states, average)
            signal = (average / (1 - beta1**t)).clamp(min=0)
            noise = masks.averaging_variance(beta1, t) * s / (1 - rho**t)
        else:
            s.mul_(rho).add_(deviations * c.weight)
            squares, variances = self._pooled(self._mean_sq(m), params), self._pooled(s, params)
            signal, noise = masks.signal_and_noise(squares, variances, c, estimator="debiased", first_ratio=1.0)
        if self.signal_beta is not None:
            wide = [state["wide_avg"] for state in states]
            torch._foreach_lerp_(wide, grads, 1 - self.signal_beta)
            ratio = masks.averaging_variance(self.signal_beta, t) / masks.averaging_variance(beta1, t)
            square = self._pooled(self._mean_sq(wide), params) / (1 - self.signal_beta**t) ** 2
            signal = (square - ratio * noise).clamp(min=0) * (t > 1)  # nothing is known of the noise at t = 1
        self._keep("grad_var", states, s)
        q = masks.mask_values(
            signal, noise, mask="snr", alpha=1.0, softness=self.softness, mask_eps=masks.SCALE_FREE_EPS
        )
        return list(q.split([len(state["grad_var"]) for state in states]))

    def _pooled(self, means: Tensor, params: list[Tensor]) -> Tensor:
        """Means over tensors, to those over all elements of each tensor's pool, if there are pools."""
        if not self.pools:
            return means
        _, pool = torch.tensor([self.pools[p] for p in params], device=means.device).unique(return_inverse=True)
        numels = torch.tensor([p.numel() for p in params], dtype=means.dtype, device=means.device)
        total, size = (torch.zeros_like(means).index_add_(0, pool, x) for x in (means * numels, numels))
        return (total / size.clamp(min=1))[pool]

    @staticmethod
    def _keep(name: str, states: list[dict[str, Tensor]], values: Tensor) -> None:
        kept = [state[name] for state in states]
        torch._foreach_copy_(kept, list(values.split([len(x) for x in kept])))

    def _of_micro_batches(self, p: Tensor) -> tuple[float, float]:
        """Mean square of the step's gradient over the tensor, and the mean of its unbiased variance."""
        total, squares, count = self._micro[p]
        if count < 2:
            raise ValueError(
                f"`within_step` needs two micro-batches a step or more, got {count}: raise "
                "`gradient_accumulation_steps`."
            )
        whole, total = p.grad.double().square().sum().item(), total.double().square().sum().item()
        clipped = whole / total if total > 0 else 0.0  # the square of the factor by which gradients were clipped
        variance = count / (count - 1) * (clipped * squares - whole / count)
        return whole / p.numel(), variance / p.numel()


class RowMaskRecorder(TrainerCallback):
    """Adds up the masks of PRM's rows over all steps, for `FIXED`, and writes their means, of each tensor `[rows]`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps, self.sums = 0, {}

    def on_optimizer_step(self, args, state, control, **kwargs):
        prm = self.trainer.find_prm()
        self.steps += 1
        for group in prm.param_groups:
            hyper = hyperparameters(group)
            for p in group["params"]:
                kept = {name: prm.state[p][name] for name in ("exp_avg", "grad_var", "exp_avg_signal", "step")}
                self.sums[p] = self.sums.get(p, 0) + local_masks(**kept, hyper=hyper)[0]

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            means = [(total / self.steps).cpu() for total in self.sums.values()]
            torch.save(means, Path(args.output_dir) / ROW_MASKS)


def set_up_variant(trainer: Trainer, variant: str, fixed: Path | None = None) -> None:
    """Gives the trainer the optimizer of a variant; `fixed` is the file of the row masks of `FIXED`.

    Raises:
        ValueError: the model is sharded, or gradients are not clipped and the variant's eps is relative to the norm.
    """
    if is_sharded(trainer) or trainer.args.world_size > 1:
        raise ValueError(f"`{variant}` runs on whole tensors in one process: launch it on one GPU, or on a CPU.")
    options = dict(VARIANTS[variant])
    eps = options.pop("eps", None)
    optimizer = trainer.create_optimizer()
    if eps is not None:
        if not trainer.args.max_grad_norm:
            raise ValueError(f"`{variant}` is scaled by the clipped gradient: set `max_grad_norm` above 0.")
        enlarge_eps(optimizer.param_groups, eps, gradient_scale(trainer))
    if "embedding" in options:
        scale_embedding(trainer, variant, options["embedding"])
        return
    if fixed is not None:
        if not fixed.is_file():
            raise ValueError(
                f"`{variant}` takes the row masks of another seed, and {fixed} is not there: run {FIXED_FROM} with "
                "all `seeds` and `prm_learning_rates` before it."
            )
        options["fixed"] = torch.load(fixed)
    groups = [
        {key: group[key] for key in ("params", "lr", "eps", "betas", "weight_decay")}
        for group in optimizer.param_groups
    ]
    if options.pop("modules", False):
        params = [p for group in groups for p in group["params"]]
        names = {p: name for name, p in trainer.model.named_parameters()}
        if not all(".lora_" in names[p] for p in params):
            raise ValueError(f"`{variant}` has one mask for A and B of each LoRA layer: set `use_peft`.")
        modules = [names[p].split(".lora_")[0] for p in params]
        options["pools"] = [modules.index(module) for module in modules]
    trainer.optimizer = SearchedPRM(groups, **options)


def methods(base: Recipe, noise_rate: float, per_device: int, accumulation: int) -> dict[str, dict[str, Any]]:
    """The methods of a recipe and the variants; micro-batches split the batch of a step and do not enlarge it."""
    known = dict(base.methods(noise_rate))
    micro = 1 if per_device % MICRO_BATCHES else per_device // MICRO_BATCHES
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation * per_device // micro}
    for variant, options in VARIANTS.items():
        known[variant] = known["adamw"] | (split if options.get("within_step") else {})
    return known


@dataclasses.dataclass(frozen=True)
class Area:
    """One method's mean over log KL minus another's, at equal drift: of accuracy, and of the fit of wrong labels.

    Attributes:
        accuracy: over seeds and held-out pairs.
        noise_fit: over seeds.
        kl: the range of KL, nats a token, that the curves of both cover in every seed.
    """

    accuracy: Interval
    noise_fit: Interval
    kl: tuple[float, float]


def area(mine: list[Row], theirs: list[Row]) -> Area | None:
    """None without two seeds, or where the curves have no KL in common."""
    noise_fit = mine[0].measures.noise_fit
    accuracy = frontier_difference(mine, theirs)
    fit = frontier_difference(mine, theirs, lambda run: np.array([run.metrics[noise_fit]]))
    if isinstance(accuracy, str) or accuracy[0].seeds < 2:
        return None
    return Area(accuracy[0], fit[0], accuracy[1])


def table(comparison: Comparison) -> str:
    """Markdown: of each method its area against AdamW and against the best baseline, which is AdamW's eps of the
    largest area. p-values are Holm's over all areas of accuracy in the table."""
    rows = comparison.methods()
    adamw = rows["adamw"]
    areas = {(method, "adamw"): area(its, adamw) for method, its in rows.items() if method != "adamw"}
    baselines = [method for method in comparison.methods(BASELINE) if areas.get((method, "adamw"))]
    strongest = max(baselines, key=lambda method: areas[method, "adamw"].accuracy.mean, default=None)
    if strongest:
        others = [method for method in rows if method not in ("adamw", strongest)]
        areas |= {(method, strongest): area(rows[method], rows[strongest]) for method in others}
    areas = {key: found for key, found in areas.items() if found}
    adjusted = dict(zip(areas, holm([found.accuracy.p_value for found in areas.values()]), strict=True))

    def cells(key: tuple[str, str]) -> list[str]:
        if key not in areas:
            return ["", "", ""]
        found, p = areas[key], adjusted[key]
        x, y = found.accuracy, found.noise_fit
        return [
            f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]",
            f"{p:.2g}" if p >= 0.001 else "<.001",
            f"{y.mean:+.3f} [{y.low:+.3f}, {y.high:+.3f}]",
        ]

    heads = ["method", "seeds", "best accuracy"]
    for name in ("AdamW", *([display_name(strongest)] if strongest else [])):
        heads += [f"accuracy against {name}", "p (Holm)", adamw[0].measures.noise_label]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method, its in rows.items():
        top = max(its, key=lambda row: row.accuracy)
        start = [display_name(method), str(min(len(row.runs) for row in its))]
        start.append(f"{top.accuracy:.3f} ± {top.accuracy_error()[0]:.3f}")
        more = [cell for rival in ("adamw", *([strongest] if strongest else [])) for cell in cells((method, rival))]
        lines.append("| " + " | ".join([*start, *more]) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    module = dpo_noisy
    if arguments and not arguments[0].startswith("-"):
        name, arguments = Path(arguments[0]).stem, arguments[1:]
        if name not in RECIPES:
            raise ValueError(f"The first argument may name a recipe, {' or '.join(RECIPES)}, got {name!r}.")
        module = RECIPES[name]
    if "--methods" not in arguments:
        arguments = [*arguments, "--methods", *METHODS]
    known = [*(dpo_noisy.methods(0.3) if module is dpo_noisy else OPTIMIZERS), *VARIANTS]
    script_args, training_args, model_args = module.parse(arguments, known, "runs/mask_search")
    base = module.make_recipe(script_args, model_args)
    per_device, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps

    def make_trainer(config: Any, spec: RunSpec, data: Data) -> Trainer:
        trainer = base.make_trainer(config, spec, data)
        if spec.method in VARIANTS:
            seeds, fixed = script_args.seeds, None
            if spec.method == FIXED:
                other = RunSpec(FIXED_FROM, spec.learning_rate, seeds[seeds.index(spec.seed) - 1], {})
                fixed = Path(config.output_dir).parent / other.name / ROW_MASKS
            set_up_variant(trainer, spec.method, fixed)
        elif spec.method == FIXED_FROM:
            trainer.add_callback(RowMaskRecorder(trainer))
        return trainer

    def outcomes(trainer: Trainer, data: Data) -> tuple[dict[str, float], dict[str, list]]:
        metrics, margins = base.outcomes(trainer, data)
        optimizer = innermost_optimizer(trainer.optimizer)
        if isinstance(optimizer, SearchedPRM):
            metrics = {**metrics, "mask/mean_q": torch.stack(optimizer.mean_qs).mean().item()}
        return metrics, margins

    recipe = dataclasses.replace(
        base,
        methods=lambda noise_rate: methods(base, noise_rate, per_device, accumulation),
        make_trainer=make_trainer,
        outcomes=outcomes,
    )
    code = run_comparisons(script_args, training_args, model_args, recipe)
    for folder in sorted({path.parent.parent for path in Path(training_args.output_dir).rglob("metrics.json")}):
        comparison = compare_runs(folder)
        if "adamw" in comparison.methods():
            print(f"\n{folder}, areas over log KL:\n\n{table(comparison)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
