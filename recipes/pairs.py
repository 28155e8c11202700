"""Preference pairs on policy, from prompts with a checkable answer: one right and one wrong completion of a model.

    python recipes/pairs.py gsm8k_sft.train.jsonl --model <folder of the model> --output pairs.jsonl

`prm-hf pairs` does the same without a clone, and `accelerate launch --multi_gpu recipes/pairs.py …` shares the prompts
among the GPUs of this machine. Rows are `prompt` and `completion`, which ends in the answer; `--prompt_column`,
`--answer_column` and `--answer_checker` name others. Interrupted, the same command goes on where it stopped, also on
another number of GPUs. Then, with the share of held-out problems that are solved before and after DPO:

    prm-hf dpo --model_name_or_path <folder of the model> --dataset_name pairs.jsonl \
        --solve_dataset_name gsm8k_sft.test.jsonl --noise_rate 0.3
"""

import sys

from prm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["pairs", *sys.argv[1:]]))
