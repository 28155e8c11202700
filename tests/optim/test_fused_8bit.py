"""The Triton kernels with moments in 8 bits, interpreted on the CPU, against the same oracle as the other paths."""

import itertools

import pytest
import torch


fused = pytest.importorskip("prm_hf.optim.triton.launch", reason="needs triton")

from prm_hf.optim import PRM  # noqa: E402
from prm_hf.optim.quantized import MOMENTS  # noqa: E402

from .optimizer_runs import MEASURED, SIGNAL, train  # noqa: E402
from .quantized_runs import check_steps_from_what_is_kept, large_params, wide_gradient  # noqa: E402


pytestmark = pytest.mark.skipif(
    not fused.INTERPRETED, reason="on a machine with a GPU tests/test_gpu.py runs it there"
)
# Rows of a block of whole 16 elements, of no whole blocks, of several, and one row
SHAPES = [(66, 64), (17, 300), (3, 1413), (4111,)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "SIZES_8BIT", fused.Sizes(1024, 4, 0, ((16, 256), (4, 512), (1, 1024)), 2))
    monkeypatch.setattr(fused, "LAG", 2)


OTHERS = [{"mask": "none"}, {"mask": "soft", "reduction": "per_tensor"}, {"mask": "hard"}]
COUPLED = {"amsgrad": True, "decoupled_weight_decay": False}


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(x, marks=() if x == SIGNAL else pytest.mark.slow) for x in MEASURED),
        *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS),
        pytest.param({**SIGNAL, **COUPLED}, marks=pytest.mark.slow),
        pytest.param({**MEASURED[0], **COUPLED, "maximize": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_the_oracle(settings):
    for shapes in (SHAPES, [(66, 64)]):  # with rows of any length, and of whole 16 elements alone
        check_steps_from_what_is_kept(large_params(shapes=shapes), settings, shapes_8bit=shapes, fused=True)


@pytest.mark.parametrize("settings", [MEASURED[2], SIGNAL], ids=["per_tensor", "signal"])
def test_equals_foreach_bit_for_bit_in_what_is_kept(settings):
    """From one state: codes and scales, but where the two add up in another order and a value is on a border."""
    optimizers, results = [], []
    for implementation in ("fused", "foreach"):
        params = large_params(shapes=SHAPES)
        optimizers.append(PRM(params, state_dtype="8bit", **settings, **{implementation: True}))
        train(optimizers[-1], params, steps=1)
        results.append(params)
    for p, q in zip(*results, strict=True):
        for key in (key for key in MOMENTS if key in optimizers[0].state[p]):
            ours, theirs = (x.state[y][key] for x, y in zip(optimizers, (p, q), strict=True))
            assert (ours != theirs).float().mean() < 1e-3
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("capturable", [False, True])
def test_what_is_not_finite_stays_visible(capturable):
    for settings, bad in itertools.product((SIGNAL, {"reduction": "per_tensor"}), (torch.inf, torch.nan)):
        p = torch.zeros(66, 64, requires_grad=True)
        optimizer = PRM([p], state_dtype="8bit", fused=True, capturable=capturable, **settings)
        for value in (0.0, bad, 0.0):
            p.grad = wide_gradient(p.shape, torch.Generator().manual_seed(0))
            p.grad[3, 5] += value
            optimizer.step()
        assert 1 <= optimizer.get_mask_stats()["nonfinite_count"] <= 64
