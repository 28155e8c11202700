"""PRM's step by the Triton kernels of `kernels.py`: their tables, and what is launched for a list of tensors."""

import functools
import os
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from . import masks
from .kernels import SCALARS, STATES, TENSOR, row_kernel, step_kernel
from .quantized import is_quantized
from .step import needs_sums, scalars_of


CHUNK = 4096  # elements an item,
SMALL_CHUNK, SMALL = 1024, 2**18  # and where no tensor has more than so many, as with LoRA
LAG = 768  # statistics items between a tensor's last and its first update: about what all programs hold at a time
PROGRAMS_PER_MULTIPROCESSOR = 6
# Rows and columns of an item of `per_row`: the first tile that a row fits in, or the last one again and again.
ROW_TILES = ((64, 64), (4, 1024), (1, 4096))
N_WARPS = 4
# `TRITON_INTERPRET=1`: the kernel runs on a CPU, slowly, to be tested.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MASKS = {name: number for number, name in enumerate(masks.MASKS)}
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class FusedList:
    """The tables of a list of tensors on one device, of one parameter dtype and one dtype of `exp_avg`.

    All other state is float32.

    They hold as long as the tensors keep their storages; the gradients may be new tensors at every step.

    Args:
        params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, grad_vars, exp_avg_signals: as in [`prm`]; contiguous. Without
            `grad_vars` tensors or rows are held in parts, and a step has two halves.
        code: what of the settings is compiled in, see [`code_of`].

    Attributes:
        sums: Σ(g - center)² and Σm² of each tensor, or of each row of each tensor, float64 `(units, 2)`, after the
            first half of a step.
        q: their masks for the second half, float32 `(units,)`.
    """

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        grad_vars: list[Tensor],
        exp_avg_signals: list[Tensor],
        code: dict[str, Any],
    ) -> None:
        self.device, n = params[0].device, len(params)
        # Keeps their storages
        self._tensors = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, grad_vars, exp_avg_signals)
        other_kernels = {"PER_TENSOR"} if code["PER_ROW"] else {"SIGNAL"}
        self._code = {name: value for name, value in code.items() if name not in {"PER_ROW", *other_kernels}}
        self._dtypes = {"P": _DTYPES[params[0].dtype], "M": _DTYPES[exp_avgs[0].dtype]}
        numels = np.array([p.numel() for p in params], dtype=np.int64)
        self._chunk = CHUNK if numels.max(initial=0) > SMALL else SMALL_CHUNK
        n_chunks = -(-numels // self._chunk)
        first = np.concatenate([[0], np.cumsum(n_chunks)]).astype(np.int32)
        chunk_tensors = np.repeat(np.arange(n, dtype=np.int32), n_chunks)
        statistics, updates = 2 * np.arange(first[-1], dtype=np.int32), 2 * np.arange(first[-1], dtype=np.int32) + 1
        whole = _schedule(first, chunk_tensors) if code["PER_TENSOR"] else updates
        items = {0: whole, 1: statistics, 2: updates}
        self._items = {phase: (self._upload(array), len(array)) for phase, array in items.items()}
        self._chunk_tensors = self._upload(chunk_tensors)
        self.addresses = [_addresses(tensors) for tensors in self._tensors]
        elementwise = list(self.addresses)
        if code["PER_TENSOR"] or code["PER_ROW"]:  # the scalars of a tensor or a row are read by themselves
            del elementwise[STATES.index("grad_var")]
        self._aligned = all(map(_are_aligned, elementwise))
        rows = np.array([masks.n_rows(p) for p in params], dtype=np.int64)
        self._tiles = self._cut_rows(rows, numels) if code["PER_ROW"] else []
        table = np.zeros((n, len(TENSOR)), dtype=np.int64)
        first_row = np.cumsum(rows) - rows
        for column, values in enumerate((*self.addresses, numels, first[:-1], rows, first_row)):
            if len(values):
                table[:, column] = values
        self._table = self._upload(table)
        self._counters = torch.zeros(1 + 2 * n, dtype=torch.int32, device=self.device)
        self._partials = torch.empty(2 * max(int(first[-1]), 1), dtype=torch.float64, device=self.device)
        units = n
        if code["PER_ROW"]:  # whole rows keep their sums and masks to themselves
            units = 0 if grad_vars else int(rows.sum())
        self.sums = torch.zeros(units, 2, dtype=torch.float64, device=self.device)
        self.q = torch.ones(units, device=self.device)
        self._programs = 1
        if self.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
            self._programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._grads: list[int] = []
        self._rows: np.ndarray | None = None
        self._make_room(0)

    def _cut_rows(self, rows: np.ndarray, numels: np.ndarray) -> list[tuple[Tensor, dict[str, Any]]]:
        """The items of each launch of the rows' kernel, and what is compiled in for it."""
        columns = numels // np.maximum(rows, 1)
        widths = np.array([width for _, width in ROW_TILES[:-1]])
        kinds = np.searchsorted(widths, columns)
        tiles = []
        for kind, (height, width) in enumerate(ROW_TILES):
            members = np.flatnonzero((kinds == kind) & (numels > 0))
            if len(members):
                items = [np.stack(np.broadcast_arrays(i, np.arange(0, rows[i], height)), axis=1) for i in members]
                even = bool((columns[members] % 16 == 0).all())
                items = self._upload(np.concatenate(items).astype(np.int32))
                tiles.append((items, {"ROWS": height, "COLS": width, "EVEN": even}))
        return tiles

    def _make_room(self, n_rows: int) -> None:
        """For what is sent at each step, in one piece: the table of the gradients and `n_rows` of scalars."""
        n = len(self._tensors[0])
        self._here = torch.zeros(2 * n + len(SCALARS) * n_rows, dtype=torch.int64)
        self._there = self._upload(self._here.numpy())
        grads, scalars = self._here[: 2 * n], self._here[2 * n :].view(torch.float64)
        self._grads_here, self._scalars_here = grads.view(n, 2).numpy(), scalars.view(-1, len(SCALARS)).numpy()
        self._grads_there, self._scalars_there = self._there[: 2 * n], self._there[2 * n :].view(torch.float64)

    def _upload(self, array: np.ndarray) -> Tensor:
        return self._sendable(torch.from_numpy(np.ascontiguousarray(array))).to(self.device, non_blocking=True)

    def _sendable(self, tensor: Tensor) -> Tensor:
        """Such that the host need not wait for the device: CUDA takes up to 64 kB along with the command."""
        return tensor.pin_memory() if self.device.type == "cuda" and tensor.nbytes > 2**16 else tensor

    def fits(self, *lists: list[Tensor]) -> bool:
        """Whether the tensors still have the storages that the tables were made of."""
        return all(np.array_equal(_addresses(new), old) for new, old in zip(lists, self.addresses, strict=True))

    def run(
        self,
        addresses: list[int],
        dtype: torch.dtype,
        scalars: np.ndarray | Tensor,
        rows: np.ndarray,
        phase: int = 0,
        found_inf: Tensor | None = None,
    ) -> None:
        """One step, or one half of it.

        Args:
            addresses: of the gradients, which are contiguous.
            dtype: the gradients'.
            scalars: float64 (any number, len(SCALARS)).
            rows: int32 (n,), the row of `scalars` that is a tensor's.
            phase: 0 all; 1 the sums over tensors or rows, which are left in `sums`; 2 the update, with the masks in
                `q`.
            found_inf: GradScaler's, on the device: nothing is done unless it is 0. With it gradients are unscaled.
        """
        items, n_items = self._items[phase]
        if n_items == 0:
            return
        on_device = isinstance(scalars, Tensor)
        if not on_device and scalars.shape != self._scalars_here.shape:
            self._make_room(len(scalars))
            self._rows = None
        moved = addresses != self._grads or not (rows is self._rows or np.array_equal(rows, self._rows))
        if moved:
            self._grads, self._rows = addresses, rows
            self._grads_here[:, 0], self._grads_here[:, 1] = addresses, rows
            self._grads_aligned = _are_aligned(self._grads_here[:, 0])
        changed = not on_device and not np.array_equal(scalars, self._scalars_here)
        if changed:
            self._scalars_here[:] = scalars
        if not on_device:
            scalars = self._scalars_there
        if moved or changed:  # else nothing: the second half needs no upload, and a step can be captured in a graph
            self._there.copy_(self._sendable(self._here), non_blocking=True)
        given = {
            "SCALED": found_inf is not None,
            **self._dtypes,
            "G": _DTYPES[dtype],
            "ALIGNED": self._aligned and self._grads_aligned,
            "N_ENTRIES": len(TENSOR),
            "N_SCALARS": len(SCALARS),
            "PHASE": phase,
            "num_warps": N_WARPS,
            **self._code,
        }
        found_inf = self._counters if found_inf is None else found_inf
        if self._tiles:
            arguments = (self._table, self._grads_there, scalars, self.sums, self.q, found_inf)
            for rows_of_tile, tile in self._tiles:
                row_kernel[(len(rows_of_tile),)](rows_of_tile, *arguments, **tile, **given)
            return
        self._counters.zero_()
        step_kernel[(min(n_items, self._programs),)](
            items,
            n_items,
            self._chunk_tensors,
            self._table,
            len(addresses),
            self._grads_there,
            scalars,
            self._counters,
            self._partials,
            self.sums,
            self.q,
            found_inf,
            CHUNK=self._chunk,
            **given,
        )


class FusedStep:
    """[`ListStep`] in one kernel: the same halves, and `whole` for tensors whose masks need nobody else's sums.

    Args:
        lists: as of [`ListStep`].
        hyper: the settings, as in [`prm`].
        tables: where the tables of lists are kept from step to step.
        grad_scale: the factor, on the device, that GradScaler has left in the gradients; needs capturable.
    """

    def __init__(
        self,
        lists: dict[str, list[Tensor]],
        hyper: dict[str, Any],
        tables: dict[tuple, FusedList],
        grad_scale: Tensor | None = None,
    ) -> None:
        states = [lists[f"{name}s"] for name in STATES]
        self.grad_vars, self.state_steps = lists["grad_vars"], lists["state_steps"]
        code = code_of(hyper)
        self._pauses = needs_sums(hyper)
        # Not by identity: slices of flat partitions are new views at each step.
        key = (*((p.data_ptr(), p.numel()) for p in lists["params"]), *code.values())
        self._list = tables.get(key)
        if self._list is None or not self._list.fits(*states):
            while len(tables) > 8:  # of parameters that do not all have gradients at each step
                tables.pop(next(iter(tables)))
            self._list = tables[key] = FusedList(*states, code)
        self._grads = [g.contiguous() for g in lists["grads"]]  # holding them until the step is done
        scalars, rows = scalar_table(self.state_steps, hyper)
        if grad_scale is not None:
            scalars[:, SCALARS.index("unscale")] = 1 / grad_scale.double()
        addresses = list(map(Tensor.data_ptr, self._grads))
        self._run = functools.partial(self._list.run, addresses, self._grads[0].dtype, scalars, rows)

    def whole(self, found_inf: Tensor | None = None) -> None:
        self._run(found_inf=found_inf)

    def moments(self) -> Tensor | None:
        if not self._pauses:
            return None
        self._run(phase=1)
        return self._list.sums

    def update(self, q: Tensor | None = None) -> None:
        if q is not None:
            self._list.q.copy_(q)
        self._run(phase=2)


def code_of(hyper: dict[str, Any]) -> dict[str, Any]:
    """What of the settings decides which code is compiled."""
    return {
        "MASK": _MASKS[hyper["mask"]],
        "DEBIASED": hyper["estimator"] == "debiased",
        "PER_TENSOR": hyper["mask"] != "none" and hyper["reduction"] == "per_tensor",
        "PER_ROW": hyper["mask"] != "none" and hyper["reduction"] in ("per_row", masks.ROWS_IN_PARTS),
        "SIGNAL": hyper["signal_beta"] is not None,
        "AMSGRAD": hyper["amsgrad"],
        "COUPLED": hyper["weight_decay"] != 0 and not hyper["decoupled_weight_decay"],
        "MAXIMIZE": hyper["maximize"],
    }


def scalar_table(state_steps: list[Tensor], hyper: dict[str, Any]) -> tuple[np.ndarray | Tensor, np.ndarray]:
    """The rows of `SCALARS` of all steps, float64, and for each tensor which one is its own, int32."""
    if hyper["capturable"]:  # the steps are on the device, and must stay there
        t = torch.stack(state_steps).double()
        rows = scalar_row(t, hyper)
        # Filled in on the device: a copy from the host could not be captured in a graph.
        columns = [x.double().expand(len(t)) if isinstance(x, Tensor) else torch.full_like(t, x) for x in rows]
        return torch.stack(columns, dim=1), np.arange(len(t), dtype=np.int32)
    steps = torch.stack(state_steps).tolist()
    number = {t: i for i, t in enumerate(dict.fromkeys(steps))}
    table = np.array([scalar_row(t, hyper) for t in number], dtype=np.float64)
    return table, np.array([number[t] for t in steps], dtype=np.int32)


def scalar_row(t: float | Tensor, hyper: dict[str, Any]) -> list:
    """One row of `SCALARS`."""
    c = scalars_of(t, hyper)
    lr = hyper["lr"].double() if isinstance(hyper["lr"], Tensor) else hyper["lr"]
    decay = 1 - lr * hyper["weight_decay"] if hyper["decoupled_weight_decay"] else 1.0
    ratio = masks.first_noise_ratio(hyper["beta1"], hyper["rho"], hyper["bias_correction"])
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    own = [lr / c.bias1, c.bias2**0.5, decay, c.center, c.weight, c.signal, c.noise, c.first, c.open]
    settings = ["rho", "eps", "weight_decay", "alpha", "softness", "mask_eps"]
    floor, signal_beta = c.floor, hyper["signal_beta"] or 0.0
    return [*own, 1 - beta1, beta2, 1 - beta2, *(hyper[x] for x in settings), ratio, 1.0, floor, 1 - signal_beta]


def supports(part: dict[str, list[Tensor]]) -> bool:
    """Whether tensors can be stepped by the kernel: contiguous, float32 or less, on a GPU (or interpreted)."""
    return all(
        p.dtype in _DTYPES
        and p.is_contiguous()
        and (p.is_cuda or INTERPRETED)
        and g.dtype in _DTYPES
        and not is_quantized(m)
        for p, g, m in zip(part["params"], part["grads"], part["exp_avgs"], strict=True)
    )


def _addresses(tensors: list[Tensor]) -> np.ndarray:
    return np.array([x.data_ptr() for x in tensors], dtype=np.int64)


def _are_aligned(addresses: np.ndarray) -> bool:
    return bool((addresses % 16 == 0).all())


def _schedule(first: np.ndarray, chunk_tensors: np.ndarray) -> np.ndarray:
    """The items of a whole per-tensor step in order: 2c is the statistics of chunk c, 2c + 1 its update.

    Statistics go from front to back. An update may come once `LAG` further statistics follow those of its tensor, and
    the two alternate; so programs rarely wait, and find g and m in the cache.
    """
    chunks = np.arange(len(chunk_tensors), dtype=np.int64)
    begin, end = first[chunk_tensors].astype(np.int64), first[chunk_tensors + 1].astype(np.int64)
    backwards = begin + end - 1 - chunks  # updates, tensor by tensor, each from its end
    keys = chunks + np.maximum.accumulate(end + LAG - chunks)
    order = np.argsort(np.concatenate([chunks, keys]), kind="stable")
    return np.concatenate([2 * chunks, 2 * backwards + 1])[order].astype(np.int32)
