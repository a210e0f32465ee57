"""What a flow's deterministic action should be: candidates on two datasets with two modes.

    python benchmarks/bench_flow_action.py

Weighted and conditioned flows learn from the dataset of ``examples/iql_multimodal.py`` (actions in the
plane, an obstacle between the modes) and from that of ``docs/pictures/two_modes.py`` (one dimension).
Each way to act without randomness is scored in the same states: the share of states in which the
action lies between the modes (in the obstacle), the mean reward, and the time of an action for 1 and
256 states.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from iql_torchrl import Agent, policies
from iql_torchrl.losses import LossCritics
from study import Row, Settings, Task, make_parser, milliseconds, run

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs" / "pictures")]
import iql_multimodal  # noqa: E402
import two_modes  # noqa: E402

Choice = Callable[[Any, TensorDict, Tensor], Tensor]
FLOWS: Mapping[str, Settings] = {
    "weighted": {},
    "cloning": {"temperature": 0.0},
    "conditioned, w = 1": {"actor_objective": "conditioned_flow"},
    "conditioned, w = 3": {"actor_objective": "conditioned_flow", "guidance": 3.0},
}


def plane(state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each action is between the modes, and its reward."""
    return iql_multimodal.hits(action), iql_multimodal.returns(state[:, 0], action)


def line(state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = action[:, 0]
    return np.abs(a) < two_modes.HALF_WIDTH, two_modes.reward(state[:, 0], a)


def of_noise(noise: Tensor) -> Choice:
    def choose(actor: Any, data: TensorDict, _: Tensor) -> Tensor:
        rows = (len(data), actor.action_features)
        return actor.from_noise(data, noise.to(actor.fixed_noise).expand(rows))

    return choose


def candidates(actor: Any, data: TensorDict, noise: Tensor) -> Tensor:
    """Actions ``(B, N, A)`` of the same N noise vectors in every state."""
    noise = noise[:, None].expand(-1, len(data), -1)
    return actor.from_noise(data, noise).movedim(0, 1)


def picked(score: Callable[[Tensor], Tensor], count: int) -> Choice:
    """Of ``count`` candidates that with the least ``score`` of the distances ``(B, N, N)``."""

    def choose(actor: Any, data: TensorDict, noise: Tensor) -> Tensor:
        actions = candidates(actor, data, noise[:count])
        unit = actor.normalise(actions)
        best = score(torch.cdist(unit, unit)).argmin(-1)
        return actions[torch.arange(len(data)), best]

    return choose


def neighbours(distance: Tensor) -> Tensor:
    """Sum of the distances to the nearest quarter of the candidates: small where they are dense."""
    nearest: Tensor = distance.topk(distance.shape[-1] // 4 + 1, largest=False).values
    return nearest.sum(-1)


WAYS: dict[str, Choice] = {
    "drawn": lambda actor, data, _: actor.from_noise(
        data, torch.randn(len(data), actor.action_features)
    ),
    "one fixed vector": lambda actor, data, _: of_noise(actor.fixed_noise)(actor, data, _),
    "noise zero": of_noise(torch.zeros(1)),
    "noise 1 in every dimension": of_noise(torch.ones(1)),
    "mean of 32": lambda actor, data, noise: candidates(actor, data, noise).mean(1),
    "medoid of 32": picked(lambda distance: distance.sum(-1), 32),
    **{f"densest of {count}": picked(neighbours, count) for count in (8, 16, 32)},
}


def scores(score: Any, states: int, agent: Agent) -> Iterator[Row]:
    state = np.random.default_rng(1).uniform(-1, 1, (states, 1)).astype(np.float32)
    data = TensorDict({"observation": torch.from_numpy(state)}, [states])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(32, agent.actor.action_features, generator=generator)
    best = policies.best_of(agent.actor, LossCritics(agent.loss), 32)
    ways = WAYS | {"best of 32 by the critics": lambda _, data, __: best(data)["action"]}
    for way, choose in ways.items():
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            between, reward = score(state, choose(agent.actor, data, noise).numpy())
            times = {
                f"ms {size}": milliseconds(partial(choose, agent.actor, data[:size], noise))
                for size in (1, 256)
            }
        row = {"between": float(between.mean()), "reward": float(reward.mean())}
        yield {"way": way, **row, **times}


def task_of(make_data: Any, config: Any, score: Any, o: argparse.Namespace) -> Task:
    config, measure = replace(config, policy="flow"), partial(scores, score, o.states)
    return Task(data=make_data(), config=config, variants=FLOWS, scores=measure)


TASKS = {
    "plane": partial(
        task_of, partial(iql_multimodal.make_dataset, 0), iql_multimodal.CONFIG, plane
    ),
    "line": partial(task_of, two_modes.make_dataset, two_modes.CONFIG, line),
}


def main() -> None:
    parser = make_parser(__doc__, "flow_action", tasks=TASKS, updates=4_000, seeds=4)
    parser.add_argument("--states", type=int, default=4_000)
    run(parser.parse_args(), TASKS, keys=("task", "variant", "way"))


if __name__ == "__main__":
    main()
