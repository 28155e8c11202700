"""PRM's step by the Triton kernels of `kernels.py`: their tables, and what is launched for a list of tensors."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from .. import masks
from ..foreach import TensorLists
from ..hyperparameters import MASKS, Hyperparameters
from ..lists import PlanList
from ..quantized import BLOCK, is_quantized
from .kernels import SCALARS, SCALES, STATES, row_kernel, step_kernel


@dataclass(frozen=True)
class Sizes:
    """How a list of tensors is cut up, as was fastest on an H200.

    Attributes:
        chunk: elements of an item of `step_kernel`.
        warps: of its programs.
        programs: so many of them on a multiprocessor, each for many items; or 0 for one program an item.
        row_tiles: rows and columns of an item of `row_kernel`: the first tile that a row fits in, or the last one
            again and again.
        row_warps: of its programs.
    """

    chunk: int
    warps: int
    programs: int
    row_tiles: tuple[tuple[int, int], ...]
    row_warps: int


SMALL = 2**18  # no tensor has more elements, as with LoRA
LARGE_SIZES = Sizes(2048, 4, 0, ((64, 64), (2, 1024), (1, 4096)), 4)
SMALL_SIZES = Sizes(2048, 8, 8, ((128, 16), (16, 64), (1, 1024), (1, 8192)), 4)
# In 8 bits tiles are of whole blocks. With more elements a thread these do not fit into its registers, and with more
# warps a program the maximum of a block takes longer.
SIZES_8BIT = Sizes(1024, 2, 0, ((4, 256), (1, 1024)), 2)
LAG = 768  # statistics items between a tensor's last and its first update: about what all programs hold at a time
# `TRITON_INTERPRET=1`: the kernel runs on a CPU, slowly, to be tested.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MASKS = {name: number for number, name in enumerate(MASKS)}
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_STATE_DTYPES = {**_DTYPES, torch.uint8: tl.uint8}


class KernelTables:
    """The tables of a list of tensors on one device, of one parameter dtype and one dtype of each moment.

    `exp_avg_signal` is kept as `exp_avg`, all other state in float32. The tables hold as long as the tensors keep
    their storages; the gradients may be new tensors at every step.

    Args:
        lists: contiguous tensors; `grads` are not used. Without `grad_vars` masks are decided between the halves of a
            step.
        code: what of the settings is compiled in, see [`code_of`].

    Attributes:
        sums: Σ(g - center)² and Σm² of each tensor, or of each row of each tensor, float64 `(units, 2)`, after the
            first half of a step.
        q: their masks for the second half, float32 `(units,)`.
    """

    def __init__(self, lists: TensorLists, code: dict[str, Any]) -> None:
        params = lists.params
        self.device, n = params[0].device, len(params)
        self._lists = lists._replace(grads=[])  # keeps their storages
        other_kernels = {"PER_TENSOR"} if code["PER_ROW"] else {"SIGNAL"}
        self._code = {name: value for name, value in code.items() if name not in {"PER_ROW", *other_kernels}}
        kinds = {"P": params, "M": lists.exp_avgs, "V": lists.exp_avg_sqs}
        self._dtypes = {name: _STATE_DTYPES[tensors[0].dtype] for name, tensors in kinds.items()}
        self._quantized = is_quantized(lists.exp_avgs[0])
        kept = [params, lists.exp_avgs, lists.exp_avg_sqs, lists.max_exp_avg_sqs]
        kept += [] if code["PER_TENSOR"] or code["PER_ROW"] else [lists.grad_vars]
        self._itemsize = max(tensors[0].dtype.itemsize for tensors in kept if tensors)
        numels = np.array([p.numel() for p in params], dtype=np.int64)
        self._sizes = LARGE_SIZES if numels.max(initial=0) > SMALL else SMALL_SIZES
        if self._quantized:
            self._sizes = SIZES_8BIT
        chunk = self._sizes.chunk
        rows = np.array([masks.n_rows(p) for p in params], dtype=np.int64)
        widths = numels // np.maximum(rows, 1)
        n_chunks = -(-numels // chunk)
        if self._quantized:  # of whole blocks, which end where rows do
            n_chunks = -(-rows * -(-widths // BLOCK) // (chunk // BLOCK))
        self._even = self._quantized and bool((widths % 16 == 0).all())
        first = np.concatenate([[0], np.cumsum(n_chunks)]).astype(np.int32)
        chunk_tensors = np.repeat(np.arange(n, dtype=np.int32), n_chunks)
        statistics = self._upload(2 * np.arange(first[-1], dtype=np.int32))
        updates = statistics + 1
        whole = [(0, updates)]
        if code["PER_TENSOR"]:
            whole = [(3, statistics), (2, updates)]
            if self._sizes.programs:
                whole = [(0, self._upload(_schedule(first, chunk_tensors)))]
        # By phase of a step, the launches: what of it each does, and its items
        self._launches = {0: whole, 1: [(1, statistics)], 2: [(2, updates)]}
        self._chunk_tensors = self._upload(chunk_tensors)
        self._addresses = _addresses(lists)
        # The scalars of a tensor or a row are read by themselves
        by_unit = code["PER_TENSOR"] or code["PER_ROW"]
        unaligned = {*SCALES, "grad_var"} if by_unit else {*SCALES}
        self._aligned = all(_are_aligned(x) for key, x in self._addresses.items() if key not in unaligned)
        self._tiles = self._cut_rows(rows, numels) if code["PER_ROW"] else []
        columns = (*self._addresses.values(), numels, first[:-1], rows, np.cumsum(rows) - rows)  # as `TENSOR` says
        self._table = self._upload(np.stack([x if len(x) else np.zeros_like(numels) for x in columns], axis=1))
        self._counters = torch.zeros(1 + 2 * n, dtype=torch.int32, device=self.device)
        self._partials = torch.empty(2 * max(int(first[-1]), 1), dtype=torch.float64, device=self.device)
        units = n
        if code["PER_ROW"]:  # whole rows keep their sums and masks to themselves
            units = 0 if lists.grad_vars else int(rows.sum())
        self.sums = torch.zeros(units, 2, dtype=torch.float64, device=self.device)
        self.q = torch.ones(units, device=self.device)
        self._programs = self._sizes.programs
        if self.device.type == "cuda":
            self._programs *= torch.cuda.get_device_properties(self.device).multi_processor_count
        self._grads: list[int] = []
        self._make_room(0)

    def _cut_rows(self, rows: np.ndarray, numels: np.ndarray) -> list[tuple[Tensor, dict[str, Any]]]:
        """The items of each launch of the rows' kernel, and what is compiled in for it."""
        columns = numels // np.maximum(rows, 1)
        shapes = self._sizes.row_tiles
        kinds = np.searchsorted(np.array([width for _, width in shapes[:-1]]), columns)
        tiles = []
        for kind, (height, width) in enumerate(shapes):
            members = np.flatnonzero((kinds == kind) & (numels > 0))
            if len(members):
                items = [np.stack(np.broadcast_arrays(i, np.arange(0, rows[i], height)), axis=1) for i in members]
                even = bool((columns[members] % 16 == 0).all())
                items = self._upload(np.concatenate(items).astype(np.int32))
                tiles.append((items, {"ROWS": height, "COLS": width, "EVEN": even}))
        return tiles

    def _make_room(self, n_rows: int) -> None:
        """For what is sent at each step, in one piece: the table of the gradients and `n_rows` of scalars."""
        n, self._rows = len(self._lists.params), None
        self._here = torch.zeros(2 * n + len(SCALARS) * n_rows, dtype=torch.int64, device="cpu")
        self._there = self._upload(self._here.numpy())
        grads, scalars = self._here[: 2 * n], self._here[2 * n :].view(torch.float64)
        self._grads_here, self._scalars_here = grads.view(n, 2).numpy(), scalars.view(-1, len(SCALARS)).numpy()
        self._grads_there, self._scalars_there = self._there[: 2 * n], self._there[2 * n :].view(torch.float64)

    def _upload(self, array: np.ndarray) -> Tensor:
        return self._sendable(torch.from_numpy(np.ascontiguousarray(array))).to(self.device, non_blocking=True)

    def _sendable(self, tensor: Tensor) -> Tensor:
        """Such that the host need not wait for the device: CUDA takes up to 64 kB along with the command."""
        return tensor.pin_memory() if self.device.type == "cuda" and tensor.nbytes > 2**16 else tensor

    def _vector(self, grad_dtype: torch.dtype) -> int:
        """Elements that a thread may read at once: 16 bytes of the widest dtype, or of codes of 8 bits."""
        return 16 if self._quantized else 16 // max(self._itemsize, grad_dtype.itemsize)

    def fits(self, lists: TensorLists) -> bool:
        """Whether the tensors still have the storages that the tables were made of."""
        return all(np.array_equal(new, self._addresses[name]) for name, new in _addresses(lists).items())

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
        if len(self._chunk_tensors) == 0:
            return
        on_device = isinstance(scalars, Tensor)
        if not on_device and scalars.shape != self._scalars_here.shape:
            self._make_room(len(scalars))
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
            "ALIGNED": self._vector(dtype) if self._aligned and self._grads_aligned else 0,
            "num_warps": self._sizes.row_warps if self._tiles else self._sizes.warps,
            **self._code,
        }
        found_inf = self._counters if found_inf is None else found_inf
        if self._tiles:
            arguments = (self._table, self._grads_there, scalars, self.sums, self.q, found_inf)
            for rows_of_tile, tile in self._tiles:
                row_kernel[(len(rows_of_tile),)](rows_of_tile, *arguments, PHASE=phase, **tile, **given)
            return
        tables = self._chunk_tensors, self._table, len(addresses), self._grads_there, scalars
        results = self._counters, self._partials, self.sums, self.q, found_inf
        given |= {"CHUNK": self._sizes.chunk, "EVEN": self._even, "PERSISTENT": self._programs > 0}
        for part, items in self._launches[phase]:
            n_items = len(items)
            if self._programs or part != 2:
                self._counters.zero_()
            grid = min(n_items, self._programs) if self._programs else n_items
            step_kernel[(grid,)](items, n_items, *tables, *results, PHASE=part, **given)


