"""Learn from a log of camera images: drive a point to a mark that is seen in a picture of 16 x 16.

The log holds the pictures and the actions of drivers who take turns at every step: each heads for
the mark with a skill between -0.5 (away from it) and 1 (straight to it), with noise. Compared are the
log; behaviour cloning and IQL from pictures, with one convolutional encoder for policy, critics and V;
and IQL from the coordinates that the pictures show, with the same actions, as a reference.
"""

import csv
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, OfflineDataset, evaluate, load_dataset, make_agent
from iql_torchrl.evaluation import Evaluation

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.spaces import Box
from numpy.typing import NDArray

SIDE, STEPS, SPEED, REACHED, NOISE = 16, 20, 0.15, 0.15, 0.3
EVALUATION_SEED = 10_000
CONFIG = IQLConfig(
    batch_size=128,
    discount=0.95,
    hidden=(128, 128),
    reward="raw",
    schedule="constant",
    temperature=5.0,
    actor_lr=1e-3,
    critic_lr=1e-3,
    value_lr=1e-3,
    # Few updates: an encoder that moves fast changes the features faster than policy and V can follow.
    encoder_lr=1e-5,
    image_features=256,
)


class Drive(gym.Env[Any, Any]):
    """A point and a mark in [-1, 1]^2; the reward is minus their distance, for ``STEPS`` steps.

    Observations: pictures ``(16, 16, 3)`` uint8 with the point in green and the mark in red, or with
    ``pictures=False`` the four coordinates. Actions: the point's step, divided by ``SPEED``.
    """

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = (
            Box(0, 255, (SIDE, SIDE, 3), np.uint8) if pictures else Box(-1.0, 1.0, (4,), np.float32)
        )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.point, self.mark = self.np_random.uniform(-1, 1, (2, 2))
        self.clock = 0
        return self.observation(), {}

    def observation(self) -> NDArray[Any]:
        coordinates = np.concatenate([self.point, self.mark]).astype(np.float32)
        return picture(coordinates[None])[0] if self.pictures else coordinates

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.point = np.clip(self.point + SPEED * np.asarray(action, np.float64), -1, 1)
        self.clock += 1
        distance = float(np.linalg.norm(self.point - self.mark))
        info = {"success": distance < REACHED}
        return self.observation(), -distance, False, self.clock == STEPS, info


def picture(coordinates: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pictures ``(N, 16, 16, 3)`` of coordinates ``(N, 4)``: two blurred dots."""
    line = np.linspace(-1, 1, SIDE)
    image = np.zeros((len(coordinates), SIDE, SIDE, 3), np.uint8)
    for channel, first in ((1, 0), (0, 2)):
        across, down = (coordinates[:, first + i, None] - line for i in (0, 1))
        square = across[:, None, :] ** 2 + down[:, :, None] ** 2
        image[..., channel] = 255 * np.exp(-square / (2 * 0.25**2))
    return image


@dataclass(frozen=True, kw_only=True)
class Options:
    updates: int = 2_000
    """number of gradient updates of each policy, >= 1"""
    episodes: int = 2_000
    """episodes of the log, >= 2"""
    seed: int = 0
    """seed of the log, the initial weights and the batches, >= 0"""
    output: Path = Path("runs")
    """where the results are written"""

    def __post_init__(self) -> None:
        if self.updates < 1 or self.episodes < 2 or self.seed < 0:
            raise ValueError(
                f"updates is {self.updates}, episodes {self.episodes} and seed {self.seed}; expected "
                "at least 1, 2 and 0."
            )


def make_logs(episodes: int, seed: int) -> tuple[OfflineDataset, OfflineDataset]:
    """The same log with pictures and with coordinates."""
    generator = np.random.default_rng(seed)
    env = Drive(pictures=False)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("observation", "action", "reward", "next_observation", "truncated")
    }
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        over = False
        while not over:
            skill = generator.uniform(-0.5, 1)
            offset = env.mark - env.point
            mean = skill * offset / max(SPEED, float(np.linalg.norm(offset)))
            action = np.clip(mean + NOISE * generator.normal(size=2), -1, 1).astype(np.float32)
            later, reward, _, over, _ = env.step(action)
            for name, value in zip(rows, (observation, action, reward, later, over), strict=True):
                rows[name].append(value)
            observation = later
    columns = {name: np.asarray(values) for name, values in rows.items()}
    columns["terminated"] = np.zeros(len(columns["reward"]), bool)
    seen = {name: picture(columns[name]) for name in ("observation", "next_observation")}
    pictures = load_dataset(columns | seen, env=Drive)
    coordinates = load_dataset(columns, env=partial(Drive, pictures=False))
    return pictures, coordinates


def train(config: IQLConfig, dataset: OfflineDataset, name: str) -> Evaluation:
    """Train an agent of ``config`` and run it in 100 episodes."""
    began = time.perf_counter()
    agent = make_agent(config, dataset)
    buffer = dataset.replay_buffer(config.batch_size, seed=config.seed)
    for update in range(1, config.updates + 1):
        agent.step(buffer.sample())
        if update % 500 == 0 or update == config.updates:
            spent = time.perf_counter() - began
            print(f"  {name}: {update:,} updates, {spent:.0f} s", flush=True)
    return evaluate(agent.policy, dataset.make_env, episodes=100, num_envs=50, seed=EVALUATION_SEED)


def draw(path: Path, results: dict[str, NDArray[np.float64]]) -> None:
    """Returns of the episodes of each policy, and one picture of the log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
    left.imshow(picture(np.array([[-0.5, 0.4, 0.6, -0.3]], np.float32))[0])
    left.set(title="what the policy sees", xticks=[], yticks=[])
    right.boxplot(list(results.values()), orientation="horizontal", tick_labels=list(results))
    right.set(title="returns of the episodes", xlabel="minus the sum of distances")
    right.invert_yaxis()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    options = tyro.cli(Options, args=arguments, description=__doc__.split("\n\n")[0])
    folder = options.output / f"pixels-seed{options.seed}"
    pictures, coordinates = make_logs(options.episodes, options.seed)
    pictures.print_notes()
    megabytes = pictures.transitions.bytes() / 2**20
    print(f"The log: {options.episodes:,} episodes, {len(pictures):,} steps, {megabytes:.0f} MiB.")
    config = replace(CONFIG, updates=options.updates, seed=options.seed)
    results = {"log": pictures.episode_returns}
    rows = [{"policy": "log", "return": float(pictures.episode_returns.mean()), "success": ""}]
    for name, chosen, dataset in (
        ("cloning, pictures", replace(config, temperature=0.0), pictures),
        ("IQL, pictures", config, pictures),
        ("IQL, coordinates", config, coordinates),
    ):
        result = train(chosen, dataset, name)
        results[name] = np.asarray(result.returns)
        success = float(np.mean(result.successes))
        rows.append({"policy": name, "return": float(results[name].mean()), "success": success})
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    print(f"\n{'policy':20}{'return':>10}{'at the mark':>14}")
    for row in rows:
        at_mark = f"{row['success']:14.0%}" if row["success"] != "" else ""
        print(f"{row['policy']:20}{row['return']:10.2f}{at_mark}")
    draw(folder / "returns.png", results)
    print(f"\nWritten to {folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
