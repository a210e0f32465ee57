"""``OfflineTrainer``: TorchRL's trainer for a fixed dataset, without collector and environment."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.data import PrioritizedSampler
from torchrl.trainers import Trainer

from iql_torchrl.agent.build import Agent
from iql_torchrl.data import DatasetSummary, OfflineDataset
from iql_torchrl.distributed import Ranks
from iql_torchrl.evaluation.background import BackgroundEvaluation, EvaluationTimeout
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.evaluation.value_gap import value_gap
from iql_torchrl.losses import IQLLoss
from iql_torchrl.networks import history_of
from iql_torchrl.trainers.checkpoints import ResumableTrainer, check_same_data, data_digest
from iql_torchrl.trainers.events import Display, Interruption, Progress, intervals
from iql_torchrl.trainers.parts import (
    check_agent,
    check_parts,
    check_priorities,
    checkpoint_destination,
    filled_in,
    is_called_by_step,
    one_step,
)
from iql_torchrl.trainers.run_folder import RunFolder
from iql_torchrl.update.step import part_of

Evaluate = Callable[[], "Evaluation | Mapping[str, float]"]

# TorchRL's stages of ``register_op``, and the attributes in which its Trainer keeps their hooks.
OWNED_BY_STEP = ("process_loss", "optimizer")
CHANGE_BATCH = ("_batch_process_ops", "_pre_epoch_ops", "_process_optim_batch_ops")
AFTER_UPDATE = ("_post_loss_ops", "_post_optim_ops", "_post_optim_log_ops")
MUCH_SLOWER = 10  # times the fastest interval of the run
READ_FIRST_BATCH = ("_pre_steps_log_ops", "_post_steps_log_ops", "_pre_epoch_log_ops")


class OfflineTrainer(ResumableTrainer):
    """Trains with a replay buffer up to ``total_updates`` updates, without a collector.

    An event is a multiple of ``log_interval`` or ``eval_interval``, or the end. Between two events
    the trainer only samples and calls the step. At an event, the means of the metrics since the
    last event become a row, the policy is evaluated, hooks are called and the state is saved.

    TorchRL's hooks, loggers, ``register_op`` and ``register_module`` work as in ``Trainer``, with
    updates where it counts frames (``collected_frames``) and an event where it counts a collected
    batch. Hooks that read a batch (``pre_steps_log``, ``post_steps_log``, ...) get the first one
    after each event; hooks that change one (``batch_process``, ``pre_epoch``,
    ``process_optim_batch``), and those that follow an update (``post_loss``, ``post_optim``,
    ``post_optim_log``), are called at every update, and refused with a captured step. A
    ``TargetNetUpdaterHook`` or ``LRSchedulerHook`` of an updater or scheduler that the step itself
    calls is not called, because there would be two calls per update.

    Args:
        step: an ``IQLStep``, plain or compiled; or a callable without arguments that performs
            ``step.updates`` updates, as ``captured`` returns.
        agent: in place of ``step``: its step is used.
        loss_module, optimizer, target_net_updater: in place of ``step``: TorchRL's, for a plain
            step.
        replay_buffer: has ``sample()``; see also ``OfflineDataset.replay_buffer``. With ``agent``
            and ``dataset``, by default a buffer with the settings of the agent's config. With a
            ``PrioritizedSampler`` each update also updates the priorities of its batch.
        dataset: the data of the buffer, whole or in shards; its digest, reward scaling and returns are
            recorded.
        seed: as TorchRL's; seeds torch's and NumPy's global generators in the constructor.
        ranks: the processes that train this run together, with a step that ``data_parallel`` made for
            them; build the trainer on each with the same arguments, and a buffer with the same seed.
            The batch is divided over them. Rank 0 alone evaluates, shows, logs and writes files, and
            loads checkpoints for all, which do not depend on the number of ranks. An error on one rank
            at an event, a loss that is not finite, Ctrl-C and SIGTERM stop all at the same update (a
            signal within 16 updates).

    Args of time in updates:
        total_updates: where training ends, counted from the first update of the run, also after
            interruptions; by default ``config.updates`` of the agent.
        log_interval: updates between two rows; by default a hundredth of the total.
        eval_interval: updates between two evaluations; by default a tenth of the total.
        save_trainer_interval: as TorchRL's; updates between two checkpoints, which are saved at
            events; by default ``eval_interval``. A new best policy is always saved.

    Args of evaluation:
        evaluation: a function without arguments returning an ``Evaluation`` (or a mapping of
            numbers), or a ``BackgroundEvaluation``; called every ``eval_interval`` updates and at
            the end. Where the agent's policy takes the best of several actions, its
            :func:`~iql_torchrl.evaluation.value_gap` is recorded too, as ``chosen_value_gap``,
            unless the dataset is in shards.
        evaluate_first: whether to evaluate before the first update too.
        monitor: the evaluation's number by which the best checkpoint is kept, higher is better.

    Args of what is written:
        folder: receives ``metrics.csv``, ``curves.png``, ``config.json`` (of an agent),
            ``checkpoints/`` (the last ``keep_last``) and ``best.torchrl``. None writes nothing.
        keep_last: how many checkpoints ``folder`` keeps.
        save_trainer_file, checkpoint, checkpoint_rotation, checkpoint_metadata: TorchRL's, in
            place of ``folder``'s checkpoints.
        logger: any TorchRL logger; receives every number of every row.
        progress_bar: on stderr: a bar on a terminal; in a file or a pipe, one line at each event.
            False shows nothing.
        resume_command: the command that is printed after Ctrl-C; by default the call that loads
            the last checkpoint and continues, ``trainer.resume().train()`` with ``folder``.
        log_timings, auto_log_optim_steps: TorchRL's.

    On a CPU a resumed run gives the same bits as a run without interruption, if the buffer does not
    prefetch.

    Raises:
        ValueError: parts missing, given twice or of different agents; an interval below 1, or
            not a multiple of a captured step's updates; ``register_op`` of a stage that would
            change losses or the optimizer's step, which only the step may do here, or of one that is
            called at every update with a captured step.
        FloatingPointError: while training, a loss that is no longer finite. Saved files stay.
        OSError: while training, a file of ``folder`` that cannot be written, as on a full disk; the
            message names it. Saved files stay.
    """

    updates_per_second = math.nan
    _fastest = 0.0  # the most updates per second so far
    _said_slow = False

    def __init__(
        self,
        *,
        replay_buffer: Any = None,
        total_updates: int | None = None,
        step: Any = None,
        agent: Agent | None = None,
        loss_module: IQLLoss | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        target_net_updater: Any = None,
        dataset: DatasetSummary | None = None,
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
        ranks: Ranks | None = None,
        log_timings: bool = False,
        auto_log_optim_steps: bool = True,
    ) -> None:
        step = one_step(step, agent, loss_module, optimizer, target_net_updater)
        replay_buffer, total_updates = filled_in(replay_buffer, total_updates, agent, dataset)
        self.ranks = Ranks() if ranks is None else ranks
        is_main = self.ranks.is_main  # rank 0 alone evaluates, shows, logs and writes
        check_parts(step, replay_buffer, evaluation, logger, self.ranks)
        if agent is not None:
            check_agent(agent, dataset, total_updates, warns=is_main)
        self.step, self.agent, self.dataset = step, agent, dataset
        self.samples_itself = hasattr(step, "updates")
        self.updates_per_call = int(getattr(step, "updates", 1))
        self.log_interval, self.eval_interval, save_trainer_interval = intervals(
            total_updates, self.updates_per_call, evaluation is not None,
            log_interval=log_interval, eval_interval=eval_interval,
            save_trainer_interval=save_trainer_interval,
        )  # fmt: skip
        self.evaluates, self.evaluate_first = evaluation is not None, evaluate_first
        self.evaluation = evaluation if is_main else None
        self.monitor, self.resume_command = monitor, resume_command
        run_folder = None if folder is None else RunFolder(folder, keep_last)
        destination = checkpoint_destination(
            run_folder, save_trainer_file=save_trainer_file, checkpoint=checkpoint,
            checkpoint_rotation=checkpoint_rotation, checkpoint_metadata=checkpoint_metadata,
        )  # fmt: skip
        self.folder = run_folder if is_main else None
        self.progress, self._last_save = Progress(), -1
        self._pbar_str: dict[str, Any] = {}
        super().__init__(
            collector=None,
            total_frames=total_updates,
            frame_skip=1,
            optim_steps_per_batch=1,
            log_interval=-1,  # rows are recorded at events, and every row is logged
            loss_module=part_of(step, "loss"),
            target_net_updater=part_of(step, "target_updater"),
            replay_buffer=replay_buffer,
            logger=logger if is_main else None,
            progress_bar=progress_bar and is_main,
            save_trainer_interval=save_trainer_interval,
            log_timings=log_timings,
            auto_log_optim_steps=auto_log_optim_steps,
            **(destination if is_main else {}),
        )
        self.optimizer = part_of(step, "optimizer")  # not given above, where a hook would step it
        self.collected_frames = self._optim_count = 0
        self._last_log: dict[str, Any] = {}  # TorchRL's is one of the class
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed)
        sampler = getattr(replay_buffer, "sampler", None)
        if isinstance(sampler, PrioritizedSampler) and not self.samples_itself:
            check_priorities(replay_buffer, part_of(step, "loss"))
            self.register_op("post_optim_log", replay_buffer.update_tensordict_priority)

    def register_op(self, dest: str, op: Callable[..., Any], **kwargs: Any) -> None:
        """As TorchRL's; see the class for when each stage runs."""
        if dest in OWNED_BY_STEP:
            raise ValueError(
                f"stage {dest!r} changes losses or gradients, which only the step may do here; write "
                "a loss or a step that does it, and pass that."
            )
        if is_called_by_step(self.step, op):
            return
        if self.samples_itself and f"_{dest}_ops" in (*CHANGE_BATCH, *AFTER_UPDATE):
            raise ValueError(
                f"stage {dest!r} is called at every update, and the step makes {self.updates_per_call} "
                "updates per call, between which nothing can be called. Use the step itself or "
                "compiled(step) in place of captured(step, ...), or the stage "
                "'post_optim_complete_log', which is called at every event."
            )
        super().register_op(dest, op, **kwargs)

    register_hook = register_op

    def train(self) -> None:
        """Train up to ``total_updates``.

        Ctrl-C or SIGTERM finishes the update, saves, prints how to continue, and raises
        ``KeyboardInterrupt`` or ``SystemExit(143)``. It does not wait for an unfinished
        ``BackgroundEvaluation``, which is repeated after a resume. An evaluation that exceeds its
        ``timeout`` gives a ``RuntimeWarning`` and no score, and training continues.
        """
        self._stop_training, self._stop_reason = False, None
        self._check_total(self.updates)
        if self.ranks.size > 1:
            self.ranks.check_same(
                [
                    self.updates,
                    self.total_updates,
                    self.log_interval,
                    self.eval_interval,
                    self.evaluates,
                ],
                "the ranks would stop for each other at different updates: give the same "
                "total_updates, log_interval, eval_interval and evaluation on every rank, and "
                "continue from the same checkpoint.",
            )
            check_same_data(self.ranks, self.data_state, self.replay_buffer)
        with contextlib.ExitStack() as stack:
            self.ranks.together(lambda: self._enter_folder(stack))
            self.display = Display(self.progress_bar, self.total_updates, self.updates)
            stack.callback(self.display.close)
            self.interruption = stack.enter_context(Interruption(self.ranks))
            stack.callback(self._shutdown_hook)
            self._setup_hook()
            self.ranks.together(self._evaluate_at_start)
            while self.updates < self.total_updates and not (
                self._stop_training or self.interruption.requested
            ):
                self._train_to_next_event()
                self.interruption.agree()
            if not self.interruption.requested:  # otherwise the checkpoint contains them
                self.ranks.together(lambda: self._collect(wait=True))
                self.interruption.agree()
            self.ranks.together(self._leave)
        self.interruption.finish()

    def _enter_folder(self, stack: contextlib.ExitStack) -> None:
        if self.folder is not None:
            config = None if self.agent is None else self.agent.description()["config"]
            if config is not None and self.dataset is not None:
                data = data_digest(self.data_state)
                config = {"dataset": self.dataset.name, "data": data} | config
            pending = getattr(self.evaluation, "pending", ())
            stack.enter_context(self.folder.in_use(config, pending, continues=self._in_folder))
            self._in_folder = True

    def shutdown(self) -> None:
        """There is no collector to close."""

    # -- updates and events ------------------------------------------------------------------------

    def _train_to_next_event(self) -> None:
        """Update until the next event, or until the run is interrupted."""
        every = [self.log_interval] + [self.eval_interval] * self.evaluates
        until = min(self.total_updates, *((self.updates // n + 1) * n for n in every))
        began, first = time.perf_counter(), self.updates
        reads_batch = any(getattr(self, name) for name in READ_FIRST_BATCH)
        needs_batch = reads_batch or not self.samples_itself
        batch = self.replay_buffer.sample() if needs_batch else None
        self._pre_steps_log_hook(batch)
        self._pre_optim_hook()
        self._pre_epoch_log_hook(batch)
        self._update(batch, until)
        self.updates_per_second = (self.updates - first) / (time.perf_counter() - began)
        self._notice_slowness()
        if self.updates == until:
            self.ranks.together(lambda: self._event(batch))

    def _notice_slowness(self) -> None:
        """Say once that updates have become much slower, and what mostly causes it."""
        self._fastest = max(self._fastest, self.updates_per_second)
        one_thread = os.environ.get("OMP_NUM_THREADS") == "1"  # then there is nothing to set
        slow = self.updates_per_second * MUCH_SLOWER < self._fastest and not one_thread
        if slow and not self._said_slow:
            self._said_slow = True
            torchrl_logger.warning(
                f"updates have become slow: {self.updates_per_second:.3g} a second, and "
                f"{self._fastest:.3g} before. Mostly another process uses the cores. Start each of "
                "several trainings with OMP_NUM_THREADS=1, or with GOMP_SPINCOUNT=2000 where torch is "
                "imported before iql_torchrl."
            )

    def _update(self, batch: TensorDictBase | None, until: int) -> None:
        """The updates themselves, the first one with ``batch``, and the hooks of every update."""
        step, per_call, tally = self.step, self.updates_per_call, self.progress.tally
        sample = None if self.samples_itself else self.replay_buffer.sample
        advance, stops = self.display.advance, self.interruption.stops
        hooked = sample and any(getattr(self, name) for name in (*CHANGE_BATCH, *AFTER_UPDATE))
        while True:
            if hooked:
                batch = self._changed(batch)
            metrics = step(batch) if sample else step()
            self.collected_frames += per_call
            self._optim_count += per_call
            tally(metrics, per_call)
            if hooked:
                self._post_loss_hook(batch)
                self._post_optim_hook()
                self._post_optim_log(batch)
            advance(per_call)
            if self.collected_frames >= until or stops():
                return
            batch = sample() if sample else None

    def _changed(self, batch: TensorDictBase | None) -> TensorDictBase | None:
        """The batch after the hooks that may change it."""
        for name in CHANGE_BATCH:
            for op, kwargs in getattr(self, name):
                changed = op(batch, **kwargs)
                batch = changed if isinstance(changed, TensorDictBase) else batch
        return batch

    def _event(self, batch: TensorDictBase | None) -> None:
        """Record a row, evaluate, call hooks, save and show."""
        means = self.progress.new_row(self.updates)
        self._post_epoch_log_hook(batch)
        self._post_epoch_hook()
        self._log(updates_per_second=self.updates_per_second)
        averages = TensorDict({name: torch.tensor(value) for name, value in means.items()})
        self._post_optim_complete_log_hook(self.updates, averages)
        try:
            self._collect()
            if self._is_evaluation_due():
                self._evaluate()
            self._post_steps_hook()
            self._post_steps_log_hook(batch)
        except BaseException:
            self.save_trainer(force_save=True)  # all updates before the error are complete
            raise
        self.save_trainer()
        self._write()
        losses = {name: value for name, value in means.items() if name.startswith("loss_")}
        self.display.event(
            self.updates,
            losses | self._pbar_str,
            score=self.progress.latest(self.monitor),
            speed=self.updates_per_second,
            saved=self._last_save == self.updates,
        )

    def _leave(self) -> None:
        """Save updates that are not saved yet; after an interruption print how to continue."""
        if self._last_save != self.updates:
            self.save_trainer(force_save=True)
        self._write(now=True)
        self.display.last_score(self.updates, self.progress.latest(self.monitor))
        self.display.close()
        if self.interruption.requested and self.ranks.is_main:
            saved = "" if self.folder is None else f" and saved {self.folder.path}"
            print(
                f"Stopped after update {self.updates:,} of {self.total_updates:,}{saved}. "
                f"{self._how_to_continue()}",
                file=sys.stderr,
            )

    def _how_to_continue(self) -> str:
        file = repr(str(self.save_trainer_file))
        if self.checkpoint_rotation is not None:
            file = "the newest checkpoint"
        call = "resume()" if self.folder is not None else f"load_from_file({file})"
        if self.resume_command is not None or self._has_checkpoint_destination():
            return f"Continue with: {self.resume_command or f'trainer.{call}.train()'}"
        return (
            "Nothing was saved, because the trainer has no folder=. In this process, continue "
            "with: trainer.train()"
        )

    def _write(self, now: bool = False) -> None:
        if self.folder is not None:
            mean = math.nan  # also where rewards depend on goals
            if self.dataset is not None:
                mean = float(self.dataset.episode_returns.mean())
            self.folder.write(self.progress.rows, mean_return=mean, now=now)

    # -- evaluation --------------------------------------------------------------------------------

    def _is_evaluation_due(self) -> bool:
        if self.updates == 0:
            return self.evaluate_first
        return self.updates % self.eval_interval == 0 or self.updates == self.total_updates

    def _evaluate_at_start(self) -> None:
        """The evaluation before the first update, or one that a stopped run did not finish."""
        latest = self.progress.latest(self.monitor)
        evaluated = latest is not None and latest[1] == self.updates
        waiting = self.updates in getattr(self.evaluation, "pending", ())
        missing = self.evaluation is not None and not (evaluated or waiting)
        if missing and self._is_evaluation_due():
            self._evaluate()
            self.save_trainer()
            self.display.last_score(self.updates, self.progress.latest(self.monitor))

    def _evaluate(self) -> None:
        """Evaluate the policy, and the value gap where it takes the best of several actions."""
        if isinstance(self.evaluation, BackgroundEvaluation):
            self._collect(wait=True)
            if not self.evaluation.pending:  # otherwise interrupted: it follows after a resume
                self.evaluation.submit(self.updates)
                self._keep_as = (
                    None if self.folder is None else self.folder.pending_checkpoint(self.updates)
                )
        elif self.evaluation is not None and self._enter(self.updates, self.evaluation()):
            self._keep_as = None if self.folder is None else self.folder.best
        agent, dataset = self.agent, self.dataset
        if agent is None or not isinstance(dataset, OfflineDataset) or not self.ranks.is_main:
            return
        single = history_of(agent.policy) is None and agent.config.action_chunk == 1
        if agent.config.num_samples > 1 and single:  # transitions are not windows or chunks
            gap = value_gap(agent.policy, dataset.transitions).mean
            self._record(self.updates, {"chosen_value_gap": gap})

    def _collect(self, wait: bool = False) -> None:
        """Enter the results of finished background evaluations; ``wait``: until all are finished."""
        while isinstance(self.evaluation, BackgroundEvaluation):
            try:
                results = self.evaluation.results(
                    wait=wait, stop=lambda: bool(self.interruption.asked)
                )
            except EvaluationTimeout as error:
                if self.folder is not None:
                    self.folder.promote_or_delete(error.number, improves=False)
                warnings.warn(f"Training continues: {error}", RuntimeWarning, stacklevel=2)
                continue
            for update, evaluation in results:
                improves = self._enter(update, evaluation)
                if self.folder is not None:
                    self.folder.promote_or_delete(update, improves=improves)
            return

    def _enter(self, update: int, evaluation: Evaluation | Mapping[str, float]) -> bool:
        """Record an evaluation; whether it is the best so far."""
        values = _numbers(evaluation)
        if self.monitor not in values:
            raise ValueError(
                f"monitor is {self.monitor!r}, which the evaluation does not give; it gives "
                f"{sorted(values)}."
            )
        self._record(update, values)
        return self.progress.improves(update, values[self.monitor])

    def _record(self, update: int, values: Mapping[str, float]) -> None:
        self.progress.record(update, values)
        for name, value in values.items():
            self._log_dict[name].append(value)
            if self.logger is not None:
                self.logger.log_scalar(name, value, step=update)

    def _log(self, log_pbar: bool = False, **kwargs: Any) -> None:
        """As TorchRL's, but scalar tensors become numbers, because some loggers need numbers."""
        tensors = {n: v for n, v in kwargs.items() if isinstance(v, torch.Tensor) and v.ndim == 0}
        super()._log(log_pbar=log_pbar, **kwargs | {n: v.item() for n, v in tensors.items()})


def _numbers(evaluation: Any) -> dict[str, float]:
    values = evaluation.summary() if isinstance(evaluation, Evaluation) else evaluation
    try:
        numbers = {str(name): float(value) for name, value in values.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"the evaluation returned {evaluation!r}; expected an Evaluation, or a dict of numbers "
            "such as {'return_mean': 1.0}."
        ) from error
    if "update" in numbers:
        raise ValueError(
            "the evaluation gives 'update', which is the number of updates in each row; use "
            "another name."
        )
    return numbers
