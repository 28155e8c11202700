"""What the ranks of a run recorded, put together and compared: with another run, or with PRM written a second time."""

import itertools

import numpy as np
import torch

from ..optim.reference_prm import ReferenceTensor
from ..optim.reference_quantized import bf16_stochastic, dequantize, quantize, random_bits


def assemble(ranks: list[dict], step: int, field: str) -> dict[int, torch.Tensor]:
    """By number of each original tensor, `field` of a step over the whole tensor, flattened.

    Slices that several ranks hold must be equal on them, and what is put together must have no gap.
    """
    found = {}
    for rank in ranks:
        for segment in rank["steps"][step]["slices"]:
            if segment[field] is None or len(segment[field]) == 0:
                continue
            offsets = found.setdefault(segment["tensor"], {})
            other = offsets.setdefault(segment["offset"], segment[field])
            if field != "grad":  # DeepSpeed's gradients beyond its own slice are not reduced
                assert torch.equal(other, segment[field]), f"ranks disagree on tensor {segment['tensor']}"
    return {number: torch.cat([parts[o] for o in sorted(parts)]) for number, parts in sorted(found.items())}


def masks_of(ranks: list[dict], step: int) -> dict[int, torch.Tensor]:
    """By number of each original tensor, its mask: for `per_tensor` one value, else one for each scalar parameter."""
    qs = {}
    for rank in ranks:
        for number, q in rank["steps"][step]["q"].items():
            assert qs.setdefault(number, q) == q, f"ranks disagree on the mask of tensor {number}"
    qs = {number: torch.tensor([q], dtype=torch.float64) for number, q in qs.items()}
    return qs or _masks_of_rows(ranks, step) or assemble(ranks, step, "q")


def _masks_of_rows(ranks: list[dict], step: int) -> dict[int, torch.Tensor]:
    """Those of tensors held in parts, one for each scalar parameter."""
    rows, qs = {}, {}
    for rank in ranks:
        for number, values in rank["steps"][step]["row_q"].items():
            for row, q in values.items():
                assert rows.setdefault(number, {}).setdefault(row, q) == q, f"ranks disagree on row {row} of {number}"
    lengths = {number: len(tensor) for number, tensor in assemble(ranks, step, "before").items()} if rows else {}
    for number, values in sorted(rows.items()):
        assert sorted(values) == list(range(len(values))), f"tensor {number} lacks rows"
        q = torch.tensor([values[row] for row in range(len(values))], dtype=torch.float64)
        qs[number] = q.repeat_interleave(lengths[number] // len(values))
    return qs


def difference(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor], relative: bool) -> float:
    """The largest difference of two sets of tensors; with `relative` each element's relative to `b`'s."""
    assert a.keys() == b.keys(), f"{sorted(a)} and {sorted(b)}"
    largest = 0.0
    for number, x in a.items():
        y = b[number]
        assert x.shape == y.shape, f"tensor {number}: {x.shape} and {y.shape}"
        distance = (x.double() - y.double()).abs()
        if relative:
            distance = torch.where(distance == 0, distance, distance / y.double().abs())
        largest = max(largest, distance.max().item())
    return largest


def is_relative(prm: dict) -> bool:
    """Whether masks are compared by their relative difference.

    `"ema"` masks of whole tensors are. The others can be as close to zero as one likes, by a difference of two nearly
    equal numbers in float32: only the absolute difference of two computations of such a mask is bounded.
    """
    return prm["reduction"] == "per_tensor" and prm.get("estimator", "ema") == "ema"


def compare_runs(a: list[dict], b: list[dict], prm: dict, leave_out: tuple[int, ...] = ()) -> tuple[float, float]:
    """The largest difference of masks and of weights over the last steps of two runs, as many as the shorter has."""

    def kept(tensors):
        return {number: x for number, x in tensors.items() if number not in leave_out}

    n_steps = min(len(a[0]["steps"]), len(b[0]["steps"]))
    assert n_steps > 0
    mask = weight = 0.0
    for step in range(-n_steps, 0):
        assert a[0]["steps"][step]["step"] == b[0]["steps"][step]["step"]
        mask = max(mask, difference(kept(masks_of(a, step)), kept(masks_of(b, step)), is_relative(prm)))
        weights = [kept(assemble(ranks, step, "after")) for ranks in (a, b)]
        weight = max(weight, difference(*weights, relative=False))
    return mask, weight


def compare_scalar_masks(a: list[dict], b: list[dict]) -> float:
    """The largest difference of masks of `per_param`, each times its gradient's share of the tensor's largest.

    By that share the rounding of a gradient, which is that of the largest, is small beside the gradient itself: a mask
    moves by their quotient. (A gradient that is zero but for rounding, as of the keys' bias, has any mask.)
    """
    largest = 0.0
    for step in range(len(b[0]["steps"])):
        masks, others, gradients = masks_of(a, step), masks_of(b, step), assemble(b, step, "grad")
        for number, gradient in gradients.items():
            share = gradient.double().abs() / gradient.double().abs().max()
            distance = (masks[number].double() - others[number].double()).abs()
            largest = max(largest, torch.where(share > 0, distance * share, 0).max().item())
    return largest


