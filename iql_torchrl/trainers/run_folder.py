"""The folder of a run: its table, curves, settings, and which checkpoints are kept."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torchrl.checkpoint import CheckpointRotation

from iql_torchrl.checkpoint import (
    PREFIX,
    SUFFIX,
    checkpoint_path,
    newest,
    remove_leftovers,
    replace_by_link,
)
from iql_torchrl.files import whole_file
from iql_torchrl.report.figures import draw
from iql_torchrl.report.runs import write_csv

__all__ = ["RunFolder", "new_folder", "saved_arguments", "started_folder"]

SECONDS_BETWEEN_PICTURES = 60.0
TABLE_SHARE = 0.01  # at most this share of the time is spent on writing the table
ARGUMENTS = "arguments.json"


def new_folder(parent: Path, name: str, arguments: Sequence[str]) -> Path:
    """Make ``parent/name``, or ``parent/name-2`` and so on: earlier runs are kept.

    ``arguments``, a script's command line, are written there for :func:`saved_arguments`. Raises
    ``ValueError`` when ``name`` is not one folder name, and ``OSError`` as ``mkdir`` does.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"--name is {name!r}; give one folder name, and its parent as --output.")
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_dir():
                continue
            raise
        with whole_file(folder / ARGUMENTS) as temporary:
            temporary.write_text(json.dumps(list(arguments)) + "\n")
        return folder
    raise AssertionError


def started_folder(parent: Path, name: str, arguments: Sequence[str]) -> Path | None:
    """The newest folder that :func:`new_folder` made of the same values; None where there is none.

    torchrun starts a script that failed again with the same arguments: see ``Ranks.restarts``.
    """
    newest_match = None
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return newest_match
        with contextlib.suppress(ValueError):  # a folder of something else
            newest_match = folder if saved_arguments(folder) == list(arguments) else newest_match
    raise AssertionError


def saved_arguments(folder: Path) -> list[str]:
    """The command line that started the run in ``folder``; ``ValueError`` without a readable one."""
    try:
        arguments = json.loads((folder / ARGUMENTS).read_text())
    except (OSError, ValueError) as error:
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder, so no run to continue.") from None
        raise ValueError(
            f"{folder} has no readable {ARGUMENTS}, so there is no run to continue ({error})."
        ) from error
    return [str(argument) for argument in arguments]


class RunFolder:
    """``metrics.csv``, ``curves.png``, ``config.json``, ``checkpoints/``, ``best.torchrl``.

    Every file is replaced as a whole, never written in place.
    """

    def __init__(self, path: str | os.PathLike[str], keep_last: int) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise ValueError(f"folder is {path}, which is a file; give the name of a folder.")
        self.rotation = CheckpointRotation(self.path / "checkpoints", keep_last=keep_last)
        self.best = self.path / f"best{SUFFIX}"
        self._drawn = time.monotonic()
        self._write_again = -math.inf

    def refuse_if_taken(self) -> None:
        """Raises ``ValueError`` when another run has left checkpoints here."""
        taken = list(self.rotation.directory.glob(f"*{SUFFIX}"))
        if taken or self.best.exists():
            raise ValueError(
                f"{self.path} already contains a run ({len(taken)} checkpoints): call "
                "trainer.resume().train() to continue it, choose another folder, or delete this one."
            )

    def make(self) -> None:
        """Make the folder; ``ValueError`` where that is not possible."""
        try:
            self.rotation.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"folder is {self.path}, which cannot be created ({error}); give a folder below one "
                "that exists and that you may write to."
            ) from error

    def prepare(self, config: Mapping[str, Any] | None) -> None:
        """Delete incomplete files of a killed process, write the settings."""
        remove_leftovers(self.rotation.directory)
        if config is not None:
            with whole_file(self.path / "config.json") as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other training may use the folder; the lock ends with the process too.

        Raises ``ValueError`` with the process that holds it. Where the file system has no locks, a
        warning says that nothing is locked.
        """
        holder = self.path / "training.json"
        lock = FileLock(self.path / ".training.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            try:
                own = json.loads(holder.read_text())
                who = f"process {own['process']} on {own['host']}"
            except (OSError, ValueError, KeyError):
                who = "another process"
            raise ValueError(
                f"{self.path}: {who} trains in this folder now; wait for its end, or choose another "
                "folder."
            ) from None
        except (OSError, NotImplementedError) as error:
            warnings.warn(
                f"{self.path}: cannot be locked ({error}); start no second training in this folder.",
                RuntimeWarning,
                stacklevel=3,
            )
            yield
            return
        try:
            with whole_file(holder) as temporary:
                temporary.write_text(json.dumps({"process": os.getpid(), "host": platform.node()}))
            yield
        finally:
            holder.unlink(missing_ok=True)
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def has_checkpoint(self) -> bool:
        return any(self.rotation.directory.glob(f"{PREFIX}*{SUFFIX}"))

    def newest(self) -> Path:
        return newest(self.rotation.directory)

    def holds(self, path: Path) -> bool:
        """Whether ``path`` is a file of this run."""
        return self.path.resolve() in path.resolve().parents

    def checkpoint_of(self, update: int) -> Path:
        return checkpoint_path(self.rotation.directory, update)

    def write(self, rows: Sequence[Mapping[str, float]], *, now: bool = False) -> None:
        """Write the table: at each event while that is fast, and less often when it is long.

        After a crash, missing rows are later than the last checkpoint, or the checkpoint has them.
        """
        began = time.monotonic()
        if now or began >= self._write_again:
            write_csv(self.path / "metrics.csv", rows)
            ended = time.monotonic()
            self._write_again = ended + (ended - began) / TABLE_SHARE

    def draw(
        self,
        rows: Sequence[Mapping[str, float]],
        *,
        log_return: float | None,
        now: bool = False,
    ) -> None:
        """Draw the curves, and a horizontal line at the mean return of the log if known.

        At most once a minute unless ``now``, because drawing takes about half a second.
        """
        if rows and (now or time.monotonic() - self._drawn > SECONDS_BETWEEN_PICTURES):
            level = None if log_return is None else (f"the log ({log_return:.0f})", log_return)
            draw(self.path / "curves.png", rows, title=self.path.name, reference=level)
            self._drawn = time.monotonic()

    def set_aside(self, saved: Path, update: int) -> None:
        """Keep the checkpoint of ``update`` until its evaluation in the background is finished."""
        replace_by_link(saved, self._aside(update))

    def judge(self, update: int, *, improves: bool) -> None:
        """Make the checkpoint that was set aside the best one if it ``improves``, or delete it."""
        aside = self._aside(update)
        if improves and aside.exists():
            os.replace(aside, self.best)
        aside.unlink(missing_ok=True)

    def promote(self, saved: Path) -> None:
        replace_by_link(saved, self.best)

    def forget_asides(self, pending: Collection[int]) -> None:
        """Delete checkpoints set aside for evaluations that are not ``pending`` any more."""
        kept = {self._aside(update) for update in pending}
        for path in self.rotation.directory.glob(f".aside-*{SUFFIX}"):
            if path not in kept:
                path.unlink()

    def _aside(self, update: int) -> Path:
        return self.rotation.directory / f".aside-{update:012d}{SUFFIX}"
