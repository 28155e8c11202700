"""Preference pairs on policy: completions of a model to prompts with a checkable answer, one right and one wrong.

`prm-hf pairs`, and recipes/pairs.py, which has the commands.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .._files import write_whole
from ..trainers.config import with_help
from . import interruptible
from .answers import Checker, checkable_rows, find_checker
from .arguments import check_ranges
from .command_line import CommandLine
from .completions import Drawn, Store
from .console import messages_shown
from .data import check_split, digest, load_split, local_name, model_digest
from .generation import as_messages, evaluating, generate, render, seeded_sampler
from .rows import Columns, text_of


DESCRIPTION = (
    "Makes preference pairs on policy: draws completions to each prompt, checks their final answers, and writes one "
    "right and one wrong completion of each prompt, for `prm-hf dpo --dataset_name`."
)
BAR = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} completions, {elapsed}, {remaining} left{postfix}"


@with_help
@dataclass
class PairsArguments:
    """
    Arguments of `prm-hf pairs`.

    Parameters:
        dataset_name (`str`):
            Prompts with their answers: a dataset on the hub, a local folder, or a .json, .jsonl, .csv or .parquet
            file. It may stand before all flags without its name.
        model (`str`):
            Model that completes them, on the hub or in a folder.
        output (`str`):
            File of the pairs. The completions are kept beside it, in `<output>.completions.<process>.jsonl`, from
            which the same command goes on after an interruption.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, if it has several.
        dataset_split (`str`):
            Split, slices included (`train[:1000]`).
        prompt_column (`str`):
            Column of the prompts. A prompt of text becomes a user's message if the tokenizer has a chat template.
        answer_column (`str`):
            Column of the answers, or of completions that end in them.
        answer_checker (`str`):
            How an answer is checked: `number` (the last number), `choice` (a letter), `exact` (the whole text), or a
            function of a completion and an answer that is true where it is right, as `my_module:is_right`.
        samples (`int`):
            Completions of each prompt.
        temperature (`float`):
            Temperature of the samples.
        top_p (`float`):
            Share of the probability that the samples are drawn from.
        max_new_tokens (`int`):
            Longest completion in tokens. One that has not ended by then counts neither as right nor as wrong.
        batch_size (`int`):
            Completions that are drawn at once, on each device. It does not change what is drawn, but for rounding.
        seed (`int`):
            Seed of the samples, and of which right and which wrong one make a pair.
    """

    dataset_name: str | None = None
    model: str | None = None
    output: str = "pairs.jsonl"
    dataset_config: str | None = None
    dataset_split: str = "train"
    prompt_column: str = "prompt"
    answer_column: str = "completion"
    answer_checker: str = "number"
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0

    def check(self) -> Checker:
        """The checker; raises ValueError for what cannot be done."""
        for name, what in (("dataset_name", "the prompts"), ("model", "the model that completes them")):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is missing: name {what}, as in `prm-hf pairs DATA --model MODEL`.")
        check_ranges(
            self,
            ("samples", lambda x: x >= 2, "at least 2, a right and a wrong one"),
            ("temperature", lambda x: 0 < x < float("inf"), "above 0"),
            ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("max_new_tokens", lambda x: x >= 1, "at least 1"),
            ("batch_size", lambda x: x >= 1, "at least 1"),
            ("seed", lambda x: 0 <= x < 2**32, "an integer in [0, 2**32)"),
        )
        output = Path(self.output)
        if output.suffix != ".jsonl":
            raise ValueError(f"`output` is {self.output!r}: it must end in .jsonl.")
        if not output.parent.is_dir():
            raise ValueError(f"`output` is {self.output!r}: there is no folder {str(output.parent)!r}: make it first.")
        return find_checker(self.answer_checker)


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--dataset_name", *arguments]
    (args,) = CommandLine("pairs", DESCRIPTION, [PairsArguments]).parse(arguments, lambda given: {})
    with messages_shown():
        make_pairs(args)
    return 0


def make_pairs(args: PairsArguments) -> None:
    """Draws the completions that are missing, and writes the pairs. Collective.

    Raises:
        ValueError: an argument, a column or an answer is wrong; there is output of other settings; no prompt has both
            a right and a wrong completion.
    """
    checker, output = args.check(), Path(args.output)
    state = PartialState(cpu=not torch.accelerator.is_available())
    rows, prompts, answers = _load_rows(args, checker)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is not None:
        prompts = [as_messages(prompt) for prompt in prompts]
    store = Store(output, _settings(args, rows), state.process_index)
    store.read()
    units = [(row, sample) for row in range(len(prompts)) for sample in range(args.samples)]
    left = [unit for unit in units if unit not in store.drawn]
    if left and output.exists():
        raise ValueError(
            f"`output` {args.output!r} exists, and is not of this command: move it away, or name another."
        )
    state.wait_for_everyone()  # all have read the files before one of them grows
    if left:
        left.sort(key=lambda unit: (-len(render(prompts[unit[0]], tokenizer)), unit))
        _draw(args, store, tokenizer, prompts, left[state.process_index :: state.num_processes], len(units))
        state.wait_for_everyone()
        store.read()
    if state.is_main_process:
        pairs, counts = choose_pairs(prompts, answers, checker, store.drawn, args.samples, args.seed)
        if not pairs:
            raise ValueError(
                f"No prompt of {len(prompts)} has both a right and a wrong completion ({counts['right']} are right, "
                f"{counts['wrong']} wrong, {counts['cut off']} cut off): raise `samples` or `max_new_tokens`, and "
                "look at whether `answer_checker` fits them."
            )
        _write_pairs(output, pairs)
        print(_summary(args, len(pairs), len(prompts), counts), flush=True)


def _load_rows(args: PairsArguments, checker: Checker) -> tuple[Dataset, list[Any], list[str]]:
    """The rows, their prompts and their answers."""
    check_split(args.dataset_name, args.dataset_split, "dataset_split")
    rows = load_split(args.dataset_name, args.dataset_config, args.dataset_split)
    flags = ("prompt_column", "answer_column")
    prompts, answers = checkable_rows(rows, args.dataset_name, args, flags, checker)
    return rows, prompts, answers


def _settings(args: PairsArguments, rows: Dataset) -> dict[str, Any]:
    """What completions depend on. More samples of the same settings are added to those that there are."""
    names = ("temperature", "top_p", "max_new_tokens", "seed", "prompt_column")
    columns = Columns(args.prompt_column, (), needs_prompt=True, advice="")
    return {
        "dataset": local_name(args.dataset_name),
        "prompts": digest(rows, columns),
        "model": local_name(args.model),
        "model_digest": model_digest(args.model),
        **{name: getattr(args, name) for name in names},
    }


def _draw(
    args: PairsArguments,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    units: list[tuple[int, int]],
    n_all: int,
) -> None:
    """Draws completions of one process, batch by batch; `n_all` is the number that there will be."""
    state = PartialState()
    is_gpu = state.device.type == "cuda"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if is_gpu else torch.float32)
    model.to(state.device)
    n = min(state.num_processes, n_all)  # the bar counts for all processes what the first one does
    with (
        store.appending(),
        evaluating(model),
        tqdm(total=n_all, disable=None if state.is_main_process else True, bar_format=BAR) as bar,
    ):
        bar.update(len(store.drawn))
        for start in range(0, len(units), args.batch_size):
            batch = units[start : start + args.batch_size]
            sampler = seeded_sampler(batch, args.seed, args.max_new_tokens, args.temperature, args.top_p, state.device)
            found = generate(model, tokenizer, [prompts[row] for row, _ in batch], args.max_new_tokens, sampler)
            store.add(dict(zip(batch, found, strict=True)))
            bar.update(min(n * len(batch), n_all - bar.n))


def choose_pairs(
    prompts: list[Any], answers: list[str], checker: Checker, drawn: Drawn, samples: int, seed: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """A pair of each prompt that has a right and a wrong completion, and how often there was what.

    Returns:
        Rows `prompt`, `chosen`, `rejected`, `answer` and `group`, which is the first row with the same prompt; and
        numbers of completions (`right`, `wrong`, `cut off`) and of prompts (`without right`, `without wrong`,
        `without right and wrong`).
    """
    pairs, counts, first = [], Counter(), {}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        sides: dict[str, list[str]] = {"right": [], "wrong": [], "cut off": []}
        for completion in (drawn[row, sample] for sample in range(samples)):
            kind = "right" if checker.is_right(completion.text, answer) else "wrong"
            sides[kind if completion.is_whole else "cut off"].append(completion.text)
        counts.update({kind: len(texts) for kind, texts in sides.items()})
        if lacks := " and ".join(kind for kind in ("right", "wrong") if not sides[kind]):
            counts[f"without {lacks}"] += 1
            continue
        choice = random.Random(f"{seed} {row}")
        chosen, rejected = (choice.choice(list(dict.fromkeys(sides[kind]))) for kind in ("right", "wrong"))
        if not isinstance(prompt, str):
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        group = first.setdefault(text_of(prompt), row)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "answer": answer, "group": group})
    return pairs, counts


def _write_pairs(output: Path, pairs: list[dict[str, Any]]) -> None:
    text = "".join(f"{json.dumps(pair, ensure_ascii=False)}\n" for pair in pairs)
    if output.exists() and output.read_text(encoding="utf-8") != text:
        raise ValueError(f"`output` {str(output)!r} exists, and holds other pairs: move it away, or name another.")
    write_whole(output, [text])


def _summary(args: PairsArguments, n_pairs: int, n_prompts: int, counts: Counter[str]) -> str:
    """What there was, in two lines."""
    words = {"right": "right one", "wrong": "wrong one", "right and wrong": "one that ended"}
    without = [f"{n} have no {words[kind]}" for kind in words if (n := counts[f"without {kind}"])]
    n = n_prompts * args.samples
    shares = ", ".join(f"{counts[kind] / n:.1%} {kind}" for kind in ("right", "wrong", "cut off"))
    cut_off = f" (`max_new_tokens` is {args.max_new_tokens})" if counts["cut off"] else ""
    return (
        f"{n_pairs} pairs of {n_prompts} prompts in {args.output}{': ' + ', '.join(without) if without else ''}.\n"
        f"Of {n} completions: {shares}{cut_off}."
    )
