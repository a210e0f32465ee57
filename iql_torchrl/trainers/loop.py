"""The updates between two events, and which of TorchRL's hooks are called at each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from torchrl import logger as torchrl_logger
from torchrl.trainers import LRSchedulerHook
from torchrl.trainers.trainers import TargetNetUpdaterHook

from iql_torchrl.update.step import part_of

__all__ = ["check_stage", "make_updates", "moved_by_step"]

# TorchRL's stages of ``register_op``, and the attributes in which its Trainer keeps their hooks.
OWNED_BY_STEP = ("process_loss", "optimizer")
CHANGE_BATCH = ("_batch_process_ops", "_pre_epoch_ops", "_process_optim_batch_ops")
AFTER_UPDATE = ("_post_loss_ops", "_post_optim_ops", "_post_optim_log_ops")
READ_FIRST_BATCH = ("_pre_steps_log_ops", "_post_steps_log_ops", "_pre_epoch_log_ops")


def make_updates(trainer: Any, until: int) -> TensorDictBase | None:
    """Update until the run has made ``until`` updates, or until it is interrupted.

    Calls the hooks that come before the updates and those of every update. Returns the first batch;
    None for a step that samples for itself, unless a hook reads that batch.
    """
    reads_batch = any(getattr(trainer, name) for name in READ_FIRST_BATCH)
    sampled = None
    if reads_batch or not trainer.samples_itself:
        sampled = trainer.replay_buffer.sample()
    trainer._pre_steps_log_hook(sampled)
    trainer._pre_optim_hook()
    trainer._pre_epoch_log_hook(sampled)
    if trainer.samples_itself:
        _calls(trainer, until)
    elif any(getattr(trainer, name) for name in (*CHANGE_BATCH, *AFTER_UPDATE)):
        _updates_with_hooks(trainer, sampled, until)
    else:
        _updates(trainer, sampled, until)
    return sampled


def _updates(trainer: Any, batch: TensorDictBase | None, until: int) -> None:
    step, sample, progress = trainer.step, trainer.replay_buffer.sample, trainer.progress
    advance, stops = trainer.display.advance, trainer.interruption.stops
    while True:
        progress.tally(step(batch))
        progress.updates += 1
        advance()
        if progress.updates >= until or stops():
            return
        batch = sample()


def _updates_with_hooks(trainer: Any, batch: TensorDictBase | None, until: int) -> None:
    while True:
        for name in CHANGE_BATCH:
            for op, kwargs in getattr(trainer, name):
                changed = op(batch, **kwargs)
                batch = changed if isinstance(changed, TensorDictBase) else batch
        metrics = trainer.step(batch)
        trainer.progress.updates += 1
        trainer.progress.tally(metrics)
        trainer._post_loss_hook(batch)
        trainer._post_optim_hook()
        trainer._post_optim_log(batch)
        trainer.display.advance()
        if trainer.updates >= until or trainer.interruption.stops():
            return
        batch = trainer.replay_buffer.sample()


def _calls(trainer: Any, until: int) -> None:
    """A captured step samples for itself and makes several updates a call."""
    while trainer.updates < until and not trainer.interruption.stops():
        trainer.progress.tally(trainer.step(), trainer.updates_per_call)
        trainer.progress.updates += trainer.updates_per_call
        trainer.display.advance(trainer.updates_per_call)


def check_stage(stage: str) -> None:
    """Raises ``ValueError`` for a stage of ``register_op`` that the step carries out itself."""
    if stage in OWNED_BY_STEP:
        raise ValueError(
            f"stage {stage!r} changes losses or gradients, which only the step may do here; write "
            "a loss or a step that does it, and pass that."
        )


def moved_by_step(step: Any, op: Callable[..., Any]) -> bool:
    """Whether the hook ``op`` would call a target updater or scheduler that ``step`` calls.

    Such a hook must not be called; a warning reports it.
    """
    hook = getattr(op, "__self__", op)
    moved = None
    if isinstance(hook, TargetNetUpdaterHook):
        if hook.target_params_updater is part_of(step, "target_updater"):
            moved = "target_params_updater"
    elif isinstance(hook, LRSchedulerHook):
        schedulers = part_of(step, "lr_schedulers") or ()
        moved = "scheduler" if any(hook.scheduler is each for each in schedulers) else None
    if moved is not None:
        torchrl_logger.warning(
            f"{type(hook).__name__}: the step already calls this {moved}, so the hook is not "
            "called; build the step without it to let the hook decide."
        )
    return moved is not None
