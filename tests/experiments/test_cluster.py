"""Runs that are made in tasks of Ray: what is sent and returned, and what becomes of runs that fail or are lost."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from prm_hf import cli
from prm_hf.experiments import INTERRUPTED, cluster, dpo, grokking, interruptible, runner, suspects, sweep
from prm_hf.experiments.engine import current_engine, engine_in_use
from prm_hf.experiments.runner import OutOfTime, Runner
from prm_hf.runs.schema import METRICS_FILE, SOLVE_BEFORE_FILE
from prm_hf.runs.write import find_folder, start_run

from .comparisons import ONE_RATE, SHORT, infos, on_files, read, run_dpo, stamps
from .fakes import FakeGrid, FakeTrainer, PartsGrid


class Lost(Exception):
    """As Ray's error of a machine that is gone, or of a task, whose own error it has as `cause`."""


class FakeRay(SimpleNamespace):
    """A cluster of two processors. What is sent is made in this process, when it is asked for."""

    def __init__(self):
        super().__init__(exceptions=SimpleNamespace(RayError=Lost), sent=[], cancelled=[], most=0, options_of={})
        self.before_wait = self.before_get = lambda: None

    def remote(self, function):
        def options(**settings):
            self.options_of.update(settings)
            return SimpleNamespace(remote=lambda *given: self.send(function, given))

        return SimpleNamespace(options=options)

    def send(self, function, given):
        self.sent.append((function, given))
        return len(self.sent) - 1

    def put(self, files):
        return files

    def cluster_resources(self):
        return {"CPU": 2.0, "GPU": 1.0}

    def wait(self, refs, timeout):
        self.before_wait()
        self.most = max(self.most, len(refs))
        return refs[-1:], refs[:-1]

    def get(self, ref):
        self.before_get()
        function, given = self.sent[ref]
        try:
            return function(*given)
        except Exception as error:
            lost = Lost(str(error))
            lost.cause = error
            raise lost from error

    def cancel(self, ref, force):
        self.cancelled.append(ref)


@pytest.fixture
def ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", found := FakeRay())
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def sweep_of(ray, monkeypatch, tmp_path):
    """Makes a grid by an engine; each task makes its own of the same kind, which are in `grids`."""

    def make(grids, deadline=None, **settings):
        def main(arguments):
            grids.append(FakeGrid(arguments[-1], **settings))
            return Runner(grids[-1]).run()

        monkeypatch.setattr(dpo, "main", main)
        own = FakeGrid(tmp_path / "runs", **settings)
        engine = cluster.OnRay(cluster.Work("dpo", ["--beta", "1"], "", str(tmp_path)), tmp_path / "runs", 0.0)
        with engine_in_use(engine):
            made = Runner(own, deadline)
        return own, made

    return make


def raising(error):
    def make():
        raise error

    return make


def test_each_run_is_a_task_and_returns_its_files(sweep_of, ray, tmp_path):
    tasks = []
    own, made = sweep_of(tasks)
    assert made.run() == 0 and own.trained == [] and len(own.reported) == 3
    assert sorted(seed for grid in tasks for seed in grid.trained) == [0, 1, 2] and len(tasks) == 3
    options = {"num_cpus": 1, "num_gpus": 0.0, "max_retries": cluster.RETRIES, "scheduling_strategy": "SPREAD"}
    assert ray.most == 2 and ray.options_of == options
    assert not any(grid.output_dir.exists() or grid.reported for grid in tasks)
    here = FakeGrid(tmp_path / "here")
    assert Runner(here).run() == 0
    for folder in (tmp_path / "here").glob("adamw*"):
        other = tmp_path / "runs" / folder.name
        assert {x.name for x in folder.iterdir()} == {x.name for x in other.iterdir()}
        assert read(other / "margins.json") == read(folder / "margins.json")
    assert sweep_of(tasks)[1].run() == 0 and len(ray.sent) == 3  # all were finished before


def test_a_task_says_what_its_machine_lacks(ray, monkeypatch, tmp_path):
    monkeypatch.setattr(dpo, "main", lambda arguments: Runner(FakeGrid(arguments[-1])).run())
    with pytest.raises(RuntimeError, match="no run adamw_lr1 on this machine.* same version of prm_hf"):
        cluster.make_one(cluster.Work("dpo", [], "adamw_lr1", "/nowhere"))


