"""TorchRL's loggers for the runs of a script: one logger for each run, closed at its end."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from torchrl.record import loggers

__all__ = ["LOGGERS", "LoggerError", "LoggerName", "check_logger", "open_logger"]

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow", "trackio"]
LOGGERS: tuple[str, ...] = get_args(LoggerName)


class LoggerError(RuntimeError):
    """A logger cannot be started; the message is one sentence that names the option."""


def check_logger(kind: str | None) -> None:
    """Check that a logger of ``LOGGERS`` can be started; None is no logger.

    Raises ``LoggerError`` if its package is not installed, and for ``"wandb"`` if W&B would upload
    the run and no user is logged in. Uploads nothing and asks the user nothing.
    """
    if kind in (None, "csv"):
        return
    if find_spec(kind) is None:
        raise LoggerError(f"--logger {kind}: not installed; run `pip install {kind}`.")
    if kind == "wandb":
        _check_wandb_login()


def _check_wandb_login() -> None:
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    options: dict[str, Any] = (
        {"prompt": False} if "prompt" in inspect.signature(wandb.login).parameters else {}
    )
    try:
        logged_in, reason = wandb.login(**options), "this machine is not logged in"
    except Exception as error:  # its kinds of exceptions differ between versions
        logged_in, reason = False, str(error)
    if not logged_in:
        raise LoggerError(
            f"--logger wandb: {reason}. Run `wandb login`, or set WANDB_MODE=offline to write to "
            "files only, or choose --logger tensorboard."
        )


@contextmanager
def open_logger(kind: str | None, run: Path) -> Iterator[Any]:
    """TorchRL's logger ``kind`` for the run in folder ``run``; None for ``kind=None``.

    ``kind`` is one of ``LOGGERS``. The logger and its run are closed when the block ends: W&B,
    MLflow and Trackio allow one active run per process. CSV and TensorBoard files are named after
    ``run``; the other three, which collect the runs of many folders, name it ``parent-run``. MLflow
    writes to ``MLFLOW_TRACKING_URI``, or else to ``mlflow.db`` in the parent folder.

    Raises ``LoggerError`` with the logger's own message if it cannot be started.
    """
    if kind is None:
        yield None
        return
    try:
        logger = _start(kind, run)
    except Exception as error:  # each kind raises its own exceptions
        raise LoggerError(f"--logger {kind} could not be started: {error}") from error
    try:
        yield logger
    finally:
        if kind == "mlflow":  # TorchRL's MLFlowLogger has no method that ends the run
            import mlflow

            mlflow.end_run()
        logger.close()


def _start(kind: str, run: Path) -> Any:
    folder, name = run.parent, f"{run.parent.name}-{run.name}"
    if kind == "mlflow":
        database = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        return loggers.MLFlowLogger(name, os.environ.get("MLFLOW_TRACKING_URI", database))
    if kind == "trackio":
        options = {"resume": "allow" if run.exists() else "never"}
        return loggers.get_logger(kind, str(folder), name, trackio_kwargs=options)
    return loggers.get_logger(kind, str(folder), name if kind == "wandb" else run.name)
