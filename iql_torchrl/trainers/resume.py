"""What must be equal, and what is restored, when a run goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import ImmutableDatasetWriter, ReplayBuffer

from iql_torchrl.checkpoint import CheckpointError
from iql_torchrl.data import OfflineDataset
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.host import (
    generator_of,
    logged_values,
    registered_modules,
    without_prefetched,
)
from iql_torchrl.update.step import part_of

__all__ = ["DataState", "check_total", "restore", "stateful_parts"]

# these say how a run is carried out, not what it computes; a falling rate depends on `updates` too
FREE_SETTINGS = frozenset({"compile", "device"})


def stateful_parts(trainer: Any) -> dict[str, Any]:
    """What a checkpoint of an ``OfflineTrainer`` holds: parts that have a ``state_dict``, by name.

    Networks and targets; the step (optimizer, schedulers, target updater); where sampling stands
    and the global random generators; the identity of the data; how to rebuild an agent; progress;
    and the modules registered on the trainer.
    """
    parts = {
        "loss_module": trainer.loss_module,
        "step": trainer.step,
        "replay_buffer": ReplayState(trainer.replay_buffer),
        "data": trainer.data_state,
        "agent": None if trainer.agent is None else Description(trainer.agent),
        "settings": Settings(trainer),
        "trainer_state": ProgressState(trainer),
        "random": GlobalRNGState(),
    }
    parts |= {f"trainer_module.{name}": part for name, part in registered_modules(trainer).items()}
    return {n: part for n, part in parts.items() if callable(getattr(part, "state_dict", None))}


def restore(trainer: Any, states: Mapping[str, Any]) -> None:
    """Put saved states back. Everything that can be refused is, before anything is changed.

    Raises ``CheckpointError`` with a sentence saying what differs, and ``ValueError`` when the run
    has made more updates than the trainer's total.
    """
    parts = stateful_parts(trainer)
    missing = [n for n in parts if n not in states and n not in ("agent", *_modules(parts))]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {missing}; it holds {sorted(states)}.")
    if "agent" in parts and "agent" in states:
        parts["agent"].load_state_dict(states["agent"])
    parts["data"].load_state_dict(states["data"])
    parts["settings"].load_state_dict(states["settings"])
    parts["replay_buffer"].check(states["replay_buffer"])
    check_total(states["trainer_state"]["progress"]["updates"], trainer.total_updates)
    if isinstance(trainer.loss_module, nn.Module):
        _ = trainer.loss_module.value_estimator  # made when first needed; a part of the state
        check_shapes(trainer.loss_module, states["loss_module"])
    for name in _modules(parts) ^ _modules(states):
        where = "registered here" if name in parts else "in the checkpoint"
        torchrl_logger.warning(f"{name} is only {where}; it is left as it is.")
    for name, part in parts.items():
        if name in states and name not in ("agent", "data", "settings", "random"):
            part.load_state_dict(states[name])
    parts["random"].load_state_dict(states["random"])  # last: loading may draw numbers


def check_total(updates: int, total_updates: int) -> None:
    """Raise ``ValueError`` when more updates have been made than there are to be in all."""
    if updates > total_updates:
        raise ValueError(
            f"total_updates is {total_updates} and the run has made {updates} updates already. It "
            "counts from the first update of the run, however often that was stopped: give at least "
            f"{updates}, or more to train further."
        )


def _modules(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("trainer_module.")}


class ProgressState:
    """Progress, the last value of everything that was logged, and evaluations under way."""

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


class DataState:
    """Identity of the log: digests, reward map, name.

    Digests of ``dataset``, or of a TorchRL buffer that is fixed; of other buffers there are none.
    """

    def __init__(self, replay_buffer: Any, dataset: OfflineDataset | None) -> None:
        self._dataset = dataset
        self._replay_buffer = replay_buffer
        self._state: dict[str, Any] | None = None

    def _transitions(self) -> TensorDictBase | None:
        if self._dataset is not None:
            return self._dataset.transitions
        if _is_fixed(self._replay_buffer):
            table: TensorDictBase = self._replay_buffer.storage.get(slice(None))
            return table
        return None

    def state_dict(self) -> dict[str, Any]:
        if self._state is None:
            transitions = self._transitions()
            mapped = None if self._dataset is None else self._dataset.reward_map
            self._state = {
                "fingerprint": None if transitions is None else fingerprint(transitions),
                "reward_map": None if mapped is None else [mapped.scale, mapped.shift],
                "name": None if self._dataset is None else self._dataset.name,
            }
        return self._state

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` when ``saved`` is of another log, naming what differs."""
        mine = self.state_dict()
        if saved["fingerprint"] is None or mine["fingerprint"] is None:
            return
        both = {*saved["fingerprint"], *mine["fingerprint"]}
        differing = sorted(
            k for k in both if saved["fingerprint"].get(k) != mine["fingerprint"].get(k)
        )
        maps = saved["reward_map"], mine["reward_map"]
        same_steps = all("reward" in key for key in differing)
        if None not in maps and maps[0] != maps[1] and same_steps:
            raise CheckpointError(
                "the checkpoint is of the same run only with its own reward map: it was saved with "
                f"(scale, shift) = {tuple(saved['reward_map'])} and the dataset has "
                f"{tuple(mine['reward_map'])}; pass reward={tuple(saved['reward_map'])} to "
                "load_dataset."
            )
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"the checkpoint is of another dataset ({saved['name'] or 'unnamed'}, here "
                f"{mine['name'] or 'unnamed'}): {', '.join(differing)} differ. {key} was "
                f"{saved['fingerprint'].get(key)} and is {mine['fingerprint'].get(key)}. Resume "
                "with the data it was trained on, or start a new run."
            )


