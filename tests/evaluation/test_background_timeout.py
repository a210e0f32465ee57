"""Evaluations that hang: ended after ``timeout``, and no reason to wait when training is stopped."""

import csv
import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import small_trainers
import torch
from gymnasium import spaces
from small_trainers import make_step
from test_background import alive

from iql_torchrl.evaluation.background import BackgroundEvaluation, EvaluationTimeout
from iql_torchrl.files import newest, read_components

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and sessions")


class Hanging(gymnasium.Env):
    """Its reset never returns while ``folder/hang`` exists, and it leaves a process behind.

    With ``folder/once`` the first reset alone does not return.
    """

    observation_space = spaces.Box(-1.0, 1.0, (3,))
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if (self.folder / "once").exists():
            (self.folder / "once").unlink()
            time.sleep(600)
        if (self.folder / "hang").exists():
            simulator = os.fork()  # it holds the pipes of its parent
            if simulator:
                (self.folder / "pids").write_text(f"{os.getpid()} {simulator}")
                (self.folder / "pids").rename(self.folder / "hanging")
            time.sleep(600)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, True, False, {}


def ended(pids: str) -> bool:
    deadline = time.monotonic() + 5
    while any(map(alive, pids.split())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids.split()))


def background(policy, folder: Path, **options) -> BackgroundEvaluation:
    make_env = functools.partial(Hanging, folder)
    return BackgroundEvaluation(policy, make_env, episodes=2, seed=0, **options)


def warmed_up(policy, folder: Path) -> BackgroundEvaluation:
    """One whose process runs, so that a short timeout does not pass while it starts."""
    evaluation = background(policy, folder, timeout=120)
    evaluation.submit(-1)
    assert evaluation.results(wait=True)[0][1].returns.tolist() == [1.0, 1.0]
    return evaluation


@pytest.mark.slow
def test_a_hung_evaluation_is_ended_and_reported_and_the_next_one_runs(tmp_path):
    with warmed_up(make_step(3, 1).loss.actor_network, tmp_path) as evaluation:
        first = evaluation._worker.process.pid
        (tmp_path / "hang").touch()
        evaluation.timeout = 1.0
        evaluation.submit(7)
        began = time.monotonic()
        with pytest.raises(
            EvaluationTimeout, match=r"number 7 .*Hanging.*timeout=1 seconds"
        ) as caught:
            evaluation.results(wait=True)
        assert time.monotonic() - began < 5
        assert caught.value.number == 7
        pids = (tmp_path / "hanging").read_text()
        assert pids.split()[0] == str(first)
        assert ended(pids), "the process and what its environment started"
        assert evaluation.pending == {}
        assert evaluation.results(wait=True) == []
        (tmp_path / "hang").unlink()
        evaluation.timeout = None
        evaluation.submit(8)
        ((number, result),) = evaluation.results(wait=True)
        assert (number, result.returns.tolist()) == (8, [1.0, 1.0])
        assert evaluation._worker.process.pid != first


@pytest.mark.slow
def test_what_waits_behind_a_hung_evaluation_is_evaluated(tmp_path):
    with warmed_up(make_step(3, 1).loss.actor_network, tmp_path) as evaluation:
        (tmp_path / "once").touch()
        for number, timeout in ((7, 1.0), (8, 120.0), (9, 120.0)):
            evaluation.timeout = timeout
            evaluation.submit(number)
        with pytest.raises(EvaluationTimeout, match="number 7"):
            evaluation.results(wait=True)
        assert list(evaluation.pending) == [8, 9]
        assert [number for number, _ in evaluation.results(wait=True)] == [8, 9]


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), "60", True])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(tmp_path, wrong):
    policy = make_step(3, 1).loss.actor_network
    with pytest.raises(ValueError, match=r"timeout is .*number > 0, or None for no limit"):
        background(policy, tmp_path, timeout=wrong)
    assert background(policy, tmp_path).timeout == 600.0
    assert background(policy, tmp_path, timeout=None).timeout is None


def make_trainer(folder: Path, evaluation_of):
    step = make_step(3, 1)
    torch.manual_seed(3)
    return small_trainers.make_trainer(
        step, obs=3, act=1, log_interval=10, eval_interval=10, evaluate_first=False,
        evaluation=evaluation_of(step.loss.actor_network), folder=folder / "run",
    )  # fmt: skip


def scores(folder: Path) -> dict[str, str]:
    text = (folder / "run" / "metrics.csv").read_text()
    return {row["update"]: row["return_mean"] for row in csv.DictReader(text.splitlines())}


@pytest.mark.slow
def test_training_continues_without_the_score(tmp_path):
    trainer = make_trainer(tmp_path, lambda policy: warmed_up(policy, tmp_path))
    evaluation = trainer.evaluation
    submit = evaluation.submit

    def submit_with_a_hang_at_10(number):
        hang = tmp_path / "hang"
        hang.touch() if number == 10 else hang.unlink()
        evaluation.timeout = 1.0 if number == 10 else 120
        submit(number)

    evaluation.submit = submit_with_a_hang_at_10
    with evaluation, pytest.warns(RuntimeWarning, match=r"Training continues:.*timeout=1 seconds"):
        trainer.train()
    assert trainer.updates == 20
    assert scores(tmp_path) == {"10": "", "20": "1.0"}
    assert trainer.progress.best_update == 20
    assert not list(tmp_path.glob("run/**/.*")), "no checkpoint stays set aside"


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        pytest.param(signal.SIGTERM, SystemExit, marks=pytest.mark.slow),
    ],
)
def test_the_first_signal_stops_the_wait_for_a_hung_evaluation(tmp_path, capfd, number, error):
    """The second signal, sent 10 seconds later, must not be needed."""
    (tmp_path / "hang").touch()
    sent, done = [], threading.Event()

    def stop():
        while not (tmp_path / "hanging").exists() and not done.wait(0.02):
            pass
        done.wait(0.5)  # until training waits for it
        for _ in range(2):
            if not done.is_set():
                sent.append(time.monotonic())
                os.kill(os.getpid(), number)
            done.wait(10)

    sender = threading.Thread(target=stop)
    trainer = make_trainer(tmp_path, lambda policy: background(policy, tmp_path))
    with trainer.evaluation:
        sender.start()
        with pytest.raises(error):
            trainer.train()
        took = time.monotonic() - sent[0]
        done.set()
        sender.join()
    assert took < 5, took
    assert "Stopped after update 20 of 20" in capfd.readouterr().err
    assert ended((tmp_path / "hanging").read_text())
    saved = newest(tmp_path / "run" / "checkpoints")
    assert saved.name == "checkpoint-000000000020.torchrl"
    assert list(read_components(saved)["trainer_state"]["pending"]) == [10]
    if number == signal.SIGTERM:  # the slow one
        (tmp_path / "hang").unlink()
        again = make_trainer(tmp_path, lambda policy: background(policy, tmp_path))
        with again.evaluation:
            again.resume().train()
        assert scores(tmp_path) == {"10": "1.0", "20": "1.0"}
