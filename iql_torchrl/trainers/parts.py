"""The parts of a trainer: defaults for those that are left out, and checks of each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torchrl import torchrl_logger
from torchrl.data import Composite, ReplayBuffer, TensorSpec

from iql_torchrl.agent.build import Agent
from iql_torchrl.agent.task import Task
from iql_torchrl.checkpoint import new_checkpoint
from iql_torchrl.data import (
    DatasetSummary,
    OfflineDataset,
    RewardMap,
    ShardedDataset,
    ShardedReplay,
)
from iql_torchrl.descriptions import describe_space
from iql_torchrl.distributed import Ranks
from iql_torchrl.losses import ImplicitQLoss
from iql_torchrl.networks import history_of
from iql_torchrl.private_apis import generator_of
from iql_torchrl.trainers.identity import DataState
from iql_torchrl.trainers.run_folder import RunFolder
from iql_torchrl.update.step import IQLStep, part_of

__all__ = [
    "check_parts",
    "check_ranks",
    "check_reward",
    "check_same_data",
    "check_task",
    "filled_in",
    "folder_of_run",
    "one_step",
    "with_checkpoint",
]


def one_step(
    step: Any, agent: Agent | None, loss: Any, optimizer: Any, target_net_updater: Any
) -> Any:
    """The step to train with: ``step``, the agent's step, or one made of the other parts.

    Raises ``ValueError`` where there is none, or parts are given that are not the step's own.
    """
    if step is None and agent is not None:
        step = agent.step
    if isinstance(step, ImplicitQLoss):
        raise ValueError(
            "step is a loss, which updates nothing; give it as loss_module= with optimizer= and "
            "target_net_updater=, or build IQLStep(loss, optimizer, target_updater)."
        )
    given = {"loss_module": loss, "optimizer": optimizer, "target_net_updater": target_net_updater}
    if step is None:
        if loss is None or optimizer is None:
            raise ValueError(
                "there is nothing to train: give step=, or agent=, or loss_module= and optimizer= "
                "(with target_net_updater=)."
            )
        return IQLStep(loss, optimizer, target_net_updater)
    names = {
        "loss_module": "loss",
        "optimizer": "optimizer",
        "target_net_updater": "target_updater",
    }
    for name, part in given.items():
        if part is not None and part is not part_of(step, names[name]):
            raise ValueError(f"{name} is not the step's own; give it to the step, and only there.")
    return step


def filled_in(
    replay_buffer: Any, total_updates: Any, agent: Agent | None, dataset: DatasetSummary | None
) -> tuple[Any, Any]:
    """Buffer and number of updates; those that are None follow from the agent's config.

    For a policy with a history the buffer is one of windows.
    """
    if replay_buffer is None and agent is not None and dataset is not None:
        config, history = agent.config, history_of(agent.policy)
        source: Any = dataset
        if history is not None and isinstance(dataset, ShardedDataset):
            raise ValueError(
                f"the agent has history={history.length} and {dataset.name} is in shards, from which "
                "windows of observations cannot be sampled; use history=1, or load_dataset where the "
                "log fits into memory."
            )
        if history is not None and isinstance(dataset, OfflineDataset):
            source = dataset.windows(history.length, stack=history.stack)
        replay_buffer = source.replay_buffer(config.batch_size, config.device, config.seed)
    if total_updates is None and agent is not None:
        total_updates = agent.config.updates
    if replay_buffer is None or total_updates is None:
        raise ValueError(
            "replay_buffer and total_updates are needed; only with agent= and dataset= do they "
            "follow from the agent's config."
        )
    return replay_buffer, total_updates


def check_parts(replay_buffer: Any, evaluation: Any, logger: Any) -> None:
    """Raises ``ValueError`` for what cannot be sampled, called or logged to."""
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


def check_task(agent: Agent | None, dataset: DatasetSummary | None) -> None:
    """Raises ``ValueError`` where observations or actions of agent and data differ in keys or shapes.

    Bounds may differ.
    """
    if agent is None or dataset is None:
        return
    other = Task.of(dataset)
    for name in ("observation", "action"):
        spaces = [getattr(task, f"{name}_space") for task in (agent.task, other)]
        shapes = [_shapes(getattr(task, f"{name}_spec")) for task in (agent.task, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name}: the agent was made for {describe_space(spaces[0])} and the dataset "
                f"{dataset.name!r} has {describe_space(spaces[1])}; make_agent(config, dataset) "
                "with this dataset makes one that fits."
            )


def _shapes(spec: TensorSpec) -> dict[Any, tuple[torch.Size, int | None]]:
    """Shape of each leaf, and the number of categories where it is one."""
    leaves = spec.items(True, True) if isinstance(spec, Composite) else [("", spec)]
    return {key: (leaf.shape, getattr(leaf.space, "n", None)) for key, leaf in leaves}


def check_reward(agent: Agent | None, dataset: DatasetSummary | None) -> None:
    """Logs a warning where the config names a reward map and the data have raw rewards, or reverse."""
    if agent is None or dataset is None:
        return
    asked = agent.config.reward
    if (asked == "raw") is not (dataset.reward_map == RewardMap()):
        torchrl_logger.warning(
            f"config.reward is {asked!r} and the rewards of {dataset.name} have the map "
            f"{(dataset.reward_map.scale, dataset.reward_map.shift)} (1, 0 is raw). Training uses "
            f"them as they are; if that is not wanted, load_dataset(..., reward={asked!r})."
        )


def check_ranks(ranks: Ranks, step: Any) -> None:
    """Raises ``ValueError`` unless the step was made data parallel for these ranks, or for none."""
    of_step = part_of(step, "ranks")
    if (of_step is None) is not (ranks.size == 1) or (of_step is not None and of_step is not ranks):
        raise ValueError(
            f"the trainer has {ranks.size} ranks and the step "
            f"{'one process' if of_step is None else f'{of_step.size} ranks'}; write "
            "step = data_parallel(agent.step, ranks), and give both, step= and ranks=."
        )


def check_same_data(ranks: Ranks, data: DataState, replay_buffer: Any) -> None:
    """Raises ``ValueError`` on all ranks unless they have the same data and draw the same rows."""
    if ranks.size == 1:
        return
    ranks.check_same(
        data.state_dict(),
        "the ranks have different data: their datasets' digests differ. Load the same files with the "
        "same arguments on every rank.",
    )
    generator = getattr(replay_buffer, "generator", None)
    if generator is None and isinstance(replay_buffer, ReplayBuffer):
        generator = generator_of(replay_buffer)
    state: Any = None if generator is None else generator.get_state().tolist()
    if isinstance(replay_buffer, ShardedReplay):
        whole = replay_buffer.state_dict()
        state = [state, *(whole[name] for name in ("rotation", "since", "replace_every"))]
    ranks.check_same(
        state,
        "the ranks' replay buffers would draw different rows, and each rank must draw the whole "
        "batch: build the buffer with the same seed= and other arguments on every rank.",
    )


def folder_of_run(
    path: str | os.PathLike[str] | None, keep_last: int, torchrl_destinations: Mapping[str, Any]
) -> RunFolder | None:
    """The run's folder, if a ``path`` is given.

    Raises ``ValueError`` when one of TorchRL's destinations of checkpoints is given too.
    """
    if path is None:
        return None
    if any(value is not None for value in torchrl_destinations.values()):
        first, second, third = torchrl_destinations
        raise ValueError(
            f"folder= keeps checkpoints of its own; leave out {first}, {second} and {third}, or "
            "leave out folder."
        )
    return RunFolder(path, keep_last)


def with_checkpoint(destinations: Mapping[str, Any], folder: RunFolder | None) -> dict[str, Any]:
    """TorchRL's destinations of checkpoints, or the folder's, with a coordinator to write them."""
    result = dict(destinations)
    if folder is not None:
        result["checkpoint_rotation"] = folder.rotation
    if result["checkpoint"] is None and any(value is not None for value in result.values()):
        result["checkpoint"] = new_checkpoint()
    return result