def test_a_run_that_fails_is_tried_again_by_the_next_command(sweep_of, ray, tmp_path, capsys):
    _, made = sweep_of([], trainers={1: raising(MemoryError("full"))})
    assert made.run() == 1 and len(stamps(tmp_path / "runs")) == 2
    (failed,) = (tmp_path / "runs").glob("*/failed.json")
    assert read(failed)["error"] == "MemoryError" and "Failed: " in capsys.readouterr().out
    tasks = []
    _, made = sweep_of(tasks, seeds=(1, 3))
    assert made.run() == 0 and sorted(seed for grid in tasks for seed in grid.trained) == [1, 3]
    assert not failed.exists() and len(stamps(tmp_path / "runs")) == 4
    assert ray.sent[-2][1][0].folder.split("_")[2] == "seed3"  # what failed before comes last


def test_a_machine_that_is_lost_too_often(sweep_of, ray, tmp_path):
    """Ray has given up: the run counts as failed, and the others are made."""
    losses = iter([Lost("The node died."), None, None])

    def lose():
        if error := next(losses):
            raise error

    ray.before_get = lose
    _, made = sweep_of([])
    assert made.run() == 1 and len(stamps(tmp_path / "runs")) == 2
    (failed,) = (tmp_path / "runs").glob("*/failed.json")
    assert read(failed)["message"] == "The node died." and (failed.parent / "run.json").is_file()
    ray.before_get = lambda: None
    assert sweep_of([])[1].run() == 0 and len(stamps(tmp_path / "runs")) == 3


def test_after_the_deadline_nothing_is_sent(sweep_of, ray, tmp_path):
    own, made = sweep_of([], deadline=0.0)
    with pytest.raises(OutOfTime):
        made.run()
    assert ray.sent == [] and own.reported is None
    own, made = sweep_of([], deadline=float("inf"), seeds=range(5))
    ray.before_get = lambda: setattr(made, "deadline", 0.0)
    with pytest.raises(OutOfTime):
        made.run()
    assert len(ray.sent) == len(stamps(tmp_path / "runs")) == len(own.reported) == 2  # which were under way


def test_what_another_process_trains_is_left_to_it(sweep_of, ray, tmp_path):
    own, made = sweep_of([])
    spec = own.specify_runs()[0]
    folder, _ = find_folder(spec, own.output_dir)
    (own.output_dir / ".locks").mkdir(parents=True)
    is_held, may_end = threading.Event(), threading.Event()

    def other():
        with FileLock(own.output_dir / ".locks" / f"{folder.name}.lock"):
            is_held.set()
            may_end.wait(60)
            time.sleep(0.2)

    threading.Thread(target=other).start()
    is_held.wait(60)
    looks = iter(range(100))
    ray.before_wait = lambda: next(looks) == 1 and may_end.set()  # the two other runs are made, or nearly
    assert made.run() == 0 and len(stamps(own.output_dir)) == 3
    assert [given[0].folder for _, given in ray.sent][-1] == folder.name and len(ray.sent) == 3


