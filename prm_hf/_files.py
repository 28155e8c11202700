"""Writing a file whole, whether one is, judged by its own bytes, and setting aside one that is not. Needs no torch."""

import json
import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, texts: Iterable[str]) -> None:
    """Writes texts, one after the other, as a UTF-8 file: whole or not at all, whatever interrupts it."""
    part = path.with_suffix(".part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(texts)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def problem_with(file: Path) -> str | None:
    """What is wrong with a file of a format that tells its length: JSON, safetensors, or what `torch.save` writes.

    Returns:
        Words that follow the file's name in a sentence; None where nothing is wrong or the format tells nothing.
    """
    check = _CHECKS.get(file.suffix)
    if check is None:
        return None
    try:
        if file.stat().st_size == 0:
            return "is empty"
        return check(file)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def problems_in(folder: Path) -> list[str]:
    """[`problem_with`] each file in a folder and the folders below it, each with its name before it."""
    found = ((file, problem_with(file)) for file in sorted(folder.rglob("*")) if file.is_file())
    return [f"{file.relative_to(folder)} {problem}" for file, problem in found if problem is not None]


def set_aside(path: Path) -> Path:
    """Renames a file or folder that cannot be used to `<name>.corrupt`, or the first `.corrupt<n>` that is free."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.corrupt{number if number > 1 else ''}")):
        number += 1
    return path.rename(aside)


def _json_problem(file: Path) -> str | None:
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    return None


def _safetensors_problem(file: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return "is cut off, or no safetensors file"
        try:
            header = json.loads(stream.read(length))
            end = max(
                (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
            )
            expected = 8 + length + end
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return "has a header that cannot be read"
    return None if size == expected else f"has {size:,} bytes in place of {expected:,}"


def _torch_problem(file: Path) -> str | None:
    with file.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(b"\x80"):  # a pickle, as torch wrote before version 1.6: it does not tell its length
        return None
    try:
        with zipfile.ZipFile(file) as archive:  # its directory is the end of the file
            is_torch = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, LookupError, RuntimeError):
        return "is cut off, or no file of torch.save"
    return None if is_torch else "is no file of torch.save"


_CHECKS = {
    ".json": _json_problem,
    ".safetensors": _safetensors_problem,
    **dict.fromkeys((".pt", ".pth", ".bin"), _torch_problem),
}
