"""Real loggers of TorchRL's, written by a training run and read back with their own tools.

W&B, MLflow and Trackio: ``tests/examples/test_examples_loggers.py``.
"""

from __future__ import annotations

import csv

import pytest
from small_trainers import make_step, make_trainer
from torchrl.record.loggers import get_logger


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
