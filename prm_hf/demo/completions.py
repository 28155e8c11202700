"""Supervised rows of the built-in task: each prompt with the completion of the highest utility."""

from datasets import Dataset

from . import task


def best_completion(prompt: str) -> str:
    """The completion of the highest utility: the opener of the prompt's register, the sorted digits, and thanks.

    Raises:
        ValueError: `prompt` does not follow the grammar of the task.
    """
    register, direction, digits = task._parse_prompt(prompt)
    return " ".join([task.MATCHING_OPENER[register], "answer", *task._sorted(digits, direction), "thanks"])


def completion_rows(pairs: Dataset) -> Dataset:
    """The prompts of preference pairs, each with its best completion.

    Returns:
        Dataset with the columns `prompt` and `completion`, lists of messages.
    """

    def row(pair: dict) -> dict:
        content = best_completion(pair["prompt"][-1]["content"])
        return {"prompt": pair["prompt"], "completion": [{"role": "assistant", "content": content}]}

    return Dataset.from_list([row(pair) for pair in pairs])
