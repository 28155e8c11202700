"""Disks that are full, files that cannot grow, and folders that cannot be written to, as the system makes them."""

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips the test where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        pytest.skip("a file system can be mounted by root alone")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def change_disk(folder: Path, options: str) -> None:
    assert _mount("-o", f"remount,{options}", str(folder))


def _mount(*arguments: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0
    return False


@contextlib.contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """Writing past this size fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
