"""The finished parts that a trainer is given: whether they belong together, and how they divide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from iql_torchrl.agent.build import Agent
from iql_torchrl.data import OfflineDataset
from iql_torchrl.objectives.iql import ImplicitQLoss
from iql_torchrl.update.step import IQLStep, part_of

__all__ = ["check_intervals", "check_parts", "filled_in", "how_to_continue", "one_step", "share"]


def one_step(
    step: Any, agent: Agent | None, loss: Any, optimizer: Any, target_net_updater: Any
) -> Any:
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
    replay_buffer: Any, total_updates: Any, agent: Agent | None, dataset: OfflineDataset | None
) -> tuple[Any, Any]:
    """Buffer and number of updates: as given, or as the agent's config says."""
    if replay_buffer is None and agent is not None and dataset is not None:
        config = agent.config
        replay_buffer = dataset.replay_buffer(config.batch_size, config.device, config.seed)
    if total_updates is None and agent is not None:
        total_updates = agent.config.updates
    if replay_buffer is None or total_updates is None:
        raise ValueError(
            "replay_buffer and total_updates are needed; only with agent= and dataset= do they "
            "follow from the agent's config."
        )
    return replay_buffer, total_updates


def share(total: int, parts: int, per_call: int) -> int:
    """About ``total / parts``, in whole calls of ``per_call`` updates."""
    return max(1, math.ceil(total / parts / per_call)) * per_call


def check_intervals(intervals: Mapping[str, Any], per_call: int) -> None:
    """Raises ``ValueError`` for what counts no updates, or no whole calls of the step."""
    for name, value in intervals.items():
        if name == "save_trainer_interval" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it counts updates: an integer >= 1.")
        if value % per_call and name != "save_trainer_interval":
            raise ValueError(
                f"{name} is {value}, and the step makes {per_call} updates a call; give a multiple "
                "of that."
            )


def check_parts(replay_buffer: Any, evaluation: Any, logger: Any) -> None:
    """Raises ``ValueError`` for what cannot be sampled, called or logged to."""
    if evaluation is not None and not (callable(evaluation) or hasattr(evaluation, "submit")):
        raise ValueError(
            f"evaluation is {evaluation!r}; wanted a function without arguments, such as "
            "partial(evaluate, policy, make_env, episodes=20, seed=0), or a BackgroundEvaluation."
        )
    if logger is not None and not hasattr(logger, "log_scalar"):
        raise ValueError(
            f"logger is {logger!r}; wanted one of TorchRL's loggers, such as "
            "torchrl.record.loggers.get_logger('csv', folder, name)."
        )
    if not callable(getattr(replay_buffer, "sample", None)):
        raise ValueError(
            f"replay_buffer is {type(replay_buffer).__name__}, which has no sample(); pass "
            "dataset.replay_buffer(batch_size) or a TorchRL replay buffer."
        )


def how_to_continue(trainer: Any) -> str:
    """One or two sentences for the user of a trainer that was interrupted."""
    command = trainer.resume_command
    if command is None and trainer.folder is not None:
        command = "trainer.resume().train()"
    elif command is None and trainer.save_trainer_file is not None:
        command = f"trainer.load_from_file({str(trainer.save_trainer_file)!r}).train()"
    elif command is None and trainer.checkpoint_rotation is not None:
        command = "trainer.load_from_file(the newest checkpoint).train()"
    if command is None:
        return (
            "Nothing was saved, because the trainer has no folder=. In this process, go on with: "
            "trainer.train()"
        )
    return f"Go on with: {command}"
