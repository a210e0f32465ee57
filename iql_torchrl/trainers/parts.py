"""The parts of a trainer: defaults for those that are left out, and checks of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import Checkpoint
from torchrl.data import Composite, TensorSpec
from torchrl.trainers import LRSchedulerHook
from torchrl.trainers.trainers import TargetNetUpdaterHook

from iql_torchrl.agent.build import Agent, ends_before
from iql_torchrl.agent.task import Task
from iql_torchrl.data import (
    DatasetSummary,
    DatasetWarning,
    OfflineDataset,
    RelabelledDataset,
    ShardedDataset,
)
from iql_torchrl.data.schema import dotted
from iql_torchrl.descriptions import describe_space
from iql_torchrl.distributed import Ranks
from iql_torchrl.losses import IQLLoss
from iql_torchrl.networks import history_of
from iql_torchrl.tolerance import outside_bounds
from iql_torchrl.trainers.events import whole_updates
from iql_torchrl.trainers.run_folder import RunFolder
from iql_torchrl.update.step import IQLStep, part_of

FAR, SMALL = 10, 1e-3  # means and deviations in units of the agent's deviations


def one_step(
    step: Any, agent: Agent | None, loss: Any, optimizer: Any, target_net_updater: Any
) -> Any:
    """The step to train with: ``step``, the agent's step, or one made of the other parts."""
    if step is None and agent is not None:
        step = agent.step
    if isinstance(step, IQLLoss):
        raise ValueError(
            "step is a loss, which updates nothing; give it as loss_module= with optimizer= and "
            "target_net_updater=, or build IQLStep(loss, optimizer, target_updater)."
        )
    if step is None and loss is not None and optimizer is not None:
        return IQLStep(loss, optimizer, target_net_updater)
    if step is None:
        raise ValueError(
            "there is nothing to train: give step=, or agent=, or loss_module= and optimizer= "
            "(with target_net_updater=)."
        )
    of_step = part_of(step, "loss")
    if agent is not None and of_step is not None and of_step is not agent.loss:
        raise ValueError(
            "step is not of the agent: it trains another loss, and the agent would be evaluated and "
            "saved untrained. Give the agent alone, or a step made of agent.step, such as "
            "compiled(agent.step)."
        )
    for name, part, given in (
        ("loss_module", "loss", loss),
        ("optimizer", "optimizer", optimizer),
        ("target_net_updater", "target_updater", target_net_updater),
    ):
        if given is not None and given is not part_of(step, part):
            raise ValueError(f"{name} is not the step's own; give it to the step, and only there.")
    return step


def filled_in(
    replay_buffer: Any, total_updates: Any, agent: Agent | None, dataset: DatasetSummary | None
) -> tuple[Any, int]:
    """Buffer and number of updates; those that are None follow from the agent's config."""
    if replay_buffer is None and agent is not None and dataset is not None:
        config, history, chunk = agent.config, history_of(agent.policy), agent.config.action_chunk
        source: Any = dataset
        refused = {"history": 1 if history is None else history.length, "action_chunk": chunk}
        for name, value in refused.items():
            if value > 1 and isinstance(dataset, ShardedDataset):
                raise ValueError(
                    f"the agent has {name}={value} and {dataset.name} is in shards, from which windows "
                    f"of consecutive rows cannot be sampled; use {name}=1, or load_dataset where the "
                    "dataset fits into memory."
                )
        if chunk > 1:
            windows = {} if history is None else {"history": history.length, "stack": history.stack}
            source = source.chunks(chunk, **windows)
        elif history is not None:
            source = source.windows(history.length, stack=history.stack)
        replay_buffer = source.replay_buffer(config.batch_size, config.device, config.seed)
    if total_updates is None and agent is not None:
        total_updates = agent.config.updates
    if replay_buffer is None or total_updates is None:
        raise ValueError(
            "replay_buffer and total_updates are needed; only with agent= and dataset= do they "
            "follow from the agent's config."
        )
    return replay_buffer, whole_updates("total_updates", total_updates)


