"""Borders between processes in every place: within a row, at its edge, through a tiny tensor, with empty shards.

The processes of DeepSpeed are threads here, which meet in a collective that adds up and notes what it was given. What
they step is what DeepSpeed gives an optimizer; the layout is found by the package. `tests/distributed/` has the real
ones.
"""

import copy
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from prm_hf.optim import PRM
from prm_hf.optim.quantized import MOMENTS, moment_of, requantize
from prm_hf.sharding.deepspeed import LifeCycle


PROCESSES = 4
# By group. The first has 45 elements, with rows of 5, 2 and 3; the second one row of 3, which three processes share.
GROUPS = [[(4, 5), (3, 2), (9,), (1,), (2, 3), (3,)], [(1, 3), (1,)]]
SHAPES = [shape for group in GROUPS for shape in group]
NUMELS = [math.prod(shape) for shape in SHAPES]
OF_GROUPS = [range(6), range(6, 8)]
# Elements of a process in the first group's buffer, and where the borders of this buffer then lie
IN_A_ROW, AT_A_ROW, AT_A_TENSOR = "in a row", "at a row's edge", "at a tensor's edge"
IN_A_VECTOR, IN_A_TINY_ONE, EMPTY = "in a vector", "in a tensor of 3 elements", "before a process with padding alone"
SHARES = {
    12: [IN_A_ROW, AT_A_ROW, AT_A_TENSOR],
    13: [IN_A_ROW, AT_A_TENSOR, AT_A_ROW],
    15: [AT_A_ROW, IN_A_VECTOR, EMPTY],
    22: [AT_A_ROW, IN_A_TINY_ONE, EMPTY],
    46: [EMPTY, EMPTY, EMPTY],  # one process has all
}
SETTINGS = {
    "per_tensor": {"reduction": "per_tensor", "estimator": "ema"},
    "per_row": {"reduction": "per_row", "mask_min_elements": 2},
    "signal": {"reduction": "per_row", "signal_beta": 0.9, "mask_min_elements": 0},
}


class Processes:
    """Threads in place of processes, and the collective between them.

    Attributes:
        sent: bytes of each message, by process.
    """

    def __init__(self, monkeypatch, count: int = PROCESSES):
        self.count, self._thread = count, threading.local()
        self._barrier, self._given = threading.Barrier(count, timeout=30), [None] * count
        self.sent = [[] for _ in range(count)]
        monkeypatch.setattr("prm_hf.sharding.layout._all_reduce", self._all_reduce)
        monkeypatch.setattr(dist, "get_rank", lambda group=None: self._thread.rank)

    def _all_reduce(self, table, group, op):
        rank = self._thread.rank
        self.sent[rank].append(table.nbytes)
        self._given[rank] = table.clone()
        self._barrier.wait()
        given = torch.stack(self._given)
        self._barrier.wait()
        reduced = {dist.ReduceOp.SUM: given.sum(0), dist.ReduceOp.MIN: given.amin(0), dist.ReduceOp.MAX: given.amax(0)}
        table.copy_(reduced[op])

    def run(self, function):
        """`function(rank)` of each."""

        def work(rank):
            self._thread.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(work, range(self.count)))


