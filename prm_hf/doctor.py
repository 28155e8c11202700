"""`prm-hf doctor`: what is installed, which way of sharding accelerate is set to, and how PRM gets into each tool."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__
from ._extras import require


PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "torchao")
# By the name of a tool its package, and how one trains with PRM in it.
TOOLS = {
    "transformers": ("transformers", 'call `prm_hf.integrations.transformers.register()`, then set `optim="prm"`'),
    "TRL": ("trl", "`PRMDPOTrainer` and `PRMSFTTrainer`, or TRL's own scripts by `prm-hf trl dpo ...`"),
    "PEFT": ("peft", "`peft_config` of `PRMDPOTrainer` and `PRMSFTTrainer`, as in TRL"),
    "DeepSpeed": (
        "deepspeed",
        "`accelerate launch`; DeepSpeed's configuration may have no section `optimizer`",
    ),
    "axolotl": ("axolotl", "`optimizer: prm` and `plugins: [prm_hf.integrations.axolotl.PRMPlugin]`"),
    "ms-swift": (
        "ms-swift",
        "`--external_plugins FILE.py --optimizer prm`; FILE.py has `import prm_hf.integrations.swift`",
    ),
    "LLaMA-Factory": ("llamafactory", "`optim: prm` in FILE.yaml, and `prm-hf llamafactory train FILE.yaml`"),
    "Unsloth": ("unsloth", "as in transformers; training stops where `UnslothTrainer` makes another optimizer"),
    "Ray": ("ray", "`prm-hf sweep --ray auto dpo ...` makes the runs of a comparison on a cluster"),
}
WIDTH, LABEL = 110, 14  # of a line, and of what stands before its text


class Launch(NamedTuple):
    """What `accelerate launch` would start.

    Attributes:
        title: the number of processes, and what shards.
        path: the way of sharding, and its `ShardingPath`; None where every process holds whole tensors.
        refused: why PRM with its defaults does not train there; empty where it does.
        limits: what is refused there beside the defaults.
        here: what is in the way on this machine.
    """

    title: str
    path: str | None
    refused: str
    limits: list[str]
    here: list[str]


def main(config_file: str | None) -> int:
    """Prints the report; returns 1 if PRM's defaults are refused under the configuration, otherwise 0."""
    launch = _read_launch(config_file)
    print(f"prm-hf {__version__}, Python {platform.python_version()}")
    for label, text in [*_machine(), *_launch_lines(launch)]:
        _print(label, text)
    print("\nHow to train with PRM in each tool:")
    for name, (package, how) in TOOLS.items():
        version = version_of(package)
        _print(name, f"not installed: {how}" if version is None else f"{version}: {how}")
    return int(launch is not None and bool(launch.refused))


def _print(label: str, text: str) -> None:
    lines = textwrap.wrap(text, WIDTH - LABEL - 1, break_long_words=False, break_on_hyphens=False)
    print(f"{label:<{LABEL}} " + f"\n{' ' * (LABEL + 1)}".join(lines))


def version_of(package: str) -> str | None:
    """The version of a package that is installed, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- This machine ----


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    found = {package: version_of(package) for package in PACKAGES}
    yield "packages", ", ".join(f"{package} {version}" for package, version in found.items() if version)
    if missing := [package for package, version in found.items() if not version]:
        yield "not installed", ", ".join(missing)
    if outside := _outside_of_range():
        yield "not tested", "; ".join(outside)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    sizes = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(len(names))]
    devices = [f"GPU {i}: {name}, {size:.0f} GiB" for i, (name, size) in enumerate(zip(names, sizes, strict=True))]
    yield "devices", "; ".join(devices) or f"no GPU, {os.cpu_count()} CPU cores"
    has_triton = all(importlib.util.find_spec(name) is not None for name in ("triton", "numpy"))
    if names and not has_triton:
        yield "PRM's step", 'uses torch\'s multi-tensor functions. `pip install "prm-hf[triton]"` makes it one kernel.'
    elif names:
        yield "PRM's step", "is one Triton kernel"
    else:
        yield "PRM's step", "uses torch's multi-tensor functions. On a GPU it is one Triton kernel."


def _outside_of_range() -> list[str]:
    """Packages of another version than this package asks for, with what it asks for."""
    if importlib.util.find_spec("packaging") is None:  # neither is any package of the extras there
        return []
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("prm-hf") or ()]
    except importlib.metadata.PackageNotFoundError:  # as a clone on PYTHONPATH
        return []
    found = {}
    for requirement in wanted:
        version = version_of(requirement.name) if requirement.name in PACKAGES else None
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            found[requirement.name] = f"{requirement.name} {version}, and prm-hf asks for {requirement.specifier}"
    return list(found.values())


# ---- The configuration of accelerate ----


def _launch_lines(launch: Launch | None) -> Iterator[tuple[str, str]]:
    if launch is None:
        yield (
            "launch",
            "there is no configuration of accelerate, so nothing is sharded. `--config_file` names one.",
        )
        return
    yield "launch", launch.title
    yield "sharding", launch.path or "every process holds whole tensors"
    yield "PRM", f"is refused: {launch.refused}" if launch.refused else "trains there with its defaults"
    for limit in launch.limits:
        yield "refused", limit
    for problem in launch.here:
        yield "this machine", problem


def _read_launch(config_file: str | None) -> Launch | None:
    """What the file stands for, or accelerate's default file; None without either.

    Raises:
        ValueError: the file is not there, or accelerate does not take it.
    """
    if config_file is None and importlib.util.find_spec("accelerate") is None:
        return None
    require("--config_file", "accelerate")
    from accelerate.commands.config.config_args import default_config_file

    file = Path(config_file or default_config_file)
    if not file.is_file():
        if config_file is None:
            return None
        raise ValueError(f"`--config_file` {config_file!r} {'is a folder' if file.is_dir() else 'does not exist'}.")
    return _launch_of(_launch_arguments(file), file)


def _launch_arguments(file: Path) -> argparse.Namespace:
    """The arguments of `accelerate launch --config_file FILE`, as it completes them itself."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    try:
        return _validate_launch_command(args)[0]
    except Exception as error:  # of whatever kind: it is what accelerate would end with
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"`--config_file` {str(file)!r}: accelerate does not take it: {problem}") from error