def checkpoint_destination(folder: RunFolder | None, **given: Any) -> dict[str, Any]:
    """TorchRL's arguments that say where checkpoints are saved: ``given``, or those of ``folder``."""
    if folder is not None:
        if any(given[n] for n in ("save_trainer_file", "checkpoint", "checkpoint_rotation")):
            raise ValueError(
                "folder= keeps checkpoints of its own; leave out save_trainer_file, checkpoint and "
                "checkpoint_rotation, or leave out folder."
            )
        given["checkpoint_rotation"] = folder.rotation
    if given["save_trainer_file"] or given["checkpoint_rotation"]:
        given["checkpoint"] = given["checkpoint"] or Checkpoint(format="archive")
    return given


def check_parts(step: Any, replay_buffer: Any, evaluation: Any, logger: Any, ranks: Ranks) -> None:
    """Refuse what cannot be sampled, called or logged to, and a step of other ranks."""
    if evaluation is not None and not (callable(evaluation) or hasattr(evaluation, "submit")):
        raise ValueError(
            f"evaluation is {evaluation!r}; expected a function without arguments, such as "
            "partial(evaluate, policy, make_env, episodes=20, seed=0), or a BackgroundEvaluation."
        )
    if logger is not None and not hasattr(logger, "log_scalar"):
        raise ValueError(
            f"logger is {logger!r}; expected one of TorchRL's loggers, such as "
            "torchrl.record.loggers.get_logger('csv', folder, name)."
        )
    if not callable(getattr(replay_buffer, "sample", None)):
        raise ValueError(
            f"replay_buffer is {type(replay_buffer).__name__}, which has no sample(); pass "
            "dataset.replay_buffer(batch_size) or a TorchRL replay buffer."
        )
    of_step = part_of(step, "ranks")
    if (of_step is None) is not (ranks.size == 1) or (of_step is not None and of_step is not ranks):
        raise ValueError(
            f"the trainer has {ranks.size} ranks and the step "
            f"{'one process' if of_step is None else f'{of_step.size} ranks'}; write "
            "step = data_parallel(agent.step, ranks), and give both, step= and ranks=."
        )


def check_priorities(replay_buffer: Any, loss: Any) -> None:
    """Refuse a prioritised buffer that would not receive the priorities that the loss writes."""
    if not hasattr(replay_buffer, "update_tensordict_priority"):
        raise ValueError(
            f"replay_buffer is {type(replay_buffer).__name__} with a PrioritizedSampler, and cannot "
            "read priorities from a batch; make it a TensorDictReplayBuffer with the same sampler."
        )
    read, written = replay_buffer.priority_key, loss.tensor_keys.priority
    if read != written:
        raise ValueError(
            f"the replay buffer reads priorities from {read!r} and the loss writes them to "
            f"{written!r}, so they would never change; give the buffer priority_key={written!r}, or "
            f"call loss.set_keys(priority={read!r})."
        )


def check_agent(
    agent: Agent, dataset: DatasetSummary | None, total_updates: int, *, warns: bool
) -> None:
    """Refuse data of other keys or shapes, or with actions that the agent's policy can never take.

    With ``warns`` report a short schedule, and rewards or observations in other units than those of
    the data that the agent was made for.
    """
    if warns and (after := ends_before(agent.config, total_updates)):
        torchrl_logger.warning(after)
    if dataset is None:
        return
    other = Task.of(dataset)
    for name in ("observation", "action"):
        shapes = [_shapes(getattr(task, f"{name}_spec")) for task in (agent.task, other)]
        if shapes[0] != shapes[1]:
            spaces = [describe_space(getattr(t, f"{name}_space")) for t in (agent.task, other)]
            raise ValueError(
                f"{name}: the agent was made for {spaces[0]} and the dataset {dataset.name!r} has "
                f"{spaces[1]}; make_agent(config, dataset) with this dataset makes one that fits."
            )
    _check_action_range(agent.task.action_space, dataset)
    for text in (*_other_rewards(agent.task, other), *_other_units(agent.task, other)) * warns:
        warnings.warn(text, DatasetWarning, stacklevel=3)


def _shapes(spec: TensorSpec) -> dict[Any, tuple[torch.Size, int | None]]:
    """Shape of each leaf, and the number of categories where it is one."""
    leaves = spec.items(True, True) if isinstance(spec, Composite) else [("", spec)]
    return {key: (leaf.shape, getattr(leaf.space, "n", None)) for key, leaf in leaves}