def _round(reference: ReferenceTensor, lengths: dict[int, int]) -> None:
    """Keeps the moments as `state_dtype="bf16"` does, in segments of these lengths by their offsets."""
    for moment in "ma":
        rounded = torch.from_numpy(getattr(reference, moment)).to(torch.bfloat16)
        setattr(reference, moment, rounded.double().numpy())
    v = reference.v.ravel()
    parts = [bf16_stochastic(v[offset : offset + length], reference.t) for offset, length in sorted(lengths.items())]
    reference.v = np.concatenate(parts).reshape(reference.v.shape)


MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v", "exp_avg_signal": "a"}


def _in_8_bits(x: np.ndarray, in_row: int, offset: int, name: str, step: int) -> np.ndarray:
    """Elements of a matrix from `offset` on in 8 bits: what is left of a row, whole rows, and the beginning of one."""
    first = min(-offset % in_row, len(x))
    cuts = [0, first, first + (len(x) - first) // in_row * in_row, len(x)]
    parts = []
    for begin, end in itertools.pairwise(cuts):
        if end > begin:
            part = x[begin:end].reshape(-1, min(in_row, end - begin))
            noise = random_bits(part.size, step) if name == "exp_avg_sq" else None
            codes, scales = quantize(part, name != "exp_avg_sq", noise)
            parts.append(dequantize(codes, scales, name != "exp_avg_sq").ravel())
    return np.concatenate([*parts, x[:0]])


def _take_over(reference: ReferenceTensor, ranks: list[dict], step: int, number: int) -> None:
    """Goes on from the moments that the ranks keep, which have to be the reference's in 8 bits or float32."""
    shape, path = reference.w.shape, ranks[0]["path"] or ""
    in_row = reference.w.size // shape[0] if len(shape) > 1 else reference.w.size
    is_coded = len(shape) > 1 and (path.startswith("DeepSpeed") or (reference.w.size >= 4096 and in_row >= 64))
    slices = [x for rank in ranks for x in rank["steps"][step]["slices"] if x["tensor"] == number]
    for name in MOMENTS.keys() & slices[0].keys():
        exact = getattr(reference, MOMENTS[name]).ravel()
        expected = exact.copy()
        for x in slices if is_coded else ():
            span = slice(x["offset"], x["offset"] + len(x[name]))
            expected[span] = _in_8_bits(exact[span], in_row, x["offset"], name, reference.t)
        kept = assemble(ranks, step, name)[number].double().numpy()
        # Where float32 and float64 lie on two sides of a border, there are two neighbouring codes
        distance = np.abs(kept - expected)
        differs = distance > 1e-5 * np.abs(expected) + 1e-7 * np.abs(exact).max()
        assert differs.mean() < 2e-3 and (distance[differs] <= 0.13 * np.abs(expected[differs])).all()
        assert is_coded == bool((np.abs(kept - exact) > 1e-5 * np.abs(exact)).mean() > 0.5)
        setattr(reference, MOMENTS[name], kept.reshape(shape))


def replay(ranks: list[dict], prm: dict) -> tuple[float, float]:
    """Feeds the gradients that the ranks saw to the float64 reference: largest difference of masks and of weights."""
    tensors, mask, weight = {}, 0.0, 0.0
    for step in range(len(ranks[0]["steps"])):
        settings = {segment["tensor"]: segment for rank in ranks for segment in rank["steps"][step]["slices"]}
        gradients, before = assemble(ranks, step, "grad"), assemble(ranks, step, "before")
        expected_masks, expected_weights = {}, {}
        for number, gradient in gradients.items():
            shape = settings[number]["shape"] or gradient.shape
            reference = tensors.setdefault(number, ReferenceTensor(before[number].view(shape).double().numpy()))
            used = {key: settings[number][key] for key in ("lr", "weight_decay")}
            arguments = {"variance_beta": 0.9, **prm, **used}
            state_dtype = arguments.pop("state_dtype", "float32")
            arguments.pop("fused", None)
            reference.step(gradient.view(shape).double().numpy(), **arguments)
            if state_dtype == "8bit":
                _take_over(reference, ranks, step, number)
            if state_dtype == "bf16":
                segments = [x for rank in ranks for x in rank["steps"][step]["slices"] if x["tensor"] == number]
                _round(reference, {x["offset"]: len(x["grad"]) for x in segments if x["grad"] is not None})
            q, w = (torch.from_numpy(x).flatten() for x in (reference.q, reference.w))
            expected_masks[number] = q[:1] if prm["reduction"] == "per_tensor" else q
            expected_weights[number] = w
        if prm["reduction"] != "per_param" or prm.get("state_dtype") != "8bit":  # of which what is kept does not tell
            mask = max(mask, difference(masks_of(ranks, step), expected_masks, is_relative(prm)))
        weight = max(weight, difference(assemble(ranks, step, "after"), expected_weights, relative=False))
    return mask, weight
