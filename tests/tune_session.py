"""In place of Ray Tune in one process: what a trial calls, with the reports kept."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path


class Stopped(Exception):
    pass


class Checkpoint:
    """As Tune's: a folder."""

    def __init__(self, folder):
        self.folder = folder

    @classmethod
    def from_directory(cls, folder):
        return cls(folder)

    def to_directory(self):
        return self.folder

    def as_directory(self):
        return contextlib.nullcontext(self.folder)


class Session:
    """In place of Tune in this process: keeps reports, and stops a trial after ``stop`` of them."""

    Checkpoint = Checkpoint

    def __init__(self, folder: Path, stop: int | None = None):
        self.folder, self.stop, self.rows = folder, stop, []
        self.checkpoint = None

    def get_checkpoint(self):
        return self.checkpoint

    def report(self, metrics, *, checkpoint):
        kept = self.folder / str(len(self.rows))
        shutil.copytree(checkpoint.folder, kept)
        self.checkpoint = Checkpoint(str(kept))
        self.rows.append(metrics)
        if len(self.rows) == self.stop:
            self.stop = None
            raise Stopped
