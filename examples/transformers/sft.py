"""Fine-tuning in transformers' own Trainer: python examples/transformers/sft.py, with any argument of a Trainer.

On two GPUs: accelerate launch --num_processes 2 examples/transformers/sft.py
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from prm_hf.integrations.transformers import register


@dataclass
class Task:
    """What to train on what."""

    model: str = "Qwen/Qwen2.5-0.5B"
    dataset: str = "trl-lib/tldr"
    max_length: int = 1024


DEFAULTS = {
    "output_dir": "Qwen2.5-0.5B-PRM",
    "optim": "prm",
    "optim_args": "reduction=per_row,signal_beta=0.98,relative_eps=10",
    "learning_rate": 2e-5,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "logging_steps": 10,
    "bf16": True,
}


def main() -> None:
    register()  # before the arguments are parsed
    parser = HfArgumentParser((Task, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    task, args = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = load_dataset(task.dataset, split="train")

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        text = row["prompt"] + row["completion"] + tokenizer.eos_token
        return tokenizer(text, truncation=True, max_length=task.max_length)

    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(task.model),
        args,
        train_dataset=rows.map(tokenize, remove_columns=rows.column_names),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
