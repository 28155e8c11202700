"""Many small models at once: the runs of one method, over learning rates, weight decays and seeds, as one stack.

Each model takes the steps that it would take alone, up to rounding: `torch.func` stacks the weights, and the
functional form of PRM, which is AdamW with `mask="none"`, goes through all of them at once.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from transformers import Trainer, get_scheduler

from ..optim.functional import mean_mask, prm
from ..optim.hyperparameters import Hyperparameters
from ..optim.state import new_state
from ..runs.schema import SECONDS
from ..trainers.config import PRMArguments, prm_kwargs
from ..trainers.presets import with_preset
from .problems import Problem, order_of_rows


@dataclass(frozen=True)
class Setting:
    """What one model of a stack has of its own."""

    learning_rate: float
    weight_decay: float
    seed: int


@dataclass
class Record:
    """What became of one model: the rows of its history, and the step at which it diverged, if it did."""

    history: list[dict[str, float]]
    steps: int = 0
    diverged_at_step: int | None = None


Tensors = dict[str, Tensor]
# Optimizers that are the formula of PRM, with a mask or without
FORMULAS = ("prm", "adamw_torch", "adamw_torch_fused")


def can_stack(config: PRMArguments) -> bool:
    """Whether a training configuration is one that a stack computes."""
    is_plain = not (config.fp16 or config.bf16) and config.gradient_accumulation_steps == 1 and config.world_size == 1
    return is_plain and config.optim in FORMULAS and config.prm_state_dtype == "float32"


class GraphedStep:
    """A function of tensors in a CUDA graph: the host takes longer to launch a stack's small kernels than they run.

    Args:
        function: what is called. Its inputs keep their shapes, and what else it reads and writes stays in its place.
    """

    WARM_UP = 3  # calls before the capture, for what libraries set up once

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None and self.calls < self.WARM_UP:
            self.calls += 1
            return self.function(*inputs)
        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # notes what is launched, and runs nothing
                self.output = self.function(*self.inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output.clone()


class Stack:
    """Models of one method and of one task, trained together.

    Args:
        problems: by seed; they differ in their numbers alone.
        settings: of each of the n models.
        config: the training configuration of the method.
    """

    def __init__(self, problems: dict[int, Problem], settings: Sequence[Setting], config: PRMArguments) -> None:
        self.config, self.settings, self.device = config, list(settings), config.device
        seeds = list(problems)
        first = next(iter(problems.values()))
        self.n_rows, self.measure = first.n_rows, first.measure
        self.place = torch.tensor([seeds.index(x.seed) for x in settings], device=self.device)  # of each one's problem
        self.seeds = seeds
        self.rows, self.data = (
            {name: torch.stack([getattr(p, kind)[name] for p in problems.values()]).to(self.device) for name in names}
            for kind, names in (("rows", first.rows), ("data", first.data))
        )
        self.params, self.buffers = stack_module_state([problems[x.seed].model for x in settings])
        self.params = {name: x.detach().to(self.device) for name, x in self.params.items()}
        self.buffers = {name: x.to(self.device) for name, x in self.buffers.items()}
        self.model = copy.deepcopy(first.model).to("meta")
        decayed = set(Trainer.get_decay_parameter_names(None, first.model))
        names = list(self.params)
        self.groups = [g for g in ([x for x in names if x in decayed], [x for x in names if x not in decayed]) if g]
        self.decayed = [group[0] in decayed for group in self.groups]
        self._set_up_optimizer(sum(p.numel() for p in first.model.parameters()))

    def _set_up_optimizer(self, numel: int) -> None:
        args = with_preset(self.config, is_peft=False)
        self.kwargs = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "mask": "none"}
        if args.optim == "prm":
            self.kwargs = prm_kwargs(args)
            if args.prm_boundary == "empirical" and args.prm_alpha is None:
                self.kwargs |= {"batch_size": args.per_device_train_batch_size, "n_dataset": self.n_rows}
        scale = 1 + (args.relative_eps or 0.0)
        if args.relative_eps is not None:  # of all tensors, and a group has only some
            eps = Hyperparameters(relative_eps=args.relative_eps, max_grad_norm=args.max_grad_norm).adam_eps(numel)
            self.kwargs = {k: v for k, v in self.kwargs.items() if k not in ("relative_eps", "max_grad_norm")}
            self.kwargs["eps"] = eps
        self.kwargs.pop("lr", None)
        self.kwargs["capturable"] = self.device.type == "cuda"
        numbers = [[x.learning_rate * scale, x.weight_decay / scale] for x in self.settings]
        self.lr, self.decay = torch.tensor(numbers, dtype=torch.float32, device=self.device).unbind(1)
        h, n = Hyperparameters(**self.kwargs), len(self.settings)
        alone = {name: x[0] for name, x in self.params.items()}
        group = {"params": [], **vars(h)}
        states = {name: new_state(x, group, flat=None) for name, x in alone.items()}
        # All models have taken as many steps, which are counted once
        self.steps = {name: own.pop("step") for name, own in states.items()}
        self._graphs: dict[torch.Size, GraphedStep] = {}  # by the shape of a batch
        self.state: dict[str, Tensors] = {
            name: {key: x.to(self.device).expand(n, *x.shape).clone() for key, x in own.items()}
            for name, own in states.items()
        }

    def __len__(self) -> int:
        return len(self.lr)

    # ---- Functions of one model, which vmap maps over all ----

    def _call(self, params: Tensors, buffers: Tensors) -> Callable[..., dict[str, Tensor]]:
        return lambda **rows: functional_call(self.model, (params, buffers), (), rows)

    def _step_of_one(self, params, state, buffers, rows, lr, decay) -> Tensor:
        grads, loss = grad_and_value(lambda p: self._call(p, buffers)(**rows)["loss"])(params)
        norm = torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]).square().sum().sqrt()
        if self.config.max_grad_norm:  # as `clip_grad_norm_`
            factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = {name: g * factor for name, g in grads.items()}
        for names, is_decayed in zip(self.groups, self.decayed, strict=True):
            m, v, maxima, grad_vars, signals = self._lists(state, names)
            steps = [self.steps[name] for name in names]
            args = [[params[name] for name in names], [grads[name] for name in names]]
            prm(
                *args,
                m,
                v,
                maxima,
                grad_vars,
                steps,
                signals,
                lr=lr,
                weight_decay=decay if is_decayed else 0.0,
                **self.kwargs,
            )
        return loss

    @staticmethod
    def _lists(state: dict[str, Tensors], names: list[str]) -> list[list[Tensor]]:
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad_var", "exp_avg_signal")
        return [[state[name][key] for name in names if key in state[name]] for key in keys]

    def _mask_of_one(self, state: dict[str, Tensors]) -> Tensor:
        m, _, _, grad_vars, signals = self._lists(state, list(state))
        return mean_mask(m, grad_vars, list(self.steps.values()), signals, **self.kwargs)

    # ---- All models ----

    def step(self, index: Tensor, factor: float) -> Tensor:
        """One step of all models; returns their losses, `(n,)`.

        Args:
            index: rows of the batch of each seed, `(seeds, batch)`.
            factor: of the learning rates, that of the schedule.
        """
        step = self._step
        if self.device.type == "cuda":
            step = self._graphs.setdefault(index.shape, GraphedStep(self._step))
        with torch.no_grad():
            return step(index, self.lr * factor)

    def _step(self, index: Tensor, lr: Tensor) -> Tensor:
        rows = {name: x[self.place[:, None], index[self.place]] for name, x in self.rows.items()}
        return vmap(self._step_of_one)(self.params, self.state, self.buffers, rows, lr, self.decay).detach()

    def evaluate(self) -> dict[str, list[float]]:
        """The metrics of all models."""
        data = {name: x[self.place] for name, x in self.data.items()}
        with torch.no_grad():
            found = vmap(lambda p, b, d: self.measure(self._call(p, b), d))(self.params, self.buffers, data)
        return {name: x.tolist() for name, x in found.items()}

    def mean_masks(self) -> list[float]:
        return vmap(self._mask_of_one)(self.state).tolist()

    def keep(self, which: list[int]) -> None:
        """Leaves the other models out from here on."""
        index = torch.tensor(which, device=self.device)
        self.params, self.buffers = ({k: x[index] for k, x in d.items()} for d in (self.params, self.buffers))
        self.state = {name: {k: x[index] for k, x in own.items()} for name, own in self.state.items()}
        self.lr, self.decay, self.place = self.lr[index], self.decay[index], self.place[index]
        self._graphs = {}  # which work on the tensors of before

    def batches(self) -> Iterator[Tensor]:
        """Without end, the rows of a batch of each seed, `(seeds, batch)`, in the order of a Trainer's."""
        size, epoch = self.config.per_device_train_batch_size, 0
        while True:
            order = torch.stack([order_of_rows(self.n_rows, seed, epoch) for seed in self.seeds]).to(self.device)
            yield from order.split(size, dim=1)
            epoch += 1


