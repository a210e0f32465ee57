"""What a run shows on stderr (lines in a file or a pipe, a bar on a terminal) and writes to loggers.

Real loggers of TorchRL's, read back with their own tools. W&B, MLflow and Trackio:
``tests/examples/test_examples_loggers.py``.
"""

from __future__ import annotations

import csv
import os
import re
import struct
import sys

import pytest
from small_trainers import make_step, make_trainer
from torchrl.record.loggers import get_logger

from iql_torchrl.trainers.events import Display

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


def test_no_progress_bar_prints_nothing(capfd):
    make_trainer(
        make_step(), 10, progress_bar=False, evaluation=lambda: {"return_mean": 1.0}
    ).train()
    assert capfd.readouterr() == ("", "")


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
        text = screen.read(100_000).decode()
    assert "20/20" in text
    assert "return_mean=2.5" in text
    assert "of 20:" not in text


def test_a_score_that_comes_after_the_last_event_gets_a_line_once(capfd):
    display = Display(True, 20, 0)
    display.event(20, {"loss_value": 1234.0}, score=("return_mean", 10, 1.0), speed=0.5)
    display.last_score(20, ("return_mean", 10, 1.0))
    display.last_score(20, ("return_mean", 20, 7.0))
    display.last_score(20, ("return_mean", 20, 7.0))
    assert capfd.readouterr().err.splitlines() == [
        "update 20 of 20: 0.50 updates/s, value 1234, return_mean 1 at 10",
        "update 20 of 20: return_mean 7",
    ]


def train(logger):
    scores = iter([-3.0, -2.0, -1.0])
    trainer = make_trainer(
        make_step(),
        evaluation=lambda: {"return_mean": next(scores)},
        eval_interval=10,
        logger=logger,
    )
    trainer.train()
    return {row["update"]: row for row in trainer.progress.rows}


def test_tensorboard_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = get_logger("tensorboard", str(tmp_path), "run")
    rows = train(logger)
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    result = {e.step: e.value for e in events.Scalars("return_mean")}
    assert result == {0: -3.0, 10: -2.0, 20: -1.0}
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        logged = {e.step: e.value for e in events.Scalars(name)}
        assert logged == pytest.approx({u: rows[u][name] for u in (5, 10, 15, 20)}, rel=1e-6)


def test_csv_files(tmp_path):
    rows = train(get_logger("csv", str(tmp_path), "run"))
    files = {path.stem: path for path in tmp_path.rglob("*.csv")}
    with files["loss_value"].open() as file:
        result = {int(step): float(value) for step, value in csv.reader(file)}
    assert result == pytest.approx({u: rows[u]["loss_value"] for u in (5, 10, 15, 20)}, rel=1e-6)
