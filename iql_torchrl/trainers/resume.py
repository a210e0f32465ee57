"""The parts of a trainer's checkpoint, and loading them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import GlobalRNGState

from iql_torchrl.checkpoint import CheckpointError
from iql_torchrl.data import ShardedReplay
from iql_torchrl.private_apis import (
    generator_of,
    logged_values,
    registered_modules,
    without_prefetched,
)
from iql_torchrl.trainers.identity import (
    AgentState,
    SettingsState,
    check_shapes,
    check_total,
    is_fixed,
)

__all__ = ["restore", "stateful_parts"]


def stateful_parts(trainer: Any) -> dict[str, Any]:
    """The parts in a checkpoint of an ``OfflineTrainer``, by name; each has a ``state_dict``.

    Networks and targets; the step (optimizer, schedulers, target updater); the state of sampling
    and of the global random generators; what identifies the data; how to rebuild an agent;
    progress; and the modules registered on the trainer.
    """
    parts = {
        "loss_module": trainer.loss_module,
        "step": trainer.step,
        "replay_buffer": ReplayState(trainer.replay_buffer),
        "data": trainer.data_state,
        "agent": None if trainer.agent is None else AgentState(trainer.agent),
        "settings": SettingsState(trainer),
        "trainer_state": ProgressState(trainer),
        "random": GlobalRNGState(),
    }
    parts |= {f"trainer_module.{name}": part for name, part in registered_modules(trainer).items()}
    return {n: part for n, part in parts.items() if callable(getattr(part, "state_dict", None))}


def restore(trainer: Any, states: Mapping[str, Any]) -> None:
    """Load saved states into the trainer; every check is made before anything is changed.

    Raises ``CheckpointError`` with a sentence saying what differs, and ``ValueError`` when the run
    has made more updates than the trainer's total.
    """
    parts = stateful_parts(trainer)
    missing = [n for n in parts if n not in states and n not in ("agent", *_modules(parts))]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {missing}; it has {sorted(states)}.")
    if "agent" in parts and "agent" in states:
        parts["agent"].check(states["agent"])
    for name in ("data", "settings", "replay_buffer"):
        parts[name].check(states[name])
    check_total(states["trainer_state"]["progress"]["updates"], trainer.total_updates)
    if isinstance(trainer.loss_module, nn.Module):
        _ = trainer.loss_module.value_estimator  # made at its first use; its state is saved too
        check_shapes(trainer.loss_module, states["loss_module"])
    for name in _modules(parts) ^ _modules(states):
        place = "registered here" if name in parts else "in the checkpoint"
        torchrl_logger.warning(f"{name} is only {place}; it is not loaded.")
    for name, part in parts.items():
        if name in states and name not in ("agent", "data", "settings", "random"):
            part.load_state_dict(states[name])
    # last, because loading the other parts may draw random numbers
    parts["random"].load_state_dict(states["random"])


def _modules(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("trainer_module.")}


class ProgressState:
    """The part of a checkpoint with progress, last logged values and unfinished evaluations."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "progress": trainer.progress.state_dict(),
            "last_save": trainer._last_save,
            "logged": {
                k: float(v[-1]) for k, v in logged_values(trainer).items() if _is_number(v[-1])
            },
            "pending": trainer.scores.pending,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trainer = self._trainer
        device = next((p.device for p in trainer.loss_module.parameters()), None)
        trainer.progress.load_state_dict(state["progress"], device)
        trainer._last_save = state["last_save"]
        for name, value in state["logged"].items():
            logged_values(trainer)[name].append(value)
        trainer.scores.resubmit(state["pending"])


class ReplayState:
    """The part of a checkpoint with the state of sampling; the data too if the buffer can grow."""

    def __init__(self, replay_buffer: Any) -> None:
        self.replay_buffer = replay_buffer

    def state_dict(self) -> dict[str, Any]:
        buffer = self.replay_buffer
        if is_fixed(buffer):
            generator = generator_of(buffer)
            return {
                "sampler": buffer.sampler.state_dict(),
                "generator": None if generator is None else generator.get_state(),
            }
        if not hasattr(buffer, "state_dict"):
            return {}
        return {"whole": without_prefetched(buffer.state_dict())}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` when ``state`` is of another kind of buffer."""
        buffer = self.replay_buffer
        if ("sampler" in state) is not is_fixed(buffer):
            raise CheckpointError(
                "the checkpoint was saved with another kind of replay buffer (fixed, or one that "
                f"grows) than this {type(buffer).__name__}; build it as it was."
            )
        sharded = isinstance(buffer, ShardedReplay)
        if ("rotation" in state.get("whole", {})) is not sharded:
            raise CheckpointError(
                "the checkpoint was saved with another kind of replay buffer (of shards, or of rows in "
                f"memory) than this {type(buffer).__name__}; build it as it was."
            )
        if sharded:
            buffer.check_state(state["whole"])
        if "sampler" in state and (state["generator"] is None) is not (
            generator_of(buffer) is None
        ):
            raise CheckpointError(
                "the checkpoint's replay buffer and this one differ in whether they were given a "
                "seed; build the buffer with seed= as it was."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        buffer = self.replay_buffer
        if "whole" in state:
            buffer.load_state_dict(state["whole"])
        elif "sampler" in state:
            buffer.sampler.load_state_dict(state["sampler"])
            generator = generator_of(buffer)
            if generator is not None:
                generator.set_state(state["generator"].cpu())


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float))
