"""Engine ``slurm``, with submitit's executor of local processes: preemption and failures."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from small_populations import BASE
from small_sweeps import Killing, first_weight, grid, reference, table, write_log

from iql_torchrl.sweep import Sweep

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
UPDATES, EVERY = 400, 50
LOCAL = {"cluster": "local", "timeout_min": 5}


@pytest.fixture(autouse=True)
def submitit():
    return pytest.importorskip("submitit")


def test_a_preempted_job_is_queued_again_and_continues(tmp_path):
    """``SIGUSR2`` is submitit's signal of preemption, and of the end of a job's time."""
    source = write_log(tmp_path)
    configs = [*grid(updates=UPDATES), replace(BASE, updates=UPDATES, policy="categorical")]
    options = {"members_per_task": 2, "score": first_weight, "save_every": EVERY}
    expected = reference(configs, source, tmp_path / "reference", **options)
    folder = tmp_path / "sweep"
    with Killing(folder / "tasks" / "from-00000", 120, signal.SIGUSR2) as preempting:
        result = Sweep(configs, source, folder, **options).run("slurm", slurm=LOCAL)
    assert preempting.at is not None
    assert 120 <= preempting.at < UPDATES, "the job was preempted in the middle"
    logs = [path.read_text() for path in (folder / "slurm").glob("*_log.*")]
    assert any("Requeued job" in text for text in logs)
    assert list(result.failures) == [list(result.rows)[-1]]
    assert (folder / "members.csv").read_bytes() == expected


def test_a_job_that_fails_is_named_and_the_next_call_repeats_it(tmp_path):
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


def test_without_slurm_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="engine='slurm' finds no Slurm on this machine"):
        Sweep(grid(updates=1), write_log(tmp_path), tmp_path / "s", score=None).run("slurm")
