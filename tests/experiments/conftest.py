import sys

import pytest

from .comparisons import write_pairs


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests that make comparisons and look at no report: drawing takes longer than a short run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder with 40 pairs of the built-in task in train.jsonl, and 24 in test.jsonl."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    return folder
