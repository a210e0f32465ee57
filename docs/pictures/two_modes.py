"""Where seven policies act that learned from one dataset with two modes: two_modes.png.

    python docs/pictures/two_modes.py

The observation is one number s in [-1, 1], the action one number a in [-1, 1]. An action with
``|a| < 0.35`` hits an obstacle, and the reward is -2. Past the obstacle the reward is ``s * sign(a)``:
the upper side is better where s > 0, the lower one where s < 0. It passes on both sides equally
often, everywhere. It takes about a minute on one core.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl import IQLConfig, OfflineDataset, load_dataset, make_agent, policies
from iql_torchrl.losses import LossCritics

Array = NDArray[np.float64]
HALF_WIDTH = 0.35  # of the obstacle
ROWS, UPDATES, DRAWN = 8_000, 1_500, 600
CONFIG = IQLConfig(
    hidden=(64, 64), reward="raw", temperature=5.0, expectile=0.9, schedule="constant",
    actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
)  # fmt: skip
POLICIES: dict[str, dict[str, Any]] = {
    "cloning, Gaussian": {"temperature": 0.0},
    "IQL, Gaussian": {},
    "IQL, deterministic": {"policy": "deterministic"},
    "IQL, mixture": {"policy": "mixture"},
    "DDPG+BC": {"policy": "deterministic", "actor_objective": "ddpg_bc", "bc_weight": 0.1},
    "flow, cloning": {"policy": "flow", "temperature": 0.0},
}
COLOURS = {"better": "#0072B2", "worse": "#E69F00", "hit": "#D55E00"}


def reward(state: Array, action: Array) -> Array:
    return np.where(np.abs(action) < HALF_WIDTH, -2.0, state * np.sign(action))


def make_dataset(seed: int = 0) -> OfflineDataset:
    """Episodes of one step that pass above and below with equal probability."""
    draw = np.random.default_rng(seed)
    state, side = draw.uniform(-1, 1, ROWS), draw.choice([-1.0, 1.0], ROWS)
    action = (side * (0.65 + 0.1 * draw.normal(size=ROWS))).clip(-1, 1)
    return load_dataset(
        {
            "observation": state[:, None].astype(np.float32),
            "action": action[:, None].astype(np.float32),
            "reward": reward(state, action),
            "next_observation": state[:, None].astype(np.float32),
            "terminated": np.ones(ROWS, bool),
        },
        action_space=Box(-1.0, 1.0, (1,), np.float32),
    )


def trained(dataset: OfflineDataset) -> dict[str, Any]:
    """The policies by name; the last one acts with the best of 32 actions of the one before."""
    result = {}
    for name, settings in POLICIES.items():
        torch.manual_seed(0)
        agent = make_agent(replace(CONFIG, **settings), dataset)
        buffer = dataset.replay_buffer(CONFIG.batch_size, seed=0)
        for _ in range(UPDATES):
            agent.step(buffer.sample())
        result[name] = agent.policy.eval()
        print(f"trained: {name}", flush=True)
    result["flow, best of 32"] = policies.best_of(agent.actor, LossCritics(agent.loss), 32)
    return result


def act(policy: Any, state: Array) -> Array:
    """Actions as the policy draws them."""
    data = TensorDict({"observation": torch.as_tensor(state[:, None]).float()}, [len(state)])
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return policy(data)["action"].double().numpy()[:, 0]


def draw_panels(drawn: dict[str, tuple[Array, Array]]) -> Figure:
    figure = Figure(figsize=(8.4, 4.9), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for number, (axes, (name, (state, action))) in enumerate(
        zip(panels.flat, drawn.items(), strict=True)
    ):
        axes.axhspan(-HALF_WIDTH, HALF_WIDTH, color="0.85", lw=0)
        hit = np.abs(action) < HALF_WIDTH
        better = ~hit & (np.sign(action) == np.sign(state))
        for kind, rows in (("better", better), ("worse", ~hit & ~better), ("hit", hit)):
            axes.scatter(state[rows], action[rows], s=4, color=COLOURS[kind], lw=0)
        value = reward(state, action).mean()
        axes.set_title(f"{name}\nmean reward {value:.2f}, hits {hit.mean():.0%}", fontsize=8.5)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        if number % 4 == 0:
            axes.set_ylabel("action")
        if number > 3:
            axes.set_xlabel("observation s")
    figure.suptitle(
        "Each point is an action: on the better side (blue), on the worse side (orange), "
        "into the obstacle (red, grey band)",
        fontsize=9,
    )
    return figure


def main() -> None:
    torch.set_num_threads(1)
    dataset = make_dataset()
    state = np.random.default_rng(1).uniform(-1, 1, DRAWN)
    logged = (
        dataset.transitions[key][:DRAWN, 0].double().numpy() for key in ("observation", "action")
    )
    drawn = {"the dataset": tuple(logged)}
    torch.manual_seed(0)
    drawn |= {name: (state, act(policy, state)) for name, policy in trained(dataset).items()}
    for name, (states, actions) in drawn.items():
        hit = (np.abs(actions) < HALF_WIDTH).mean()
        print(f"{name:<20} mean reward {reward(states, actions).mean():6.2f}, hits {hit:.0%}")
    path = Path(__file__).with_suffix(".png")
    draw_panels(drawn).savefig(path, dpi=100)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
