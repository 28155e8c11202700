"""What a command shows beside its runs: each message of this package once, and not what others say of themselves."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from tqdm.auto import tqdm


NOTES = logging.getLogger("prm_hf.notes")


class Messages(logging.Handler):
    """Writes each message once, above the bar: every run would repeat what its trainer says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._written: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if text not in self._written:
            self._written.add(text)
            tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def messages_shown() -> Iterator[None]:
    """Shows the messages of this package by [`Messages`], and no warnings of what transformers will rename.

    What optimizer a trainer has is left out, until [`show_notes`]: `run.json` says it of each run.
    """
    logger, messages = logging.getLogger("prm_hf"), Messages()
    logger.addHandler(messages)
    NOTES.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        NOTES.setLevel(logging.NOTSET)
        logger.removeHandler(messages)


def show_notes(log_level: str) -> None:
    """Shows what optimizer a trainer has too, with `--log_level info` or `debug`."""
    if log_level in ("debug", "info"):
        NOTES.setLevel(logging.NOTSET)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps a process quiet that works beside the one that reports. What it raises is still seen."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
