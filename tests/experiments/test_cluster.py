"""Runs that are made on a Ray cluster: what one task does, and a sweep that loses a machine while it runs."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from prm_hf.experiments import cluster, suspects, sweep
from prm_hf.experiments.engine import current_engine, engine_in_use
from prm_hf.runs.schema import METRICS_FILE

from .comparisons import ONE_RATE, ROOT, SHORT, folder_of, infos, on_files, plain, read, run_dpo, stamps


TIMES = {"wall_seconds", "cost_seconds"}


def same(one, other):
    """Whether two runs have the same numbers, but for the time that they took."""
    one, other = ({k: v for k, v in read(x / METRICS_FILE).items() if k not in TIMES} for x in (one, other))
    return one == other


class Here(cluster.OnRay):
    """The engine without a cluster: what is sent is made at once, in this process."""

    class task:
        sent: list = []

        @classmethod
        def remote(cls, *arguments):
            cls.sent.append(arguments[0].folder)
            return len(cls.sent), arguments

    def __init__(self, work, output_dir, rooms=2):
        self.work, self.output_dir, self.finished, self.rooms = work, output_dir, {}, rooms
        self.task.sent = []

    def room(self):
        return self.rooms


class Ray:
    """What `Flights` uses of Ray."""

    class exceptions:
        class RayError(Exception):
            pass

    @staticmethod
    def put(files):
        return files

    @staticmethod
    def wait(refs, timeout):
        return refs[-1:], refs[:-1]

    @staticmethod
    def cancel(ref, force):
        assert force

    @classmethod
    def get(cls, ref):
        try:
            return cluster.make_one(*ref[1])
        except Exception as error:
            lost = cls.exceptions.RayError("lost")
            lost.cause = error
            raise lost from error


@pytest.fixture
def sent(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", Ray)
    monkeypatch.setattr(Path, "__hash__", Path.__hash__)
