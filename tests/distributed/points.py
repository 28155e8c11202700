"""What a step sends and how long it takes on the processes of a CPU: the points of results/sharding_points.json.

    python -m tests.distributed.points results/sharding_points.json

Bytes are counted on two, four and eight processes. Times are those of `per_tensor` and `per_row` in turns on one, two
and four, all of it twice. Each round takes steps with both, on two copies of a model, and gives a ratio. The processes
share the cores of the machine, so times of different rounds say little, and ratios of one round do.
"""

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

from benchmarks.sharded import count_sent
from benchmarks.traffic import step_traffic
from prm_hf import PRM
from prm_hf.sharding import local_tensor

from .worker import prepare_backends


PATHS = {"fsdp2": None, "zero1": 1, "zero2": 2, "zero3": 3}
TIMED_PATHS = ("fsdp2", "zero2", "zero3")
REDUCTIONS = ("per_tensor", "per_row")
COUNTED_ON, TIMED_ON = (2, 4, 8), (1, 2, 4)  # processes
ROUNDS, WARM_UP = 20, 2
REPEATED = 5  # calls of the optimizer in a step of training that is timed, all on its gradients
# 1.6 M parameters in sizes that 8 does not divide, to be counted, and 5 M to be timed
SIZES = {
    "counted": {"vocab_size": 5001, "hidden_size": 180, "intermediate_size": 499, "num_attention_heads": 6},
    "timed": {"vocab_size": 4001, "hidden_size": 512, "intermediate_size": 1399, "num_attention_heads": 8},
}


class Training:
    """A model under a way of sharding, with PRM.

    Attributes:
        shapes: of the parameters, by parameter group.
        prm: the optimizer.
    """

    def __init__(self, sizes: str, path: str, reduction: str) -> None:
        set_seed(0)
        more = {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
        config = Qwen2Config(**SIZES[sizes], **more, use_cache=False)
        self.engine = model = Qwen2ForCausalLM(config)
        self.vocabulary, self.is_deepspeed = config.vocab_size, path != "fsdp2"
        if not self.is_deepspeed:
            for layer in (*model.model.layers, model):
                fully_shard(layer)
        groups = [[p for p in model.parameters() if (p.dim() > 1) is flag] for flag in (True, False)]
        self.shapes = [[tuple(p.shape) for p in group] for group in groups]
        self.prm = PRM([{"params": group} for group in groups], reduction=reduction)

    def start(self, path: str) -> None:
        """Gives model and optimizer to DeepSpeed, after what is to be counted or timed was set up."""
        if not self.is_deepspeed:
            return
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": PATHS[path]},
            "zero_allow_untested_optimizer": True,
        }
        self.engine, *_ = deepspeed.initialize(model=self.engine, optimizer=self.prm, config=config)

    def step(self) -> None:
        tokens = torch.randint(self.vocabulary, (1, 9))
        loss = self.engine(input_ids=tokens, labels=tokens).loss
        if self.is_deepspeed:
            self.engine.backward(loss)
            dist.barrier()
            self.engine.step()
        else:
            loss.backward()
            dist.barrier()
            self.prm.step()
            self.prm.zero_grad()


def count(path: str, reduction: str) -> dict:
    """What the second step of a path sends, and what the model says. Collective."""
    training = Training("counted", path, reduction)
    prm, sent = training.prm, count_sent(training.prm)
    training.start(path)
    for _ in range(2):
        sent.clear()
        training.step()
    kept = [local_tensor(state["grad_var"]) for state in prm.state.values() if "grad_var" in state]
    kept += prm._deepspeed.variances.tables.values()
    most = torch.tensor([sum(x.nbytes for x in kept)])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    shapes = training.shapes
    return {
        "path": path,
        "reduction": reduction,
        "processes": dist.get_world_size(),
        "messages": sum(sum(mode.messages.values()) for mode in sent),
        "bytes": sum(sum(mode.bytes.values()) for mode in sent),
        "kept": int(most),
        "model": list(step_traffic(shapes, path, dist.get_world_size(), reduction)),
        "units": sum(shape[0] if reduction == "per_row" and len(shape) > 1 else 1 for x in shapes for shape in x),
    }


def time_both(path: str) -> dict:
    """Milliseconds of the optimizer in a step with each reduction, and the ratio of each round. Collective."""
    trainings, spent = {}, dict.fromkeys(REDUCTIONS, 0.0)
    for reduction in REDUCTIONS:
        training = trainings[reduction] = Training("timed", path, reduction)
        training.prm._step = _timed(training.prm._step, spent, reduction)
        training.start(path)
    found = {reduction: [] for reduction in REDUCTIONS}
    for i in range(WARM_UP + ROUNDS):
        for reduction in REDUCTIONS if i % 2 else REDUCTIONS[::-1]:
            spent[reduction] = 0.0
            trainings[reduction].step()
            slowest = torch.tensor(spent[reduction])
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            found[reduction].append(1e3 * slowest.item() / REPEATED)
    found = {reduction: times[WARM_UP:] for reduction, times in found.items()}
    ratios = sorted(row / tensor for tensor, row in zip(found["per_tensor"], found["per_row"], strict=True))
    beside = round(0.98 * ROUNDS**0.5)  # ranks beside the median that hold it with 95 %
    middle = ROUNDS // 2
    return {
        "path": path,
        "processes": dist.get_world_size(),
        "milliseconds": {name: round(statistics.median(times), 2) for name, times in found.items()},
        "ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[middle - 1 - beside], 3),
        "high": round(ratios[middle + beside], 3),
    }


def _timed(step, spent: dict[str, float], name: str):
    """DeepSpeed calls an optimizer several times a step: adds up what its calls take."""

    def timed() -> None:
        begin = time.perf_counter()
        for _ in range(REPEATED):
            step()
        spent[name] += time.perf_counter() - begin

    return timed


def work(what: str) -> None:
    PartialState(cpu=True)
    prepare_backends(deepspeed_is_used=True)
    if what == "counted":
        found = (count(path, reduction) for path, reduction in itertools.product(PATHS, REDUCTIONS))
    else:
        found = map(time_both, TIMED_PATHS)
    for point in found:
        if dist.get_rank() == 0:
            print("POINT " + json.dumps(point), flush=True)
    dist.destroy_process_group()


def launch(what: str, processes: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(port), "-m", "tests.distributed.points", what]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    lines = [line.removeprefix("POINT ") for line in done.stdout.splitlines() if line.startswith("POINT ")]
    print("\n".join(lines), flush=True)
    return list(map(json.loads, lines))


def main(file: Path) -> None:
    result = {"torch": torch.__version__, "cores": os.cpu_count()}
    result |= {"counted": [point for n in COUNTED_ON for point in launch("counted", n)]}
    result |= {"timed": [point for _ in range(2) for n in TIMED_ON for point in launch("timed", n)]}
    rows = [f" {json.dumps(name)}: " + _lines(value) for name, value in result.items()]
    file.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def _lines(value) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "\n ]"


if __name__ == "__main__":
    if sys.argv[1:] in (["counted"], ["timed"]):
        work(sys.argv[1])
    else:
        main(Path(sys.argv[1]))
