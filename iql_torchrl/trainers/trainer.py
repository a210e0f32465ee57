"""``OfflineTrainer``: TorchRL's trainer for a fixed log. It needs no collector and no environment."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.trainers import Trainer

from iql_torchrl.agent.build import Agent, ends_before
from iql_torchrl.data import DatasetSummary, OfflineDataset
from iql_torchrl.distributed import Ranks
from iql_torchrl.evaluation.background import BackgroundEvaluation
from iql_torchrl.evaluation.value_gap import value_gap
from iql_torchrl.losses import ImplicitQLoss
from iql_torchrl.networks import history_of
from iql_torchrl.trainers.display import Display, print_how_to_continue
from iql_torchrl.trainers.evaluations import Evaluate, Scores
from iql_torchrl.trainers.identity import DataState, check_total
from iql_torchrl.trainers.loop import check_stage, make_updates, moved_by_step
from iql_torchrl.trainers.parts import (
    check_parts,
    check_ranks,
    check_reward,
    check_same_data,
    check_task,
    filled_in,
    folder_of_run,
    one_step,
)
from iql_torchrl.trainers.progress import Interruption, check_finite
from iql_torchrl.trainers.saving import ResumableTrainer
from iql_torchrl.trainers.schedule import Schedule, whole_updates

__all__ = ["OfflineTrainer"]


MUCH_SLOWER = 10  # times the fastest interval of the run


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
    ``post_optim_log``), are called at every update. A ``TargetNetUpdaterHook`` or
    ``LRSchedulerHook`` of an updater or scheduler that the step itself calls is not called, because
    there would be two calls per update.

    Args, what is trained:
        step: an ``IQLStep``, plain or compiled; or a callable without arguments that performs
            ``step.updates`` updates, as ``captured`` returns.
        agent: in place of ``step``: its step is used.
        loss_module, optimizer, target_net_updater: in place of ``step``: TorchRL's, for a plain
            step.
        replay_buffer: has ``sample()``; see also ``OfflineDataset.replay_buffer``. With ``agent``
            and ``dataset``, by default a buffer with the settings of the agent's config.
        dataset: the data of the buffer, whole or in shards; its digest, reward map and returns are
            recorded.
        seed: as TorchRL's; seeds torch's and NumPy's global generators in the constructor.
        ranks: the processes that train this run together, with a step that ``data_parallel`` made for
            them; build the trainer on each with the same arguments, and a buffer with the same seed.
            The batch is divided over them. Rank 0 alone evaluates, shows, logs and writes files, and
            loads checkpoints for all, which do not depend on the number of ranks. An error on one rank
            at an event, a loss that is not finite, Ctrl-C and SIGTERM stop all at the same update (a
            signal within 16 updates).

    Args, for how long and how often, in updates:
        total_updates: where training ends, counted from the first update of the run, also after
            interruptions; by default ``config.updates`` of the agent.
        log_interval: updates between two rows; by default a hundredth of the total.
        eval_interval: updates between two evaluations; by default a tenth of the total.
        save_trainer_interval: as TorchRL's; updates between two checkpoints, which are saved at
            events; by default ``eval_interval``. A new best policy is always saved.

    Args, evaluation:
        evaluation: a function without arguments returning an ``Evaluation`` (or a mapping of
            numbers), or a ``BackgroundEvaluation``; called every ``eval_interval`` updates and at
            the end. Where the agent's policy takes the best of several actions, its
            :func:`~iql_torchrl.evaluation.value_gap` is recorded too, as ``chosen_value_gap``,
            unless the dataset is in shards.
        evaluate_first: whether to evaluate before the first update too.
        monitor: the evaluation's number by which the best checkpoint is kept, higher is better.

    Args, what is written:
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
            change losses or the optimizer's step, which only the step may do here.
        FloatingPointError: while training, a loss that is no longer finite. Saved files stay.
        OSError: while training, a file of ``folder`` that cannot be written, as on a full disk; the
            message names it. Saved files stay.
    """

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
        total_updates = whole_updates("total_updates", total_updates)
        check_parts(replay_buffer, evaluation, logger)
        check_task(agent, dataset)
        self.ranks = Ranks() if ranks is None else ranks
        check_ranks(self.ranks, step)
        if self.ranks.is_main:
            check_reward(agent, dataset)
        self.agent, self.dataset = agent, dataset
        self.data_state = DataState(replay_buffer, dataset)
        self.samples_itself = hasattr(step, "updates")
        self.updates_per_call = int(getattr(step, "updates", 1))
        self.schedule = Schedule.of(
            total_updates,
            log_interval=log_interval,
            eval_interval=eval_interval,
            save_trainer_interval=save_trainer_interval,
            evaluates=evaluation is not None,
            evaluate_first=evaluate_first,
            updates_per_call=self.updates_per_call,
        )
        destinations = {
            "save_trainer_file": save_trainer_file,
            "checkpoint": checkpoint,
            "checkpoint_rotation": checkpoint_rotation,
        }
        self._check_schedule(total_updates)
        run_folder = folder_of_run(folder, keep_last, destinations)
        if not self.ranks.is_main:
            run_folder, logger, evaluation, progress_bar = None, None, None, False
            destinations = dict.fromkeys(destinations)
        super().__init__(
            step,
            total_updates,
            run_folder,
            destinations,
            replay_buffer=replay_buffer,
            logger=logger,
            progress_bar=progress_bar,
            save_trainer_interval=self.schedule.save_interval,
            checkpoint_metadata=checkpoint_metadata,
            log_timings=log_timings,
            auto_log_optim_steps=auto_log_optim_steps,
        )
        self.scores = Scores(
            evaluation, monitor, self.progress, self.folder, self._log_at, self._asked_to_stop
        )
        self.resume_command, self.updates_per_second = resume_command, math.nan
        self._fastest, self._told_slowness = 0.0, False
        self.interruption, self.display = Interruption(), Display(False, total_updates, 0)
        self._pbar_str: dict[str, Any] = {}
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed)

    def _check_schedule(self, total_updates: int) -> None:
        """Say where scheduled learning rates reach 0 before the end."""
        config = None if self.agent is None else self.agent.config
        if (
            config is not None
            and self.ranks.is_main
            and (after := ends_before(config, total_updates))
        ):
            torchrl_logger.warning(after)

    def register_op(self, dest: str, op: Callable[..., Any], **kwargs: Any) -> None:
        """As TorchRL's; see the class for when each stage runs."""
        check_stage(dest)
        if not moved_by_step(self.step, op):
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
        check_total(self.updates, self.total_updates)
        check_same_data(self.ranks, self.data_state, self.replay_buffer)
        with contextlib.ExitStack() as stack:
            self.ranks.together(lambda: self._enter_folder(stack))
            self._train_in_folder()

    def _train_in_folder(self) -> None:
        shown = Display(self.progress_bar, self.total_updates, self.updates)
        with Interruption(self.ranks) as self.interruption, shown as self.display:
            try:
                self._setup_hook()
                self.ranks.together(self._evaluate_at_start)
                while self.updates < self.total_updates and not self._stop_training:
                    self._train_to_next_event()
                    self.interruption.agree()
                    if self._interrupted:
                        break
                if not self._interrupted:  # otherwise the checkpoint contains them
                    self.ranks.together(lambda: self.scores.collect(wait=True))
                    self.interruption.agree()
                self.ranks.together(self._leave)
            finally:
                self._shutdown_hook()
        self.interruption.finish()

    @property
    def _interrupted(self) -> bool:
        return self.interruption.requested is not None

    def _asked_to_stop(self) -> bool:
        return self.interruption.asked is not None

    def _enter_folder(self, stack: contextlib.ExitStack) -> None:
        """Prepare the folder, which stays locked until the end of ``stack``."""
        if self.folder is None:
            return
        self.folder.make()
        stack.enter_context(self.folder.locked())
        if not self._in_folder:
            self.folder.refuse_if_taken()
        self.folder.prepare(self._settings())
        self.folder.forget_asides(self.scores.pending)
        self._in_folder = True

    def _evaluate_at_start(self) -> None:
        """The evaluation before the first update, or one that a stopped run did not finish."""
        due = self.schedule.evaluation_due(self.updates, self.total_updates)
        if due and self.scores.is_missing(self.updates):
            self._evaluate()
            self.save_trainer(force_save=self.scores.wants_checkpoint)
            self.display.last_score(self.updates, self.scores.latest())

    def _evaluate(self) -> None:
        """The evaluation; and the value gap of a policy that takes the best of several actions."""
        self.scores.evaluate(self.updates)
        agent = self.agent if self.ranks.is_main else None
        # the rows of a dataset are no windows
        plain = agent is not None and history_of(agent.policy) is None
        log = self.dataset if isinstance(self.dataset, OfflineDataset) else None
        if agent is not None and plain and log is not None and agent.chooses:
            gap = value_gap(agent.policy, log.transitions).mean
            self.progress.record(self.updates, {"chosen_value_gap": gap})
            self._log_at(self.updates, "chosen_value_gap", gap)

    def shutdown(self) -> None:
        """There is no collector to close."""

    def _train_to_next_event(self) -> None:
        until = self.schedule.next_event(self.updates, self.total_updates)
        began, first = time.perf_counter(), self.updates
        sampled = make_updates(self, until)
        self.updates_per_second = (self.updates - first) / (time.perf_counter() - began)
        self._notice_slowness()
        if self.updates == until:
            self.ranks.together(lambda: self._event(sampled))

    def _notice_slowness(self) -> None:
        """Say once that updates have become much slower, and what mostly causes it."""
        self._fastest = max(self._fastest, self.updates_per_second)
        if self.updates_per_second * MUCH_SLOWER < self._fastest and not self._told_slowness:
            self._told_slowness = True
            torchrl_logger.warning(
                f"updates have become slow: {self.updates_per_second:.3g} a second, and "
                f"{self._fastest:.3g} before. Mostly another process uses the cores. Start each of "
                "several trainings with OMP_NUM_THREADS=1, or with GOMP_SPINCOUNT=2000 where torch is "
                "imported before iql_torchrl."
            )

    def _event(self, sampled: TensorDictBase | None) -> None:
        """Record a row, evaluate, call hooks, save and show."""
        means = self.progress.means()
        check_finite(means, self.updates)
        self.progress.record(self.updates, means)
        self._post_epoch_log_hook(sampled)
        self._post_epoch_hook()
        self._log(updates_per_second=self.updates_per_second)
        averages = TensorDict({name: torch.tensor(value) for name, value in means.items()})
        self._post_optim_complete_log_hook(self.updates, averages)
        try:
            self.scores.collect()
            if self.schedule.evaluation_due(self.updates, self.total_updates):
                self._evaluate()
            self._post_steps_hook()
            self._post_steps_log_hook(sampled)
        except BaseException:
            self.save_trainer(force_save=True)  # all updates before the error are complete
            raise
        self.save_trainer(force_save=self.scores.wants_checkpoint)
        self._write()
        losses = {name: value for name, value in means.items() if name.startswith("loss_")}
        self.display.event(
            self.updates,
            losses | self._pbar_str,
            score=self.scores.latest(),
            speed=self.updates_per_second,
            saved=self._last_save == self.updates,
        )

    def _leave(self) -> None:
        """Save updates that are not saved yet; after an interruption print how to continue."""
        if self._has_checkpoint_destination() and self._last_save != self.updates:
            self._save_now()
        self._write(now=True)
        self.display.last_score(self.updates, self.scores.latest())
        self.display.close()
        if self._interrupted and self.ranks.is_main:
            print_how_to_continue(self)

    def _settings(self) -> dict[str, Any] | None:
        if self.agent is None:
            return None
        name = {} if self.dataset is None else {"dataset": self.dataset.name}
        return name | dict(self.agent.description()["config"])

    def _log(self, log_pbar: bool = False, **kwargs: Any) -> None:
        """As TorchRL's, but scalar tensors become numbers, because some loggers need numbers."""
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
            mean = None if self.dataset is None else float(self.dataset.episode_returns.mean())
            self.folder.write(self.progress.rows, now=now)
            self.folder.draw(self.progress.rows, log_return=mean, now=now)

    def __repr__(self) -> str:
        kind = type(self.step).__name__
        return f"OfflineTrainer({kind}, updates={self.updates} of {self.total_updates})"
