"""SFT on prompts of which some have another row's completion: `prm-hf sft`, and recipes/sft_noisy.py, which has the
commands.
"""

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForCausalLM

from .. import PRMSFTConfig, PRMSFTTrainer
from ..demo import completion_rows
from ..noise import corrupt
from ..runs.methods import LOSS, METHODS, Method
from ..runs.write import RunSpec
from ..sven.checks import check_row_arguments
from ..trainers import MemorizationCallback
from ..trainers.config import with_help
from . import interruptible
from .answers import Checker, expected_answers, find_checker, pattern_checker
from .arguments import ComparisonArguments, check_ranges
from .data import Data
from .experiment import BUILT_IN, Experiment
from .rows import Columns
from .runner import run_comparisons
from .solve import check_whole_weights, solve
from .sven import SVEN, trainer_class


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
        answer_checker (`str`, *optional*):
            The same for answers that are not matched but checked: `number` (the last number), `choice` (a letter),
            `exact` (the whole text), or a function of a completion and the held-out one that is true where it is
            right, as `my_module:is_right`.
        max_new_tokens (`int`):
            Longest completion that is generated for `answer_match`.
        memorization_max_rows (`int`):
            Number of training rows on which memorization is measured, spread evenly over the training set.
    """

    prompt_column: str = "prompt"
    completion_column: str = "completion"
    as_messages: bool = False
    answer_pattern: str | None = None
    answer_checker: str | None = None
    max_new_tokens: int = 256
    memorization_max_rows: int = 1024

    def check(self, known: Collection[str], learning_rate: float, max_grad_norm: float) -> None:
        super().check(known, learning_rate, max_grad_norm)
        check_ranges(
            self, *((name, lambda x: x >= 1, "at least 1") for name in ("max_new_tokens", "memorization_max_rows"))
        )
        if self.answer_pattern is not None and self.answer_checker is not None:
            raise ValueError("`answer_pattern` and `answer_checker` both say what an answer is: give one of them.")
        if self.answer_checker is not None:
            find_checker(self.answer_checker)
        if self.answer_pattern is None:
            return
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"`answer_pattern` {self.answer_pattern!r} is no regular expression: {error}.") from error
        if groups != 1:
            raise ValueError(f"`answer_pattern` must have one group, the answer, got {self.answer_pattern!r}.")

    @property
    def checker(self) -> Checker | None:
        """How answers are checked; None where whole completions are."""
        if self.answer_pattern is not None:
            return pattern_checker(self.answer_pattern)
        return None if self.answer_checker is None else find_checker(self.answer_checker)


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


def expected(rows: Dataset, checker: Checker) -> list[str]:
    """The held-out completions as texts; a ValueError where one has no answer."""
    return expected_answers(rows["completion"][:], checker, "The held-out completions")


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
        return super().info() | ({} if self.script_args.checker is None else {"accuracy": "answer_match"})

    def columns(self) -> Columns:
        args = self.script_args
        advice = "Name yours with `--prompt_column` and `--completion_column`."
        return Columns(args.prompt_column, (args.completion_column,), needs_prompt=True, advice=advice)

    def unused_arguments(self) -> dict[str, str]:
        unused = dict.fromkeys(("label_votes_column", "label_rater"), "is for preferences, on which raters vote")
        if self.script_args.checker is None:
            reason = "is for an `answer_pattern` or `answer_checker`, without which nothing is generated"
            unused["max_new_tokens"] = reason
        return unused

    def check_method(self, method: Method, config: PRMSFTConfig) -> None:
        if config.loss_type not in ("nll", "dft"):
            raise ValueError(f"`loss_type` is {config.loss_type!r}: TRL knows nll and dft.")
        if method.key == SVEN:
            check_row_arguments(config)
        if self.script_args.checker is not None:
            check_whole_weights(config, "answer_checker" if self.script_args.answer_checker else "answer_pattern")

    def check_simplicity(self, asked: Sequence[str]) -> None:
        for name in ("packing", "padding_free"):
            if getattr(self.training_args, name):
                raise ValueError(f"`{name}` is True, and `{asked[0]}` is measured row by row: leave it out.")
        if "bound" in asked and any(self.script_args.noise_rate):
            raise ValueError(
                f"`noise_rate` is {self.script_args.noise_rate}: wrong completions are those of other rows, which are "
                "then not independent as `bound` needs them. Set it to 0."
            )

    def check_rows(self, data: Data) -> None:
        for rows in (data.train, data.heldout):
            prepare_rows(rows.select([0]), self.script_args)
        if self.script_args.checker is not None:
            expected(prepare_rows(data.heldout, self.script_args), self.script_args.checker)

    def settings(self) -> dict[str, Any]:
        own = [f.name for f in dataclasses.fields(SFTArguments)][len(dataclasses.fields(ComparisonArguments)) :]
        return {name: getattr(self.script_args, name) for name in own}

    def readable(self, data: Data) -> Data:
        return self.prepare(data)

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
        trainer = trainer_class(PRMSFTTrainer, spec.method)(
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
        checker, more = self.script_args.checker, {}
        if checker is None:
            table = trainer.sequence_evaluations["eval"]
            right = ((table.correct == table.tokens) & (table.tokens > 0)).tolist()
        else:
            answers, size = expected(data.heldout, checker), trainer.args.per_device_eval_batch_size
            right = solve(trainer, data.heldout["prompt"][:], answers, checker, self.script_args.max_new_tokens, size)
            more = {"answer_match": sum(right) / len(right)}
        return more, {"heldout": [1 if x else -1 for x in right]}


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of [`run_comparisons`]."""
    return run_comparisons(SFTExperiment, arguments)