def test_an_interruption_takes_the_tasks_back(sweep_of, ray, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    ray.before_wait = interrupt
    own, made = sweep_of([])
    assert interruptible(made.run)() == INTERRUPTED
    assert ray.cancelled == [0, 1] and not stamps(own.output_dir)
    for lock in (own.output_dir / ".locks").glob("adamw*.lock"):
        FileLock(lock).acquire(timeout=0).lock.release()


def test_a_run_that_was_begun_goes_on(sweep_of, ray, tmp_path):
    """Its checkpoints travel with the task."""
    trainer = FakeTrainer()
    own, made = sweep_of([], seeds=(0,), trainers={0: lambda: trainer})
    (spec,) = own.specify_runs()
    folder, _ = find_folder(spec, own.output_dir)
    start_run(spec, folder, {})
    (folder / "checkpoint-2" / "inner").mkdir(parents=True)
    (folder / "checkpoint-2" / "inner" / "file").write_bytes(b"\0\1")
    assert made.run() == 0 and trainer.resumed is True
    assert ray.sent[0][1][2][f"{folder.name}/checkpoint-2/inner/file"] == b"\0\1"
    assert (folder / "checkpoint-2" / "inner" / "file").read_bytes() == b"\0\1" and (folder / METRICS_FILE).is_file()


def test_what_models_solve_before_training_is_joined(sweep_of, tmp_path):
    def solving():
        (here := grids[-1].output_dir).mkdir(exist_ok=True)
        seed = grids[-1].trained[-1]
        (here / SOLVE_BEFORE_FILE).write_text(f'{{"model {seed}": [1, 0]}}')
        return FakeTrainer()

    grids = []
    _, made = sweep_of(grids, make=solving)
    assert made.run() == 0
    assert read(tmp_path / "runs" / SOLVE_BEFORE_FILE) == {f"model {seed}": [1, 0] for seed in range(3)}


def test_a_task_returns_the_runs_that_it_made_of_the_same_weights(ray, monkeypatch, tmp_path):
    """What is finished here is not made again there."""
    tasks = []

    def main(arguments):
        tasks.append(PartsGrid(arguments[-1], seeds=[0]))
        return Runner(tasks[-1]).run()

    monkeypatch.setattr(dpo, "main", main)
    root = tmp_path / "runs"
    assert Runner(PartsGrid(root, seeds=[0], methods=("interpolate:2",))).run() == 0
    before = stamps(root)
    engine = cluster.OnRay(cluster.Work("dpo", [], "", str(tmp_path)), root, 0.0)
    with engine_in_use(engine):
        made = Runner(own := PartsGrid(root, seeds=[0]))
    assert made.run() == 0 and len(own.reported) == 3 and own.trained == []
    assert [grid.measured for grid in tasks] == [[("adamw", 0), ("interpolate:0.5", 0)]] and len(ray.sent) == 1
    assert len(stamps(root)) == 3 and before.items() <= stamps(root).items()
    assert {info["name"] for info in infos(root).values()} == infos(root).keys()


def test_the_checkpoint_of_another_run_travels_with_the_run_that_is_made_of_it(ray, monkeypatch, tmp_path):
    found, trainer = [], FakeTrainer()

    def main(arguments):
        return Runner(PartsGrid(arguments[-1], seeds=[0], make=lambda: trainer)).run()

    def last(folder):
        found.append(folder / "checkpoint-4")
        return found[-1] if (found[-1] / "file").is_file() else None

    monkeypatch.setattr(dpo, "main", main)
    monkeypatch.setattr(runner, "last_complete_checkpoint", last)
    grid = PartsGrid(tmp_path, seeds=[0], methods=("adamw",))
    assert Runner(grid).run() == 0
    (checkpoint := tmp_path / grid.specify_runs()[0].folder_name / "checkpoint-4").mkdir()
    (checkpoint / "file").write_bytes(b"0")
    with engine_in_use(cluster.OnRay(cluster.Work("dpo", [], "", str(tmp_path)), tmp_path, 0.0)):
        made = Runner(PartsGrid(tmp_path, seeds=[0]))
    assert made.run() == 0 and len(ray.sent) == 1 and len(stamps(tmp_path)) == 3
    assert trainer.resumed == str(found[-1]) and found[-1].parts[-2:] == checkpoint.parts[-2:] != checkpoint.parts


def test_an_engine_has_no_processes_beside(ray, monkeypatch):
    monkeypatch.setattr(runner, "get_context", None)  # which would start them
    with engine_in_use(cluster.OneRun(Path("run"))), runner.workers_beside(3, print):
        assert isinstance(current_engine(), cluster.OneRun)
    assert current_engine() is None


@pytest.mark.parametrize(
    "arguments", [["--output_dir", "a"], ["--output_dir=a"], ["--output", "a"], ["--output=a"], []], ids=" ".join
)
def test_a_task_has_a_folder_of_its_own(arguments):
    assert cluster.without_output(["--seeds", "0", *arguments, "--beta", "1"]) == ["--seeds", "0", "--beta", "1"]


# ---- The command ----


@pytest.fixture
def connected(ray, monkeypatch):
    """A cluster whose machines have these GPUs, and what each command was given."""
    ray.init = lambda address, **settings: None
    ray.shutdown = lambda: None
    ray.nodes = lambda: [
        {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"GPU": 8.0}},
    ]
    given = {}
    for module in (dpo, suspects, grokking):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "main", lambda x, name=name: given.update({name: (x, current_engine())}) or 3)
    monkeypatch.setattr(cluster, "require", lambda *names, **more: None)
    return given


def test_the_gpus_of_a_run(connected, ray, capsys):
    for command, more, gpus in (("dpo", [], 0), ("suspects", [], 0), ("grokking", ["--use_cpu", "False"], 1)):
        own = ["--output_dir", "here", *more]
        assert sweep.main(["--ray", "auto", command, *own]) == 3
        arguments, engine = connected[command]
        assert arguments == own and engine.output_dir == Path("here")
        assert engine.gpus == gpus  # the built-in tasks are set to the CPU
    assert ray.options_of["max_calls"] == 1 and "1 runs at a time" in capsys.readouterr().out
    assert sweep.main(["--ray", "auto", "--gpus_per_run", "0.5", "dpo"]) == 3 and connected["dpo"][1].gpus == 0.5
    assert current_engine() is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpus_per_run", "1", "dpo"], "needs `--ray`"),
        (["--ray", "auto", "--gpus_per_run", "-1", "dpo"], "must be a number from 0 on"),
        (["--ray", "auto", "--gpus_per_run", "3", "dpo"], "no machine of the cluster has more than 2 GPUs."),
        (["--ray", "auto", __file__], "`--ray` needs the name of a command"),
        (["--ray", "auto", "dpo", "--seedss", "1"], "`--seedss` is no argument of `prm-hf dpo`"),
        (["--ray", "auto"], "The first argument must be one of"),
    ],
    ids=lambda x: None if isinstance(x, str) else " ".join(x[:-1]),
)
def test_wrong_input(arguments, message, connected, capsys):
    assert cli.main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not connected


