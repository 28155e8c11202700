import gc
import os

import pytest
import torch


# One GPU, before CUDA is asked: with more of them visible to a process, Trainer splits batches over them with
# `nn.DataParallel`, which the trainers of this package refuse.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
# Nothing is asked of a hub, not even whether a name is one there: where it cannot be reached, each question waits.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton's interpreter tests the kernel without a GPU. It has to be chosen before anything imports triton, since
# triton's own library is decorated then, and other libraries import it on the way.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    """Of tests side by side, each process has one thread: a second one would only wait for those of the others."""
    if config.getoption("numprocesses", None):  # in the first process, whose environment the others get
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def quiet(monkeypatch):
    """For tests that run trainers: no bars, and nothing asked of a hub."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_collection_finish(session):
    """Each run of a trainer collects garbage; half a second of that would go to the objects of imported libraries."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()
