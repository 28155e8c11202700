"""SFT on prompts of which some have another row's completion: `prm-hf sft`, and recipes/sft_noisy.py, which has the
commands.
"""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.models.utils import unwrap_model_for_generation

from .. import PRMSFTConfig, PRMSFTTrainer
from ..demo import completion_rows
from ..noise import corrupt
from ..runs.methods import LOSS, METHODS, Method
from ..runs.write import RunSpec
from ..trainers import MemorizationCallback
from ..trainers.config import with_help
from . import interruptible
from .arguments import ComparisonArguments, check_ranges
from .data import Data
from .experiment import BUILT_IN, Experiment
from .rows import Columns
from .runner import run_comparisons


@with_help
@dataclass
class SFTArguments(ComparisonArguments):
    """
    Arguments of a comparison on prompts and completions.

    Parameters:
        prompt_column (`str`):
            Column of the prompts.
        completion_column (`str`):
            Column of the completions.
        as_messages (`bool`):
            Whether to make messages of prompts and completions that are text, so that the chat template applies.
        answer_pattern (`str`, *optional*):
            Regular expression with one group, the answer in a completion. With it the held-out accuracy at the end of
            a run is `answer_match`: the share of prompts to which greedy decoding gives the answer of the held-out
            completion. Default: `exact_match`, of the whole completion.
        max_new_tokens (`int`):
            Longest completion that is generated for `answer_match`.
        memorization_max_rows (`int`):
            Number of training rows on which memorization is measured, spread evenly over the training set.
    """

    prompt_column: str = "prompt"
    completion_column: str = "completion"
    as_messages: bool = False
    answer_pattern: str | None = None
    max_new_tokens: int = 256
    memorization_max_rows: int = 1024

    def check(self, known: Collection[str], learning_rate: float, max_grad_norm: float) -> None:
        super().check(known, learning_rate, max_grad_norm)
        check_ranges(
            self, *((name, lambda x: x >= 1, "at least 1") for name in ("max_new_tokens", "memorization_max_rows"))
        )
        if self.answer_pattern is None:
            return
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"`answer_pattern` {self.answer_pattern!r} is no regular expression: {error}.") from error
        if groups != 1:
            raise ValueError(f"`answer_pattern` must have one group, the answer, got {self.answer_pattern!r}.")


def prepare_rows(dataset: Dataset, args: SFTArguments) -> Dataset:
    """The columns `prompt` and `completion`, and no others; a ValueError where messages would be made of messages."""
    names = {args.prompt_column: "prompt", args.completion_column: "completion"}
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


def expected_answers(rows: Dataset, pattern: str | None) -> list[str]:
    """The answer in each row's completion, none without a pattern; a ValueError where a row has no answer."""
    if pattern is None:
        return []
    found = answers([row if isinstance(row, str) else row[-1]["content"] for row in rows["completion"]], pattern)
    if None in found:
        row = found.index(None)
        raise ValueError(f"`answer_pattern` {pattern!r} is not found in the completion of held-out row {row}.")
    return found


@torch.no_grad()
def matches_answers(trainer: PRMSFTTrainer, rows: Dataset, pattern: str, max_new_tokens: int) -> list[bool]:
    """Whether greedy decoding gives the answer of each row's completion. Collective."""
    accelerator, tokenizer = trainer.accelerator, trainer.processing_class

    prompts = [
        row if isinstance(row, str) else tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False)
        for row in rows["prompt"]
    ]
    expected = expected_answers(rows, pattern)
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


class SFTExperiment(Experiment):
    """SFT on prompts, of which a share has the completion of another row for training."""

    command = "sft"
    description = (
        "SFT on prompts of which a share has a wrong completion: PRM against AdamW at each learning rate and seed."
    )
    task = "sft"
    output_dir = "runs/sft_noisy"
    arguments_class = SFTArguments
    config_class = PRMSFTConfig
    built_in_rows = staticmethod(completion_rows)
    built_in: ClassVar[dict[str, Any]] = {
        **BUILT_IN,
        "learning_rate": 3e-3,
        "workers": 2,
    }

    @classmethod
    def known_methods(cls) -> list[str]:
        return [name for name, method in METHODS.items() if method.group != LOSS and not method.needs_pairs]

    def info(self) -> dict[str, str]:
        return super().info() | ({} if self.script_args.answer_pattern is None else {"accuracy": "answer_match"})

    def columns(self) -> Columns:
        args = self.script_args
        advice = "Name yours with `--prompt_column` and `--completion_column`."
        return Columns(args.prompt_column, (args.completion_column,), needs_prompt=True, advice=advice)

    def unused_arguments(self) -> dict[str, str]:
        if self.script_args.answer_pattern is not None:
            return {}
        return {"max_new_tokens": "is for an `answer_pattern`, without which nothing is generated"}

    def check_method(self, method: Method, config: PRMSFTConfig) -> None:
        if config.loss_type not in ("nll", "dft"):
            raise ValueError(f"`loss_type` is {config.loss_type!r}: TRL knows nll and dft.")

    def check_rows(self, data: Data) -> None:
        for rows in (data.train, data.heldout):
            prepare_rows(rows.select([0]), self.script_args)
        expected_answers(prepare_rows(data.heldout, self.script_args), self.script_args.answer_pattern)

    def settings(self) -> dict[str, Any]:
        own = [f.name for f in dataclasses.fields(SFTArguments)][len(dataclasses.fields(ComparisonArguments)) :]
        return {name: getattr(self.script_args, name) for name in own}

    def prepare(self, data: Data) -> Data:
        train, heldout = (prepare_rows(rows, self.script_args) for rows in (data.train, data.heldout))
        return dataclasses.replace(data, train=train, heldout=heldout)

    def noisy_rows(self, spec: RunSpec, data: Data) -> Dataset:
        return corrupt(data.train, "partial_labels", spec.settings["noise_rate"], seed=spec.seed)

    def make_trainer(self, config: PRMSFTConfig, spec: RunSpec, data: Data) -> PRMSFTTrainer:
        settings, reference = self.model_settings(), None
        if settings["peft_config"] is None and config.drift_metrics:
            # With an adapter the model without it is the reference.
            loading = {key: value for key, value in config.model_init_kwargs.items() if value is not None}
            loading = {"dtype": "float32", "trust_remote_code": config.trust_remote_code, **loading}
            reference = AutoModelForCausalLM.from_pretrained(data.model, **loading)
        trainer = PRMSFTTrainer(
            model=data.model,
            args=config,
            train_dataset=self.noisy_rows(spec, data) if data.given is None else data.given,
            eval_dataset=data.heldout,
            ref_model=reference,
            **settings,
        )
        max_rows = self.script_args.memorization_max_rows
        trainer.add_callback(MemorizationCallback(trainer, memorization_max_rows=max_rows))
        return trainer

    def outcomes(self, trainer: PRMSFTTrainer, data: Data) -> tuple[dict[str, float], dict[str, list]]:
        """Of each held-out row, 1 if it is right and -1 if not."""
        pattern, more = self.script_args.answer_pattern, {}
        if pattern is None:
            table = trainer.sequence_evaluations["eval"]
            right = ((table.correct == table.tokens) & (table.tokens > 0)).tolist()
        else:
            right = matches_answers(trainer, data.heldout, pattern, self.script_args.max_new_tokens)
            more = {"answer_match": sum(right) / len(right)}
        return more, {"heldout": [1 if x else -1 for x in right]}


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of [`run_comparisons`]."""
    return run_comparisons(SFTExperiment, arguments)
