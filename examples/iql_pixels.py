"""Learn from a log of camera images: drive a point to a mark that is seen in a picture of 16 x 16.

The log holds the pictures and the actions of drivers who take turns at every step: each heads for
the mark with a skill between -0.5 (away from it) and 1 (straight to it), with noise. Compared are the
log; behaviour cloning and IQL from pictures, with one convolutional encoder for policy, critics and V;
and IQL from the coordinates that the pictures show, with the same actions, as a reference.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.report import text_table, write_rows
from iql_torchrl.report.figures import save

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation
from matplotlib.figure import Figure
from numpy.typing import NDArray

SIDE, STEPS, SPEED, REACHED, NOISE = 16, 20, 0.15, 0.15, 0.3
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


class Drive(gym.Env):
    """A point and a mark in [-1, 1]^2; the reward is minus their distance, for ``STEPS`` steps.

    Observations: the four coordinates. Actions: the point's step, divided by ``SPEED``.
    """

    action_space = Box(-1.0, 1.0, (2,), np.float32)
    observation_space = Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.point, self.mark = self.np_random.uniform(-1, 1, (2, 2))
        self.clock = 0
        return self.observation(), {}

    def observation(self) -> NDArray[Any]:
        return np.concatenate([self.point, self.mark]).astype(np.float32)

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


def seen() -> gym.Env:
    """``Drive`` with pictures ``(16, 16, 3)`` uint8: the point in green, the mark in red."""
    space = Box(0, 255, (SIDE, SIDE, 3), np.uint8)
    return TransformObservation(Drive(), lambda coordinates: picture(coordinates[None])[0], space)


def make_logs(episodes, seed):
    """The same log with pictures and with coordinates."""
    generator = np.random.default_rng(seed)
    env = Drive()
    steps = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        over = False
        while not over:
            skill = generator.uniform(-0.5, 1)
            offset = env.mark - env.point
            mean = skill * offset / max(SPEED, float(np.linalg.norm(offset)))
            action = np.clip(mean + NOISE * generator.normal(size=2), -1, 1).astype(np.float32)
            later, reward, ended, over, _ = env.step(action)
            steps.append((observation, action, reward, later, ended, over))
            observation = later
    names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    columns = dict(zip(names, map(np.asarray, zip(*steps, strict=True)), strict=True))
    pictures = {name: picture(columns[name]) for name in ("observation", "next_observation")}
    return load_dataset(columns | pictures, env=seen), load_dataset(columns, env=Drive)


def draw(path: Path, results: dict[str, NDArray[np.float64]]) -> None:
    """Returns of the episodes of each policy, and one picture of the log."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
    left.imshow(picture(np.array([[-0.5, 0.4, 0.6, -0.3]], np.float32))[0])
    left.set(title="what the policy sees", xticks=[], yticks=[])
    right.boxplot(list(results.values()), orientation="horizontal", tick_labels=list(results))
    right.set(title="returns of the episodes", xlabel="minus the sum of distances")
    right.invert_yaxis()
    save(figure, path)


@cli.errors_in_one_line()
def main(
    updates: int = 2_000, episodes: int = 2_000, seed: int = 0, output: Path = Path("runs")
) -> None:
    """Make the log, train three policies, and print a table.

    Args:
        updates: number of gradient updates of each policy.
        episodes: episodes of the log, >= 2.
        seed: seed of the log, the initial weights and the batches.
        output: where the results are written.
    """
    if episodes < 2:
        raise ValueError(f"episodes is {episodes}; expected at least 2.")
    config = replace(CONFIG, updates=updates, seed=seed)
    pictures, coordinates = make_logs(episodes, seed)
    pictures.print_notes()
    megabytes = pictures.transitions.bytes() / 2**20
    print(f"The log: {episodes:,} episodes, {len(pictures):,} steps, {megabytes:.0f} MiB.")
    results = {"log": pictures.episode_returns}
    rows: list[dict[str, Any]] = [{"policy": "log", "return": results["log"].mean()}]
    for name, chosen, dataset in (
        ("cloning, pictures", replace(config, temperature=0.0), pictures),
        ("IQL, pictures", config, pictures),
        ("IQL, coordinates", config, coordinates),
    ):
        print(f"Training: {name}", flush=True)
        agent = make_agent(chosen, dataset)
        OfflineTrainer(agent=agent, dataset=dataset).train()
        played = evaluate(agent.policy, dataset.make_env, episodes=100, num_envs=50, seed=10_000)
        results[name], success = played.returns, played.successes.mean()
        rows.append({"policy": name, "return": results[name].mean(), "success": success})
    folder = output / f"pixels-seed{seed}"
    write_rows(folder / "metrics.csv", rows)
    table = [["policy", "return", "at the mark"]]
    for row in rows:
        at_mark = f"{row['success']:.0%}" if "success" in row else ""
        table.append([row["policy"], f"{row['return']:.2f}", at_mark])
    print("\n" + text_table(table))
    draw(folder / "returns.png", results)
    print(f"\nWritten to {folder}/")


if __name__ == "__main__":
    tyro.cli(main)
