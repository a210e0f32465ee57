"""The policy as a function of plain tensors, from the leaves of an observation to an action."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iql_torchrl.agent.export_checks import assert_history, assert_values
from iql_torchrl.agent.task import Task
from iql_torchrl.data.schema import MASK, Key, field_of_space, leaf_spaces
from iql_torchrl.descriptions import describe_space
from iql_torchrl.evaluation.act import needs_mask
from iql_torchrl.evaluation.gym_interface import check_policy, reads_names_at_top_level
from iql_torchrl.networks import HISTORY_MASK, history_of, repeat_first, stack_frames

__all__ = ["HISTORY", "PolicyProgram", "ProgramInput", "program_inputs"]

HISTORY: Key = (HISTORY_MASK,)


@dataclass(frozen=True)
class ProgramInput:
    """One tensor of the program: ``leaf`` of the data, which the policy reads at ``key``."""

    leaf: Key
    key: NestedKey
    space: spaces.Space[Any]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return ".".join(self.leaf[1:] or self.leaf)


class PolicyProgram(nn.Module):
    """The policy as a function of tensors; tracing removes the TensorDict."""

    low: Tensor
    high: Tensor

    def __init__(self, policy: nn.Module, task: Task, inputs: list[ProgramInput]) -> None:
        super().__init__()
        self.inputs, self.space = inputs, task.action_space
        self.history = history_of(policy)
        self.policy = copy.deepcopy(policy).cpu().requires_grad_(False)
        if isinstance(self.space, spaces.Box):
            self.register_buffer("low", torch.from_numpy(self.space.low.copy()))
            self.register_buffer("high", torch.from_numpy(self.space.high.copy()))
        elif not isinstance(self.space, spaces.Discrete):
            raise ValueError(
                f"the actions are {describe_space(self.space)}; an export needs Box or Discrete."
            )

    def forward(self, *tensors: Tensor) -> Tensor:
        batch = TensorDict({}, batch_size=tensors[0].shape[:1])
        given = {each.leaf: values for each, values in zip(self.inputs, tensors, strict=True)}
        real = given.get(HISTORY)
        if real is not None:
            assert_history(HISTORY_MASK, real)
        for each in self.inputs:
            values = given[each.leaf]
            if each.leaf == HISTORY:
                batch[HISTORY_MASK] = values
                continue
            if real is not None and each.leaf != MASK:
                values = repeat_first(values, real)
            assert_values(each.name, values, None if each.leaf == MASK else each.space, each.dtype)
            start = getattr(each.space, "start", 0)
            values = values - torch.as_tensor(start) if np.any(start) else values
            if self.history is not None and self.history.stack and each.leaf != MASK:
                values = stack_frames(values, values.ndim - 2)
            batch[each.key] = values
        action = self.policy(batch).get("action")
        choose = self.index if isinstance(self.space, spaces.Discrete) else self.clipped
        return choose(action, tuple(action.shape[1:]))

    def index(self, action: Tensor, shape: tuple[int, ...]) -> Tensor:
        assert isinstance(self.space, spaces.Discrete)
        count = int(self.space.n)
        if shape == (count,) and count > 1:
            action = (action.long() if action.dtype == torch.bool else action).argmax(-1)
        elif shape not in ((), (1,)) or action.is_floating_point():
            raise ValueError(
                f"policy output 'action' must be integer indices (B,) or (B, 1), or (B, {count}) "
                f"one-hot, for {self.space}; found {action.dtype} with rows of shape {shape}."
            )
        return action.reshape(-1).long() + int(self.space.start)

    def clipped(self, action: Tensor, shape: tuple[int, ...]) -> Tensor:
        if shape != self.space.shape:
            raise ValueError(
                f"policy output 'action' must have rows of shape {self.space.shape} for "
                f"{describe_space(self.space)}, found {shape}."
            )
        exact = torch.promote_types(action.dtype, self.low.dtype)
        action = action.to(exact).clamp(self.low.to(exact), self.high.to(exact))
        return action.to(self.low.dtype)


def program_inputs(policy: TensorDictModuleBase, task: Task) -> list[ProgramInput]:
    """The program's inputs in their order: leaves of the observation, then the masks.

    With a history every leaf is a window ``(T, *shape)``, and the mask of its steps follows.
    """
    check_policy(policy)
    history = history_of(policy)
    steps = () if history is None else (history.length,)
    flat = reads_names_at_top_level(policy.in_keys, task.observation_space)
    masked = needs_mask(policy, task.observation_space)
    leaves = leaf_spaces(task.observation_space)
    inputs = []
    for key in policy.in_keys:
        path = (key,) if isinstance(key, str) else tuple(key)
        if (masked and path == MASK) or path == HISTORY:
            continue
        path = ("observation", *path) if flat else path
        for leaf, space in leaves.items():
            if leaf[: len(path)] == path:  # a key may name a whole Dict
                shape, dtype = field_of_space(space, task.dtype, leaf)
                read_at = leaf[1:] if flat else leaf
                inputs.append(ProgramInput(leaf, read_at, space, (*steps, *shape), dtype))
    if not inputs:
        raise ValueError(f"the policy reads {list(policy.in_keys)}: nothing of the observation.")
    if history is not None:
        bits = spaces.MultiBinary(history.length)
        inputs.append(ProgramInput(HISTORY, HISTORY, bits, steps, torch.bool))
    if masked:
        if not isinstance(task.action_space, spaces.Discrete):
            raise ValueError(
                f"action_mask needs Discrete actions, found {describe_space(task.action_space)}."
            )
        size = int(task.action_space.n)
        inputs.append(ProgramInput(MASK, MASK, spaces.MultiBinary(size), (size,), torch.bool))
    return inputs
