"""What the optimizer sends in a step on every path is what the model in `benchmarks/traffic.py` says."""

import pytest

from benchmarks.traffic import step_traffic

from .plans import COMMON, PATHS, plan
from .worker import make_model


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# With `frozen` a parameter has a gradient on some paths alone
RUNS = [(path, name) for path in PATHS if path not in ("single", "zero0") for name in COMMON if name != "frozen"]


@pytest.mark.parametrize(("path", "name"), RUNS)
def test_messages_and_bytes_of_a_step(recorded, path, name):
    sent_as_modelled(recorded.run(path, name), path, plan(path)[name])


def sent_as_modelled(ranks: list[dict], path: str, options: dict) -> None:
    reduction = options["prm"]["reduction"]
    expected = {}
    if reduction != "per_param":
        shapes = [tuple(p.shape) for p in make_model(options).parameters() if p.requires_grad]
        groups = [[shape for shape in shapes if len(shape) > 1], [shape for shape in shapes if len(shape) == 1]]
        traffic = step_traffic(groups, path.removesuffix("_offload"), len(ranks), reduction)
        expected = {"allreduce_": traffic[:2]} if traffic.messages else {}
    for rank in ranks:
        for step in rank["steps"][1:]:  # at the first one the layout is verified
            assert step["sent"] == expected
