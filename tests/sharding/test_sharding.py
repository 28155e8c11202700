"""What is refused before training, and the layout's own check. `tests/distributed/` runs the paths themselves."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from prm_hf.optim import PRM
from prm_hf.optim.quantized import MOMENTS, moment_of, read
from prm_hf.sharding import Layout, Segment, ShardingPath, find_layout
from prm_hf.sharding.checkpoint import SHARDED_OPTIMIZER, load_optimizer
from prm_hf.sharding.deepspeed import check_config
from prm_hf.sharding.fsdp import check_plugin
from prm_hf.sharding.locator import _cut_at_rows


CONFIGS = Path(__file__).parents[2] / "accelerate_configs" / "deepspeed"
OFFLOAD = {"device": "cpu"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_our_own_configurations_are_accepted(path):
    check_config(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "section `optimizer`.*Remove"),
        ({"zero_optimization": {"offload_optimizer": OFFLOAD}}, "`zero_force_ds_cpu_optimizer: false`"),
        (
            {"zero_optimization": {"offload_optimizer": OFFLOAD}, "zero_force_ds_cpu_optimizer": True},
            "`zero_force_ds_cpu_optimizer: false`",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, "`zero_force_ds_cpu_optimizer: false`"),
        (
            {
                "zero_optimization": {"offload_optimizer": OFFLOAD | {"ratio": 0.3}},
                "zero_force_ds_cpu_optimizer": False,
            },
            "ratio: 0.3.*Set it to 1",
        ),
        (
            {
                "zero_optimization": {"offload_optimizer": OFFLOAD | {"super_offload": True}},
                "zero_force_ds_cpu_optimizer": False,
            },
            "super_offload: true",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device: nvme.*`cpu`"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device: nvme.*`cpu`"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow.*Remove"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, "elastic_checkpoint: true.*ds_to_universal"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size: 2"),
    ],
)
def test_a_configuration_that_cannot_be_exact_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": None}},
        {"zero_optimization": {"offload_param": OFFLOAD}, "tensor_parallel": {"autotp_size": "auto"}},
        {"zero_optimization": {"offload_optimizer": OFFLOAD}, "zero_force_ds_cpu_optimizer": False},
    ],
)
def test_other_configurations_are_accepted(config):
    check_config(config)


def test_flat_parameters_are_refused():
    with pytest.raises(ValueError, match="fsdp_use_orig_params: true"):
        check_plugin(1, use_orig_params=False)
    check_plugin(1, use_orig_params=True)
    check_plugin(2, use_orig_params=None)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_layout_with_a_gap_is_an_error(process_group):
    layout = Layout(path=ShardingPath.ZERO_3, flat=True, numels=[6, 4], process_groups=[(process_group,)] * 2)
    flat = torch.zeros(10)
    layout.add(flat, [Segment(0, 0, 6), Segment(1, 6, 4)], [0, 1])
    layout.verify()
    layout.segments[id(flat)][1] = Segment(1, 6, 3)
    with pytest.raises(RuntimeError, match="under DeepSpeed ZeRO-3.*tensor 1: found 3 of 4 elements"):
        layout.verify()


def _sharded(values, placements):
    mesh = init_device_mesh("cpu", (1,))
    return torch.nn.Parameter(distribute_tensor(values, mesh, placements))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_masks_of_rows_of_shards(process_group, placement, foreach):
    """In processes of their own they are tested in `tests/distributed/`; here all kinds of shards and steps."""
    settings = {"reduction": "per_row", "estimator": "debiased", "signal_beta": 0.98, "foreach": foreach}
    values = [torch.randn(5, 3), torch.randn(4, 2, 3), torch.randn(7), torch.zeros(0, 3)]
    whole = [torch.nn.Parameter(x.clone()) for x in values]
    parts = [_sharded(x, [placement if x.dim() > 1 else Shard(0)]) for x in values]
    optimizers = [PRM(ps, **settings) for ps in (whole, parts)]
    for t in range(4):
        for x, y in zip(whole, parts, strict=True):
            x.grad = torch.randn_like(x) if t != 2 else x.grad * 0.5
            y.grad = distribute_tensor(x.grad, y.device_mesh, y.placements)
        for optimizer in optimizers:
            optimizer.step()
    for x, y in zip(whole, parts, strict=True):
        torch.testing.assert_close(y.full_tensor(), x)
        kept = optimizers[1].state[y]["grad_var"]
        kept = kept.full_tensor() if isinstance(kept, DTensor) else kept
        torch.testing.assert_close(kept, optimizers[0].state[x]["grad_var"])
    assert optimizers[0].get_mask_stats() == pytest.approx(optimizers[1].get_mask_stats(), rel=1e-6)


def test_variances_of_rows_are_sharded_also_where_a_checkpoint_has_them_whole(process_group):
    """As those of earlier versions, and of whole tensors."""
    gradient = torch.randn(5, 3)

    def step(p, optimizer):
        p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
        optimizer.step()

    ours, theirs = (_sharded(torch.ones(5, 3), [Shard(0)]) for _ in range(2))
    first, second = PRM([ours], reduction="per_row"), PRM([theirs], reduction="per_row")
    step(ours, first)
    state_dict = copy.deepcopy(first.state_dict())
    kept = state_dict["state"][0]["grad_var"]
    assert kept.shape == (5,) and kept.placements == ours.placements
    state_dict["state"][0]["grad_var"] = kept.full_tensor()
    second.load_state_dict(state_dict)
    theirs.data.copy_(ours.data)
    for each in ((ours, first), (theirs, second)):
        step(*each)
    assert second.state[theirs]["grad_var"].placements == theirs.placements
    for x, y in ((ours, theirs), (first.state[ours]["grad_var"], second.state[theirs]["grad_var"])):
        assert torch.equal(x.full_tensor(), y.full_tensor())


LARGE = [(70, 300), (80, 8, 9), (5000,), (3, 5)]  # the last one is too small, the one before it has its row cut


@pytest.mark.parametrize("settings", [{"reduction": "per_row", "signal_beta": 0.98}, {"reduction": "per_tensor"}])
def test_8_bits_of_rows_that_are_whole(process_group, settings):
    values = [torch.randn(shape) for shape in LARGE]
    whole = [torch.nn.Parameter(x.clone()) for x in values]
    parts = [_sharded(x, [Shard(0)]) for x in values]
    optimizers = [PRM(ps, state_dtype="8bit", foreach=True, **settings) for ps in (whole, parts)]
    for _ in range(3):
        for x, y in zip(whole, parts, strict=True):
            x.grad = torch.randn_like(x)
            y.grad = distribute_tensor(x.grad, y.device_mesh, y.placements)
        for optimizer in optimizers:
            optimizer.step()
    for i, (x, y) in enumerate(zip(whole, parts, strict=True)):
        ours, theirs = (optimizer.state[p] for optimizer, p in zip(optimizers, (x, y), strict=True))
        assert ("exp_avg_scale" in theirs) == (i < 2) and ("exp_avg_scale" in ours) == (i < 3)
        if i != 2:
            assert torch.equal(y.full_tensor(), x)
            for key in {*theirs} - {"step", "grad_var"}:
                assert theirs[key].placements == y.placements and torch.equal(theirs[key].full_tensor(), ours[key])
    assert optimizers[0].get_mask_stats() == pytest.approx(optimizers[1].get_mask_stats(), rel=1e-3)
    columns = _sharded(values[0], [Shard(1)])
    columns.grad = distribute_tensor(values[0], columns.device_mesh, columns.placements)
    with pytest.raises(
        ValueError, match=r"Invalid state_dtype='8bit': a parameter of shape \(70, 300\).*cut its rows"
    ):
        PRM([columns], state_dtype="8bit").step()


def _model_and_optimizer(is_sharded, state_dtype):
    torch.manual_seed(0)
    model = torch.nn.ParameterList([torch.randn(shape) for shape in LARGE])
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model, PRM(model.parameters(), state_dtype=state_dtype, signal_beta=0.98)


def _step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
    optimizer.step()


def _whole(x):
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def _moments(optimizer):
    states = [{key: _whole(x) for key, x in state.items()} for state in optimizer.state.values()]
    return [read(moment_of(state, key), torch.float32) for state in states for key in MOMENTS]


@pytest.mark.parametrize(
    ("theirs", "ours", "is_sharded", "was_sharded"),
    [
        ("8bit", "8bit", True, True),
        ("8bit", "8bit", False, True),
        ("8bit", "8bit", True, False),
        ("8bit", "float32", True, True),
        ("float32", "8bit", True, True),
        ("float32", "8bit", True, False),
        ("8bit", "bf16", False, True),
    ],
)
def test_checkpoints_of_8_bits_move(process_group, tmp_path, theirs, ours, is_sharded, was_sharded):
    model, optimizer = _model_and_optimizer(was_sharded, theirs)
    for t in range(2):
        _step(model, optimizer, t)
    if was_sharded:
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / SHARDED_OPTIMIZER)
    else:
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other, loaded = _model_and_optimizer(is_sharded, ours)
    with warnings.catch_warnings(record=True) as caught:
        load_optimizer(other, loaded, tmp_path)
    # Also of the vector, which is in 8 bits where it is whole
    is_converted = theirs != ours or is_sharded != was_sharded
    assert any("were converted" in str(x.message) for x in caught) == is_converted
    for i, (x, y) in enumerate(zip(_moments(optimizer), _moments(loaded), strict=True)):
        bound = 0.07 if theirs != ours or (i // len(MOMENTS) == 2 and not is_sharded) else 0
        assert ((x - y).abs() <= bound * y.abs() + bound * 1e-4).all()
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        y.data.copy_(distribute_tensor(_whole(x), y.device_mesh, y.placements) if is_sharded else _whole(x))
    for each in ((model, optimizer), (other, loaded)):
        _step(*each, 2)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert max((_whole(x) - _whole(y)).abs().max() for x, y in pairs) <= (1e-3 if is_converted else 0)


def test_codes_are_not_read_as_values(process_group):
    """As torch does with whole checkpoints of shards, which it reads into what the optimizer has."""
    for theirs, ours in (("8bit", "float32"), ("float32", "8bit")):
        optimizers = []
        for state_dtype in (theirs, ours):
            model, optimizer = _model_and_optimizer(True, state_dtype)
            _step(model, optimizer, 0)
            optimizers.append(optimizer)
        saved, other = (x.state_dict() for x in optimizers)
        with pytest.raises(ValueError, match=f"with state_dtype='{theirs}', .* Resume with state_dtype='{theirs}'"):
            optimizers[1].load_state_dict(saved | {"state": other["state"]})


def test_masks_of_rows_where_it_is_not_known_whose_they_are(process_group):
    p = _sharded(torch.ones(4, 3), [Shard(0)])
    p.grad = torch.ones_like(p)
    optimizer = PRM([p], reduction="per_row")
    optimizer._locate()
    optimizer._locator.layout.rows[0] = 0  # as of a strided shard
    with pytest.raises(ValueError, match="reduction='per_row'.*not known which rows of tensor 0.*use 'per_tensor'"):
        optimizer.step()


@pytest.mark.parametrize("offset", range(7))
@pytest.mark.parametrize("length", range(1, 14))
def test_slices_are_cut_at_rows(offset, length):
    cuts = list(_cut_at_rows(offset, length, in_row=3))
    assert [begin for begin, _, _ in cuts] == [0, *(end for _, end, _ in cuts[:-1])] and cuts[-1][1] == length
    for begin, end, count in cuts:
        first, last = (offset + begin) // 3, (offset + end - 1) // 3
        assert count == last - first + 1
        assert count == 1 or (offset + begin) % 3 == (offset + end) % 3 == 0


@pytest.mark.parametrize(("reduction", "key"), [("per_tensor", "prm_grad_var"), ("per_row", "prm_row_grad_var")])
def test_variances_that_were_loaded_are_saved_before_the_next_step(reduction, key):
    """DeepSpeed puts the settings of a checkpoint's groups into ours, and the tables with them."""
    optimizer = PRM([torch.nn.Parameter(torch.zeros(2, 3))], reduction=reduction)
    optimizer.param_groups[0][key] = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for _ in range(2):
        assert optimizer.state_dict()["param_groups"][0][key].tolist() == [1.0, 2.0]
    assert key not in optimizer.param_groups[0]


