"""The completions of a model on the disk, to which those of a batch are added as it is finished."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .generation import Completion


Drawn = dict[tuple[int, int], Completion]  # by the row of a prompt and the number of a sample


class Store:
    """The completions so far, in a file of each process: its settings in the first line, then one completion a line.

    A line is written whole when its batch is finished. What an interruption has cut off is drawn again.

    Attributes:
        drawn: those of all files at the time of `read`.
    """

    def __init__(self, output: Path, settings: dict[str, Any], process: int) -> None:
        self.output, self.settings = output, settings
        self.file = output.with_suffix(f".completions.{process}.jsonl")
        self.drawn: Drawn = {}

    def read(self) -> None:
        """Reads the files of all processes; a ValueError where one is of other settings."""
        self.drawn = {}
        for file in sorted(self.output.parent.glob(f"{self.output.stem}.completions.*.jsonl")):
            lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # a line that is cut off has no end
            if not lines:
                continue
            try:
                self._check(file, json.loads(lines[0])["settings"])
                found = [json.loads(line) for line in lines[1:]]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} holds no completions that can be read ({error}): move it away, or name another `output`."
                ) from error
            self.drawn |= {(x["row"], x["sample"]): Completion(x["completion"], x["is_whole"]) for x in found}

    def _check(self, file: Path, theirs: dict[str, Any]) -> None:
        names = sorted(key for key in {*self.settings, *theirs} if self.settings.get(key) != theirs.get(key))
        if names:
            shown = "; ".join(f"{name}: {theirs.get(name)!r}, now {self.settings.get(name)!r}" for name in names)
            raise ValueError(f"{file} has completions of other settings ({shown}): name another `output`.")

    @contextlib.contextmanager
    def appending(self) -> Iterator["Store"]:
        """Holds the file of this process, without the line that an interruption has cut off."""
        locks = self.output.parent / ".locks"
        locks.mkdir(exist_ok=True)
        try:
            with FileLock(locks / f"{self.file.name}.lock", timeout=0):
                text = self.file.read_bytes() if self.file.exists() else b""
                with self.file.open("ab") as self._stream:
                    self._stream.truncate(text.rfind(b"\n") + 1)
                    if b"\n" not in text:
                        self._write([{"settings": self.settings}])
                    yield self
        except Timeout as error:
            raise ValueError(f"Another process draws completions into {self.file}: wait for its end.") from error

    def add(self, found: Drawn) -> None:
        """Appends the completions of a batch."""
        lines = [
            {"row": row, "sample": sample, "completion": completion.text, "is_whole": completion.is_whole}
            for (row, sample), completion in found.items()
        ]
        self._write(lines)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._stream.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
        self._stream.flush()
