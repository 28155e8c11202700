"""What `prm_hf.integrations.llamafactory` gives to LLaMA-Factory, beside a stand-in of it."""

import importlib.machinery
import logging
import sys
from types import ModuleType

import pytest
import torch

from prm_hf import PRM, cli


@pytest.fixture
def factory(monkeypatch):
    """LLaMA-Factory's modules, of which those that train note the arguments that they get."""
    seen = []
    modules = {name: ModuleType(name) for name in ("llamafactory", "llamafactory.extras.misc", "llamafactory.hparams")}
    modules |= {name: ModuleType(name) for name in ("llamafactory.train.tuner", "llamafactory.v1.launcher")}
    plugin = ModuleType("llamafactory.v1.plugins.trainer_plugins.optimizer")
    registry = {}

    class OptimizerPlugin:
        def __init__(self, name):
            self.name = name

        def register(self):
            return lambda function: registry.setdefault(self.name, function)

    plugin.OptimizerPlugin = OptimizerPlugin
    modules[plugin.__name__] = plugin
    modules["llamafactory"].__spec__ = importlib.machinery.ModuleSpec("llamafactory", None)
    modules["llamafactory.extras.misc"].is_env_enabled = lambda name: name in variables
    modules["llamafactory.hparams"].read_args = lambda: given[0]
    modules["llamafactory.train.tuner"].run_exp = seen.append
    modules["llamafactory.v1.launcher"].main = lambda: seen.append(sys.argv)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["prm-hf"])
    variables, given = set(), [{}]
    return seen, given, variables, registry


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"stage": "dpo"}, {"stage": "dpo", "optim": "prm"}),
        ({"optim": "adamw_torch"}, {"optim": "adamw_torch"}),
        (["--stage", "sft"], ["--stage", "sft", "--optim", "prm"]),
        (["--optim", "sgd"], ["--optim", "sgd"]),
    ],
    ids=str,
)
def test_prm_is_the_default(factory, args, expected):
    seen, given, *_ = factory
    given[0] = args
    assert cli.main(["llamafactory", "train", "config.yaml"]) == 0
    assert seen == [expected] and sys.argv == ["llamafactory-cli", "config.yaml"]


def test_a_tracker_that_is_not_there_is_said_first(factory, capsys):
    seen, given, *_ = factory
    given[0] = {"report_to": ["wanbd"]}
    assert cli.main(["llamafactory", "train", "config.yaml"]) == 2 and not seen
    assert "error: `report_to` has 'wanbd': wanbd is not supported, only " in capsys.readouterr().err


def test_version_1_gets_its_plugin(factory, caplog):
    seen, _, variables, registry = factory
    variables.add("USE_V1")
    assert cli.main(["llamafactory", "sft", "config.yaml"]) == 0
    assert seen == [["llamafactory-cli", "sft", "config.yaml"]]
    model = torch.nn.Linear(8, 8)
    model.bias.requires_grad_(False)
    optimizer = registry["prm"](model, {"name": "prm", "lr": 1e-3, "relative_eps": 10})
    assert type(optimizer) is PRM and optimizer.param_groups[0]["params"] == [model.weight]
    with caplog.at_level(logging.WARNING, logger="prm_hf"):
        for _ in range(2):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
    assert caplog.text.count("PRM trains 1 tensors") == 1 and "lr=0.001, relative_eps=10." in caplog.text
    with pytest.raises(ValueError, match="`optim_config` has no `lr`"):
        registry["prm"](model, {"name": "prm"})


@pytest.mark.parametrize("arguments", [[], ["export"], ["sft"]], ids=str)
def test_other_commands_are_refused(factory, capsys, arguments):
    assert cli.main(["llamafactory", *arguments]) == 2
    assert "prm-hf llamafactory: error: `prm-hf llamafactory` got " in capsys.readouterr().err


def test_without_llamafactory_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    assert cli.main(["llamafactory", "train", "config.yaml"]) == 2
    assert "needs LLaMA-Factory: pip install llamafactory" in capsys.readouterr().err