class ZeRO12:
    """An optimizer as of stage 1 or 2: of each group one slice of a buffer, and a step for each group."""

    def __init__(self, rank, values, processes, share, settings):
        originals, self.pieces, flats = [], [], []
        for numbers, length in zip(OF_GROUPS, (share, -(-4 // processes)), strict=True):
            buffer = torch.cat([values[i].flatten() for i in numbers])
            padded = torch.cat([buffer, buffer.new_zeros(length * processes - len(buffer))])
            flats.append(padded[rank * length : (rank + 1) * length].clone().requires_grad_())
            begins = [sum(NUMELS[numbers[0] : i]) for i in numbers]
            parts = zip(buffer.split([NUMELS[i] for i in numbers]), numbers, strict=True)
            originals.append([torch.nn.Parameter(part.view(SHAPES[i])) for part, i in parts])
            for begin, i in zip(begins, numbers, strict=True):
                first, end = (
                    min(max(rank * length, begin) - begin, NUMELS[i]),
                    min((rank + 1) * length - begin, NUMELS[i]),
                )
                if end > first:
                    self.pieces.append((i, first, end, len(flats) - 1, begin + first - rank * length))
        for p in originals[0] + originals[1]:
            p._dp_group = "all"
        self._make(originals, flats, settings)

    def _make(self, originals, flats, settings):
        groups = [{"params": group} for group in [*originals, []]]  # the last one trains nothing, as with LoRA
        self.optimizer = PRM(groups, **({"foreach": True, "lr": 0.01} | settings))
        self.flats, self.originals = flats, originals
        self._show(flats)

    def _show(self, flats):
        for group, flat in zip(self.optimizer.param_groups, flats, strict=False):
            group["params"] = [flat]

    def set(self, grads):
        for flat in self.flats:
            flat.grad = torch.zeros_like(flat)
        for i, first, end, flat, start in self.pieces:
            self.flats[flat].grad[start : start + end - first] = grads[i].flatten()[first:end]

    def step(self, grads):
        self.set(grads)
        groups = self.optimizer.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups

    def write(self, whole, of_flat):
        """Puts what this process has of a tensor of each flat buffer into whole ones."""
        for i, first, end, flat, start in self.pieces:
            whole[i].view(-1)[first:end] = of_flat(self.flats[flat])[start : start + end - first].detach()

    def read(self, whole, name):
        """Takes its part of a state over from whole tensors."""
        for i, first, end, flat, start in self.pieces:
            kept = self.optimizer.state[self.flats[flat]][name]
            kept[start : start + end - first] = whole[i].view(-1)[first:end]


class ZeRO3(ZeRO12):
    """As of stage 3: a share of each tensor, in a buffer a group, of which a step shows one."""

    def __init__(self, rank, values, processes, share, settings):
        originals = [[torch.nn.Parameter(values[i].clone()) for i in numbers] for numbers in OF_GROUPS]
        self.pieces, flats, positions = [], [], {}
        for g, numbers in enumerate(OF_GROUPS):
            parts = []
            for i in numbers:
                length = -(-NUMELS[i] // processes)
                positions[i] = (g, sum(map(len, parts)), length)
                first, end = min(rank * length, NUMELS[i]), min((rank + 1) * length, NUMELS[i])
                self.pieces.append((i, first, end, g, positions[i][1]))
                part = values[i].flatten()[first:end]
                parts.append(torch.cat([part, part.new_zeros(length - len(part))]))
            flats.append(torch.cat(parts).requires_grad_())
        ids = {id(p): i for i, p in enumerate(originals[0] + originals[1])}
        zero = SimpleNamespace(
            get_param_id=lambda p: ids[id(p)], grad_position=positions, fp32_partitioned_groups_flat=flats
        )
        for p in originals[0] + originals[1]:
            p._z3_optimizer, p.ds_numel, p.ds_shape, p.ds_process_group = zero, p.numel(), p.shape, "all"
        self._make(originals, flats, settings)

    def step(self, grads):
        self.set(grads)
        for group in self.optimizer.param_groups:
            group["params"] = []
        for group, flat in zip(self.optimizer.param_groups, self.flats, strict=False):
            group["params"] = [flat]
            self.optimizer.step()
            group["params"] = []
        self._show(self.flats)  # as to save a checkpoint


CASES = [(ZeRO12, share) for share in SHARES] + [(ZeRO3, None)]


def draw(steps):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) + 0.5 for shape in SHAPES] for _ in range(steps)]


def cut_units(held, reduction):
    """By group, how many units have elements in several processes, counted element by element."""
    owners = [torch.full((numel,), -1) for numel in NUMELS]
    for rank, one in enumerate(held):
        for i, first, end, *_ in one.pieces:
            assert (owners[i][first:end] == -1).all()
            owners[i][first:end] = rank
    assert all((owner >= 0).all() for owner in owners)
    rows = [
        owner.view(shape[0] if len(shape) > 1 and reduction == "per_row" else 1, -1)
        for owner, shape in zip(owners, SHAPES, strict=True)
    ]
    cut = [int((row != row[:, :1]).any(1).sum()) for row in rows]
    return [sum(cut[i] for i in numbers) for numbers in OF_GROUPS]


def whole_of(held, of_flat):
    whole = [torch.zeros(shape) for shape in SHAPES]
    for one in held:
        one.write(whole, of_flat(one))
    return whole


def single(values, settings):
    params = [torch.nn.Parameter(x.clone()) for x in values]
    groups = [{"params": [params[i] for i in numbers]} for numbers in OF_GROUPS]
    return params, PRM(groups, foreach=True, lr=0.01, **settings)


def place_of(border):
    """What is in the first group's buffer on both sides of a border."""
    for shape, numel in zip(GROUPS[0], NUMELS, strict=False):
        if border < numel:
            row = numel // shape[0] if len(shape) > 1 else numel
            if border % row == 0:
                return AT_A_ROW if border else AT_A_TENSOR
            if len(shape) > 1:
                return IN_A_ROW
            return IN_A_TINY_ONE if numel == 3 else IN_A_VECTOR
        border -= numel
    return EMPTY


@pytest.mark.parametrize("share", SHARES)
def test_the_borders_are_where_they_are_meant(share):
    assert [place_of(share * i) for i in range(1, PROCESSES)] == SHARES[share]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("way", "share"), CASES)
