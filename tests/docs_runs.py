"""Runs a command of the documentation for real, but as small as it goes; or says why it does not run here.

On the PATH of `tests/test_docs_commands.py` each program is a script that calls this one, so nothing but the standard
library is imported.
"""

import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).parents[1]
PROGRAMS = ("accelerate", "axolotl", "mkdocs", "pip", "prm-hf", "pytest", "python", "ruff", "swift", ".ci/run")

INDEX = "it downloads from an index; tests/test_installation.py has the metadata, and .ci/run installs the wheel"
OTHER_TOOL = "the tool needs an environment of its own, in which tests/integrations/ runs this file"
# What is checked against its parser alone.
NOT_HERE = {
    "pip install -c constraints.txt -e .": INDEX,
    "pip install -c constraints.txt -e .[trl,report]": INDEX,
    "pip install -c constraints.txt -e .[dev]": INDEX,
    "pip install -c constraints.txt -e .[trl,diagnostics]": INDEX,
    "pip install liger-kernel": INDEX,
    ".ci/run": "it runs these tests",
    "swift sft examples/swift/sft.yaml": OTHER_TOOL,
    "swift rlhf examples/swift/dpo.yaml": OTHER_TOOL,
    "axolotl train examples/axolotl/dpo.yaml": OTHER_TOOL,
    "prm-hf llamafactory train examples/llamafactory/dpo.yaml": OTHER_TOOL,
    "prm-hf llamafactory sft examples/llamafactory/v1_sft.yaml": OTHER_TOOL,
    "python -m tests.distributed.matrix": "it launches all that `pytest -m slow tests/distributed` does",
    "python -m tests.distributed.points results/sharding_points.json": (
        "it starts 21 processes; tests/distributed/test_traffic.py counts all paths"
    ),
    "accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 recipes/dpo_noisy.py": (
        "accelerate has FSDP on GPUs alone; tests/distributed/test_recipes.py runs it, around accelerate's check"
    ),
    "accelerate launch --config_file accelerate_configs/fsdp2.yaml benchmarks/sharded.py --output fsdp2.json": (
        "it measures GPUs; tests/distributed/test_recipes.py has FSDP2"
    ),
    "prm-hf sweep --ray auto dpo --config recipes/qwen2.5-0.5b/gsm8k_pairs.yaml --model_name_or_path models/qwen "
    "--dataset_name gsm8k_pairs.train.jsonl --eval_dataset_name gsm8k_pairs.test.jsonl --max_minutes 25": (
        "it needs a Ray cluster; tests/experiments/test_ray.py has one"
    ),
    "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
    "--input_folder out/checkpoint-100/global_step100 --output_folder out/universal": (
        "it needs a checkpoint of DeepSpeed; tests/distributed/test_checkpoints.py converts some"
    ),
}

DPO = {"dpo", "recipes/dpo_noisy.py"}
SFT = {"sft", "recipes/sft_noisy.py"}
ON_A_CPU = re.search(r"Without a GPU add `([^`]+)`", (ROOT / "docs" / "getting_started.md").read_text())[1].split()
ONE_SEED = ["--seeds", "0"]  # where a comparison runs in full, with all of its methods, rates and steps
ONE_RATE = ["--learning_rates", "1e-3", "--prm_learning_rates", "1e-3", "--seeds", "0", "--max_extensions", "0"]
STEPS = ["--max_steps", "2", "--max_length", "64", *ON_A_CPU, *ONE_RATE]
METHODS = ["--methods", "adamw", "prm_noisy_labels"]  # a configuration of recipes/ has up to 22
# A configuration of recipes/ also has several rates, and slices of more rows than the stand-ins have.
DPO_CONFIGURATION = ["--noise_rate", "0.3", "--dataset_train_split", "train"]
SFT_CONFIGURATION = ["--noise_rate", "0.3", "--dataset_train_split", "train[:30]"]
SFT_CONFIGURATION += ["--dataset_test_split", "train[30:]", "--max_new_tokens", "4"]
SUSPECTS = ["--folds", "2", "--num_train_epochs", "1", "--max_length", "64", *ON_A_CPU]
TRL = [*ON_A_CPU, "--max_steps", "2", "--max_length", "64", "--dtype", "float32", "--report_to", "none"]
PAIRS = ["--max_new_tokens", "16"]
DIAGNOSE = ["--max_rows", "4", "--max_length", "64"]
CURVES = ["--widths", "4", "--depths", "1", "--train_loss", "1.5"]
ONE_RUN = ["--max_steps", "2", "--methods", "adamw", "prm_rows", "--seeds", "0", "--learning_rates", "1e-2"]
ONE_RUN += ["--prm_learning_rates", "1e-2", "--weight_decays", "0", "--prm_weight_decays", "0"]
RANDOMIZATION = ["--models", "vit", "--kinds", "true_labels", "--methods", "adamw", "--max_steps", "2"]
FILES = ["tests/optim/test_fused.py", "tests/optim/test_gpu.py"]
QUICK_TESTS = ["--collect-only", "-qq", "-p", "no:cacheprovider", *FILES]


def shortened(program: str, arguments: Sequence[str]) -> list[str]:
    """The command with more arguments, after which it takes seconds. It keeps all that it had, in its order."""
    command, names = [program, *arguments], set(arguments)
    if "--help" in names:
        return command
    if program == "accelerate" and "--config_file" in names:
        command[2:2] = ["--main_process_port", str(_free_port())]
    if "trl" in names:
        return command + TRL
    if names & (DPO | SFT):
        command += STEPS + ([] if "--methods" in names else METHODS)
        if "--config" in names:
            command += SFT_CONFIGURATION if names & SFT else DPO_CONFIGURATION
        return command
    if "suspects" in names:
        rates = [] if "--learning_rates" in names else ["--learning_rates", "1e-3"]
        return command + ([] if "--decisions" in names else [*SUSPECTS, *rates])
    if names & {"recipes/pairs.py", "pairs"}:
        return command + PAIRS
    if "diagnose" in names:
        return command + DIAGNOSE
    if "recipes/effective_dimension.py" in names:
        return command + CURVES
    if names & {"recipes/randomization.py", "randomization"}:
        return command + RANDOMIZATION
    if "recipes/compression.py" in names:
        return command + ["--models", "lenet", "--train_factor", "0.01", "--qat_steps", "1"]
    if {Path(name).stem for name in names} & {"regression", "grokking", "pinn"}:
        return command + ONE_RUN
    if "research.wrong_labels_rounds" in names:
        return command + ["--seeds", "0", "--kinds", "current"]
    if "benchmarks/convergence.py" in names:
        return command + ["--seeds", "0", "--steps", "4"]
    if "benchmarks/sven.py" in names:
        return [*command, "--widths", "8", "--batches", "2", "--repeats", "1"]
    if "benchmarks/step.py" in names:
        more = ["--time_limit", "1", "--seconds", "0.1", "--repeats", "1"]
        return command + more + (["--dpo_steps", "1"] if "--dpo_steps" in names else [])
    return command + QUICK_TESTS if program == "pytest" else command


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    program, *arguments = sys.argv[1:]
    if reason := NOT_HERE.get(" ".join([program, *arguments])):
        print(f"not run: {reason}")
        return
    command = [program, *arguments]
    if not os.environ.get("IN_FULL"):
        command = shortened(program, arguments)
    elif DPO & {*arguments}:
        command += ONE_SEED
    here = Path(sys.executable).parent / program
    os.execv(here if here.exists() else program, [str(here), *command[1:]])


if __name__ == "__main__":
    main()
