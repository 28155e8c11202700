"""PRM with options for its masks that it does not have: each was tried, and found not to be worth its place."""

import torch
from torch import Tensor

from prm_hf import PRM
from prm_hf.optim import masks
from prm_hf.optim.hyperparameters import Hyperparameters
from prm_hf.optim.reductions import row_mean_squares


def row_masks(p: Tensor, state: dict[str, Tensor], h: Hyperparameters) -> Tensor:
    """The mask of each row of a tensor, from its state after a step with `reduction="per_row"`, `(rows,)`.

    It is the one that was stepped with, also of a tensor of fewer than `mask_min_elements` elements.
    """
    return _masks([(p, state)], h, rows=True)


def _masks(pool: list[tuple[Tensor, dict[str, Tensor]]], h: Hyperparameters, rows: bool) -> Tensor:
    """q of each row of a tensor; or the one of all tensors of a pool, `(1,)`."""
    key = "exp_avg" if h.signal_beta is None else "exp_avg_signal"
    means = [torch.stack([*row_mean_squares([state[key]]), state["grad_var"]]) for _, state in pool]
    numel = sum(p.numel() for p, _ in pool)
    if not rows:
        means = [sum(x.mean(1, keepdim=True) * (p.numel() / numel) for x, (p, _) in zip(means, pool, strict=True))]
    ((mean_sq, var),) = means
    return masks.compute_mask(mean_sq, var, masks.step_scalars(int(pool[0][1]["step"]), h, numel), h)[0]


class SearchedPRM(PRM):
    """PRM with the debiased estimator and one mask a tensor, for whole tensors in one process.

    Tensors of few elements are masked as well (`mask_min_elements=0`), as they were when the variants were measured.

    Args:
        params: parameters or groups of them.
        rows: one mask a row, dimension 0, for tensors that have rows.
        keep_mean: q divided by its mean over all parameters, so that the mean step is AdamW's and selection remains.
        shuffle: the masks of a step dealt out anew, at random, to the rows of each tensor.
        fixed: masks to step with instead of those that are measured, one vector for each of `params`.
        pools: for each of `params` a number; those of the same number have one mask value, from their means together.
        within_step: signal and noise from the gradients of the step's micro-batches, two or more. Of K such gradients,
            each divided by K, Σ|g|² gives the unbiased variance N of their sum; S is the sum's square less N.
        **settings: as of `PRM`, but for `reduction`, `estimator` and `mask_min_elements`.

    Attributes:
        mean_qs: of each step, the mean mask over all parameters, before `keep_mean`.

    Raises:
        ValueError: options that exclude each other, or at the first step a single micro-batch with `within_step`.
    """

    def __init__(
        self,
        params,
        rows: bool = False,
        keep_mean: bool = False,
        shuffle: bool = False,
        fixed: list[Tensor] | None = None,
        pools: list[int] | None = None,
        within_step: bool = False,
        **settings,
    ) -> None:
        signal_beta = settings.get("signal_beta")
        if within_step and (rows or signal_beta is not None):
            raise ValueError(
                "`within_step` measures its own signal, over whole tensors: leave out `rows` and `signal_beta`, got "
                f"{rows} and {signal_beta}."
            )
        if pools is not None and (rows or within_step):
            raise ValueError("`pools` have one mask value for several tensors: leave out `rows` and `within_step`.")
        # Masks of rows, whose state gives those of tensors and pools
        super().__init__(params, **settings, reduction="per_row", estimator="debiased", mask_min_elements=0)
        self.rows, self.keep_mean, self.shuffle, self.within_step = rows, keep_mean, shuffle, within_step
        every = [p for group in self.param_groups for p in group["params"]]
        self.fixed = {} if fixed is None else dict(zip(every, fixed, strict=True))
        self.pools = dict(zip(every, range(len(every)) if pools is None else pools, strict=True))
        self.mean_qs: list[Tensor] = []
        self._versions: dict[Tensor, int] = {}  # of the average gradients, before a step
        self._micro: dict[Tensor, tuple[Tensor, float, int]] = {}  # gradient so far, sum of squares, micro-batches
        if within_step:
            for p in every:
                p.register_post_accumulate_grad_hook(self._see)

    def _see(self, p: Tensor) -> None:
        before, squares, count = self._micro.get(p, (torch.zeros_like(p), 0.0, 0))
        squares += (p.grad - before).double().square().sum().item()
        self._micro[p] = p.grad.detach().clone(), squares, count + 1

    def step(self, closure=None):
        self._versions = {p: state["exp_avg"]._version for p, state in self.state.items() if "exp_avg" in state}
        return super().step(closure)

    def _advanced(self, p: Tensor, h: Hyperparameters) -> dict[str, Tensor]:
        """The state with the average gradient of this step, which some implementations form after the masks."""
        state = self.state[p]
        if h.signal_beta is not None or state["exp_avg"]._version != self._versions.get(p, 0):
            return state
        return {**state, "exp_avg": torch.lerp(state["exp_avg"], p.grad.to(state["exp_avg"].dtype), 1 - h.beta1)}

    def transform_unit_masks(self, q: Tensor) -> Tensor:
        stepped = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        qs = dict(zip(stepped, q.split([masks.n_rows(p) for p in stepped]), strict=True))
        for p, group in stepped.items():
            if self.fixed:
                qs[p] = self.fixed[p].to(q)
            elif self.within_step:
                qs[p] = self._within_step(p, Hyperparameters.of_group(group)).expand(len(qs[p]))
            elif not self.rows:
                h = Hyperparameters.of_group(group)
                pool = [(x, self._advanced(x, h)) for x in stepped if self.pools[x] == self.pools[p]]
                qs[p] = _masks(pool, h, rows=False).expand(len(qs[p]))
        mean = sum(x.mean() * p.numel() for p, x in qs.items()) / sum(p.numel() for p in qs)
        self.mean_qs.append(mean)
        if self.shuffle:
            generator = torch.Generator().manual_seed(len(self.mean_qs))
            qs = {p: x[torch.randperm(len(x), generator=generator).to(x.device)] for p, x in qs.items()}
        q = torch.cat(list(qs.values()))
        return q / torch.where(mean > 0, mean, 1) if self.keep_mean else q

    def _within_step(self, p: Tensor, h: Hyperparameters) -> Tensor:
        """q of a tensor, 0-dim, from the gradients of the step's micro-batches."""
        total, squares, count = self._micro.pop(p)
        if count < 2:
            raise ValueError(
                f"`within_step` needs two micro-batches a step or more, got {count}: raise "
                "`gradient_accumulation_steps`."
            )
        whole, total = p.grad.double().square().sum(), total.double().square().sum()
        clipped = torch.where(total > 0, whole / total, 0)  # the square of the factor by which gradients were clipped
        variance = count / (count - 1) * (clipped * squares - whole / count) / p.numel()
        state, beta1, rho = self.state[p], h.beta1, h.variance_beta
        state["within_var"] = rho * state.get("within_var", 0) + (1 - rho) * variance
        state["signal_sq"] = beta1 * state.get("signal_sq", 0) + (1 - beta1) * (whole / p.numel() - variance)
        t = int(state["step"])
        noise = masks.averaging_variance(beta1, t) * state["within_var"] / (1 - rho**t)
        return masks.mask_values((state["signal_sq"] / (1 - beta1**t)).clamp(min=0), noise, h)

    def get_mask_stats(self, per_group: bool = False) -> dict[str, float]:
        """The mean mask of the last step alone: the others are not in the state."""
        return {"mean_q": self.mean_qs[-1].item()} if self.mean_qs else {}