def _check_action_range(policy: gym.Space[Any], dataset: DatasetSummary) -> None:
    """Refuse actions outside of the ``policy``'s space, and categories counted from another number."""
    space = dataset.action_space
    if getattr(policy, "start", 0) != getattr(space, "start", 0):
        raise ValueError(
            f"action: the agent was made for {describe_space(policy)} and the dataset "
            f"{dataset.name!r} has {describe_space(space)}; make_agent(config, dataset) with this "
            "dataset makes one that fits."
        )
    if not isinstance(policy, spaces.Box) or not isinstance(space, spaces.Box):
        return
    low, high = space.low, space.high
    if (_outside(low, policy) | _outside(high, policy)).any():  # what counts are the actions
        rows = dataset.dataset if isinstance(dataset, RelabelledDataset) else dataset
        if isinstance(rows, OfflineDataset):
            actions = rows.transitions["action"].cpu()
            low, high = actions.amin(0).numpy(), actions.amax(0).numpy()
        else:
            low, high = np.clip([low, high], *rows.range_of(("action",)))
    outside = np.flatnonzero(_outside(low, policy) | _outside(high, policy))
    if outside.size:
        first = int(outside[0])
        here, there = (
            f"[{a.flat[first]:.6g}, {b.flat[first]:.6g}]"
            for a, b in ((low, high), (policy.low, policy.high))
        )
        raise ValueError(
            f"action: the actions of {dataset.name!r} lie in {here} in dimension {first}, and the "
            f"agent's policy acts within {there}: it would be trained on actions that it can never "
            "take. make_agent(config, dataset) with this dataset makes one that fits; or "
            "load_dataset(..., action_space=agent.task.action_space, clip_actions=True) clips them."
        )


def _outside(values: NDArray[Any], space: spaces.Box) -> NDArray[np.bool_]:
    return outside_bounds(values, space.low, space.high)


def _other_rewards(own: Task, other: Task) -> Iterator[str]:
    """A sentence where the rewards of two tasks are scaled differently."""
    if None in (own.reward_map, other.reward_map) or own.reward_map == other.reward_map:
        return
    before, now = ((m.scale, m.shift) for m in (own.reward_map, other.reward_map) if m is not None)
    yield (
        f"reward: the agent was made for rewards of {own.name!r} with (scale, shift) {before}, and "
        f"those of {other.name!r} have {now}: its values are in other units, and its temperature means "
        f"something else. Load this dataset with reward={before}, or make a new agent for it."
    )


def _other_units(own: Task, other: Task) -> Iterator[str]:
    """A sentence for each entry of the observations that is far from what the networks standardise."""
    for key in own.statistics.keys() & other.statistics.keys():
        before, now = own.statistics[key], other.statistics[key]
        varying = torch.ones(before.mean.numel(), dtype=torch.bool)
        varying[[*before.constant, *now.constant]] = False
        shift = ((now.mean - before.mean) / before.std).abs().flatten()
        ratio = (now.std / before.std).flatten()
        far = varying & ((shift > FAR) | (ratio > FAR) | (ratio < SMALL))
        if not far.any():
            continue
        place = int(far.nonzero()[0])
        words = [
            f"{s.mean.flatten()[place]:.4g} +- {s.std.flatten()[place]:.4g}" for s in (before, now)
        ]
        yield (
            f"{key if isinstance(key, str) else dotted(key)}: column {place} was {words[0]} in "
            f"{own.name!r}, with which the agent's networks standardise, and is {words[1]} in "
            f"{other.name!r}. Store the column in the same unit, or make a new agent for this dataset."
        )


def is_called_by_step(step: Any, op: Callable[..., Any]) -> bool:
    """Return True if the hook ``op`` would call an updater or scheduler that ``step`` calls itself."""
    hook = getattr(op, "__self__", op)
    if isinstance(hook, TargetNetUpdaterHook):
        called = hook.target_params_updater is part_of(step, "target_updater")
    elif isinstance(hook, LRSchedulerHook):
        called = any(hook.scheduler is each for each in part_of(step, "lr_schedulers") or ())
    else:
        return False
    if called:
        torchrl_logger.warning(
            f"{type(hook).__name__}: the step itself calls what this hook would call, so the hook is "
            "not called; build the step without it to let the hook decide."
        )
    return called