def test_what_is_cut_is_added_up_and_nothing_else(monkeypatch, way, share, settings):
    values, *grads = draw(4)
    params, expected = single(values, settings)
    processes = Processes(monkeypatch)
    held = processes.run(lambda rank: way(rank, values, PROCESSES, share, settings))
    sums = [16 * cut for cut in cut_units(held, settings["reduction"]) if cut]
    for step, own in enumerate(grads):
        processes.sent = [[] for _ in range(PROCESSES)]
        processes.run(lambda rank, own=own: held[rank].step(own))
        if step:  # before the first one the layout is verified
            assert processes.sent == [sums] * PROCESSES
        for p, grad in zip(params, own, strict=True):
            p.grad = grad
        expected.step()
        for found, p in zip(whole_of(held, lambda one: lambda flat: flat), params, strict=True):
            torch.testing.assert_close(found, p.detach(), rtol=1e-6, atol=1e-7)
    statistics = processes.run(lambda rank: held[rank].optimizer.get_mask_stats(per_group=True)[:2])
    assert all(found == statistics[0] for found in statistics)
    for found, group in zip(statistics[0], expected.get_mask_stats(per_group=True), strict=True):
        assert found == pytest.approx(group, rel=1e-6, abs=1e-9)
    masks = processes.run(lambda rank: held[rank].optimizer.get_tensor_masks())
    for found, group in zip(masks[0], expected.get_tensor_masks(), strict=False):
        assert found == pytest.approx(group, rel=1e-6, abs=1e-9)
    # What is kept: each unit on the processes that hold something of it
    kept = [sum(map(len, one.optimizer._deepspeed.variances.tables.values())) for one in held]
    n_units = sum(expected.state[p]["grad_var"].numel() for p in params)
    paddings = sum(not any(piece[3] == g for piece in one.pieces) for one in held for g in range(2))
    assert n_units <= sum(kept) - paddings <= n_units + (PROCESSES - 1) * sum(sums) / 16


IN_8_BITS = {name: SETTINGS[name] for name in ("per_tensor", "signal")}
IN_8_BITS |= {"per_param": {"reduction": "per_param"}, "none": {"mask": "none"}}


@pytest.fixture
def tiny_blocks(monkeypatch):
    """All tensors are in 8 bits where a buffer has one of twelve elements, in blocks of up to two."""
    for name, value in {"SMALLEST": 12, "SHORTEST_ROW": 1, "BLOCK": 2}.items():
        monkeypatch.setattr(f"prm_hf.optim.quantized.{name}", value)


def moments_of(one):
    """By name of a moment, the values that a process keeps of each flat buffer."""
    values = {}
    for flat in one.flats:
        state, buffer = one.optimizer.state[flat], one.optimizer._locator.buffer(flat)
        for name in {*MOMENTS} & {*state}:
            values.setdefault(name, {})[id(flat)] = x = torch.zeros_like(flat.detach())
            requantize(moment_of(state, name), x, torch.float32, buffer)
    return values


