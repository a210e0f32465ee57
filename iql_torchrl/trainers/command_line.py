"""Scripts that write runs: the folder of a new run, ``--resume RUN`` and ``--logger KIND``."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torchrl.record import loggers

from iql_torchrl.config.cli import refuse
from iql_torchrl.files import read_json, write_json

OPTION, ARGUMENTS = "--resume", "arguments.json"
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow", "trackio"]


def default_name(dataset: str, seed: int) -> str:
    """A folder name from a dataset's id or path and a seed: ``pendulum-mixed-v0-seed0``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"{dataset}-seed{seed}").strip("-")


def new_folder(parent: Path, name: str, arguments: Sequence[str]) -> Path:
    """Make ``parent/name``, or ``parent/name-2`` and so on: earlier runs are kept.

    ``arguments``, a script's command line, are written there for :func:`resumed_arguments`. Raises
    ``ValueError`` when ``name`` is not one folder name, and ``OSError`` as ``mkdir`` does.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"--name is {name!r}; give one folder name, and its parent as --output.")
    for folder in _numbered(parent, name):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if not folder.is_dir():
                raise
    write_json(folder / ARGUMENTS, list(arguments))
    return folder


def started_folder(parent: Path, name: str, arguments: Sequence[str]) -> Path | None:
    """The newest folder that :func:`new_folder` made of the same values, if any.

    torchrun starts a script that failed again with the same arguments: see ``Ranks.restarts``.
    """
    newest = None
    for folder in itertools.takewhile(Path.exists, _numbered(parent, name)):
        with contextlib.suppress(ValueError):  # a folder of something else
            newest = folder if _saved_arguments(folder) == list(arguments) else newest
    return newest


def _numbered(parent: Path, name: str) -> Iterator[Path]:
    yield parent / name
    yield from (parent / f"{name}-{number}" for number in itertools.count(2))


def _saved_arguments(folder: Path) -> list[str]:
    """The command line that started the run in ``folder``; ``ValueError`` without a readable one."""
    try:
        return [str(argument) for argument in read_json(folder / ARGUMENTS)]
    except (OSError, ValueError, TypeError) as error:
        problem = f"has no readable {ARGUMENTS} ({error})" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {problem}, so there is no run to continue.") from error


def resumed_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments to parse, and the folder of the run to continue (None for a new run).

    ``["--resume", "runs/a"]`` or ``["--resume=runs/a"]`` gives the arguments that started the run
    in ``runs/a``, which :func:`new_folder` saved there. Arguments without ``--resume`` are returned
    as they are.

    Exits with status 2 and a sentence on standard error if ``--resume`` lacks its
    folder or is given with other arguments, or if the folder has no saved arguments.
    """
    if not any(word.partition("=")[0] == OPTION for word in arguments):
        return list(arguments), None
    alone = len(arguments) == 1 and arguments[0].startswith(f"{OPTION}=")
    words = arguments[0].split("=", 1) if alone else list(arguments)
    if len(words) != 2 or words[0] != OPTION or not words[1]:
        refuse(
            f"{OPTION} continues a run with the settings that it was started with: give the run's "
            f"folder and no other argument, as in {OPTION} runs/a."
        )
    folder = Path(words[1])
    try:
        return _saved_arguments(folder), folder
    except ValueError as error:
        refuse(error)


def resume_command(folder: Path) -> str:
    """The shell command that continues the run in ``folder`` with the script that runs now.

    Under torchrun on one machine it starts as many processes; on several machines, one process.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    several = size != "1" and os.environ.get("LOCAL_WORLD_SIZE") == size
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", size] if several else []
    return shlex.join([sys.executable, *torchrun, sys.argv[0], OPTION, str(folder)])


class LoggerError(RuntimeError):
    """A logger cannot be started; the message is one sentence that names the option."""


def check_logger(kind: LoggerName | None) -> None:
    """Check that a logger can be started; None: without a logger.

    Raises ``LoggerError`` if its package is not installed, and for ``"wandb"`` if W&B would upload
    the run and no user is logged in. Uploads nothing and asks the user nothing.
    """
    if kind not in (None, "csv") and find_spec(kind) is None:
        raise LoggerError(f"--logger {kind}: not installed; run `pip install {kind}`.")
    if kind != "wandb":
        return
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    # versions without this argument ask nothing where there is no terminal
    has_prompt = "prompt" in inspect.signature(wandb.login).parameters
    options: dict[str, Any] = {"prompt": False} if has_prompt else {}
    try:
        logged_in = wandb.login(**options)
        problem = "" if logged_in else "this machine is not logged in"
    except Exception as error:  # its kinds of exceptions differ between versions
        problem = str(error)
    if problem:
        raise LoggerError(
            f"--logger wandb: {problem}. Run `wandb login`, or set WANDB_MODE=offline to write to "
            "files only, or choose --logger tensorboard."
        )


@contextlib.contextmanager
def open_logger(kind: LoggerName | None, run: Path) -> Iterator[Any]:
    """TorchRL's logger ``kind`` for the run in folder ``run``; None for ``kind=None``.

    The logger and its run are closed when the block ends: W&B, MLflow and Trackio allow one active
    run per process. CSV and TensorBoard files are named after ``run``; the other three, which collect
    the runs of many folders, name it ``parent-run``. MLflow writes to ``MLFLOW_TRACKING_URI``, or else
    to ``mlflow.db`` in the parent folder.

    Raises ``LoggerError`` with the logger's own message if it cannot be started.
    """
    if kind is None:
        yield None
        return
    folder, name = run.parent, f"{run.parent.name}-{run.name}"
    options = {"trackio_kwargs": {"resume": "allow" if run.exists() else "never"}}
    try:
        if kind == "mlflow":
            database = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
            uri = os.environ.get("MLFLOW_TRACKING_URI", database)
            logger = loggers.MLFlowLogger(name, uri)
        else:
            own = run.name if kind in ("csv", "tensorboard") else name
            logger = loggers.get_logger(kind, str(folder), own, **options)
    except Exception as error:  # each kind raises its own exceptions
        raise LoggerError(f"--logger {kind} could not be started: {error}") from error
    try:
        yield logger
    finally:
        if kind == "mlflow":  # TorchRL's MLFlowLogger has no method that ends the run
            import mlflow

            mlflow.end_run()
        logger.close()
