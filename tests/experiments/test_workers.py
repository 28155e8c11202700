"""Processes that share the runs of one command: `--workers`."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from prm_hf.experiments import runner
from prm_hf.experiments.dpo import DPOExperiment

from .comparisons import ONE_RATE, SHORT, infos, on_files, read, stamps


TRAINED = "trained.txt"  # the name of each run that was begun, and the process that began it


def is_worker():
    return multiprocessing.parent_process() is not None


def begun(folder):
    file = Path(folder) / TRAINED
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


class SharedExperiment(DPOExperiment):
    """DPO whose first run waits until another process has begun one too."""

    def make_trainer(self, config, spec, data):
        folder = Path(config.output_dir).parent
        with (folder / TRAINED).open("a") as file:
            file.write(f"{spec.name} {os.getpid()}\n")
        until = time.monotonic() + 120
        while len({process for _, process in begun(folder)}) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        print("a print of a run")
        return super().make_trainer(config, spec, data)


class DyingExperiment(SharedExperiment):
    """Its worker is killed in its first run, as for want of memory."""

    def make_trainer(self, config, spec, data):
        trainer = super().make_trainer(config, spec, data)
        if is_worker():
            os._exit(9)
        return trainer


class FailingExperiment(SharedExperiment):
    """The runs of its worker end with an error."""

    def make_trainer(self, config, spec, data):
        trainer = super().make_trainer(config, spec, data)
        if is_worker():
            raise MemoryError("of a worker")
        return trainer


def compare(task, pairs, folder):
    """Four runs in two processes; the exit code."""
    arguments = [*on_files(pairs), "--methods", "adamw", "prm_debiased", "--eval_strategy", "no"]
    shared = ["--workers", "2", "--seeds", "0", "1", "--output_dir", str(folder)]
    return runner.run_comparisons(task, [*SHORT, *ONE_RATE, *arguments, *shared])


RUNS = sorted(f"{name}_seed{seed}" for name in ("adamw_lr0.001", "prm_debiased_lr0.003") for seed in (0, 1))


@pytest.mark.slow
def test_two_processes_share_the_runs(pairs, tmp_path, capfd, no_pictures):
    """Each run is made once, and the process that was started reports on all of them, alone."""
    assert compare(SharedExperiment, pairs, tmp_path) == 0
    found = begun(tmp_path)
    assert sorted(name for name, _ in found) == RUNS and len({process for _, process in found}) == 2
    assert len(stamps(tmp_path)) == 4 and all(info["finished"] for info in infos(tmp_path).values())
    assert len(read(tmp_path / "comparison.json")["runs"]) == 4
    out = capfd.readouterr().out
    mine = [name for name, process in found if int(process) == os.getpid()]
    assert out.count("a print of a run") == len(mine)
    lines = [line for line in out.splitlines() if line.startswith(tuple(RUNS))]
    assert sorted(line.split()[0] for line in lines) == RUNS
    assert sorted(line.split()[0] for line in lines if "in another process)" not in line) == sorted(mine)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_that_dies_leaves_its_run(pairs, tmp_path, capfd, no_pictures):
    assert compare(DyingExperiment, pairs, tmp_path) == 0
    found = begun(tmp_path)
    (lost,) = [name for name, process in found if int(process) != os.getpid()]
    assert sorted(name for name, process in found if int(process) == os.getpid()) == RUNS
    assert [int(process) == os.getpid() for name, process in found if name == lost] == [False, True]
    assert len(stamps(tmp_path)) == 4
    assert len(read(tmp_path / "comparison.json")["runs"]) == 4


@pytest.mark.slow
def test_what_fails_in_a_worker_is_reported(pairs, tmp_path, capfd, no_pictures):
    assert compare(FailingExperiment, pairs, tmp_path) == 1
    failed = sorted(name for name, process in begun(tmp_path) if int(process) != os.getpid())
    captured = capfd.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("Failed: ")]
    assert failed and len(lines) == len(failed) == 4 - len(stamps(tmp_path))
    assert all("MemoryError: of a worker" in line for line in lines) and "Traceback" not in captured.err


def _sleep():
    time.sleep(600)


def test_an_error_ends_the_workers():
    with pytest.raises(KeyboardInterrupt), runner.workers_beside(2, _sleep):
        workers = multiprocessing.active_children()
        raise KeyboardInterrupt
    assert len(workers) == 2
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode not in (None, 0)