class ReplayState:
    """Where a buffer's sampling stands; the rows too if the buffer can grow."""

    def __init__(self, replay_buffer: Any) -> None:
        self.replay_buffer = replay_buffer

    def state_dict(self) -> dict[str, Any]:
        buffer = self.replay_buffer
        if _is_fixed(buffer):
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
        if ("sampler" in state) is not _is_fixed(buffer):
            raise CheckpointError(
                "the checkpoint was saved with another kind of replay buffer (fixed, or one that "
                f"grows) than this {type(buffer).__name__}; build it as it was."
            )
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


class Description:
    """Config and task of an agent, so that a checkpoint can be turned into one again."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def state_dict(self) -> dict[str, Any]:
        return dict(self._agent.description())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` naming the settings in which the two runs differ."""
        mine, theirs = dict(self._agent.description()["config"]), dict(saved["config"])
        free = FREE_SETTINGS | ({"updates"} if mine.get("schedule") == "constant" else set())
        for name in free:
            mine.pop(name, None)
            theirs.pop(name, None)
        _compare(mine, theirs)


class Settings:
    """Numbers by which a run is known when its parts were made by hand."""

    LOSS = (
        "expectile",
        "temperature",
        "max_weight",
        "value_objective",
        "loss_function",
        "reduction",
    )

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer, loss = self._trainer, self._trainer.loss_module
        found = {name: _simple(getattr(loss, name, None)) for name in self.LOSS}
        return found | {
            "loss": type(loss).__name__,
            "optimizer": type(trainer.optimizer).__name__,
            "order": part_of(trainer.step, "order"),
            "max_grad_norm": part_of(trainer.step, "max_grad_norm"),
            "batch_size": getattr(trainer.replay_buffer, "batch_size", None),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` naming the settings in which the two runs differ."""
        _compare(self.state_dict(), saved)


def _compare(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    differing = {
        name: (saved.get(name), mine.get(name))
        for name in sorted({*mine, *saved})
        if _plain(saved.get(name)) != _plain(mine.get(name))
    }
    if differing:
        words = "; ".join(f"{n} was {a!r} and is {b!r}" for n, (a, b) in differing.items())
        raise CheckpointError(
            f"the checkpoint is of a run with other settings: {words}. Resume with the saved "
            "settings, or start a new run."
        )


def _simple(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, (int, float, str)) or value is None else repr(type(value))


def check_shapes(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raises ``CheckpointError`` naming the first tensor that is missing or of another shape."""
    mine = module.state_dict()
    missing = [name for name in mine if name not in saved]
    extra = [name for name in saved if name not in mine]
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint is of other networks: it lacks {missing[:3]} and holds {extra[:3]} "
            f"({len(missing)} and {len(extra)} in all); build the loss as it was."
        )
    for name, tensor in mine.items():
        found = saved[name]
        if isinstance(tensor, torch.Tensor) and tensor.shape != found.shape:
            raise CheckpointError(
                f"the checkpoint is of other shapes: {name} was {tuple(found.shape)} and is "
                f"{tuple(tensor.shape)} here; build the networks with the widths they had."
            )


def _is_fixed(buffer: Any) -> bool:
    return isinstance(buffer, ReplayBuffer) and isinstance(buffer.writer, ImmutableDatasetWriter)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float))
