"""The share of held-out problems that a model solves by greedy decoding, before and after it is trained."""

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from filelock import FileLock
from transformers import Trainer, TrainingArguments
from trl.models.utils import unwrap_model_for_generation

from ..runs.methods import Method
from ..runs.read import read_json
from ..runs.schema import SOLVE_BEFORE_FILE
from ..runs.write import write_json
from ..trainers.config import with_help
from .answers import Checker, checkable_rows, find_checker
from .arguments import ComparisonArguments, check_ranges
from .data import check_split, load_split, local_name
from .generation import as_messages, evaluating, generate, render
from .rows import Columns, text_of


@with_help
@dataclass
class SolveArguments(ComparisonArguments):
    """
    Arguments of a comparison that also counts the problems that a model solves.

    Parameters:
        solve_dataset_name (`str`, *optional*):
            Problems with a checkable answer, none of them trained on: a dataset on the hub, or a file. With it a run
            has `solve/accuracy`, the share that greedy decoding solves, and `solve/accuracy_before`, that of the model
            before it is trained.
        solve_split (`str`):
            Split of the problems, slices included (`train[:200]`).
        solve_rows (`int`):
            Number of problems, the first ones of the split.
        solve_prompt_column (`str`):
            Column of the problems.
        solve_answer_column (`str`):
            Column of their answers, or of completions that end in them.
        solve_answer_checker (`str`):
            How an answer is checked, as by the flag `--answer_checker` of `prm-hf pairs`: `number`, `choice`, `exact`
            or `my_module:is_right`.
        solve_max_new_tokens (`int`):
            Longest completion in tokens.
        solve_batch_size (`int`):
            Problems that are decoded at once, on each device.
    """

    solve_dataset_name: str | None = None
    solve_split: str = "train"
    solve_rows: int = 200
    solve_prompt_column: str = "prompt"
    solve_answer_column: str = "completion"
    solve_answer_checker: str = "number"
    solve_max_new_tokens: int = 256
    solve_batch_size: int = 64

    def check(self, known: Collection[str], learning_rate: float, max_grad_norm: float) -> None:
        super().check(known, learning_rate, max_grad_norm)
        sizes = ("solve_rows", "solve_max_new_tokens", "solve_batch_size")
        check_ranges(self, *((name, lambda x: x >= 1, "at least 1") for name in sizes))
        find_checker(self.solve_answer_checker, "solve_answer_checker")

    def unused_arguments(self) -> dict[str, str]:
        """Arguments that others leave without effect, each with the reason."""
        if self.solve_dataset_name is not None:
            return {}
        names = [name for name in SolveArguments.__annotations__ if name != "solve_dataset_name"]
        return dict.fromkeys(names, "is for a `solve_dataset_name`, and there is none")

    def check_method(self, method: Method, config: TrainingArguments) -> None:
        """Raises ValueError where a method, or the way it is trained, leaves no weights to decode with."""
        if self.solve_dataset_name is None:
            return
        if method.key.startswith("early_stopping"):
            raise ValueError(
                "its numbers are of an evaluation whose weights are not kept, and `solve_dataset_name` needs those of "
                "the end: leave one of them out."
            )
        check_whole_weights(config, "solve_dataset_name", deepspeed_too=True)


def check_whole_weights(config: TrainingArguments, argument: str, deepspeed_too: bool = False) -> None:
    """Raises ValueError where no process has whole weights, with which alone rows can be shared and decoded."""
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if is_fsdp or (deepspeed_too and config.deepspeed_plugin is not None):
        raise ValueError(
            f"`{argument}` needs whole weights on each process, and they are sharded: launch it on one GPU, or on "
            "several without sharding."
        )


@dataclass(frozen=True)
class Problems:
    """Problems with their answers, `digest` a hash of both."""

    prompts: list[Any]
    answers: list[str]
    digest: str


def load_problems(args: SolveArguments) -> Problems:
    """The problems that the arguments name; ValueError where they cannot be read or have no answer."""
    name = args.solve_dataset_name
    check_split(name, args.solve_split, "solve_split")
    rows = load_split(name, None, args.solve_split)
    rows = rows.select(range(min(args.solve_rows, len(rows))))
    checker = find_checker(args.solve_answer_checker, "solve_answer_checker")
    flags = ("solve_prompt_column", "solve_answer_column")
    prompts, answers = checkable_rows(rows, name, args, flags, checker)
    digest = hashlib.sha256(json.dumps([prompts, answers]).encode()).hexdigest()[:16]
    return Problems(prompts, answers, digest)


