"""Checks that a checkpoint belongs to the run that loads it: same data, settings and shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torchrl.data import ImmutableDatasetWriter, ReplayBuffer

from iql_torchrl.checkpoint import CheckpointError
from iql_torchrl.config import knobs
from iql_torchrl.data import DatasetSummary, ShardedReplay
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.data.windows import WindowStorage
from iql_torchrl.losses import ImplicitQLoss
from iql_torchrl.update.step import part_of

__all__ = ["AgentState", "DataState", "SettingsState", "check_shapes", "check_total", "is_fixed"]


def check_total(updates: int, total_updates: int) -> None:
    """Raise ``ValueError`` when the run has made more than ``total_updates`` updates."""
    if updates > total_updates:
        raise ValueError(
            f"total_updates is {total_updates} and the run has made {updates} updates already. It "
            "counts from the first update of the run, however often that was stopped: give at least "
            f"{updates}, or more to train further."
        )


class DataState:
    """The part of a checkpoint that identifies the data: digests, reward map, name.

    Digests are of ``dataset``, or of a buffer that is fixed; None for other buffers.
    """

    def __init__(self, replay_buffer: Any, dataset: DatasetSummary | None) -> None:
        if dataset is None and isinstance(replay_buffer, ShardedReplay):
            dataset = replay_buffer.dataset
        self._dataset = dataset
        self._replay_buffer = replay_buffer
        self._state: dict[str, Any] | None = None

    def _fingerprint(self) -> dict[str, str] | None:
        if self._dataset is not None:
            return self._dataset.fingerprint()
        if is_fixed(self._replay_buffer):
            storage = self._replay_buffer.storage
            windows = isinstance(storage, WindowStorage)
            return fingerprint(storage.windows.table() if windows else storage.get(slice(None)))
        return None

    def state_dict(self) -> dict[str, Any]:
        if self._state is None:
            mapped = None if self._dataset is None else self._dataset.reward_map
            self._state = {
                "fingerprint": self._fingerprint(),
                "reward_map": None if mapped is None else [mapped.scale, mapped.shift],
                "name": None if self._dataset is None else self._dataset.name,
            }
        return self._state

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` when ``saved`` is of other data, naming what differs."""
        current = self.state_dict()
        old, new = saved["fingerprint"], current["fingerprint"]
        if old is None or new is None:
            return
        differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        maps = saved["reward_map"], current["reward_map"]
        only_rewards = all("reward" in key for key in differing)
        if None not in maps and maps[0] != maps[1] and only_rewards:
            raise CheckpointError(
                "the checkpoint is of a run with another reward map: it was saved with "
                f"(scale, shift) = {tuple(saved['reward_map'])} and the dataset has "
                f"{tuple(current['reward_map'])}; pass reward={tuple(saved['reward_map'])} to "
                "load_dataset."
            )
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"the checkpoint is of another dataset ({saved['name'] or 'unnamed'}, here "
                f"{current['name'] or 'unnamed'}): {', '.join(differing)} differ. {key} was "
                f"{old.get(key)} and is {new.get(key)}. Resume with the data it was trained on, or "
                "start a new run."
            )


class AgentState:
    """The part of a checkpoint from which ``Agent.load`` builds an agent: its config and task."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def state_dict(self) -> dict[str, Any]:
        return dict(self._agent.description())

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` naming the settings in which the two runs differ.

        A setting that an older version did not save has its default.
        """
        config = self._agent.config
        current = config.to_dict()
        old = type(config)().to_dict() | dict(saved["config"])
        free = {name for name, knob in knobs(type(config)).items() if knob.may_change(current)}
        _compare(current, old, {*current, *old} - free)


class SettingsState:
    """The part of a checkpoint that identifies a run whose parts were made by hand: its settings."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        # a loss of another kind may have some of the attributes
        self._knobs = getattr(trainer.loss_module, "knobs", ImplicitQLoss.knobs)

    def state_dict(self) -> dict[str, Any]:
        trainer, loss = self._trainer, self._trainer.loss_module
        values = {name: _simple(getattr(loss, name, None)) for name in (*self._knobs, "reduction")}
        return values | {
            "loss": type(loss).__name__,
            "optimizer": type(trainer.optimizer).__name__,
            "order": part_of(trainer.step, "order"),
            "max_grad_norm": part_of(trainer.step, "max_grad_norm"),
            "batch_size": getattr(trainer.replay_buffer, "batch_size", None),
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` naming the settings in which the two runs differ.

        A setting of the loss that another version did not save has its default; others that it
        did not save are not compared.
        """
        current = self.state_dict()
        defaults = {n: knob.default for n, knob in self._knobs.items() if current[n] is not None}
        old = defaults | dict(saved)
        _compare(current, old, current.keys() & old.keys())


def _compare(current: Mapping[str, Any], saved: Mapping[str, Any], names: Collection[str]) -> None:
    differing = [
        f"{name} was {saved.get(name)!r} and is {current.get(name)!r}"
        for name in sorted(names)
        if _plain(saved.get(name)) != _plain(current.get(name))
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint is of a run with other settings: {'; '.join(differing)}. Resume with the "
            "saved settings, or start a new run."
        )


def _simple(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, (int, float, str)) or value is None else repr(type(value))


def check_shapes(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raises ``CheckpointError`` naming the first tensor that is missing or of another shape."""
    current = module.state_dict()
    missing = [name for name in current if name not in saved]
    extra = [name for name in saved if name not in current]
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint is of other networks: it lacks {missing[:3]} and has {extra[:3]} "
            f"({len(missing)} and {len(extra)} in all); build the loss as it was."
        )
    for name, tensor in current.items():
        old = saved[name]
        if isinstance(tensor, torch.Tensor) and tensor.shape != old.shape:
            raise CheckpointError(
                f"the checkpoint is of other shapes: {name} was {tuple(old.shape)} and is "
                f"{tuple(tensor.shape)} here; build the networks with the widths they had."
            )


def is_fixed(buffer: Any) -> bool:
    """Whether ``buffer`` is a TorchRL buffer to which nothing can be added."""
    return isinstance(buffer, ReplayBuffer) and isinstance(buffer.writer, ImmutableDatasetWriter)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
