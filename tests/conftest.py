import gc
import os

import pytest
import torch


# One GPU, before CUDA is asked: with more of them visible to a process, Trainer splits batches over them with
# `nn.DataParallel`, which the trainers of this package refuse.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
# Triton's interpreter tests the kernel without a GPU. It has to be chosen before anything imports triton, since
# triton's own library is decorated then, and other libraries import it on the way.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# Beside other processes of tests a second thread only waits for the first.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


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
