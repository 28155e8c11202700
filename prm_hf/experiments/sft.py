"""SFT on prompts of which some have another row's completion: PRM against AdamW, compared fairly.

The built-in task, on two CPU cores, in minutes:

    accelerate launch recipes/sft_noisy.py

A model and a dataset of your own (`prompt` and `completion`, as text or as messages):

    accelerate launch recipes/sft_noisy.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main --prompt_column question --completion_column answer \
        --as_messages --answer_pattern "#### (.+)" \
        --noise_rate 0.3 --seeds 0 1 2 --learning_rates 5e-6 1e-5 3e-5 --prm_learning_rates 2e-5 5e-5 1e-4 \
        --output_dir runs/gsm8k

or with everything in a file: `--config recipes/qwen2.5-0.5b/sft_noisy.yaml`. All flags of `PRMSFTConfig` and TRL's
`ModelConfig` work. Finished runs are not repeated; `prm-hf compare runs/…` prints the table again.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.models.utils import unwrap_model_for_generation

from .. import PRMSFTConfig, PRMSFTTrainer
from ..noise import corrupt
from ..trainers import MemorizationCallback
from .arguments import BuiltIn, ComparisonArguments, Data, parse_arguments
from .controls import OPTIMIZERS
from .runner import Recipe, RunSpec, run_comparisons


@dataclass
class SFTArguments(ComparisonArguments):
    """
    Arguments of a comparison on prompts and completions.

    Parameters:
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts.
        completion_column (`str`, *optional*, defaults to `"completion"`):
            Column of the completions.
        as_messages (`bool`, *optional*, defaults to `False`):
            Whether to make messages of prompts and completions that are text, so that the chat template applies.
        answer_pattern (`str`, *optional*):
            Regular expression with one group, the answer in a completion. With it the held-out accuracy at the end of
            a run is `answer_match`: the share of prompts to which greedy decoding gives the answer of the held-out
            completion. Without it, it is `exact_match`, of the whole completion.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest completion that is generated for `answer_match`.
        memorization_max_rows (`int`, *optional*, defaults to `1024`):
            Number of training rows on which memorization is measured, spread evenly over the training set.
    """

    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    completion_column: str = field(default="completion", metadata={"help": "Column of the completions."})
    as_messages: bool = field(
        default=False, metadata={"help": "Whether to make messages of texts, so that the chat template applies."}
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression with one group, the answer in a completion, to measure `answer_match` by "
            "generation at the end of a run. Default: `exact_match` of the whole completion."
        },
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Longest completion that is generated for `answer_match`."}
    )
    memorization_max_rows: int = field(
        default=1024, metadata={"help": "Number of training rows on which memorization is measured."}
    )

    def check(self, known_methods: list[str], learning_rate: float, max_grad_norm: float) -> None:
        super().check(known_methods, learning_rate, max_grad_norm)
        for name in ("max_new_tokens", "memorization_max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.answer_pattern is not None and re.compile(self.answer_pattern).groups != 1:
            raise ValueError(f"`answer_pattern` must have one group, the answer, got {self.answer_pattern!r}.")


def make_built_in(seed: int) -> tuple[str, Dataset, Dataset]:
    from ..demo import build_demo, completion_rows

    demo = build_demo(seed)
    return demo.model_path, completion_rows(demo.train), completion_rows(demo.test)


BUILT_IN = BuiltIn(
    settings={
        "num_train_epochs": 10,
        "lr_scheduler_type": "linear",
        "warmup_steps": 16,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "max_length": 64,
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 40,
        "per_device_eval_batch_size": 128,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rates": [3e-4, 1e-3, 3e-3, 1e-2],
        "prm_learning_rates": [3e-3, 1e-2, 3e-2, 1e-1],
        "seeds": [0, 1, 2],  # with one seed the same method has an accuracy of .4 or .8
    },
    batch_size=16,
    make=make_built_in,
)


def parse(
    arguments: list[str], known: Iterable[str] = tuple(OPTIMIZERS), output_dir: str = "runs/sft_noisy"
) -> tuple[SFTArguments, PRMSFTConfig, ModelConfig]:
    return parse_arguments(arguments, SFTArguments, PRMSFTConfig, list(known), output_dir, BUILT_IN)


def prepare_rows(dataset: Dataset, args: SFTArguments) -> Dataset:
    """The columns `prompt` and `completion`, and no others.

    Raises:
        ValueError: a column is missing, or there is nothing to make messages of.
    """
    names = {args.prompt_column: "prompt", args.completion_column: "completion"}
    missing = [name for name in names if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The dataset has no column {missing[0]!r}; it has {dataset.column_names}. Name yours with "
            "`--prompt_column` and `--completion_column`."
        )
    dataset = dataset.select_columns(list(names))
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    if not args.as_messages:
        return dataset
    if not all(isinstance(dataset[0][name], str) for name in ("prompt", "completion")):
        raise ValueError(
            "`--as_messages` makes messages of texts, and the dataset has messages already: leave it out."
        )
    roles = {"prompt": "user", "completion": "assistant"}

    def converse(row: dict[str, str]) -> dict[str, list]:
        return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}

    # Without removing the columns first, the new type would be taken for the old one
    return dataset.map(converse, remove_columns=list(roles), load_from_cache_file=False)


def answers(texts: list[str], pattern: str) -> list[str | None]:
    """The last match of `pattern` in each text, without surrounding space; None where there is none."""
    found = [re.findall(pattern, text) for text in texts]
    return [matches[-1].strip() if matches else None for matches in found]


@torch.no_grad()
def matches_answers(trainer: PRMSFTTrainer, rows: Dataset, pattern: str, max_new_tokens: int) -> list[bool]:
    """Whether greedy decoding gives the answer of each row's completion. Collective."""
    accelerator, tokenizer = trainer.accelerator, trainer.processing_class

    def text(value: str | list[dict[str, str]]) -> str:
        return value if isinstance(value, str) else value[-1]["content"]

    prompts = [
        row if isinstance(row, str) else tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False)
        for row in rows["prompt"]
    ]
    expected = answers([text(completion) for completion in rows["completion"]], pattern)
    if None in expected:
        row = expected.index(None)
        raise ValueError(f"`answer_pattern` {pattern!r} is not found in the completion of held-out row {row}.")
    mine = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    mine.sort(key=lambda i: len(prompts[i]))
    found, size = [], trainer.args.per_device_eval_batch_size
    with unwrap_model_for_generation(trainer.model_wrapped, accelerator) as model:
        was_training = model.training
        model.eval()
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            inputs = tokenizer(
                [prompts[i] for i in batch],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=isinstance(rows[0]["prompt"], str),
            ).to(accelerator.device)
            with accelerator.autocast():
                output = model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            completions = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found += zip(batch, answers(completions, pattern), strict=True)
        model.train(was_training)
    generated = dict(gather_object(found)) if accelerator.num_processes > 1 else dict(found)
    return [generated[i] == answer for i, answer in enumerate(expected)]


