"""Engine ``local``: workers that are killed, jobs that fail, and one display of progress."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from small_sweeps import (
    EVERY,
    MANY,
    UPDATES,
    Killing,
    first_weight,
    grid,
    interrupted,
    reference,
    table,
    write_log,
)

from iql_torchrl import IQLPopulation, load_dataset, processes
from iql_torchrl.processes import PROGRAM, failure
from iql_torchrl.sweep import Sweep, engines
from iql_torchrl.sweep.engines import perform_locally


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_once(path):
    """Kills its process, but not where it has been before; writes who performed it."""
    with path.open("a") as file:
        file.write(f"{os.getpid()} {torch.get_num_threads()}\n")
    if len(path.read_text().splitlines()) == 1:
        kill()


def fail():
    raise ValueError("first line\nsecond line")


@pytest.mark.slow
def test_jobs_whose_process_dies_are_performed_by_another_or_given_up(tmp_path):
    calls, watched = {"always": kill, "raising": fail}, []
    calls |= {"once": partial(kill_once, tmp_path / "pids")}
    failures = perform_locally(calls, lambda: watched.append(1), workers=2, threads=1)
    assert sorted(failures) == ["always", "raising"]
    assert failures["raising"] == "ValueError: first line"
    assert failures["always"].startswith("its process ended 3 times, with exit code -9 (SIGKILL)")
    lines = [line.split() for line in (tmp_path / "pids").read_text().splitlines()]
    assert len({process for process, _ in lines} - {str(os.getpid())}) == len(lines) == 2
    assert [threads for _, threads in lines] == ["1", "1"]
    assert watched


def test_processes_that_die_are_replaced_twice_and_failures_are_named(tmp_path, monkeypatch):
    """Real processes and signals; ``light_worker`` starts faster than torch."""
    none = pickle.dumps((True, None))
    raised = pickle.dumps((False, failure(ValueError("first line\nsecond line"))))
    orders = {"fine": (0, none), "twice": (2, none), "always": (9, none), "raising": (0, raised)}
    light = PROGRAM.replace("iql_torchrl.processes", "light_worker")
    monkeypatch.setattr(processes, "PROGRAM", light)
    monkeypatch.setattr(engines, "_packed", lambda calls, threads: calls)
    calls = {name: pickle.dumps((str(tmp_path / name), *orders[name])) for name in orders}
    failures = perform_locally(calls, lambda: None, workers=2, threads=1)
    assert sorted(failures) == ["always", "raising"]
    assert failures["raising"] == "ValueError: first line"
    assert failures["always"].startswith("its process ended 3 times, with exit code -9 (SIGKILL)")
    performed = {name: (tmp_path / name).read_text().split() for name in orders}
    assert [len(set(processes)) for processes in performed.values()] == [1, 3, 3, 1]
    for name in ("twice", "always"):
        child = int((tmp_path / f"{name}.child").read_text())
        assert ends(child), "what the process started is ended too"


def ends(process: int) -> bool:
    """Within 20 of the 60 seconds that it sleeps. A process that nobody waited for has no text."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        try:
            if not Path(f"/proc/{process}/cmdline").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_what_cannot_be_sent_is_refused_before_a_process_starts(tmp_path):
    with (tmp_path / "open").open("w") as file, pytest.raises(TypeError, match="env or score"):
        perform_locally({"": partial(print, file)}, lambda: None, workers=1, threads=1)


@pytest.mark.slow
def test_after_a_killed_worker_the_table_is_that_of_an_uninterrupted_run(tmp_path, capsys):
    capsys.readouterr()
    run = partial(Sweep.run, workers=2, progress=True)
    result = interrupted(tmp_path, run, ("from-00000", 120))
    shown, (failed,) = capsys.readouterr().err, result.failures
    rows = {row["member"]: row for row in table(tmp_path / "sweep")}
    assert "cannot be built: policy is 'categorical'" in result.failures[failed]
    assert [bool(row["score"]) for row in rows.values()] == [True] * 4 + [False]
    assert rows[failed]["error"] == result.failures[failed]
    assert failed in shown
    bars = [line for line in io.StringIO(shown) if "training:" in line]
    assert bars, "one bar, over the updates of all members of all tasks"
    assert "1.60k/1.60k" in bars[-1]
    assert "2 of 2 tasks" in bars[-1]
    # the table is that of populations which are trained without a sweep
    configs = grid(updates=UPDATES)
    own = load_dataset(tmp_path / "log.npz", reward=configs[0].reward)
    population = IQLPopulation(configs[2:], own)
    population.train_now()
    for number, row in enumerate(list(rows.values())[2:4]):
        score = first_weight(population.member(number), own)["score"]
        assert float(row["score"]) == pytest.approx(score, rel=1e-6)


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_is_continued(tmp_path):
    source, folder = write_log(tmp_path), tmp_path / "sweep"
    options = {"members_per_task": 2, "score": first_weight, "save_every": EVERY}
    expected = reference(grid(updates=UPDATES), source, tmp_path / "reference", **options)
    program = f"""
import sys
sys.path[:] = {sys.path!r}
from small_sweeps import first_weight, grid
from iql_torchrl.sweep import Sweep
options = {{"members_per_task": 2, "score": first_weight, "save_every": {EVERY}}}
Sweep(grid(updates={UPDATES}), {str(source)!r}, {str(folder)!r}, **options).run(workers=2)
"""
    workers = []
    with subprocess.Popen([sys.executable, "-c", program]) as process:

        def kill(worker: int) -> None:
            workers.append(worker)
            process.kill()

        with Killing(folder / "tasks" / "from-00000", 120, then=kill):
            assert process.wait() == -signal.SIGKILL
    assert ends(workers[0])
    assert not (folder / "members.csv").exists()
    result = Sweep(grid(updates=UPDATES), source, folder, **options).run(workers=1)
    assert not result.failures
    assert (folder / "members.csv").read_bytes() == expected


@pytest.mark.slow
def test_200_members_over_two_workers_one_of_which_is_killed(tmp_path):
    interrupted(tmp_path, partial(Sweep.run, workers=2), ("from-00080", 25), **MANY)
    assert len(table(tmp_path / "sweep")) == 200
    assert len(list((tmp_path / "sweep" / "tasks").iterdir())) == 25