class TritonList(PlanList):
    """Slices of tensors of one device, dtype and form of settings, also of several groups, which the kernel takes."""

    def __init__(self, members, locator, unit_masks, tables) -> None:
        super().__init__(members, locator, unit_masks, tables)
        lists, code = self.tensor_lists(), code_of(self.settings.h)
        # Not by identity: slices of flat partitions are new views in each plan.
        key = (*((p.data_ptr(), p.numel()) for p in lists.params), *code.values(), unit_masks is None)
        self._tables = tables.pop(key, None)
        if self._tables is None or not self._tables.fits(lists):
            self._tables = KernelTables(lists, code)
        tables[key] = self._tables
        while len(tables) > 8:  # of parameters that do not all have gradients at each step
            tables.pop(next(iter(tables)))
        members = [self.members[i] for i, _ in self.slices]
        self._settings = {member.cohort: member.settings for member in members}
        self._capturable = self.settings.h.capturable
        # Of each slice, its row in the table of scalars, where each cohort has one, or with `capturable` one a place
        places = [(m.cohort, m.place * self._capturable) for m in members]
        self._sizes = {i: 1 + max(place for cohort, place in places if cohort == i) for i in self._settings}
        begin = dict(zip(self._sizes, np.cumsum([0, *self._sizes.values()]), strict=False))
        self._rows = np.array([begin[cohort] + place for cohort, place in places], dtype=np.int32)
        self._scalars: np.ndarray | Tensor | None = None
        # Of slices of flat buffers, of which and from which of its elements on
        self._cuts = np.array([(i, piece.start) for i, piece in self.slices], dtype=np.int64).reshape(-1, 2).T
        self._is_cut = locator.flat

    def set_gradients(self, grads: list[Tensor]) -> None:
        super().set_gradients(grads if all(map(Tensor.is_contiguous, grads)) else list(map(Tensor.contiguous, grads)))

    def _run(self, phase: int, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        addresses = list(map(Tensor.data_ptr, self._grads))
        if self._is_cut:
            which, starts = self._cuts
            addresses = (np.array(addresses)[which] + starts * self._grads[0].element_size()).tolist()
        scalars = self._scalars
        if grad_scale is not None:
            scalars[:, SCALARS.index("unscale")] = 1 / grad_scale.double()
        if found_inf is not None:
            found_inf = found_inf.to(self._tables.device, non_blocking=True)
        self._tables.run(addresses, self._grad_dtype, scalars, self._rows, phase=phase, found_inf=found_inf)

    def _set_scalars(self, scalars: list[masks.StepScalars]) -> None:
        rows = {cohort: scalar_row(scalars[cohort], settings) for cohort, settings in self._settings.items()}
        if not self._capturable:
            self._scalars = np.array(list(rows.values()), dtype=np.float64)
            return
        # Filled in on the device: a copy from the host could not be captured in a graph.
        tables = []
        for cohort, row in rows.items():
            t = scalars[cohort].bias1.double()
            columns = [x.double().expand(len(t)) if isinstance(x, Tensor) else torch.full_like(t, x) for x in row]
            tables.append(torch.stack(columns, dim=1)[: self._sizes[cohort]])  # a cohort may go on in another list
        self._scalars = torch.cat(tables)

    def first_half(self, scalars: list[masks.StepScalars]) -> Tensor:
        self._set_scalars(scalars)
        self._run(phase=1)
        return self._tables.sums

    def second_half(self, scalars: list[masks.StepScalars], q: Tensor) -> None:
        self._tables.q.copy_(q)
        self._run(phase=2)

    def whole_step(self, scalars: list[masks.StepScalars], grad_scale=None, found_inf=None) -> None:
        self._set_scalars(scalars)
        self._run(0, grad_scale, found_inf)


def code_of(h: Hyperparameters) -> dict[str, Any]:
    """What of the settings decides which code is compiled."""
    return {
        "MASK": _MASKS[h.mask],
        "DEBIASED": h.estimator == "debiased",
        "PER_TENSOR": h.masked and h.reduction == "per_tensor",
        "PER_ROW": h.masked and h.reduction == "per_row",
        "SIGNAL": h.signal_beta is not None,
        "AMSGRAD": h.amsgrad,
        "COUPLED": h.weight_decay != 0 and not h.decoupled_weight_decay,
        "MAXIMIZE": h.maximize,
    }


def scalar_row(c: masks.StepScalars, settings) -> list[float | Tensor]:
    """A row of [`SCALARS`]; with `capturable` some of them are vectors of the steps of several tensors."""
    h, lr = settings.h, settings.lr
    lr = lr.double() if isinstance(lr, Tensor) else lr
    values = {
        **c._asdict(),
        "step_size": lr / c.bias1,
        "bias2_sqrt": c.bias2**0.5,
        "decay": 1 - lr / h.step_length * h.weight_decay if h.decoupled_weight_decay else 1.0,
        "one_minus_beta1": 1 - h.beta1,
        "one_minus_beta2": 1 - h.beta2,
        "eps": settings.eps,
        "first_ratio": masks.first_noise_ratio(h),
        "unscale": 1.0,
        "one_minus_signal_beta": 1 - (h.signal_beta or 0.0),
    }
    return [values[name] if name in values else getattr(h, name) for name in SCALARS]


def supports(param: Tensor, grad: Tensor) -> bool:
    """Whether a tensor can be stepped by the kernel: contiguous, float32 or less, on a GPU (or interpreted)."""
    return (
        param.dtype in _DTYPES and param.is_contiguous() and (param.is_cuda or INTERPRETED) and grad.dtype in _DTYPES
    )


def _addresses(lists: TensorLists) -> dict[str, np.ndarray]:
    """Where the tensors are, by the names of `STATES` and `SCALES`."""
    states = dict(zip(STATES, (lists.params, *lists[2:]), strict=True))
    scales = {}
    for key, tensors in states.items():
        if tensors and is_quantized(tensors[0]):
            scales[f"{key}_scale"] = [x.scale for x in tensors]
            states[key] = [x.codes for x in tensors]
    states |= {key: scales.get(key, []) for key in SCALES}
    return {key: np.array([x.data_ptr() for x in xs], dtype=np.int64) for key, xs in states.items()}


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
