"""What a run shows on stderr (lines in a file or a pipe, a bar on a terminal) and writes to loggers.

Real loggers of TorchRL's, read back with their own tools. W&B, MLflow and Trackio:
``tests/examples/test_examples_loggers.py``.
"""

import csv
import math
import os
import re
import struct
import sys
import time

import pytest
import torch
from extras import needs
from small_trainers import make_step, make_trainer
from tensordict import TensorDict
from torchrl.record.loggers import get_logger

from iql_torchrl.trainers import trainer as trainer_module
from iql_torchrl.trainers.events import Display, Progress

SETTINGS = {"log_interval": 5, "eval_interval": 10, "progress_bar": True}


def losses(row):
    return ", ".join(f"{name} {row[f'loss_{name}']:.4g}" for name in ("actor", "qvalue", "value"))


def test_a_line_at_each_event_in_a_file_or_a_pipe(capfd, tmp_path):
    step, scores = make_step(), iter([-1.5, 3.0, 2.0])
    trainer = make_trainer(
        step, evaluation=lambda: {"return_mean": next(scores)}, folder=tmp_path, **SETTINGS
    )
    trainer.train()
    out, err = capfd.readouterr()
    assert out == ""
    rows = {row["update"]: row for row in trainer.progress.rows}
    assert re.sub(r"[\d,.]+ updates/s", "N updates/s", err).splitlines() == [
        "update 0 of 20: return_mean -1.5",
        f"update 5 of 20: N updates/s, {losses(rows[5])}, return_mean -1.5 at 0",
        f"update 10 of 20: N updates/s, {losses(rows[10])}, return_mean 3, saved",
        f"update 15 of 20: N updates/s, {losses(rows[15])}, return_mean 3 at 10",
        f"update 20 of 20: N updates/s, {losses(rows[20])}, return_mean 2, saved",
    ]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_terminal_shows_a_bar_and_no_lines(monkeypatch):
    import fcntl
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        make_trainer(make_step(), 20, evaluation=lambda: {"return_mean": 2.5}, **SETTINGS).train()
        terminal.flush()
        os.set_blocking(master, False)
        shown, ends = b"", time.monotonic() + 10
        while b"20/20" not in shown and time.monotonic() < ends:
            shown += screen.read(100_000) or b""  # what is there so far
    text = shown.decode(errors="ignore")
    assert "20/20" in text
    assert "return_mean=2.5" in text
    assert "of 20:" not in text


def test_a_late_score_gets_a_line_once_and_without_progress_nothing_is_printed(capfd):
    display = Display(True, 20, 0)
    display.event(20, {"loss_value": 1234.0}, score=("return_mean", 10, 1.0), speed=0.5)
    display.last_score(20, ("return_mean", 10, 1.0))
    display.last_score(20, ("return_mean", 20, 7.0))
    display.last_score(20, ("return_mean", 20, 7.0))
    assert capfd.readouterr().err.splitlines() == [
        "update 20 of 20: 0.50 updates/s, value 1234, return_mean 1 at 10",
        "update 20 of 20: return_mean 7",
    ]
    make_trainer(progress_bar=False, evaluation=lambda: {"return_mean": 1.0}).train()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_files_of_loggers(tmp_path, kind):
    if kind == "tensorboard":
        needs("tensorboard")
    scores, logger = iter([-3.0, -2.0, -1.0]), get_logger(kind, str(tmp_path), "run")
    evaluation = {"eval_interval": 10, "evaluation": lambda: {"return_mean": next(scores)}}
    trainer = make_trainer(logger=logger, **evaluation)
    trainer.train()
    if kind == "csv":
        files = {path.stem: path for path in tmp_path.rglob("*.csv")}

        def read(name):
            lines = csv.reader(files[name].read_text().splitlines())
            return {int(step): float(value) for step, value in lines}
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logger.experiment.close()
        events = EventAccumulator(str(tmp_path / "run")).Reload()

        def read(name):
            return {each.step: each.value for each in events.Scalars(name)}

    assert read("return_mean") == {0: -3.0, 10: -2.0, 20: -1.0}
    rows = {row["update"]: row for row in trainer.progress.rows}
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        expected = {update: rows[update][name] for update in (5, 10, 15, 20)}
        assert read(name) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["loss_actor", "loss_value"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, name):
    """A policy whose density is infinite gets a hint."""
    progress = Progress()
    progress.tally(TensorDict({name: torch.tensor(1.0), "entropy": torch.tensor(value)}))
    assert progress.new_row(1)[name] == 1.0  # only losses must be finite
    progress.tally(TensorDict({name: torch.tensor(value), "entropy": torch.tensor(0.0)}))
    with pytest.raises(FloatingPointError, match=rf"{name} became .* before update 2") as error:
        progress.new_row(2)
    assert "max_grad_norm" in str(error.value)
    assert ("density" in str(error.value)) == (name == "loss_actor")


def test_a_metric_that_disappears_is_left_out_of_the_row():
    """As the entropy does where another objective of the policy is assigned."""
    progress = Progress()
    progress.tally(TensorDict({"entropy": torch.tensor(9.0), "loss_value": torch.tensor(1.0)}))
    progress.tally(TensorDict({"loss_value": torch.tensor(3.0)}))
    assert progress.new_row(2) == {"loss_value": 2.0}


def test_an_equal_score_is_no_better_one():
    progress, scores = Progress(), ((1, 5.0), (2, 5.0), (3, 5.5), (4, math.nan))
    assert [progress.improves(n, x) for n, x in scores] == [True, False, True, False]
    assert (progress.best, progress.best_update) == (5.5, 3)


@pytest.mark.parametrize("threads", ["1", "2", None])
def test_slow_updates_are_noticed_once(monkeypatch, threads):
    """Not where the advice is followed already."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    said = []
    monkeypatch.setattr(trainer_module.torchrl_logger, "warning", said.append)
    trainer = make_trainer()
    for speed in (20.0, 1000.0, 150.0):
        trainer.updates_per_second = speed
        trainer._notice_slowness()
    assert said == []
    for _ in range(2):
        trainer.updates_per_second = 90.0
        trainer._notice_slowness()
    assert ["OMP_NUM_THREADS=1" in text for text in said] == [True] * (threads != "1")
