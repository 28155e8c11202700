"""Tensors of a few elements have q = 1, on every path, with the debiased estimator and one mask a row or a tensor."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from prm_hf.optim import PRM

from .optimizer_runs import last_masks
from .record_checkpoints import SHAPES, STEPS, FlatModel, WholeModel


SETTINGS = [
    {"reduction": "per_tensor"},
    {"reduction": "per_row"},
    {"reduction": "per_row", "signal_beta": 0.98},
    {"reduction": "per_tensor", "mask": "hard"},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))


def noise(seed=0):
    """Gradients without a signal, whose masks are often 0."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS)]


def run(model_class, **settings):
    values = [torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape) for shape in SHAPES]
    model = model_class(values, [(settings, [0, 2]), (settings, [1])])
    for gradients in noise():
        model.step(gradients)
    return model


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class ShardedModel(WholeModel):
    """As FSDP2 holds them: DTensors."""

    def __init__(self, values, groups):
        super().__init__(values, groups)
        mesh = init_device_mesh("cpu", (1,))
        self.tensors = [torch.nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for v in values]
        self.optimizer = PRM([settings | {"params": [self.tensors[i] for i in own]} for settings, own in groups])
        self.mesh = mesh

    def step(self, gradients):
        for p, gradient in zip(self.tensors, gradients, strict=True):
            p.grad = distribute_tensor(gradient, self.mesh, [Shard(0)])
        self.optimizer.step()

    def values(self):
        return [p.detach().full_tensor() for p in self.tensors]


@pytest.mark.parametrize("path", ["foreach", "capturable", "capturable_foreach", "flat", "dtensor"])
@every_setting
def test_every_path_opens_the_same_tensors(settings, path, process_group):
    """Of 30, 4 and 12 elements, those under 12; a flat buffer holds both kinds."""
    settings = {**settings, "mask_min_elements": 12}
    expected = run(WholeModel, foreach=False, **settings)
    flags = {"foreach": "foreach" in path, "capturable": "capturable" in path}
    model_class = {"flat": FlatModel, "dtensor": ShardedModel}.get(path, WholeModel)
    model = run(model_class, **settings, **(flags if model_class is WholeModel else {}))
    for p, q in zip(model.values(), expected.values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    ours, theirs = (x.optimizer.get_mask_stats() for x in (model, expected))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)
    masked, few = expected.optimizer.get_mask_stats(per_group=True)
    assert few["min_q"] == few["mean_q"] == 1.0 and masked["min_q"] < 1.0


@every_setting
def test_they_step_as_adamw(settings):
    model, adamw = run(WholeModel, mask_min_elements=12, **settings), run(WholeModel, mask="none")
    assert torch.equal(model.values()[1], adamw.values()[1])
    assert not torch.equal(model.values()[0], adamw.values()[0])


@pytest.mark.parametrize("settings", [{"reduction": "per_param"}, {"estimator": "ema"}], ids=["per_param", "ema"])
def test_the_papers_masks_are_of_all_tensors(settings):
    results = [run(WholeModel, mask_min_elements=n, **settings).values() for n in (0, 1000)]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("foreach", [False, True])
def test_the_number_may_change(foreach):
    model = run(WholeModel, mask_min_elements=12, foreach=foreach)
    p, before = model.tensors[1], model.tensors[1].detach().clone()
    for group in model.optimizer.param_groups:
        group["mask_min_elements"] = 0
    model.step(noise(1)[0])
    q, _, _ = last_masks(model.optimizer, p, group=1)
    assert q.item() < 1.0
    adamw = run(WholeModel, mask="none", foreach=foreach)
    adamw.step(noise(1)[0])
    if q.item() == 0.0:
        assert torch.equal(p, before * (1 - 1e-3 * 0.01))
    assert not torch.equal(p, adamw.tensors[1])


def test_a_checkpoint_from_before_keeps_its_masks():
    model = run(WholeModel, mask_min_elements=0)
    saved = copy.deepcopy(model.optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["mask_min_elements"]
    resumed = PRM([{"params": [model.tensors[i] for i in own]} for own in ([0, 2], [1])])
    assert resumed.param_groups[0]["mask_min_elements"] == 32
    resumed.load_state_dict(saved)
    assert [group["mask_min_elements"] for group in resumed.param_groups] == [0, 0]
