"""A sweep on a Ray cluster of two machines, one of which is lost while it trains: no run is lost, none made twice."""

import os
import re
import subprocess
import sys
import time

import psutil
import pytest

from .comparisons import ONE_RATE, ROOT, SHORT, infos, stamps


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

METHODS = ["adamw", "prm_debiased", "constant_q"]
COMMAND = ["dpo", *SHORT, *ONE_RATE, "--max_steps", "30", "--eval_steps", "30"]
LINE = re.compile(r"^(\S+_seed\d) .*\((\d+ s|finished before)\)$", re.MULTILINE)


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one processor each, of which the first is the one that stays."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.second = found.add_node(num_cpus=1)
    yield found
    found.shutdown()


def sweep(cluster, folder, *more):
    command = [sys.executable, "-m", "prm_hf", "sweep", "--ray", cluster.address, *COMMAND, *more]
    with open(folder / "out.txt", "a") as out:
        return subprocess.Popen([*command, "--output_dir", "runs"], stdout=out, stderr=out, cwd=folder)


def at_work(node):
    """The processes of a machine that train a run."""
    daemon = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [x for x in daemon.children(recursive=True) if x.is_running() and x.name().startswith("ray::make_one")]


def wait_for(what, process, folder, seconds=400):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end and process.poll() is None, (folder / "out.txt").read_text()[-3000:]
        time.sleep(0.1)
    return found


def test_a_machine_is_lost_in_the_middle_of_a_sweep(cluster, tmp_path):
    runs = tmp_path / "runs"
    process = sweep(cluster, tmp_path, "--methods", *METHODS, "--seeds", "0", "1")
    wait_for(lambda: stamps(runs), process, tmp_path)
    before = stamps(runs)
    lost = wait_for(lambda: at_work(cluster.second), process, tmp_path)
    cluster.remove_node(cluster.second, allow_graceful=False)
    assert process.wait(timeout=400) == 0, (tmp_path / "out.txt").read_text()[-3000:]
    assert not any(worker.is_running() for worker in lost)
    output = (tmp_path / "out.txt").read_text()
    assert "retries remaining" in output  # says Ray of a task that was lost
    made = LINE.findall(output)
    assert len(stamps(runs)) == len(infos(runs)) == len(made) == len({name for name, _ in made}) == 6
    assert all(when != "finished before" for _, when in made) and "Report:" in output
    assert {name: stamp for name, stamp in stamps(runs).items() if name in before} == before
    assert not list(runs.glob("*/failed.json")) and {".locks"} == {x.name for x in runs.glob(".*")}
    assert all("prm-hf dpo" in info["command"] and "prm_hf_" not in info["command"] for info in infos(runs).values())

    # The same command with one more seed makes one more run on the machine that is left
    before = stamps(runs)
    more = sweep(cluster, tmp_path, "--methods", "adamw", "--seeds", "0", "1", "2")
    assert more.wait(timeout=400) == 0, (tmp_path / "out.txt").read_text()[-3000:]
    made = LINE.findall((tmp_path / "out.txt").read_text().removeprefix(output))
    assert sorted(when == "finished before" for _, when in made) == [False, True, True]
    assert len(stamps(runs)) == 7 and {name: stamps(runs)[name] for name in before} == before
