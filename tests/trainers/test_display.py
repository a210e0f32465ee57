"""Progress of a run on stderr: lines in a file or a pipe, a bar on a terminal."""

from __future__ import annotations

import os
import re
import struct
import sys

import pytest
from small_trainers import make_step, make_trainer

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
