"""Checks of a dataset's source before it is loaded: what is wrong with a file is said with its line."""

import csv
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.exceptions import DatasetsError


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_KINDS = {str: "text", bool: "a bool", int: "a number", float: "a number", list: "a list", dict: "an object"}


def checked_source(load: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """Lets `load(name, …)` raise errors that say which dataset, and what is wrong with it, in one line."""

    @functools.wraps(load)
    def with_checks(name: str, *args: Any) -> Dataset:
        check_source(name)
        try:
            return load(name, *args)
        except (ValueError, OSError, DatasetsError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(f"The dataset {name!r} cannot be loaded: {reason}") from error

    return with_checks


def check_source(name: str) -> None:
    """Raises ValueError for a local file or folder that no dataset can be loaded from."""
    path = Path(name)
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in FILE_FORMATS:
            raise ValueError(f"The dataset {name!r} does not exist: name a local file or folder, or one on the hub.")
    elif (path / "state.json").is_file():
        raise ValueError(f"{name!r} is one split that `save_to_disk` wrote: save a `DatasetDict` of all its splits.")
    elif path.is_dir():
        holds_data = (file.suffix in {*FILE_FORMATS, ".arrow"} for file in path.rglob("*"))
        if not any(holds_data):
            raise ValueError(
                f"The folder {name!r} holds no dataset: no {', '.join(FILE_FORMATS)} or .arrow file is in it."
            )
    elif path.suffix not in FILE_FORMATS:
        raise ValueError(f"`{name}` must end in one of {', '.join(FILE_FORMATS)}.")
    elif path.suffix == ".parquet":
        _check_parquet(path)
    else:
        _check_text(path)


def _check_parquet(path: Path) -> None:
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file ({error}): write it again.") from error
    if rows == 0:
        raise ValueError(f"{path} has no rows.")


def _check_text(path: Path) -> None:
    first = next((line for line in _lines(path) if line.strip()), None)
    if first is None:
        raise ValueError(f"{path} is empty.")
    if path.suffix == ".csv":
        _check_csv(path)
    elif _is_whole(first):
        _check_rows(path, _json_lines(path), "line")
    else:
        try:
            whole = json.loads("\n".join(_lines(path)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno} is not JSON: {error.msg}. Is the file cut off?") from error
        if not isinstance(whole, list | dict):
            raise TypeError(f"{path} is {_KINDS.get(type(whole), 'null')}: it must hold rows, each an object.")
        if not whole:
            raise ValueError(f"{path} has no rows.")
        if isinstance(whole, list):
            _check_rows(path, enumerate(whole, start=1), "row")


def _is_whole(line: str) -> bool:
    """Whether a line is a row of JSON, and not the first of a longer text."""
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return not line.lstrip().startswith("[") and line.strip() != "{"


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8 ({error}): save the file as UTF-8.") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}. Is the line cut off?"
            ) from error


def _check_rows(path: Path, rows: Iterable[tuple[int, Any]], unit: str) -> None:
    """Each row is an object, and a key has values of one kind."""
    seen: dict[str, tuple[str, int]] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise TypeError(f"{path}, {unit} {number} is {_KINDS.get(type(row), 'null')}: a row is an object.")
        for key, value in row.items():
            if value is None:
                continue
            kind = _KINDS[type(value)]
            first, where = seen.setdefault(key, (kind, number))
            if kind != first:
                both = f"{key!r} is {kind} ({str(value)[:30]!r}), and {first} in {unit} {where}"
                raise ValueError(f"{path}, {unit} {number}: {both}: make it one of them.")


def _check_csv(path: Path) -> None:
    rows = csv.reader((f"{line}\n" for line in _lines(path)), strict=True)
    header, is_empty = next(rows), True
    other = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise ValueError(f"{path} is separated by {other!r}: save it with commas, or as .jsonl.")
    try:
        for row in rows:
            is_empty = False
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {rows.line_num} has {len(row)} fields, and the header has {len(header)}: put text "
                    "with commas in quotes."
                )
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num} is not CSV: {error}.") from error
    if is_empty:
        raise ValueError(f"{path} has no rows below its header.")