def test_replaced_parameters_of_other_shapes_are_an_error():
    originals = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(4))]
    with pytest.raises(RuntimeError, match="group 0 had 2 tensors and has 1"):
        find_layout([originals], [(0, [torch.nn.Parameter(torch.zeros(10))])])
    clones = [p.detach().clone() for p in originals]
    assert find_layout([originals], [(0, clones)]).path is None


def test_the_description_of_the_path():
    optimizer = PRM([torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))], reduction="per_tensor")
    assert optimizer.describe_sharding() is None
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.describe_sharding() == "2 tensors with per_tensor masks as whole tensors"


def test_a_reduction_that_changes_on_the_way_is_refused():
    optimizer = PRM([torch.nn.Parameter(torch.ones(3))], reduction="per_tensor")
    optimizer.param_groups[0]["reduction"] = "per_param"  # as DeepSpeed's universal checkpoints do
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(ValueError, match="trained with reduction='per_param'.*created with reduction='per_tensor'"):
        optimizer.step()


def test_each_set_of_process_groups_reduces_its_own_rows(process_group, monkeypatch):
    """Tensors that nobody shares, as FSDP2 leaves some, keep their rows; also where others are asked for later."""
    monkeypatch.setattr("prm_hf.sharding.layout._all_reduce", lambda part, group, op: part.mul_(2))
    layout = Layout(ShardingPath.FSDP2, flat=False, numels=[1] * 4, process_groups=[(process_group,), ()] * 2)
    for tensors, expected in ([0, 1, 2], [2, 1, 2]), ([1, 2, 3], [1, 2, 1]), ([0, 1, 2], [2, 1, 2]), ([0, 2], [2, 2]):
        table = torch.ones(len(tensors), 1)
        layout.all_reduce(table, tensors)
        assert table[:, 0].tolist() == expected