def solve(
    trainer: Trainer,
    prompts: Sequence[Any],
    answers: Sequence[str],
    checker: Checker,
    max_new_tokens: int,
    batch_size: int,
) -> list[bool]:
    """Whether greedy decoding solves each problem with the trainer's present weights. Collective.

    The processes share the problems; the result is that of one process. The model computes in the precision that it is
    trained in, without dropout or gradient checkpointing.

    Args:
        prompts: texts or messages, all of one kind.
    """
    accelerator, tokenizer = trainer.accelerator, trainer.processing_class
    mine = sorted(range(len(prompts)), key=lambda i: len(render(prompts[i], tokenizer)))
    mine = mine[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, bool]] = []
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model,
        evaluating(model),
        accelerator.autocast(),  # around all batches, so that it casts the weights once
    ):
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            completions = generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)
            pairs = zip(batch, completions, strict=True)
            found += [(i, checker.is_right(completion.text, answers[i])) for i, completion in pairs]
    solved = dict(gather_object(found)) if accelerator.num_processes > 1 else dict(found)
    return [solved[i] for i in range(len(prompts))]


class Solving:
    """What a comparison measures with the arguments `solve_…`; nothing where they name no problems."""

    def __init__(self, args: SolveArguments) -> None:
        self.args = args
        self.problems = None if args.solve_dataset_name is None else load_problems(args)

    def settings(self) -> dict[str, Any]:
        """What `run.json` says of the problems and of how they are solved."""
        if self.problems is None:
            return {}
        args = self.args
        how = {"checker": args.solve_answer_checker, "max_new_tokens": args.solve_max_new_tokens}
        return {"solve": {"problems": local_name(args.solve_dataset_name), "digest": self.problems.digest, **how}}

    def check(self, train: Dataset, columns: Columns) -> None:
        """Raises ValueError where problems are among the training prompts."""
        if self.problems is None or columns.prompt not in train.column_names:
            return
        known = set(map(text_of, train[columns.prompt]))
        found = [i for i, prompt in enumerate(self.problems.prompts) if text_of(prompt) in known]
        if found:
            numbers = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
            raise ValueError(
                f"{len(found)} of the {len(self.problems.prompts)} problems of {self.args.solve_dataset_name} are "
                f"prompts of the training rows (problems {numbers}, from 0): name others with `solve_dataset_name` or "
                "`solve_split`."
            )

    def before(self, trainer: Trainer, model: str) -> None:
        """Measures what a model solves before it is trained, once for all runs in a folder. Collective.

        Args:
            trainer: that of a run, before it trains.
            model: what tells the model from others.
        """
        if self.problems is None:
            return
        state, (file, name) = trainer.accelerator, self._place(trainer, model)
        lock = FileLock(file.parent / ".locks" / "solve.lock")
        try:
            if state.is_main_process:
                Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()  # of several commands in one folder one measures it
            known = [name in (read_json(file) or {}) if state.is_main_process else None]
            if state.num_processes > 1:
                broadcast_object_list(known)
            if not known[0]:
                solved = self._solve(trainer)
                if state.is_main_process:
                    write_json(file, {**(read_json(file) or {}), name: solved})
        finally:
            lock.release()

    def outcomes(self, trainer: Trainer, model: str) -> tuple[dict[str, float], dict[str, list]]:
        """Metrics of a trained model, and for `margins.json` each problem's 1 or 0 and its group. Collective."""
        if self.problems is None:
            return {}, {}
        file, name = self._place(trainer, model)
        after, before = self._solve(trainer), read_json(file)[name]
        shares = {"solve/accuracy": after, "solve/accuracy_before": before}
        first: dict[str, int] = {}
        groups = [first.setdefault(text_of(prompt), i) for i, prompt in enumerate(self.problems.prompts)]
        margins = {"solve": after, "solve_before": before, "solve_groups": groups}
        return {key: sum(values) / len(values) for key, values in shares.items()}, margins

    def _solve(self, trainer: Trainer) -> list[int]:
        args, problems = self.args, self.problems
        # As the training prompts are: texts, or messages under the chat template
        is_chat = not isinstance(trainer.train_dataset[0]["prompt"], str)
        prompts = [as_messages(prompt) if is_chat else prompt for prompt in problems.prompts]
        checker = find_checker(args.solve_answer_checker)
        solved = solve(trainer, prompts, problems.answers, checker, args.solve_max_new_tokens, args.solve_batch_size)
        return [int(x) for x in solved]

    def _place(self, trainer: Trainer, model: str) -> tuple[Path, str]:
        """The file of what models solve before they are trained, and the name in it of this one."""
        config = trainer.args
        how = [model, self.settings(), config.bf16, config.fp16, config.model_init_kwargs]
        text = json.dumps(how, sort_keys=True, default=str)
        return Path(config.output_dir).parent / SOLVE_BEFORE_FILE, hashlib.sha256(text.encode()).hexdigest()[:16]