def schedule_of(config: PRMArguments) -> Iterator[float]:
    """The factors of the learning rate, step by step, as a Trainer has them."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.get_warmup_steps(config.max_steps),
        num_training_steps=config.max_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )
    while True:
        yield scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def train_stack(stack: Stack, is_done: Callable[[dict[str, float]], bool] | None = None) -> list[Record]:
    """Trains all models of a stack for the steps of its configuration and returns what became of each.

    A model whose loss is not finite, or that `is_done` by the metrics of an evaluation, is left out from there on. The
    seconds of a model are its share of those of the stack.
    """
    config, records = stack.config, [Record([]) for _ in stack.settings]
    left, seconds = list(range(len(records))), 0.0  # numbers of the models that are in the stack
    schedule, batches, losses = schedule_of(config), stack.batches(), []
    for step in range(config.max_steps + 1):
        if step:
            started = time.perf_counter()
            losses.append(stack.step(next(batches), next(schedule)))
            every = int(config.eval_steps)
            if step % every and step != config.max_steps:
                seconds += (time.perf_counter() - started) / len(left)
                continue
            mean_loss = torch.stack(losses).mean(0).tolist()  # waits for the device
            seconds += (time.perf_counter() - started) / len(left)
        masks = stack.mean_masks() if step else []
        found = stack.evaluate()
        stays = []
        for i, number in enumerate(left):
            record = records[number]
            record.steps = step
            metrics = {name: values[i] for name, values in found.items()}
            if step:
                record.history.append({"step": step, "train/loss": mean_loss[i], "mask/mean_q": masks[i]})
            record.history.append({"step": step, **metrics, SECONDS: round(seconds, 6)})
            if step and not math.isfinite(mean_loss[i]):
                record.diverged_at_step = step
            elif is_done is None or not is_done(metrics):
                stays.append(i)
        losses = []
        if not stays:
            break
        if len(stays) < len(left):
            left = [left[i] for i in stays]
            stack.keep(stays)
    return records


def final_metrics_of(records: list[Record]) -> list[dict[str, Any]]:
    """The final metrics of each model, as a run's `metrics.json` has them."""
    found = []
    for record in records:
        if record.diverged_at_step is not None:
            found.append({"diverged": True, "diverged_at_step": record.diverged_at_step, "steps": record.steps})
            continue
        values = {k: v for row in record.history for k, v in row.items() if not k.startswith("train/")}
        found.append({**{k: v for k, v in values.items() if k != "step"}, "steps": record.steps})
    return found
