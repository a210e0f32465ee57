"""Small sweeps on a log in a file, and what tests do to their workers."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from small_agents import log
from small_populations import BASE

from iql_torchrl import IQLConfig
from iql_torchrl.sweep import Sweep, SweepResult

ROWS, UPDATES, EVERY = 200, 400, 50
BAD = replace(BASE, updates=UPDATES, policy="categorical")  # it cannot be built


def write_log(folder: Path) -> Path:
    """20 episodes of ten steps, every other one terminal."""
    rows = np.arange(ROWS)
    ends = {"terminated": rows % 20 == 9, "truncated": rows % 20 == 19}
    path = folder / "log.npz"
    np.savez(path, **log(ROWS, **ends))
    return path


def grid(seeds: int = 2, **options) -> list[IQLConfig]:
    """Two expectiles, each with ``seeds`` seeds."""
    base = replace(BASE, **options)
    return [replace(base, expectile=e, seed=s) for e in (0.6, 0.9) for s in range(seeds)]


def first_weight(agent, dataset) -> dict[str, float]:
    """A score that any difference of the weights changes."""
    return {"score": float(sum(p.detach().double().abs().sum() for p in agent.actor.parameters()))}


def perform_here(calls, watch, *, workers=1, threads=1):
    """An engine without processes and without interruptions: the reference."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in calls.values():
            call()
    finally:
        torch.set_num_threads(before)
    return {}


def reference(configs, source, folder: Path, **options) -> bytes:
    """The table of an uninterrupted run in this process."""
    with patch("iql_torchrl.sweep.sweep.perform_locally", perform_here):
        Sweep(configs, source, folder, **options).run()
    return (folder / "members.csv").read_bytes()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "members.csv").open() as file:
        return list(csv.DictReader(file))


def updates_of(folder: Path) -> int:
    """Updates of a task that is being trained, 0 before its first event."""
    try:
        return int((folder / "progress.json").read_text())
    except (FileNotFoundError, ValueError):
        return 0


class Killing(threading.Thread):
    """Signals the process of the task in ``folder`` when it has made ``updates`` updates.

    ``then(process)`` in place of the signal. ``at``: the updates at that moment.
    """

    def __init__(self, folder: Path, updates: int, number=signal.SIGKILL, then=None) -> None:
        super().__init__(daemon=True)
        self.folder, self.updates = folder, updates
        self.then = then or (lambda process: os.kill(process, number))
        self.at: int | None = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.join()

    def run(self) -> None:
        limit = time.monotonic() + 600
        while updates_of(self.folder) < self.updates and time.monotonic() < limit:
            time.sleep(0.005)
        self.at = updates_of(self.folder)
        self.then(holder_of(self.folder))


def holder_of(folder: Path) -> int:
    """The process that has the lock of a task's folder, from /proc/locks."""
    inode = (folder.parent / f".{folder.name}.lock").stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
            return int(words[4])
    raise AssertionError(f"nobody holds the lock of {folder}")


def interrupted(tmp_path: Path, run, *endings, configs=None, **options) -> SweepResult:
    """The result of ``run(sweep)``, whose workers are ended in the middle; it is as without that.

    ``endings``: arguments of :class:`Killing` after the name of the task.
    """
    configs = [*grid(updates=UPDATES), BAD] if configs is None else configs
    options = {"members_per_task": 2, "score": first_weight, "save_every": EVERY} | options
    source, folder = write_log(tmp_path), tmp_path / "sweep"
    expected = reference(configs, source, tmp_path / "reference", **options)
    with ExitStack() as stack:
        endings = [
            stack.enter_context(Killing(folder / "tasks" / task, *rest)) for task, *rest in endings
        ]
        result = run(Sweep(configs, source, folder, **options))
    for each in endings:
        assert each.at is not None
        assert each.updates <= each.at < configs[0].updates, "it was ended in the middle"
    assert (folder / "members.csv").read_bytes() == expected
    assert list(result.failures) == [
        name for name, config in zip(result.rows, configs, strict=True) if config == BAD
    ]
    return result


#: 200 runs in 25 tasks, with a ranking
MANY = {
    "configs": grid(seeds=100, updates=60),
    "members_per_task": 8,
    "save_every": 20,
    "held_out": 0.4,
    "fit_updates": 20,
}