@pytest.mark.parametrize("settings", IN_8_BITS.values(), ids=IN_8_BITS)
@pytest.mark.parametrize(("way", "share"), CASES)
def test_8_bits_are_one_process_step_from_what_is_kept(monkeypatch, tiny_blocks, way, share, settings):
    values, *grads = draw(4)
    params, expected = single(values, settings)  # in float32
    processes = Processes(monkeypatch)
    held = processes.run(lambda rank: way(rank, values, PROCESSES, share, settings | {"state_dtype": "8bit"}))
    for own in grads:
        processes.run(lambda rank, own=own: held[rank].step(own))
        for p, grad in zip(params, own, strict=True):
            p.grad = grad
        expected.step()
        kept = [moments_of(one) for one in held]
        for found, p in zip(whole_of(held, lambda one: lambda flat: flat), params, strict=True):
            torch.testing.assert_close(found, p.detach(), rtol=1e-6, atol=1e-7)
        for name in kept[0]:
            by_flat = {key: x for own in kept for key, x in own[name].items()}
            whole = whole_of(held, lambda one, by_flat=by_flat: lambda flat: by_flat[id(flat)])
            for i, (p, found) in enumerate(zip(params, whole, strict=True)):
                exact = expected.state[p][name]
                precision = 0 if i in OF_GROUPS[1] else 0.126 if name == "exp_avg_sq" else 0.0626
                torch.testing.assert_close(found, exact, rtol=precision, atol=precision * 1e-6)
                exact.copy_(found)
    states = [one.optimizer.state[flat] for one in held for flat in one.flats]
    assert [state["exp_avg"].dtype for state in states] == [torch.uint8, torch.float32] * PROCESSES
    # Two neighbours of a row that lie in one process have a scale together
    n_blocks = [0] * PROCESSES
    for rank, one in enumerate(held):
        for i, first, end, *_ in one.pieces:
            in_row = NUMELS[i] // (SHAPES[i][0] if len(SHAPES[i]) > 1 else 1)
            rows = Counter(element // in_row for element in range(first, end))
            n_blocks[rank] += sum(-(-count // 2) for count in rows.values()) * (i in OF_GROUPS[0])
    assert [len(state["exp_avg_scale"]) for state in states[::2]] == n_blocks
    stats = processes.run(lambda rank: held[rank].optimizer.get_mask_stats())
    assert len(set(map(repr, stats))) == 1
    assert stats[0] == pytest.approx(expected.get_mask_stats(), rel=1e-5, abs=1e-9, nan_ok=True)


REDUCED = {f"{name}_8bit": SETTINGS[name] | {"state_dtype": "8bit"} for name in ("per_tensor", "signal")}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [x for name, x in IN_8_BITS.items() if name != "none"], ids=str)
def test_the_kernels_step_slices_in_8_bits(monkeypatch, tiny_blocks, settings):
    kernel = pytest.importorskip("prm_hf.optim.triton.launch", reason="needs triton")
    if not kernel.INTERPRETED:
        pytest.skip("its processes are threads of a CPU")
    monkeypatch.setattr("prm_hf.optim.quantized.BLOCK", 256)  # as is compiled in
    run, lock = kernel.KernelTables.run, threading.Lock()

    def one_at_a_time(*args, **kwargs):  # as the interpreter has no threads
        with lock:
            return run(*args, **kwargs)

    monkeypatch.setattr(kernel.KernelTables, "run", one_at_a_time)
    values, *grads = draw(3)
    found = []
    for implementation in ({"foreach": True}, {"foreach": None, "fused": True}):
        world, used = Processes(monkeypatch), settings | {"state_dtype": "8bit"} | implementation
        held = world.run(lambda rank, used=used: ZeRO12(rank, values, PROCESSES, 13, used))
        for own in grads:
            world.run(lambda rank, held=held, own=own: held[rank].step(own))
        found.append(whole_of(held, lambda one: lambda flat: flat))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", (SETTINGS | REDUCED).values(), ids=SETTINGS | REDUCED)
@pytest.mark.parametrize(("way", "share", "other"), [(ZeRO12, 13, 23), (ZeRO12, 15, 45), (ZeRO3, None, None)])
def test_a_checkpoint_is_read_by_as_many_processes_and_by_two(monkeypatch, tiny_blocks, way, share, other, settings):
    """By as many to the last bit; by two as from a universal checkpoint, which has the groups of the first.

    DeepSpeed keeps no scales in a universal one, so that 8 bits are refused.
    """
    values, *grads = draw(6)
    names = ["exp_avg", "exp_avg_sq"] + ["exp_avg_signal"] * ("signal_beta" in settings)
    world = Processes(monkeypatch)
    held = world.run(lambda rank: way(rank, values, PROCESSES, share, settings))
    for own in grads[:3]:
        world.run(lambda rank, own=own: held[rank].step(own))
    saved = [copy.deepcopy(x) for x in world.run(lambda rank: held[rank].optimizer.state_dict())]
    whole, parts = LifeCycle.VARIANCES[settings["reduction"]], LifeCycle.HELD[settings["reduction"]]
    found = [[{*group} & {whole, parts} for group in x["param_groups"]] for x in saved]
    assert found == [[{whole}] * 3] + [[{parts}, {parts}, set()]] * 3
    weights = whole_of(held, lambda one: lambda flat: flat)
    moments = {
        name: whole_of(held, lambda one, name=name: lambda flat: one.optimizer.state[flat][name]) for name in names
    }
    for own in grads[3:]:
        world.run(lambda rank, own=own: held[rank].step(own))
    expected = whole_of(held, lambda one: lambda flat: flat)

    again = world.run(lambda rank: way(rank, weights, PROCESSES, share, settings))
    world.run(lambda rank: again[rank].optimizer.load_state_dict(saved[rank]))
    for own in grads[3:]:
        world.run(lambda rank, own=own: again[rank].step(own))
    assert all(map(torch.equal, whole_of(again, lambda one: lambda flat: flat), expected))

    two = Processes(monkeypatch, 2)
    moved = two.run(lambda rank: way(rank, weights, 2, other, settings))
    for one in moved:
        for flat in one.flats:
            zeros = {name: torch.zeros_like(flat.detach()) for name in names}
            one.optimizer.state[flat] = {"step": torch.tensor(3.0), **zeros}
        for name in names:
            one.read(moments[name], name)
        for group, first in zip(one.optimizer.param_groups, saved[0]["param_groups"], strict=True):
            group.update({key: first[key] for key in (LifeCycle.CODES, *LifeCycle.VARIANCES.values()) if key in first})
    if "state_dtype" in settings:
        with pytest.raises(ValueError, match="a universal one of a run with state_dtype='8bit'"):
            two.run(lambda rank: moved[rank].step(grads[3]))
        return
    for own in grads[3:]:
        two.run(lambda rank, own=own: moved[rank].step(own))
    for found, x in zip(whole_of(moved, lambda one: lambda flat: flat), expected, strict=True):
        torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("theirs", "ours"), [("float32", "8bit"), ("8bit", "float32"), ("8bit", "bf16")])
@pytest.mark.parametrize(("way", "share"), [(ZeRO12, 13), (ZeRO3, None)])
def test_a_checkpoint_of_another_state_dtype_is_converted(monkeypatch, tiny_blocks, way, share, theirs, ours):
    values, *grads = draw(4)
    world = Processes(monkeypatch)
    signal = SETTINGS["signal"]
    held = world.run(lambda rank: way(rank, values, PROCESSES, share, signal | {"state_dtype": theirs}))
    for own in grads[:2]:
        world.run(lambda rank, own=own: held[rank].step(own))
    saved = world.run(lambda rank: held[rank].optimizer.state_dict())
    again = world.run(lambda rank: way(rank, values, PROCESSES, share, signal | {"state_dtype": ours}))
    names = {"float32": "float32", "bf16": "bfloat16", "8bit": "8 bits"}
    with pytest.warns(UserWarning, match=f"keeps in {names[theirs]} are kept in {names[ours]} by this optimizer"):
        world.run(lambda rank: again[rank].optimizer.load_state_dict(saved[rank]))
    for one in (held, again):
        world.run(lambda rank, one=one: one[rank].step(grads[2]))
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[ours]
    for before, after in zip(held, again, strict=True):
        assert after.optimizer.state[after.flats[0]]["exp_avg"].dtype == dtype
        pairs = zip(moments_of(before).values(), moments_of(after).values(), strict=True)
        for x, y in ((x, y) for a, b in pairs for x, y in zip(a.values(), b.values(), strict=True)):
            torch.testing.assert_close(x, y, rtol=0.25, atol=0.02)
