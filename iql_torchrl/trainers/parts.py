"""The parts of a trainer: defaults for those that are left out, and checks of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchrl import logger as torchrl_logger
from torchrl.data import Composite, TensorSpec
from torchrl.trainers import LRSchedulerHook
from torchrl.trainers.trainers import TargetNetUpdaterHook

from iql_torchrl.agent.build import Agent, ends_before
from iql_torchrl.agent.task import Task
from iql_torchrl.data import DatasetSummary, RewardMap, ShardedDataset
from iql_torchrl.descriptions import describe_space
from iql_torchrl.distributed import Ranks
from iql_torchrl.losses import ImplicitQLoss
from iql_torchrl.networks import history_of
from iql_torchrl.update.step import IQLStep, part_of


def one_step(
    step: Any, agent: Agent | None, loss: Any, optimizer: Any, target_net_updater: Any
) -> Any:
    """The step to train with: ``step``, the agent's step, or one made of the other parts."""
    if step is None and agent is not None:
        step = agent.step
    if isinstance(step, ImplicitQLoss):
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
) -> tuple[Any, Any]:
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
                    "log fits into memory."
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
    return replay_buffer, total_updates


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


def check_agent(
    agent: Agent, dataset: DatasetSummary | None, total_updates: int, *, warns: bool
) -> None:
    """Refuse data of other keys or shapes; with ``warns`` report other rewards, a short schedule."""
    if warns and (after := ends_before(agent.config, total_updates)):
        torchrl_logger.warning(after)
    if dataset is None:
        return
    other, asked, mapped = Task.of(dataset), agent.config.reward, dataset.reward_map
    for name in ("observation", "action"):
        shapes = [_shapes(getattr(task, f"{name}_spec")) for task in (agent.task, other)]
        if shapes[0] != shapes[1]:
            spaces = [describe_space(getattr(t, f"{name}_space")) for t in (agent.task, other)]
            raise ValueError(
                f"{name}: the agent was made for {spaces[0]} and the dataset {dataset.name!r} has "
                f"{spaces[1]}; make_agent(config, dataset) with this dataset makes one that fits."
            )
    if warns and (asked == "raw") is not (mapped == RewardMap()):
        torchrl_logger.warning(
            f"config.reward is {asked!r} and the rewards of {dataset.name} have the map "
            f"{(mapped.scale, mapped.shift)} (1, 0 is raw). Training uses them as they are; if that "
            f"is not wanted, load_dataset(..., reward={asked!r})."
        )


def _shapes(spec: TensorSpec) -> dict[Any, tuple[torch.Size, int | None]]:
    """Shape of each leaf, and the number of categories where it is one."""
    leaves = spec.items(True, True) if isinstance(spec, Composite) else [("", spec)]
    return {key: (leaf.shape, getattr(leaf.space, "n", None)) for key, leaf in leaves}


def is_called_by_step(step: Any, op: Callable[..., Any]) -> bool:
    """Whether the hook ``op`` would call a target updater or scheduler that ``step`` calls itself."""
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
