"""The plan of a fused step where tensors are held in parts: the same to the last bit as collecting everything anew."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate


fused = pytest.importorskip("prm_hf.optim.triton.launch", reason="needs triton")

from prm_hf.optim import PRM, masks, plan  # noqa: E402
from prm_hf.sharding import Layout, Segment, ShardingPath, local_tensor, local_tensors  # noqa: E402


pytestmark = pytest.mark.skipif(not fused.INTERPRETED, reason="the kernel is interpreted")
SHAPES = [(4, 5), (3, 2), (4, 3), (9,), (3,)]
N_DECAYED = 3


class ReplanningPRM(PRM):
    """Builds a plan for each step."""

    def _step(self):
        self._plans.clear()
        super()._step()


class Held:
    """An optimizer of two groups whose tensors are held in some way, its gradients and its steps."""

    def __init__(self, optimizer_class: type, first: dict, second: dict, **settings):
        torch.manual_seed(0)
        self.originals = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        self.generator = torch.Generator().manual_seed(1)
        self.build(optimizer_class, [first, second], {"fused": True, "lr": 0.01, "reduction": "per_tensor"} | settings)
        self.groups = self.optimizer.param_groups

    def groups_of(self, params: list, settings: list[dict]) -> list[dict]:
        parts = params[:N_DECAYED], params[N_DECAYED:]
        return [{"params": part} | group for part, group in zip(parts, settings, strict=True)]

    def draw(self) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=self.generator) + 0.7 for shape in SHAPES]

    def result(self) -> list[torch.Tensor]:
        states = [self.optimizer.state[p] for p in self.locals if p in self.optimizer.state]
        state = [local_tensor(state[key]) for state in states for key in sorted(state)]
        everything = [*map(local_tensor, self.locals), *state, *self.optimizer._deepspeed.variances.tables.values()]
        return [x.detach().clone() for x in everything]


class FSDP2(Held):
    def build(self, optimizer_class, settings, defaults):
        self.mesh = init_device_mesh("cpu", (1,))
        self.model = torch.nn.ParameterList(self.originals)
        fully_shard(self.model, mesh=self.mesh)
        self.locals = list(self.model.parameters())
        self.optimizer = optimizer_class(self.groups_of(self.locals, settings), **defaults)

    def set_gradients(self):
        for p, g in zip(self.locals, self.draw(), strict=True):
            p.grad = DTensor.from_local(g, self.mesh, p.placements)

    def step(self):
        self.optimizer.step()


class Flat(Held):
    """A buffer a group, as of DeepSpeed ZeRO. The third tensor is frozen, and is not in them."""

    def build(self, optimizer_class, settings, defaults):
        self.optimizer = optimizer_class(self.groups_of(self.originals, settings), **defaults)
        self.of_groups = [[0, 1], [3, 4]]
        numels = [p.numel() for p in self.originals]
        groups = [(dist.group.WORLD,)] * len(numels)
        rows = [masks.n_rows(p) for p in self.originals]
        layout = Layout(path=ShardingPath.ZERO_12, flat=True, numels=numels, process_groups=groups, rows=rows)
        for numbers in self.of_groups:
            self.padding = torch.zeros(3)
            flat = torch.cat([self.originals[i].detach().flatten() for i in numbers] + [self.padding]).requires_grad_()
            starts = [sum(numels[i] for i in numbers[:k]) for k in range(len(numbers))]
            layout.add(flat, [Segment(i, start, numels[i]) for i, start in zip(numbers, starts, strict=True)], numbers)
        self.locals = layout.locals
        self.optimizer._locator.layout = layout
        self.optimizer._locator._known = {id(flat): flat for flat in self.locals}
        for group, flat in zip(self.optimizer.param_groups, self.locals, strict=True):
            group["params"] = [flat]

    def set_gradients(self):
        grads = self.draw()
        for numbers, flat in zip(self.of_groups, self.locals, strict=True):
            flat.grad = None
            flat.grad = torch.cat([grads[i].flatten() for i in numbers] + [self.padding])


class ZeRO2(Flat):
    def step(self):
        groups = self.optimizer.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups


class ZeRO3(Flat):
    def step(self):
        for group in self.optimizer.param_groups:
            group["params"] = []
        for group, flat in zip(self.optimizer.param_groups, self.locals, strict=True):
            group["params"] = [flat]
            self.optimizer.step()
            group["params"] = []


class BF16Optimizer(Flat):
    def step(self):
        self.optimizer.step()


WAYS = [FSDP2, ZeRO2, ZeRO3, BF16Optimizer]
SOME = [FSDP2, ZeRO2]


@pytest.fixture(autouse=True)
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def planned(monkeypatch) -> list[bool]:
    """What plans have answered: whether they hold for the next step."""
    answers = []
    holds = plan.StepPlan.holds
    monkeypatch.setattr(plan.StepPlan, "holds", lambda *a: answers.append(holds(*a)) or answers[-1])
    return answers


def run_both(way, change=None, at=2, steps=4, first=None, second=None, **settings):
    """Trains twice, once without plans, and compares all there is bit by bit after each step."""
    first, second = {"weight_decay": 0.1} | (first or {}), second or {}
    ours, theirs = (way(optimizer_class, first, second, **settings) for optimizer_class in (PRM, ReplanningPRM))
    for t in range(steps):
        for held in (ours, theirs):
            for group in held.groups:
                group["lr"] = 0.01 / (t + 1)
            held.set_gradients()
            if change is not None and t == at:
                change(held)
            held.step()
        for ours_now, theirs_now in zip(ours.result(), theirs.result(), strict=True):
            assert torch.equal(ours_now, theirs_now)
    return ours


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "debiased", "mask_warmup_steps": 1, "alpha": 0.5},
        {"amsgrad": True, "alpha": 0.05, "first": {"mask": "soft"}, "second": {"mask": "hard", "variance_beta": 0.9}},
        {"first": {"mask": "none"}},
        {"reduction": "per_param"},
        {"first": {"weight_decay": 0.1, "decoupled_weight_decay": False}, "maximize": True},
        {"reduction": "per_row"},
        {"reduction": "per_row", "estimator": "debiased", "signal_beta": 0.98, "first": {"alpha": 0.5}},
        {"reduction": "per_row", "second": {"reduction": "per_param"}},
    ],
    ids=["default", "debiased", "two_masks", "one_mask", "per_param", "coupled", "rows", "signal", "two_reductions"],
)
@pytest.mark.parametrize(
    "way", [*SOME, *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way not in SOME)]
)
def test_a_planned_step_equals_one_that_is_not(way, settings, planned):
    held = run_both(way, **settings)
    calls = 2 if way in (ZeRO2, ZeRO3) else 1
    assert planned == [True] * 3 * calls
    for p in held.optimizer._plans.values():
        assert all(unit_masks.q.max() > 0 for unit_masks in p._masks.values())


@pytest.mark.parametrize("way", WAYS)
def test_masks_of_tensors_and_of_rows_in_one_step(way, planned):
    """Also where variances lie in two tables, as of flat buffers."""
    run_both(way, reduction="per_row", second={"reduction": "per_tensor"})
    assert planned == [True] * 3 * (2 if way in (ZeRO2, ZeRO3) else 1)


def state_of(held, i=1):
    return held.optimizer.state[held.locals[i]]


def replace(name):
    def change(held):
        state_of(held)[name] = state_of(held)[name] * 0.5

    return change


def exchange_storage(name):
    def change(held):
        (x,) = local_tensors([state_of(held)[name]])
        x.data = x.data * 0.5

    return change


def add_in_place(name):
    def change(held):
        for i in range(len(held.locals)):
            state_of(held, i)[name].data.add_(3)

    return change


def replace_entry(held):
    held.optimizer.state[held.locals[1]] = {key: x * 0.5 for key, x in state_of(held).items()}


def replace_all_state(held):
    held.optimizer.state = type(held.optimizer.state)(
        dict, {p: {key: x * 0.5 for key, x in state.items()} for p, state in held.optimizer.state.items()}
    )


def move_shard(held):
    """As FSDP2 does when a module is moved or loaded."""
    p = held.locals[1]
    if isinstance(p, DTensor):
        p._local_tensor = p._local_tensor.detach().clone()
    else:
        p.data = p.data.clone()


def exchange_parameters(held):
    params = held.optimizer.param_groups[0]["params"]
    params[1], params[2] = params[2], params[1]


def move_a_parameter(held):
    first, second = held.optimizer.param_groups
    second["params"].append(first["params"].pop(1))


def lose_a_gradient(held):
    held.locals[1].grad = None


def transpose_a_gradient(held):
    p = held.locals[1]
    p.grad = DTensor.from_local(local_tensor(p.grad).t().contiguous().t(), held.mesh, p.placements)


def replicate_a_gradient_in_name(held):
    p = held.locals[1]
    p.grad = DTensor.from_local(local_tensor(p.grad), held.mesh, [Replicate()])


def halve_a_gradient(held):
    held.locals[1].grad.data = held.locals[1].grad.half()


def load(held):
    held.optimizer.load_state_dict(copy.deepcopy(held.optimizer.state_dict()))
    held.groups = held.optimizer.param_groups
    held.groups[1]["lr"] = 0.5


def load_as_deepspeed(held):
    """In place, and with the table of variances in the groups."""
    saved = copy.deepcopy(held.optimizer.state_dict())
    for group, other in zip(held.optimizer.param_groups, saved["param_groups"], strict=True):
        group["prm_grad_var"] = other["prm_grad_var"] * 2
    for i in range(len(held.locals)):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            state_of(held, i)[name].data.copy_(state_of(held, i)[name] * 2)


def load_universally(held):
    """As stage 3 loads universal checkpoints: the first group's settings for all, and one `step` for all."""
    step = torch.tensor(7.0)
    for i in range(len(held.locals)):
        state_of(held, i)["step"] = step
    first, *others = held.groups
    for group in others:
        group.update({key: value for key, value in first.items() if key != "params"})


