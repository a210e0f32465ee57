"""What a run leaves on disk besides its checkpoints' contents: names, table, picture, the best."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl.checkpoint import CheckpointRotation

from iql_torchrl.checkpoint import (
    SUFFIX,
    checkpoint_path,
    newest,
    remove_leftovers,
    replace_by_link,
)
from iql_torchrl.files import whole_file
from iql_torchrl.report.figures import draw
from iql_torchrl.report.runs import write_csv

__all__ = ["RunFolder", "new_folder", "saved_arguments"]

SECONDS_BETWEEN_PICTURES = 60.0
TABLE_SHARE = 0.01  # of the time, at most, goes into writing the table
ARGUMENTS = "arguments.json"


def new_folder(parent: Path, name: str, arguments: Sequence[str]) -> Path:
    """Make ``parent/name``, or ``parent/name-2`` and so on: earlier runs are kept.

    ``arguments``, a script's command line, are put into it for :func:`saved_arguments`. Raises
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


def saved_arguments(folder: Path) -> list[str]:
    """The command line that started the run in ``folder``; ``ValueError`` if none is there."""
    try:
        found = json.loads((folder / ARGUMENTS).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no readable {ARGUMENTS}, so it is no run to go on with ({error})."
        ) from error
    return [str(argument) for argument in found]


class RunFolder:
    """``metrics.csv``, ``curves.png``, ``config.json``, ``checkpoints/``, ``best.torchrl``.

    Every file is replaced whole, never written in place.
    """

    def __init__(self, path: str | os.PathLike[str], keep_last: int) -> None:
        self.path = Path(path)
        self.rotation = CheckpointRotation(self.path / "checkpoints", keep_last=keep_last)
        self.best = self.path / f"best{SUFFIX}"
        self._drawn = time.monotonic()
        self._write_again = -math.inf

    def refuse_if_taken(self) -> None:
        """Raises ``ValueError`` when another run has left checkpoints here."""
        taken = list(self.rotation.directory.glob(f"*{SUFFIX}"))
        if taken or self.best.exists():
            raise ValueError(
                f"{self.path} already holds a run ({len(taken)} checkpoints): call "
                "trainer.resume().train() to continue it, choose another folder, or delete this one."
            )

    def prepare(self, config: Mapping[str, Any] | None) -> None:
        """Make the folder, drop what a killed process left half written, note the settings."""
        self.rotation.directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.rotation.directory)
        if config is not None:
            with whole_file(self.path / "config.json") as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n")

    def newest(self) -> Path:
        return newest(self.rotation.directory)

    def holds(self, path: Path) -> bool:
        """Whether ``path`` is a file of this run."""
        return self.path.resolve() in path.resolve().parents

    def checkpoint_of(self, update: int) -> Path:
        return checkpoint_path(self.rotation.directory, update)

    def write(self, rows: Sequence[Mapping[str, float]], *, now: bool = False) -> None:
        """The table, at each event while it is short; a long one, whole each time, more rarely.

        What it may lack after a crash is in no checkpoint either, or comes back from one.
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
        reference: tuple[str, float] | None,
        now: bool = False,
    ) -> None:
        """The picture, at most once a minute unless ``now``: drawing takes about half a second."""
        if rows and (now or time.monotonic() - self._drawn > SECONDS_BETWEEN_PICTURES):
            draw(self.path / "curves.png", rows, title=self.path.name, reference=reference)
            self._drawn = time.monotonic()

    def set_aside(self, saved: Path, update: int) -> None:
        """Keep the checkpoint of ``update`` until its evaluation, under way elsewhere, is known."""
        replace_by_link(saved, self._aside(update))

    def judge(self, update: int, *, improves: bool) -> None:
        """The evaluation of a checkpoint that was set aside has come: keep it as best, or drop it."""
        aside = self._aside(update)
        if improves and aside.exists():
            os.replace(aside, self.best)
        aside.unlink(missing_ok=True)

    def promote(self, saved: Path) -> None:
        replace_by_link(saved, self.best)

    def forget_asides(self, pending: Collection[int]) -> None:
        """Drop checkpoints set aside for evaluations that are not under way any more."""
        kept = {self._aside(update) for update in pending}
        for path in self.rotation.directory.glob(f".aside-*{SUFFIX}"):
            if path not in kept:
                path.unlink()

    def _aside(self, update: int) -> Path:
        return self.rotation.directory / f".aside-{update:012d}{SUFFIX}"