def test_no_cluster(connected, ray, capsys):
    def init(address, **settings):
        raise ConnectionError("Could not find\n any running Ray instance.")

    ray.init = init
    assert cli.main(["sweep", "--ray", "10.0.0.1:6379", "dpo"]) == 2
    error = capsys.readouterr().err
    assert "`--ray` '10.0.0.1:6379': Could not find any running Ray instance. Start a cluster with" in error


def test_ray_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["sweep", "--ray", "auto", "dpo"]) == 2
    assert '--ray` needs ray: pip install "prm-hf[ray]"' in capsys.readouterr().err


# ---- Real runs ----


@pytest.mark.slow
def test_a_task_makes_the_run_that_its_command_would(pairs, tmp_path, no_pictures, monkeypatch):
    """Folds, a run on repaired labels and a control, which need other runs, included."""
    arguments = [*on_files(pairs), *SHORT, *ONE_RATE, "--eval_strategy", "no", "--repair_folds", "2"]
    arguments += ["--methods", "adamw", "prm_debiased", "constant_q", "fixed_q", "filter:adamw", "--seeds", "0", "1"]
    assert run_dpo(tmp_path / "here", *arguments) == 0
    root, monkey = tmp_path / "here", tmp_path / "elsewhere"
    monkey.mkdir()
    monkeypatch.chdir(monkey)
    folders = [path.parent for path in sorted(root.rglob(METRICS_FILE)) if "seed0" in path.parent.name]
    names = {folder.name.split("_lr")[0] for folder in folders}
    assert names == {"adamw", "prm_debiased", "constant_q", "fixed_q", "filteradamw"} | {
        f"adamw-fold{i}of2" for i in (1, 2)
    }
    for folder in folders:
        others = [path.parent / name for path in root.rglob(METRICS_FILE) for name in cluster.RECORDS]
        given = cluster.read_files([path for path in others if path.parent != folder], root)
        name = str(folder.relative_to(root))
        cluster.write_files(
            cluster.make_one(cluster.Work("dpo", arguments, name, str(monkey)), given), tmp_path / "there"
        )
        one, other = read(folder / METRICS_FILE), read(tmp_path / "there" / name / METRICS_FILE)
        times = {"wall_seconds", "cost_seconds"}
        assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in other.items() if k not in times}
        assert read(folder / "margins.json") == read(tmp_path / "there" / name / "margins.json")
    assert not list(monkey.iterdir()) and len(infos(tmp_path / "there")) == 5


ONE_SETTING = ["--learning_rates", "1e-2", "--prm_learning_rates", "1e-2", "--weight_decays", "0"]
ONE_SETTING += ["--prm_weight_decays", "0", "--methods", "adamw", "prm_rows", "constant_q", "--seeds", "0"]
OTHERS = {
    grokking: [*ONE_SETTING, "--max_steps", "4", "--eval_steps", "2", "--models_at_once", "1", "--workers", "1"],
    suspects: ["--folds", "2", "--max_steps", "2", "--max_length", "64", "--learning_rates", "1e-3", "--workers", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("module", OTHERS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_task_of_another_command(module, tmp_path, no_pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert module.main([*OTHERS[module], "--output_dir", "here"]) == 0
    root = tmp_path / "here"
    *others, folder = sorted((path.parent for path in root.rglob(METRICS_FILE)), key=lambda x: "constant_q" in x.name)
    given = cluster.read_files([other / name for other in others for name in cluster.RECORDS], root)
    name = str(folder.relative_to(root))
    work = cluster.Work(module.__name__.rpartition(".")[2], OTHERS[module], name, str(tmp_path))
    cluster.write_files(cluster.make_one(work, given), tmp_path / "there")
    one, other = read(folder / METRICS_FILE), read(tmp_path / "there" / name / METRICS_FILE)
    assert {k for k in one if one[k] != other.get(k)} <= {"wall_seconds", "seconds", "seconds_to_threshold"}