def set_to(**settings):
    return lambda held: held.groups[1].update(settings)


# Each with the ways that know it, and whether a plan can take the step after it.
CHANGES = {
    "step": (replace("step"), WAYS, False),
    "exp_avg": (replace("exp_avg"), WAYS, False),
    "exp_avg_sq": (replace("exp_avg_sq"), SOME, False),
    "grad_var": (replace("grad_var"), [FSDP2], False),
    "storage": (exchange_storage("exp_avg_sq"), [FSDP2, ZeRO2], False),
    "step_in_place": (add_in_place("step"), WAYS, False),
    "grad_var_in_place": (add_in_place("grad_var"), [FSDP2], True),
    "entry": (replace_entry, WAYS, False),
    "all_state": (replace_all_state, SOME, False),
    "shard": (move_shard, WAYS, False),
    "order": (exchange_parameters, [FSDP2], False),
    "group": (move_a_parameter, [FSDP2], None),
    "no_gradient": (lose_a_gradient, WAYS, False),
    "noncontiguous_gradient": (transpose_a_gradient, [FSDP2], True),
    "placement_of_gradient": (replicate_a_gradient_in_name, [FSDP2], True),
    "dtype_of_gradient": (halve_a_gradient, [ZeRO2, ZeRO3, BF16Optimizer], False),
    "load": (load, [FSDP2, ZeRO2, BF16Optimizer], None),
    "load_as_deepspeed": (load_as_deepspeed, [ZeRO2, BF16Optimizer], False),
    "load_universally": (load_universally, [ZeRO3], False),
    "lr": (set_to(lr=0.02), SOME, True),
    "betas": (set_to(betas=(0.5, 0.9)), SOME, True),
    "softness": (set_to(softness=3.0), SOME, True),
    "warmup": (set_to(mask_warmup_steps=10), SOME, True),
    "estimator": (set_to(estimator="debiased"), SOME, False),
    "maximize": (set_to(maximize=True), SOME, False),
    "foreach": (set_to(fused=False, foreach=True), SOME, False),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), [(name, way) for name, (_, ways, _) in CHANGES.items() for way in ways])
