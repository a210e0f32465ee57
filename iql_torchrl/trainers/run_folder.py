"""The folder of a run: its table, curves, settings, and which checkpoints are kept."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torchrl.checkpoint import CheckpointRotation

from iql_torchrl.files import PREFIX, SUFFIX, atomic_write, make_folder, write_json
from iql_torchrl.report.figures import draw
from iql_torchrl.report.tables import write_csv

SECONDS_BETWEEN_PICTURES = 60.0
TABLE_SHARE = 0.01  # at most this share of the time is spent on writing the table


class RunFolder:
    """``metrics.csv``, ``curves.png``, ``config.json``, ``checkpoints/``, ``best.torchrl``."""

    def __init__(self, path: str | os.PathLike[str], keep_last: int) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise ValueError(f"folder is {path}, which is a file; give the name of a folder.")
        self.rotation = CheckpointRotation(self.path / "checkpoints", keep_last=keep_last)
        self.best = self.path / f"best{SUFFIX}"
        self._drawn = time.monotonic()
        self._write_again = -math.inf

    @contextlib.contextmanager
    def in_use(
        self, config: Mapping[str, Any] | None, pending: Collection[int], *, continues: bool
    ) -> Iterator[None]:
        """Make, lock and clean the folder, except for what is set aside for ``pending`` evaluations."""
        make_folder("folder", self.path)
        make_folder("folder", self.rotation.directory)
        with self._locked():
            taken = self.checkpoints()
            if not continues and (taken or self.best.exists()):
                raise ValueError(
                    f"{self.path} already contains a run ({len(taken)} checkpoints): call "
                    "trainer.resume().train() to continue it, choose another folder, or delete this "
                    "one."
                )
            self._delete_leftovers({self.pending_checkpoint(update) for update in pending})
            if config is not None:
                write_json(self.path / "config.json", config, indent=2)
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        user = self.path / "training.txt"
        lock = FileLock(self.path / ".training.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            who = user.read_text() if user.exists() else "another process"
            raise ValueError(
                f"{self.path}: {who} trains in this folder now; wait for its end, or choose another "
                "folder."
            ) from None
        except (OSError, NotImplementedError) as error:
            warnings.warn(
                f"{self.path}: cannot be locked ({error}); start no second training in this folder.",
                RuntimeWarning,
                stacklevel=4,
            )
        try:
            with atomic_write(user) as temporary:
                temporary.write_text(f"process {os.getpid()} on {platform.node()}")
            yield
        finally:
            for path in (user, Path(lock.lock_file)):
                path.unlink(missing_ok=True)
            lock.release()

    def _delete_leftovers(self, kept: Collection[Path]) -> None:
        """Delete copies of checkpoints that a killed process left, except ``kept``."""
        patterns = (f".{PREFIX}*", ".aside-*", "..aside-*")
        left = [path for each in patterns for path in self.rotation.directory.glob(each)]
        for path in {*left, *self.path.glob(f".{self.best.name}.*")} - set(kept):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def checkpoints(self) -> list[Path]:
        return list(self.rotation.directory.glob(f"{PREFIX}*{SUFFIX}"))

    def contains(self, path: Path) -> bool:
        """Return True if ``path`` is a file of this run."""
        return self.path.resolve() in path.resolve().parents

    def write(self, rows: Sequence[Mapping[str, float]], *, mean_return: float, now: bool) -> None:
        """Write the table, and draw the curves with a line at the dataset's mean return unless NaN.

        The table at each event while that is fast, and less often when it is long; the curves once a
        minute, because drawing takes half a second; both ``now``. After a crash, missing rows are
        later than the last checkpoint, or the checkpoint has them.
        """
        began = time.monotonic()
        if now or began >= self._write_again:
            write_csv(self.path / "metrics.csv", rows)
            ended = time.monotonic()
            self._write_again = ended + (ended - began) / TABLE_SHARE
        if rows and (now or began - self._drawn > SECONDS_BETWEEN_PICTURES):
            shown = (f"the dataset ({mean_return:.0f})", mean_return)
            level = None if math.isnan(mean_return) else shown
            draw(self.path / "curves.png", rows, title=self.path.name, reference=level)
            self._drawn = time.monotonic()

    def pending_checkpoint(self, update: int) -> Path:
        """Path of the checkpoint of ``update`` until its evaluation in the background ends."""
        return self.rotation.directory / f".aside-{update:012d}{SUFFIX}"

    def promote_or_delete(self, update: int, *, improves: bool) -> None:
        """Make the checkpoint that was set aside the best one if it ``improves``, or delete it."""
        pending = self.pending_checkpoint(update)
        if improves and pending.exists():
            os.replace(pending, self.best)
        pending.unlink(missing_ok=True)
