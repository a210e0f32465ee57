"""Engines ``ray`` and ``slurm``: workers, nodes and jobs that end, and failures of single runs."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from extras import needs
from small_sweeps import (
    MANY,
    first_weight,
    grid,
    interrupted,
    reference,
    table,
    updates_of,
    write_log,
)

from iql_torchrl.sweep import Sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of Ray and submitit, which differ between versions
]


@pytest.fixture
def ray(monkeypatch):
    ray = needs("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def nodes(ray):
    """A cluster of two nodes with one processor each, and a head without processors."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def removal(cluster):
    """What removes the node whose worker is given."""

    def remove(worker: int) -> None:
        (node,) = (
            node
            for node in cluster.worker_nodes
            for each in node.all_processes["raylet"]
            if each.process.pid == parent_of(worker)
        )
        cluster.remove_node(node, allow_graceful=False)

    return remove


def test_a_killed_worker_and_a_run_that_fails(ray, tmp_path):
    ray.init(num_cpus=2, include_dashboard=False)
    interrupted(tmp_path, partial(Sweep.run, engine="ray"), ("from-00000", 120))
    assert ray.is_initialized(), "the connection of the caller stays"


def test_200_members_over_two_nodes_with_a_killed_worker_and_a_removed_node(ray, nodes, tmp_path):
    run = partial(Sweep.run, engine="ray", address=nodes.address)
    removed = "from-00120", 25, None, removal(nodes)
    interrupted(tmp_path, run, ("from-00040", 25), removed, **MANY)
    assert len(nodes.worker_nodes) == 1
    assert not ray.is_initialized(), "what the sweep has connected, it disconnects"
    assert len(table(tmp_path / "sweep")) == 200


def test_an_interrupted_sweep_cancels_its_tasks(ray, tmp_path, monkeypatch):
    source, folder = write_log(tmp_path), tmp_path / "sweep"
    ray.init(num_cpus=1, include_dashboard=False)
    task = folder / "tasks" / "from-00000"

    def interrupted(self, *args, **kwargs):
        if updates_of(task) > 100:
            raise KeyboardInterrupt

    sweep = Sweep(grid(updates=100_000), source, folder, score=None)
    monkeypatch.setattr("iql_torchrl.sweep.sweep.tqdm.set_postfix_str", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run("ray", progress=True)
    time.sleep(5)
    at = updates_of(task)
    time.sleep(2)
    assert updates_of(task) == at < 100_000


def test_options_of_tasks_reach_ray(ray, tmp_path):
    """Two tasks of one whole (logical) GPU each are not performed at once on a node with one."""
    source, folder = write_log(tmp_path), tmp_path / "sweep"
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False)

    def gpu(agent, dataset):
        return {"score": float(os.environ["CUDA_VISIBLE_DEVICES"])}

    configs = grid(seeds=1, updates=5, device="cpu")
    options = {"members_per_task": 1, "score": gpu}
    result = Sweep(configs, source, folder, **options).run("ray", ray={"num_gpus": 1})
    assert [row["score"] for row in result.rows.values()] == [0.0, 0.0]
    with pytest.raises(ValueError, match="num_wheels"):
        Sweep(configs, source, tmp_path / "b", **options).run("ray", ray={"num_wheels": 1})


# -- Slurm: submitit's executor of local processes

LOCAL = {"cluster": "local", "timeout_min": 5}


@pytest.fixture
def submitit():
    return needs("submitit")


def test_a_preempted_job_is_queued_again_and_continues(submitit, tmp_path):
    """``SIGUSR2`` is submitit's signal of preemption, and of the end of a job's time."""
    run = partial(Sweep.run, engine="slurm", slurm=LOCAL)
    interrupted(tmp_path, run, ("from-00000", 120, signal.SIGUSR2))
    logs = [path.read_text() for path in (tmp_path / "sweep" / "slurm").glob("*_log.*")]
    assert any("Requeued job" in text for text in logs)


def test_a_job_that_fails_is_named_and_the_next_call_repeats_it(submitit, tmp_path):
    source, folder = write_log(tmp_path), tmp_path / "sweep"
    configs = grid(seeds=1, updates=20)
    options = {"members_per_task": 1, "score": first_weight}
    expected = reference(configs, source, tmp_path / "reference", **options)
    damaged = folder / "tasks" / "from-00001" / "population.torchrl"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("not a checkpoint")
    result = Sweep(configs, source, folder, **options).run("slurm", slurm=LOCAL)
    names = list(result.rows)
    assert list(result.failures) == [names[1]]
    assert "CheckpointError: " in result.failures[names[1]]
    assert str(damaged) in result.failures[names[1]]
    assert table(folder)[0]["score"]
    damaged.unlink()
    result = Sweep(configs, source, folder, **options).run("slurm", slurm=LOCAL)
    assert not result.failures
    assert (folder / "members.csv").read_bytes() == expected


def test_without_slurm_there_is_one_sentence(submitit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="engine='slurm' finds no Slurm on this machine"):
        Sweep(grid(updates=1), write_log(tmp_path), tmp_path / "s", score=None).run("slurm")
