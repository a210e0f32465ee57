"""``OfflineTrainer``: TorchRL's trainer for a fixed log. It needs no collector and no environment."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.trainers import LRSchedulerHook, Trainer
from torchrl.trainers.trainers import TargetNetUpdaterHook
from tqdm import tqdm

from iql_torchrl.agent.build import Agent
from iql_torchrl.checkpoint import (
    StateAdapter,
    checkpoint_path,
    new_checkpoint,
    read_components,
)
from iql_torchrl.data import OfflineDataset
from iql_torchrl.evaluation.background import BackgroundEvaluation
from iql_torchrl.objectives.iql import ImplicitQLoss
from iql_torchrl.records import naming
from iql_torchrl.trainers.evaluations import Evaluate, Scores
from iql_torchrl.trainers.parts import (
    check_intervals,
    check_parts,
    filled_in,
    how_to_continue,
    one_step,
    share,
)
from iql_torchrl.trainers.progress import Interruption, Progress
from iql_torchrl.trainers.resume import DataState, check_total, restore, stateful_parts
from iql_torchrl.trainers.run_folder import RunFolder
from iql_torchrl.update.step import part_of

__all__ = ["OfflineTrainer"]

OWNED_BY_STEP = ("process_loss", "optimizer")
EVERY_BATCH = ("_batch_process_ops", "_pre_epoch_ops", "_process_optim_batch_ops")
AFTER_UPDATE = ("_post_loss_ops", "_post_optim_ops", "_post_optim_log_ops")


class OfflineTrainer(Trainer):
    """Runs a step over a replay buffer for ``total_updates`` updates, from event to event.

    An event is a multiple of ``log_interval`` or ``eval_interval``, or the end. Between events
    the host only samples and steps; at one, the means of the metrics since the last become a row,
    the policy is evaluated, hooks run and the state is saved.

    TorchRL's hooks, loggers, ``register_op`` and ``register_module`` work as in ``Trainer``, with
    updates where it counts frames (``collected_frames``) and an event where it counts a collected
    batch. Hooks that look at a batch (``pre_steps_log``, ``post_steps_log``, ...) see the first of
    each stretch; hooks that change one (``batch_process``, ``pre_epoch``,
    ``process_optim_batch``), and those that follow an update (``post_loss``, ``post_optim``,
    ``post_optim_log``), run at every update. A ``TargetNetUpdaterHook`` or ``LRSchedulerHook`` of
    an updater or scheduler that the step itself moves is not called: it would move twice.

    Args:
        step: an ``IQLStep``, plain or compiled; or a callable without arguments that performs
            ``step.updates`` updates, as ``captured`` returns. In its place: ``agent`` (its step),
            or ``loss_module``, ``optimizer`` and ``target_net_updater`` for a plain step.
        replay_buffer: has ``sample()``; see also ``OfflineDataset.replay_buffer``. With ``agent``
            and ``dataset``, by default a buffer as the agent's config says.
        total_updates: where training ends, counted from the first update ever; by default the
            agent's config's.
        dataset: of the buffer, if it has one: its digest, reward map and returns are recorded.
        evaluation: a function without arguments returning an ``Evaluation`` (or a mapping of
            numbers), or a ``BackgroundEvaluation``; called every ``eval_interval`` updates, at the
            end, and before the first update if ``evaluate_first``.
        eval_interval, log_interval: in updates; by default a tenth and a hundredth of the total.
        monitor: the evaluation's number by which the best checkpoint is kept, higher is better.
        logger: any TorchRL logger; receives every number of every row.
        folder: receives ``metrics.csv``, ``curves.png``, ``config.json`` (of an agent),
            ``checkpoints/`` (the last ``keep_last``) and ``best.torchrl``. None writes nothing.
        save_trainer_interval: updates between checkpoints, taken at events; by default
            ``eval_interval``. A new best is always saved.
        save_trainer_file, checkpoint, checkpoint_rotation, checkpoint_metadata: TorchRL's, in
            place of ``folder``'s checkpoints.
        progress_bar: shown on a terminal only.
        seed: of torch's and NumPy's global generators, set at once.
        resume_command: what Ctrl-C tells the user to type; by default the call that
            continues from what was saved, ``trainer.resume().train()`` with ``folder``.

    Training again from a checkpoint gives the same bits on a CPU as never having stopped, if the
    buffer does not prefetch.

    Raises:
        ValueError: parts missing, given twice or not belonging together; an interval below 1, or
            not a multiple of a captured step's updates; ``register_op`` of a stage that would
            change losses or the optimizer's step, which belong to the step here.
        FloatingPointError: while training, a loss that is no longer finite; what was saved stays.
        OSError: while training, a file of ``folder`` that cannot be written, as on a full disk; it
            is named, and what was saved stays.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> OfflineTrainer:
        # TorchRL's puts its counters on the class, in place of the properties below
        return object.__new__(cls)

    def __init__(
        self,
        *,
        replay_buffer: Any = None,
        total_updates: int | None = None,
        step: Any = None,
        agent: Agent | None = None,
        loss_module: ImplicitQLoss | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        target_net_updater: Any = None,
        dataset: OfflineDataset | None = None,
        evaluation: Evaluate | BackgroundEvaluation | None = None,
        eval_interval: int | None = None,
        evaluate_first: bool = True,
        monitor: str = "return_mean",
        logger: Any = None,
        log_interval: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        keep_last: int = 3,
        save_trainer_interval: int | None = None,
        save_trainer_file: str | os.PathLike[str] | None = None,
        checkpoint: Checkpoint | None = None,
        checkpoint_rotation: CheckpointRotation | None = None,
        checkpoint_metadata: Callable[[Trainer], Mapping[str, Any]] | None = None,
        progress_bar: bool = True,
        seed: int | None = None,
        resume_command: str | None = None,
        log_timings: bool = False,
        auto_log_optim_steps: bool = True,
    ) -> None:
        self.progress = Progress()
        self.step = one_step(step, agent, loss_module, optimizer, target_net_updater)
        replay_buffer, total_updates = filled_in(replay_buffer, total_updates, agent, dataset)
        self.agent, self.dataset = agent, dataset
        self.target_net_updater = part_of(self.step, "target_updater")
        self.samples_itself = hasattr(self.step, "updates")
        self.updates_per_call = int(getattr(self.step, "updates", 1))
        self.folder = None
        if folder is not None:
            if (save_trainer_file, checkpoint, checkpoint_rotation) != (None, None, None):
                raise ValueError(
                    "folder= keeps checkpoints of its own; leave out save_trainer_file, checkpoint "
                    "and checkpoint_rotation, or leave out folder."
                )
            self.folder = RunFolder(folder, keep_last)
            checkpoint_rotation = self.folder.rotation
        if checkpoint is None and (checkpoint_rotation or save_trainer_file):
            checkpoint = new_checkpoint()
        self.data_state = DataState(replay_buffer, dataset)
        self._last_log: dict[str, Any] = {}
        self._last_save = -1
        per_call = self.updates_per_call
        tenth, hundredth = (share(total_updates, parts, per_call) for parts in (10, 100))
        self.eval_interval = tenth if eval_interval is None else eval_interval
        self.event_interval = hundredth if log_interval is None else log_interval
        in_calls = {
            "total_updates": total_updates,
            "eval_interval": self.eval_interval if evaluation is not None else per_call,
            "log_interval": self.event_interval,
        }
        check_intervals(in_calls | {"save_trainer_interval": save_trainer_interval}, per_call)
        check_parts(replay_buffer, evaluation, logger)
        self._in_folder = False
        super().__init__(
            collector=None,
            total_frames=total_updates,
            frame_skip=1,
            optim_steps_per_batch=1,
            loss_module=part_of(self.step, "loss"),
            replay_buffer=replay_buffer,
            target_net_updater=self.target_net_updater,
            logger=logger,
            progress_bar=progress_bar,
            save_trainer_interval=save_trainer_interval or self.eval_interval,
            log_interval=-1,  # rows come at events, and every row is logged
            save_trainer_file=save_trainer_file,
            checkpoint=checkpoint,
            checkpoint_rotation=checkpoint_rotation,
            checkpoint_metadata=checkpoint_metadata,
            log_timings=log_timings,
            auto_log_optim_steps=auto_log_optim_steps,
        )
        self.optimizer = part_of(self.step, "optimizer")
        self.evaluate_first = evaluate_first
        self.scores = Scores(
            evaluation, monitor, self.progress, self.folder, self._log_at, lambda: self._interrupted
        )
        self.resume_command = resume_command
        self.updates_per_second = math.nan
        self._pbar_str: dict[str, Any] = {}
        self._pbar: Any = None
        self._interruption = Interruption()
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed)

    # TorchRL's counters, which hooks read, are the one counter of updates.

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

    def register_op(self, dest: str, op: Callable[..., Any], **kwargs: Any) -> None:
        """As TorchRL's; see the class for when each stage runs."""
        if dest in OWNED_BY_STEP:
            raise ValueError(
                f"stage {dest!r} changes losses or gradients, which the step owns here; write a "
                "loss or a step that does it, and pass that."
            )
        owned = (
            (TargetNetUpdaterHook, "target_params_updater", (self.target_net_updater,)),
            (LRSchedulerHook, "scheduler", part_of(self.step, "lr_schedulers") or ()),
        )
        for kind, name, parts in owned:
            hook = getattr(op, "__self__", op)
            if isinstance(hook, kind) and any(getattr(hook, name) is part for part in parts):
                torchrl_logger.warning(
                    f"{kind.__name__}: the step already moves this {name}, so the hook is not "
                    "called; build the step without it to let the hook decide."
                )
                return
        super().register_op(dest, op, **kwargs)

    register_hook = register_op

    def train(self) -> None:
        """Train up to ``total_updates``.

        Ctrl-C or SIGTERM finishes the update, saves, says how to go on, and raises
        ``KeyboardInterrupt`` or ``SystemExit(143)``; a ``BackgroundEvaluation`` under way is not
        waited for, but made again after a resume. One that exceeds its ``timeout`` gives a
        ``RuntimeWarning`` and no score, and training goes on.
        """
        self._stop_training, self._stop_reason = False, None
        check_total(self.updates, self.total_updates)
        self._enter_folder()
        with Interruption() as self._interruption, self._progress_bar() as self._pbar:
            try:
                self._setup_hook()
                if self._evaluation_due() and self.scores.owed(self.updates):
                    self.scores.evaluate(self.updates)
                    self.save_trainer(force_save=self.scores.wants_checkpoint)
                while self.updates < self.total_updates and not self._stop_training:
                    self._stretch()
                    if self._interrupted:
                        break
                if not self._interrupted:  # else they stay in the checkpoint
                    self.scores.collect(wait=True)
                self._leave()
            finally:
                self._shutdown_hook()
        self._interruption.finish()

    @property
    def _interrupted(self) -> bool:
        return self._interruption.requested is not None

    def _enter_folder(self) -> None:
        if self.folder is None:
            return
        if not self._in_folder:
            self.folder.refuse_if_taken()
        self.folder.prepare(self._settings())
        self.folder.forget_asides(self.scores.pending)
        self._in_folder = True

    def _evaluation_due(self) -> bool:
        if self.updates == 0:
            return self.evaluate_first
        return self.updates % self.eval_interval == 0 or self.updates == self.total_updates

    def shutdown(self) -> None:
        """There is no collector to close."""

    def _progress_bar(self) -> Any:
        return tqdm(
            total=self.total_updates,
            initial=self.updates,
            unit="update",
            dynamic_ncols=True,
            disable=None if self.progress_bar else True,  # None: quiet when not a terminal
        )

    def _stretch(self) -> None:
        """Updates up to the next event, and the event."""
        intervals = [self.event_interval]
        if self.scores.evaluation is not None:
            intervals.append(self.eval_interval)
        until = min(self.total_updates, *(_after(self.updates, every) for every in intervals))
        began, first = time.perf_counter(), self.updates
        sampled = None if self.samples_itself and not self._looked_at() else self._sample()
        self._pre_steps_log_hook(sampled)
        self._pre_optim_hook()
        self._pre_epoch_log_hook(sampled)
        if self.samples_itself:
            self._run_calls(until)
        elif any(getattr(self, name) for name in (*EVERY_BATCH, *AFTER_UPDATE)):
            self._run_with_hooks(sampled, until)
        else:
            self._run(sampled, until)
        speed = (self.updates - first) / (time.perf_counter() - began)
        if self.updates == until:
            self._event(sampled, speed)

    def _run(self, batch: TensorDictBase, until: int) -> None:
        step, sample, progress = self.step, self.replay_buffer.sample, self.progress
        advance, interruption = self._pbar.update, self._interruption
        while True:
            progress.tally(step(batch))
            progress.updates += 1
            advance()
            if progress.updates >= until or interruption.requested is not None:
                return
            batch = sample()

    def _run_with_hooks(self, batch: TensorDictBase, until: int) -> None:
        while True:
            for name in EVERY_BATCH:
                for op, kwargs in getattr(self, name):
                    changed = op(batch, **kwargs)
                    batch = changed if isinstance(changed, TensorDictBase) else batch
            metrics = self.step(batch)
            self.progress.updates += 1
            self.progress.tally(metrics)
            self._post_loss_hook(batch)
            self._post_optim_hook()
            self._post_optim_log(batch)
            self._pbar.update()
            if self.updates >= until or self._interruption.requested is not None:
                return
            batch = self._sample()

    def _run_calls(self, until: int) -> None:
        """A captured step samples for itself and makes several updates a call."""
        while self.updates < until and self._interruption.requested is None:
            self.progress.tally(self.step(), self.updates_per_call)
            self.progress.updates += self.updates_per_call
            self._pbar.update(self.updates_per_call)

    def _sample(self) -> TensorDictBase:
        batch: TensorDictBase = self.replay_buffer.sample()
        return batch

    def _looked_at(self) -> bool:
        looking = ("_pre_steps_log_ops", "_post_steps_log_ops", "_pre_epoch_log_ops")
        return any(getattr(self, name) for name in looking)

    def _event(self, sampled: TensorDictBase | None, speed: float) -> None:
        """Row, evaluation, hooks, save: everything that happens between two stretches."""
        means = self.progress.means()
        self._check_finite(means)
        self.progress.record(self.updates, means)
        self._post_epoch_log_hook(sampled)
        self._post_epoch_hook()
        self.updates_per_second = speed
        self._log(updates_per_second=speed)
        averages = TensorDict({name: torch.tensor(value) for name, value in means.items()})
        self._post_optim_complete_log_hook(self.updates, averages)
        try:
            self.scores.collect()
            if self._evaluation_due():
                self.scores.evaluate(self.updates)
            self._post_steps_hook()
            self._post_steps_log_hook(sampled)
        except BaseException:
            self.save_trainer(force_save=True)  # the updates were whole; what failed came after
            raise
        self.save_trainer(force_save=self.scores.wants_checkpoint)
        self._write()
        self._show()

    def _leave(self) -> None:
        """Save once more if anything happened since; on an interruption, say how to go on."""
        if self._has_checkpoint_destination() and self._last_save != self.updates:
            self._save_now()
        self._write(now=True)
        self._pbar.close()
        if self._interrupted:
            saved = "" if self.folder is None else f" and saved {self.folder.path}"
            print(
                f"Stopped after update {self.updates:,} of {self.total_updates:,}{saved}. "
                f"{how_to_continue(self)}",
                file=sys.stderr,
            )

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
        return metadata | ({} if latest is None else {self.scores.monitor: latest})

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
        """Raises ``CheckpointError`` for a run that is not this one, with nothing changed.

        Likewise ``ValueError`` for a run of more updates than ``total_updates``.
        """
        restore(self, state_dict)

    def load_from_file(self, file: str | os.PathLike[str], **kwargs: Any) -> OfflineTrainer:
        """Load a checkpoint and return this trainer; ``load_from_file(file).train()`` continues.

        Runs none of the file's contents, whatever ``kwargs`` say.

        Raises ``CheckpointError`` with a sentence, and changes nothing, if the file is truncated,
        damaged or from another version, or of another dataset, reward map, settings or shapes; and
        ``ValueError`` if the run has made more updates than this trainer's ``total_updates``.
        """
        self.load_state_dict(read_components(Path(file)))
        self._in_folder = self.folder is not None and self.folder.holds(Path(file))
        return self

    def resume(self) -> OfflineTrainer:
        """Load the newest checkpoint of ``folder`` and return this trainer; nothing is trained.

        ``trainer.resume().train()`` continues the run. Raises as :meth:`load_from_file`, and
        ``ValueError`` without ``folder``.
        """
        if self.folder is None:
            raise ValueError("resume() looks into folder=, and there is none; use load_from_file.")
        return self.load_from_file(self.folder.newest())

    def _settings(self) -> dict[str, Any] | None:
        if self.agent is None:
            return None
        name = {} if self.dataset is None else {"dataset": self.dataset.name}
        return name | dict(self.agent.description()["config"])

    def _log(self, log_pbar: bool = False, **kwargs: Any) -> None:
        """TorchRL's, with numbers in place of scalar tensors, which not every logger can write."""
        if self.logger is not None:
            for name, value in kwargs.items():
                if isinstance(value, torch.Tensor) and value.ndim == 0:
                    kwargs[name] = value.item()
        super()._log(log_pbar=log_pbar, **kwargs)

    def _log_at(self, update: int, name: str, value: float) -> None:
        self._log_dict[name].append(value)
        if self.logger is not None:
            self.logger.log_scalar(name, value, step=update)

    def _write(self, now: bool = False) -> None:
        if self.folder is not None:
            self.folder.write(self.progress.rows, now=now)
            mean = None if self.dataset is None else float(self.dataset.episode_returns.mean())
            self.folder.draw(
                self.progress.rows,
                reference=None if mean is None else (f"the log ({mean:.0f})", mean),
                now=now,
            )

    def _show(self) -> None:
        """Losses and the last score, behind the bar."""
        row = self.progress.rows[-1]
        shown = {n.removeprefix("loss_"): v for n, v in row.items() if n.startswith("loss_")}
        latest = self.scores.latest()
        if latest is not None:
            shown[self.scores.monitor] = latest
        self._pbar.set_postfix({n: f"{v:.4g}" for n, v in (shown | self._pbar_str).items()})

    def _check_finite(self, means: Mapping[str, float]) -> None:
        bad = [n for n, v in means.items() if n.startswith("loss_") and not math.isfinite(v)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} became {means[bad[0]]} before update {self.updates:,}, and nothing "
                "was saved since the last event. Look for extreme rewards or observations in the "
                "data, or lower the learning rates, or set max_grad_norm."
            )

    def __repr__(self) -> str:
        kind = type(self.step).__name__
        return f"OfflineTrainer({kind}, updates={self.updates} of {self.total_updates})"


def _after(updates: int, interval: int) -> int:
    return (updates // interval + 1) * interval
