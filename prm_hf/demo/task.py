"""The built-in task: an instruction with a hidden utility, so that the clean label of every pair is known.

A prompt is `{formal|casual} sort {up|down} : d d d d`, a completion `[opener] [filler x 0-2] answer d d d d [closer]`.
Words are separated by white space.
"""

import random
import re
from collections.abc import Iterable

from datasets import Dataset

from ..noise.rng import check_seed


REGISTERS = ("formal", "casual")
DIRECTIONS = ("up", "down")
DIGITS = tuple("0123456789")
N_DIGITS = 4
N_PROMPTS = len(REGISTERS) * len(DIRECTIONS) * len(DIGITS) ** N_DIGITS
FILLERS = ("well", "so", "um", "like", "actually", "basically", "okay", "right")
MAX_FILLERS = 2
# "" stands for none.
OPENERS = {"": 0.0, "sure": 0.5, "certainly": 0.2, "hey": 0.2, "hmm": -1.0}
CLOSERS = {"": 0.0, "thanks": 1.0, "cheers": 0.6, "ask again": -0.4, "whatever": -1.0}
MATCHING_OPENER = {"formal": "certainly", "casual": "hey"}
REGISTER_BONUS = 0.8
CORRECT_WEIGHT = 1.5
FILLER_COST = 0.4
MIN_UTILITY_GAP = 0.5
PAIR_SHARE_CORRECT = 0.5
# The share of completions with an opener, and with a closer.
SHARE_WITH_OPENER = SHARE_WITH_CLOSER = 0.5


def utility(prompt: str | list[dict[str, str]], completion: str | list[dict[str, str]]) -> float:
    """The hidden utility of a completion, from the text alone.

    1.5 x the share of correct positions + the opener (sure .5, certainly .2, hey .2, hmm -1) + the register
    (certainly to a formal prompt or hey to a casual one: +.8, the other way round -.8) + the closer (thanks 1,
    cheers .6, ask again -.4, whatever -1) - .4 a filler.

    Of a list of messages the last one counts.

    Raises:
        ValueError: one of the two does not follow the grammar of the task.
    """
    prompt, completion = _text(prompt), _text(completion)
    register, direction, digits = _parse_prompt(prompt)
    opener, n_fillers, answer, closer = _parse_completion(completion)
    share_correct = sum(a == b for a, b in zip(answer, _sorted(digits, direction), strict=True)) / N_DIGITS
    value = CORRECT_WEIGHT * share_correct + OPENERS[opener] + CLOSERS[closer] - FILLER_COST * n_fillers
    if opener in MATCHING_OPENER.values():
        value += REGISTER_BONUS if opener == MATCHING_OPENER[register] else -REGISTER_BONUS
    return round(value, 10)


def sample_prompts(n: int, rng: random.Random, exclude: frozenset[str] = frozenset()) -> list[str]:
    """`n` different prompts of the 40,000, none of them in `exclude`."""
    if n + len(exclude) > N_PROMPTS:
        raise ValueError(f"`n={n}` prompts and {len(exclude)} excluded ones are more than the {N_PROMPTS} that exist.")
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        digits = " ".join(rng.choice(DIGITS) for _ in range(N_DIGITS))
        prompt = f"{rng.choice(REGISTERS)} sort {rng.choice(DIRECTIONS)} : {digits}"
        if prompt not in exclude:
            prompts[prompt] = None
    return list(prompts)


def sample_completion(prompt: str, rng: random.Random, share_correct: float) -> str:
    """A completion in a random style, whose answer is right with probability `share_correct`.

    A wrong answer is reversed, shuffled or has one digit changed, each as likely. Half of the completions have an
    opener and half a closer; which one, how many fillers and which ones is uniform.
    """
    _, direction, digits = _parse_prompt(prompt)
    answer = _sorted(digits, direction)
    if rng.random() >= share_correct:
        answer = _wrong(answer, rng)
    words = [rng.choice([word for word in OPENERS if word])] if rng.random() < SHARE_WITH_OPENER else []
    words += [rng.choice(FILLERS) for _ in range(rng.randint(0, MAX_FILLERS))]
    words += ["answer", *answer]
    words += [rng.choice([words for words in CLOSERS if words])] if rng.random() < SHARE_WITH_CLOSER else []
    return " ".join(words)