def _launch_of(args: argparse.Namespace, file: Path) -> Launch:
    from .optim.hyperparameters import REDUCTIONS, STATE_DTYPES, Hyperparameters
    from .sharding import ShardingPath, deepspeed, fsdp

    processes = "1 process" if args.num_processes == 1 else f"{args.num_processes} processes"
    path, what, limits = None, "DDP" if args.num_processes > 1 else "nothing is sharded", []
    refused = ""
    if args.use_deepspeed:
        config = _deepspeed_config(args)
        stage = config["zero_optimization"]["stage"]
        path, what = ShardingPath.of_zero(stage), f"DeepSpeed ZeRO-{stage}"
        refused = _reason(lambda: deepspeed.check_config(config))
    elif args.use_fsdp:
        version = int(args.fsdp_version)
        path, what = ShardingPath[f"FSDP{version}"], f"FSDP{version}"
        refused = _reason(lambda: fsdp.check_plugin(version, str(args.fsdp_use_orig_params).lower() == "true"))
        if version == 1 and args.fsdp_state_dict_type != "FULL_STATE_DICT":
            limits.append(f"resuming: {fsdp.LOST_STATE}")
    elif args.use_megatron_lm or args.tpu:
        what = "Megatron-LM" if args.use_megatron_lm else "TPU"
        refused = f"PRM was never run under {what}. Use DDP, FSDP2 or DeepSpeed ZeRO."
    if path is not None:
        defaults = Hyperparameters()
        refused = refused or _reason(lambda: path.check(defaults.reduction, defaults.state_dtype))
        settings = [(name, "float32") for name in REDUCTIONS] + [("per_tensor", dtype) for dtype in STATE_DTYPES]
        limits += _joined([_reason(lambda s=setting: path.check(*s)) for setting in settings])
    words = path and f"{path.value}, ShardingPath.{path.name}"
    return Launch(f"{file}: {processes}, {what}", words, refused, limits, list(_in_the_way(args)))


def _joined(reasons: list[str]) -> list[str]:
    """Messages `Invalid NAME=VALUE: REASON`; those of one reason are one."""
    values: dict[str, list[str]] = {}
    for value, reason in (text.removeprefix("Invalid ").split(": ", 1) for text in reasons if text):
        values.setdefault(reason, []).append(value)
    return [f"{', '.join(names)}: {reason}" for reason, names in values.items()]


def _reason(check: Any) -> str:
    """What a check says against something; empty where it says nothing."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return ""


def _deepspeed_config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration that accelerate gives DeepSpeed, as far as PRM looks at it."""
    offload = {x: {"device": getattr(args, f"{x}_device") or "none"} for x in ("offload_optimizer", "offload_param")}
    stage = 2 if args.zero_stage is None else args.zero_stage
    config = {"zero_optimization": {"stage": stage, **offload}}
    if args.deepspeed_config_file is not None:
        file = Path(args.deepspeed_config_file)
        name = f"`deepspeed_config_file` {str(file)!r}"
        if not file.is_file():
            raise ValueError(f"{name} does not exist in the working folder, {str(Path.cwd())!r}.")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
            raise ValueError(f"{name} has no section `zero_optimization`, without which accelerate does not take it.")
        if config["zero_optimization"].setdefault("stage", 0) == "auto":
            config["zero_optimization"]["stage"] = stage
    if config["zero_optimization"]["stage"] not in (0, 1, 2, 3):
        found = config["zero_optimization"]["stage"]
        raise ValueError(f"The stage of DeepSpeed's ZeRO is {found!r}: it must be 0, 1, 2 or 3.")
    return config


def _in_the_way(args: argparse.Namespace) -> Iterator[str]:
    """Why this machine does not start it, which says nothing of the machine that is meant."""
    import torch

    gpus, wanted = torch.cuda.device_count(), args.num_processes // (args.num_machines or 1)
    if args.use_deepspeed and version_of("deepspeed") is None:
        yield 'has no DeepSpeed: `pip install "prm-hf[deepspeed]"`.'
    if args.use_cpu:
        return
    if args.use_fsdp and not gpus:
        yield "has no GPU, and accelerate has FSDP on GPUs alone."
    elif args.use_deepspeed and not gpus:
        if os.environ.get("DS_ACCELERATOR") != "cpu":
            yield "has no GPU, and DeepSpeed then needs the environment variable `DS_ACCELERATOR=cpu`."
    elif (gpus or args.multi_gpu) and wanted > max(1, gpus):
        found = f"{gpus} GPU{'s' * (gpus != 1)}"
        yield f"has {found}, and {wanted} processes are to start on a machine."
