"""Engine ``slurm``, with submitit's executor of local processes: preemption and failures."""

from __future__ import annotations

import signal
from functools import partial

import pytest
from small_sweeps import first_weight, grid, interrupted, reference, table, write_log

from iql_torchrl.sweep import Sweep

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
LOCAL = {"cluster": "local", "timeout_min": 5}


@pytest.fixture(autouse=True)
def submitit():
    return pytest.importorskip("submitit")


def test_a_preempted_job_is_queued_again_and_continues(tmp_path):
    """``SIGUSR2`` is submitit's signal of preemption, and of the end of a job's time."""
    run = partial(Sweep.run, engine="slurm", slurm=LOCAL)
    interrupted(tmp_path, run, ("from-00000", 120, signal.SIGUSR2))
    logs = [path.read_text() for path in (tmp_path / "sweep" / "slurm").glob("*_log.*")]
    assert any("Requeued job" in text for text in logs)


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