def make_recipe(script_args: SFTArguments, model_args: ModelConfig) -> Recipe:
    def prepare(data: Data, _: PRMSFTConfig) -> Data:
        train, heldout = (prepare_rows(rows, script_args) for rows in (data.train, data.heldout))
        return dataclasses.replace(data, train=train, heldout=heldout)

    def make_trainer(config: PRMSFTConfig, spec: RunSpec, data: Data) -> PRMSFTTrainer:
        peft_config, reference = get_peft_config(model_args), None
        if peft_config is None and config.drift_metrics:  # with an adapter the model without it is the reference
            loading = {key: value for key, value in config.model_init_kwargs.items() if value is not None}
            reference = AutoModelForCausalLM.from_pretrained(data.model, **{"dtype": "float32", **loading})
        trainer = PRMSFTTrainer(
            model=data.model,
            args=config,
            train_dataset=corrupt(data.train, "partial_labels", spec.settings["noise_rate"], seed=spec.seed),
            eval_dataset=data.heldout,
            quantization_config=get_quantization_config(model_args),
            peft_config=peft_config,
            ref_model=reference,
        )
        trainer.add_callback(MemorizationCallback(trainer, memorization_max_rows=script_args.memorization_max_rows))
        return trainer

    def outcomes(trainer: PRMSFTTrainer, data: Data) -> tuple[dict[str, float], dict[str, list]]:
        """Of each held-out row, 1 if it is right and -1 if not."""
        if script_args.answer_pattern is None:
            table = trainer.sequence_evaluations["eval"]
            right, more = ((table.correct == table.tokens) & (table.tokens > 0)).tolist(), {}
        else:
            right = matches_answers(trainer, data.heldout, script_args.answer_pattern, script_args.max_new_tokens)
            more = {"answer_match": sum(right) / len(right)}
        return more, {"heldout": [1 if x else -1 for x in right]}

    own = ("prompt_column", "completion_column", "as_messages", "answer_pattern", "max_new_tokens")
    return Recipe(
        built_in=BUILT_IN,
        methods=lambda noise_rate: OPTIMIZERS,
        prepare=prepare,
        make_trainer=make_trainer,
        outcomes=outcomes,
        info={"task": "sft"} if script_args.answer_pattern is None else {"task": "sft", "accuracy": "answer_match"},
        settings={name: getattr(script_args, name) for name in (*own, "memorization_max_rows")},
    )


def main(arguments: list[str]) -> int:
    script_args, training_args, model_args = parse(arguments)
    return run_comparisons(script_args, training_args, model_args, make_recipe(script_args, model_args))
