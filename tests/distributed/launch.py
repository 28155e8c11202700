"""Starts `accelerate launch` for the tests in this folder. No launch can hang, and every failure prints its log."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def accelerate_launch(
    config: str,
    module: list[str],
    log: Path,
    num_processes: int,
    *,
    timeout: float = 300,
    kill_when: Path | None = None,
) -> None:
    """Runs `accelerate launch --config_file accelerate_configs/<config>.yaml … -m <module>` to its end.

    Args:
        log: the file for its output.
        timeout: seconds after which the launcher and all its processes are killed and the test fails.
        kill_when: kill them all with SIGKILL as soon as this file exists, which then is the expected end.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", str(num_processes)]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    if config.startswith("fsdp"):
        command += ["--fsdp_transformer_layer_cls_to_wrap", "Qwen2DecoderLayer"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("w") as output:
        run = subprocess.Popen(
            [*command, "-m", *module],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            problem = _wait(run, timeout, kill_when)
        finally:
            kill_with_children(run)
    if problem is not None:
        raise AssertionError(f"{config} with {num_processes} processes {problem}:\n{log.read_text()[-6000:]}")


def kill_with_children(run: subprocess.Popen) -> None:
    """SIGKILL for a launcher and the processes under it, each of which is in a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(run.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    run.wait()


def _wait(run: subprocess.Popen, timeout: float, kill_when: Path | None) -> str | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if run.poll() is not None:
            expected = run.returncode == 0 and kill_when is None
            return None if expected else f"ended with exit code {run.returncode}"
        if kill_when is not None and kill_when.exists():
            return None
        time.sleep(0.05)
    return f"did not end within {timeout} s"


def launch_runs(
    config: str, runs: dict[str, dict], folder: Path, num_processes: int = 2, **kwargs
) -> dict[str, list[dict]]:
    """Makes `runs` with the worker and returns, by name, what each rank recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"world_size": num_processes, "output_dir": str(folder), "runs": runs}))
    module = ["tests.distributed.worker", str(plan)]
    timeout = 120 + 10 * len(runs) * num_processes
    accelerate_launch(config, module, folder / "log", num_processes, timeout=timeout, **kwargs)
    if kwargs.get("kill_when") is not None:
        return {}
    return {name: read_run(folder / name, num_processes) for name in runs}


def read_run(folder: Path, num_processes: int) -> list[dict]:
    ranks = [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(num_processes)]
    for rank in ranks:
        if rank["error"] is None:
            assert rank["world_size"] == num_processes
    return ranks