def test_a_state_that_was_loaded_before_the_parameters_were_replaced(tmp_path):
    """As accelerate's `prepare` does for FSDP2, which switches the groups to the sharded parameters."""
    model = torch.nn.Linear(4, 3)
    optimizer = PRM(model.parameters())

    def step():
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    step()
    saved = copy.deepcopy(optimizer.state_dict())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer.param_groups[0]["params"] = list(model.parameters())
        for _ in range(2):  # it stays an error
            with pytest.raises(RuntimeError, match="group 0 were replaced.*state of 2 of.*after `prepare`"):
                step()
        with pytest.raises(RuntimeError, match="group 0 were replaced"):
            optimizer.get_mask_stats()
        optimizer.state.clear()
        step()
        optimizer.load_state_dict(saved)
        step()
        assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("reduction", ["per_tensor", "per_row", "per_param"])
def test_a_flat_buffer_of_padding_alone(reduction):
    """As DeepSpeed ZeRO gives to a process where a group has fewer elements than there are processes."""
    originals = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = PRM([{"params": [p]} for p in originals], reduction=reduction, weight_decay=0.0)
    layout = Layout(ShardingPath.ZERO_12, flat=True, numels=[6, 1], rows=[2, 1], process_groups=[(), ()])
    flats = [torch.zeros(6).requires_grad_(), torch.zeros(2).requires_grad_()]
    layout.add(flats[0], [Segment(0, 0, 6)], [0])
    layout.add(flats[1], [], [1])
    optimizer._locator.layout, optimizer._locator._known = layout, {id(flat): flat for flat in flats}
    for group, flat in zip(optimizer.param_groups, flats, strict=True):
        group["params"] = [flat]
    for _ in range(3):
        flats[0].grad, flats[1].grad = torch.ones(6), torch.zeros(2)
        optimizer.step()
    assert (flats[0] < 0).all() and (flats[1] == 0).all()
    assert optimizer.get_mask_stats()["parameter_count"] == 6
