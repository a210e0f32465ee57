"""What ``captured`` cannot hold, said before anything is captured."""

from __future__ import annotations

from typing import Any

from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler
from torchrl.objectives import HardUpdate

from iql_torchrl.data.replay import DeviceSampler
from iql_torchrl.update.step import IQLStep


def check_replay(replay: DeviceSampler | ReplayBuffer) -> None:
    if isinstance(replay, DeviceSampler):
        return
    if not isinstance(replay, ReplayBuffer):
        raise TypeError(
            f"replay is {type(replay).__name__}; wanted a DeviceSampler or a TorchRL replay buffer."
        )
    if type(replay.sampler) is not RandomSampler:
        raise ValueError(
            f"replay samples with {type(replay.sampler).__name__}; captured updates sample "
            "uniformly on the device. Use RandomSampler, or the step or compiled(step) in a loop."
        )
    if len(replay.transform):
        raise ValueError(
            "replay has transforms, which would run on the host at every update. Apply them to "
            "the data once, or use the step or compiled(step) in a loop."
        )
    if replay.batch_size is None:
        raise ValueError("replay has no batch_size; give it one when you build it.")


def check_cuda(step: IQLStep, updates: int, whole: bool) -> None:
    optimizer, updater = step.optimizer, step.target_updater
    words = ("capturable", "fused") if whole else ("capturable",)
    if not all(any(group.get(word) for word in words) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__} that counts its updates on the host; build "
            f"it with {' or '.join(f'{word}=True' for word in words)}, or use compiled(step)."
        )
    if step.lr_schedulers and not whole:
        raise ValueError(
            f"the learning rates of {type(optimizer).__name__} would be fixed in a CUDA graph (or "
            "this torch cannot trace gradients; torch 2.13 can). Use Adam or AdamW, or "
            "compiled(step)."
        )
    if updater is not None and not step.targets and not isinstance(updater, HardUpdate):
        raise ValueError(
            f"a {type(updater).__name__} moves the targets on the host, after every update; use "
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