def test_changes_are_seen(name, way, planned):
    change, _, planned_then = CHANGES[name]
    calls = 2 if way in (ZeRO2, ZeRO3) else 1
    run_both(way, change, estimator="ema")
    assert planned[:calls] == [True] * calls
    if planned_then is not None:
        assert all(planned[calls : 2 * calls]) is planned_then


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": -1.0}, "lr=-1.0"), ({"reduction": "per_param"}, "trained with reduction='per_param'")],
)
def test_invalid_settings_are_refused(way, settings, message):
    held = way(PRM, {}, {})
    for _ in range(3):
        held.set_gradients()
        held.step()
    before = held.result()
    held.groups[1].update(settings)
    held.optimizer.param_groups = [held.groups[1]]
    held.groups[1]["params"] = held.groups[1]["params"] or [held.locals[1]]
    with pytest.raises(ValueError, match=message):
        held.optimizer.step()
    assert all(map(torch.equal, held.result(), before))


@pytest.mark.parametrize("distributed", [False, True], ids=["torch_save", "distributed_checkpoint"])
def test_checkpoints_of_shards(distributed, tmp_path):
    """State that lies in one tensor is saved and loaded as if each had its own, also into an optimizer with a plan."""
    held, other = FSDP2(PRM, {}, {}), FSDP2(PRM, {}, {})
    for each, steps in ((held, 3), (other, 2)):
        for _ in range(steps):
            each.set_gradients()
            each.step()
        assert each.optimizer._plans
    if distributed:
        dcp.save(get_optimizer_state_dict(held.model, held.optimizer), checkpoint_id=tmp_path)
        state = get_optimizer_state_dict(other.model, other.optimizer)
        dcp.load(state, checkpoint_id=tmp_path)  # in place
        set_optimizer_state_dict(other.model, other.optimizer, state)
    else:
        torch.save(held.optimizer.state_dict(), tmp_path / "optimizer.pt")
        other.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for p, q in zip(local_tensors(other.locals), local_tensors(held.locals), strict=True):
        p.copy_(q)
    other.generator.set_state(held.generator.get_state())
    for _ in range(3):
        assert all(map(torch.equal, other.result(), held.result()))
        for each in (held, other):
            each.set_gradients()
            each.step()
    assert all(map(torch.equal, other.result(), held.result()))


@pytest.mark.parametrize("foreach", [None, True])
def test_a_group_of_two_dtypes_keeps_its_plan(foreach, planned):
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    optimizer = PRM(params, foreach=foreach)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert planned == [True, True]
