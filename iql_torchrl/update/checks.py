"""What ``captured`` refuses before anything is captured."""

from __future__ import annotations

from typing import Any

from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler
from torchrl.objectives import HardUpdate

from iql_torchrl.data.replay import DeviceSampler
from iql_torchrl.data.shards.replay import ShardedReplay
from iql_torchrl.update.step import IQLStep


def check_replay(replay: DeviceSampler | ReplayBuffer) -> None:
    if isinstance(replay, DeviceSampler):
        return
    if isinstance(replay, ShardedReplay):
        raise TypeError(
            "replay is a ShardedReplay, whose shards are replaced while training; captured updates "
            "read rows that stay. Use compiled(step) or the step itself with OfflineTrainer, or a "
            "DeviceSampler where the log fits into memory."
        )
    if not isinstance(replay, ReplayBuffer):
        raise TypeError(
            f"replay is {type(replay).__name__}; expected a DeviceSampler or a TorchRL replay buffer."
        )
    if type(replay.sampler) is not RandomSampler:
        raise ValueError(
            f"replay samples with {type(replay.sampler).__name__}; captured updates sample "
            "uniformly on the device. Use RandomSampler, or the step or compiled(step) in a loop."
        )
    if len(replay.transform):
        raise ValueError(
            "replay has transforms, which would run in Python at every update. Apply them to "
            "the data once, or use the step or compiled(step) in a loop."
        )
    if replay.batch_size is None:
        raise ValueError("replay has no batch_size; give it one when you build it.")


def check_cuda(step: IQLStep, updates: int) -> None:
    """Raise ``ValueError`` on an optimizer or updater that a CUDA graph cannot hold."""
    optimizer, updater = step.optimizer, step.target_updater
    if step.ranks is not None:
        raise ValueError(
            f"the step is data parallel over {step.ranks.size} ranks, and sums over GPUs inside a CUDA "
            "graph are not tested yet, so they are refused; use compiled(step), or captured with a "
            "step on one GPU without data_parallel."
        )
    options = ("capturable", "fused")
    if not all(any(group.get(name) for name in options) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__} that counts its updates on the CPU; build it "
            f"with {' or '.join(f'{name}=True' for name in options)}, or use compiled(step)."
        )
    if updater is not None and not step.followed.targets and not isinstance(updater, HardUpdate):
        raise ValueError(
            f"a {type(updater).__name__} moves the targets in Python, after every update; use "
            "SoftUpdate or HardUpdate, or compiled(step)."
        )
    check_alignment(updater, updates)


def check_alignment(updater: Any, updates: int) -> None:
    """Raise ``ValueError`` unless a ``HardUpdate`` copies after the last update of a call."""
    if not isinstance(updater, HardUpdate):
        return
    period = updater.value_network_update_interval + 1  # the update that copies is not counted
    coming = period - updater.counter
    if period % updates or coming % updates:
        raise ValueError(
            f"HardUpdate copies to the targets every {period} updates, next after {coming}, and a "
            f"call makes {updates}; choose updates that divide both."
        )
