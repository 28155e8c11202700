import shutil
from pathlib import Path

import pytest

from .launch import launch_runs
from .plans import PATHS, plan


class Recorded:
    """The runs of each path, made when a test asks for the first of them."""

    def __init__(self, root: Path):
        self.root = root
        self._runs: dict[str, dict[str, list[dict]]] = {}
        self._failures: dict[str, AssertionError] = {}

    def runs(self, path: str) -> dict[str, list[dict]]:
        """By name of each run of `plan(path)`, what each of its processes recorded."""
        if path in self._failures:
            raise self._failures[path]
        if path not in self._runs:
            try:
                self._runs[path] = launch_runs(path, plan(path), self.root / path, PATHS[path])
            except AssertionError as error:
                self._failures[path] = error
                raise
        return self._runs[path]

    def run(self, path: str, name: str) -> list[dict]:
        """What each process recorded of one run, which has to have ended well."""
        ranks = self.runs(path)[name]
        assert all(rank["error"] is None for rank in ranks), ranks[0]["error"]
        assert len(ranks) == PATHS[path]
        return ranks

    def checkpoint(self, path: str, name: str) -> Path:
        """The folder of what a run saved half way."""
        self.run(path, name)
        return self.root / path / name / "checkpoint-3"


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    yield Recorded(root)
    shutil.rmtree(root)  # some hundred megabytes of checkpoints