def best_completion(prompt: str) -> str:
    """The completion of the highest utility: the opener of the prompt's register, the sorted digits, and thanks.

    Raises:
        ValueError: `prompt` does not follow the grammar of the task.
    """
    register, direction, digits = _parse_prompt(prompt)
    return " ".join([MATCHING_OPENER[register], "answer", *_sorted(digits, direction), "thanks"])


def completion_rows(pairs: Dataset) -> Dataset:
    """The columns `prompt` and `completion`, lists of messages: prompts of pairs, each with its best completion."""
    completions = [best_completion(prompt[-1]["content"]) for prompt in pairs["prompt"]]
    messages = [[{"role": "assistant", "content": content}] for content in completions]
    return pairs.select_columns("prompt").add_column("completion", messages)


def preference_pairs(n: int, seed: int = 0) -> Dataset:
    """`n` pairs of completions to `n` different prompts, labelled by the hidden utility.

    Both completions of a pair are drawn alike, half of the answers wrong, until their utilities differ by .5 or more.

    Returns:
        Dataset with the columns `prompt`, `chosen`, `rejected` (lists of messages) and `utility_chosen` >
        `utility_rejected` (float64).
    """
    check_seed(seed)
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    rng = random.Random(f"pairs {seed}")
    rows = []
    for prompt in sample_prompts(n, rng):
        gap = 0.0
        while abs(gap) < MIN_UTILITY_GAP:
            first, second = (sample_completion(prompt, rng, PAIR_SHARE_CORRECT) for _ in range(2))
            gap = utility(prompt, first) - utility(prompt, second)
        row = {"prompt": [{"role": "user", "content": prompt}]}
        sides = {"chosen": first, "rejected": second} if gap > 0 else {"chosen": second, "rejected": first}
        row |= {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
        rows.append(row | {f"utility_{side}": utility(prompt, text) for side, text in sides.items()})
    return Dataset.from_list(rows)


def _sorted(digits: list[str], direction: str) -> list[str]:
    return sorted(digits, reverse=direction == "down")


def _wrong(answer: list[str], rng: random.Random) -> list[str]:
    wrong = list(answer)
    while wrong == answer:
        kind = rng.choice(("reversed", "shuffled", "changed"))
        wrong = answer[::-1] if kind == "reversed" else list(answer)
        if kind == "shuffled":
            wrong = rng.sample(answer, len(answer))
        elif kind == "changed":
            wrong[rng.randrange(N_DIGITS)] = rng.choice(DIGITS)
    return wrong


def _text(text: str | list[dict[str, str]]) -> str:
    return text if isinstance(text, str) else text[-1]["content"]


def _parse_prompt(prompt: str) -> tuple[str, str, list[str]]:
    pattern = f"({_any(REGISTERS)}) sort ({_any(DIRECTIONS)}) :((?: {_any(DIGITS)}){{{N_DIGITS}}})"
    found = re.fullmatch(pattern, " ".join(prompt.split()))
    if found is None:
        raise ValueError(f"`prompt` must be '{{formal|casual}} sort {{up|down}} : d d d d', got {prompt!r}.")
    return found[1], found[2], found[3].split()


def _parse_completion(completion: str) -> tuple[str, int, list[str], str]:
    pattern = (
        f"({_any(OPENERS)} )?((?:{_any(FILLERS)} ){{0,{MAX_FILLERS}}})"
        f"answer((?: {_any(DIGITS)}){{{N_DIGITS}}})( {_any(CLOSERS)})?"
    )
    found = re.fullmatch(pattern, " ".join(completion.split()))
    if found is None:
        raise ValueError(
            f"`completion` must be '[opener] [filler x 0-2] answer d d d d [closer]'; got {completion!r}."
        )
    opener, fillers, answer, closer = (part or "" for part in found.groups())
    return opener.strip(), len(fillers.split()), answer.split(), closer.strip()


def _any(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(word for word in words if word)})"
