"""The base of this package's trainers: one counter of updates, and checkpoints to resume from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torchrl.checkpoint import Checkpoint
from torchrl.trainers import Trainer

from iql_torchrl.checkpoint import (
    StateAdapter,
    checkpoint_path,
    new_checkpoint,
    read_components,
)
from iql_torchrl.distributed import Ranks
from iql_torchrl.files import naming
from iql_torchrl.trainers.evaluations import Scores
from iql_torchrl.trainers.parts import with_checkpoint
from iql_torchrl.trainers.progress import Progress
from iql_torchrl.trainers.resume import restore, stateful_parts
from iql_torchrl.trainers.run_folder import RunFolder
from iql_torchrl.update.step import part_of

__all__ = ["ResumableTrainer"]

Self = TypeVar("Self", bound="ResumableTrainer")


class ResumableTrainer(Trainer):
    """TorchRL's trainer with one counter, :attr:`updates`, and checkpoints that run no code.

    Abstract: a subclass sets ``scores`` and has ``train``.
    """

    scores: Scores
    ranks: Ranks = Ranks()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # ``Trainer.__new__`` would replace the properties below by attributes of the class
        return object.__new__(cls)

    def __init__(
        self,
        step: Any,
        total_updates: int,
        folder: RunFolder | None,
        destinations: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """``options`` are those of ``Trainer``, ``destinations`` its destinations of checkpoints."""
        self.step, self.folder, self.progress = step, folder, Progress()
        self._last_log: dict[str, Any] = {}
        self._last_save = -1  # the number of updates at the last save
        self._in_folder = False  # whether what ``folder`` contains is of this run
        super().__init__(
            collector=None,
            total_frames=total_updates,
            frame_skip=1,
            optim_steps_per_batch=1,
            log_interval=-1,  # rows are recorded at events, and every row is logged
            loss_module=part_of(step, "loss"),
            target_net_updater=part_of(step, "target_updater"),
            **with_checkpoint(destinations, folder),
            **options,
        )
        self.optimizer = part_of(step, "optimizer")

    # TorchRL's counters, which hooks read, return this one.

    @property
    def updates(self) -> int:
        """Updates made so far, however often the run was stopped."""
        return self.progress.updates

    @property
    def total_updates(self) -> int:
        return int(self.total_frames)

    @property
    def collected_frames(self) -> int:
        return self.progress.updates

    @collected_frames.setter
    def collected_frames(self, value: int) -> None:
        self.progress.updates = value

    @property
    def _optim_count(self) -> int:
        return self.progress.updates

    @_optim_count.setter
    def _optim_count(self, value: int) -> None:
        self.progress.updates = value

    def save_trainer(self, force_save: bool = False) -> None:
        """Save if ``save_trainer_interval`` updates have passed since the last save, or forced."""
        due = self.updates - max(0, self._last_save) >= self.save_trainer_interval
        if (force_save or due) and self._has_checkpoint_destination():
            self._save_now()

    def _save_now(self) -> None:
        self._last_save = self.updates
        with naming(self._checkpoint_destination()):
            self._save_trainer()
        if self.folder is not None:
            self.scores.saved(self.folder.checkpoint_of(self.updates))

    def _checkpoint_destination(self) -> Path:
        if self.checkpoint_rotation is not None:
            return checkpoint_path(Path(self.checkpoint_rotation.directory), self.updates)
        return Path(self.save_trainer_file)

    def _checkpoint_manifest_metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = super()._checkpoint_manifest_metadata()
        latest = self.scores.latest()
        return metadata | ({} if latest is None else {latest[0]: latest[2]})

    def _sync_checkpoint_components(self, checkpoint: Checkpoint | None = None) -> Checkpoint:
        checkpoint = checkpoint or self.checkpoint or new_checkpoint()
        for name, part in stateful_parts(self).items():
            if name not in checkpoint:
                checkpoint.register(name, part, adapter=StateAdapter())
        return checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The states of :func:`iql_torchrl.trainers.resume.stateful_parts`, by name."""
        return {name: part.state_dict() for name, part in stateful_parts(self).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` for the state of another run, and then changes nothing.

        Raises ``ValueError`` for a run with more updates than ``total_updates``.
        """
        restore(self, state_dict)

    def load_from_file(self: Self, file: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a checkpoint and return this trainer; ``load_from_file(file).train()`` continues.

        Never runs code from the file; ``kwargs`` are not used.

        Raises ``CheckpointError`` with a sentence, and changes nothing, if the file is truncated,
        damaged or from another version, or of another dataset, reward map, settings or shapes; and
        ``ValueError`` if the run has made more updates than this trainer's ``total_updates``.
        """
        self.load_state_dict(self.ranks.from_main(lambda: read_components(Path(file))))
        self._in_folder = self.folder is not None and self.folder.holds(Path(file))
        return self

    def resume(self: Self) -> Self:
        """Load the newest checkpoint of ``folder`` and return this trainer; nothing is trained.

        ``trainer.resume().train()`` continues the run. Raises as :meth:`load_from_file`, and
        ``ValueError`` without ``folder``.
        """
        return self.load_from_file(self.ranks.from_main(self._newest))

    def has_checkpoint(self) -> bool:
        """Whether ``folder`` has a checkpoint from which :meth:`resume` would continue."""
        folder = self.folder
        return self.ranks.from_main(lambda: folder is not None and folder.has_checkpoint())

    def _newest(self) -> Path:
        if self.folder is None:
            raise ValueError("resume() looks into folder=, and there is none; use load_from_file.")
        return self.folder.newest()
