"""Prints the table of results/sharding.md of what a step sends, counted anew.

python -m tests.distributed.points    # starts two, four and eight processes of a CPU
"""

import itertools
import json
import os
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

from benchmarks.sharded import count_sent
from benchmarks.traffic import step_traffic
from prm_hf import PRM
from prm_hf.sharding import local_tensor

from .plans import PER_ROW, PER_TENSOR
from .worker import prepare_backends


PATHS = {"fsdp2": None, "zero1": 1, "zero2": 2, "zero3": 3}
REDUCTIONS = {"per_tensor": PER_TENSOR, "per_row": PER_ROW}
# 1.6 M parameters, in sizes that 8 does not divide
MODEL = Qwen2Config(
    vocab_size=5001,
    hidden_size=180,
    intermediate_size=499,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    use_cache=False,
)


def count(path: str, reduction: str) -> dict:
    """What the second step of a path sends, and what the model says. Collective."""
    set_seed(0)
    model = Qwen2ForCausalLM(MODEL)
    if path == "fsdp2":
        for layer in (*model.model.layers, model):
            fully_shard(layer)
    groups = [[p for p in model.parameters() if (p.dim() > 1) is flag] for flag in (True, False)]
    shapes = [[tuple(p.shape) for p in group] for group in groups]
    prm = PRM([{"params": group} for group in groups], **REDUCTIONS[reduction])
    sent, engine = count_sent(prm), model
    if path != "fsdp2":
        import deepspeed

        zero = {"stage": PATHS[path]}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=prm, config=config)
    for _ in range(2):
        tokens = torch.randint(MODEL.vocab_size, (1, 9))
        loss = engine(input_ids=tokens, labels=tokens).loss
        sent.clear()
        if path == "fsdp2":
            loss.backward()
            prm.step()
            prm.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
    kept = [local_tensor(state["grad_var"]) for state in prm.state.values() if "grad_var" in state]
    kept += prm._deepspeed.variances.tables.values()
    most = torch.tensor([sum(x.nbytes for x in kept)])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    expected = step_traffic(shapes, path, dist.get_world_size(), reduction)
    return {
        "path": path,
        "reduction": reduction,
        "processes": dist.get_world_size(),
        "messages": sum(sum(mode.messages.values()) for mode in sent),
        "bytes": sum(sum(mode.bytes.values()) for mode in sent),
        "kept": int(most),
        "model": list(expected),
        "units": sum(shape[0] if reduction == "per_row" and len(shape) > 1 else 1 for x in shapes for shape in x),
    }


def work() -> None:
    PartialState(cpu=True)
    prepare_backends(deepspeed_is_used=True)
    for path, reduction in itertools.product(PATHS, REDUCTIONS):
        found = count(path, reduction)
        if dist.get_rank() == 0:
            print("POINT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


def main() -> None:
    print("| path | reduction | processes | messages | bytes | as the model says | `grad_var`, bytes | before |")
    print("|---" * 8 + "|")
    for processes in (2, 4, 8):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", str(port), "-m", "tests.distributed.points", "work"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        for line in done.stdout.splitlines():
            if line.startswith("POINT "):
                x = json.loads(line.removeprefix("POINT "))
                agrees = "yes" if x["model"][:2] == [x["messages"], x["bytes"]] else f"no: {x['model'][:2]}"
                cells = [x["path"], x["reduction"], x["processes"], x["messages"], x["bytes"], agrees, x["kept"]]
                print("| " + " | ".join(map(str, [*cells, 16 * x["units"]])) + " |", flush=True)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["work"] else main()
