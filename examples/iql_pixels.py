"""Learn from a dataset of camera images: drive a point to a mark that is seen in a picture of 16 x 16.

The dataset holds the pictures and the actions of drivers who take turns at every step: each heads for
the mark with a skill between -0.5 (away from it) and 1 (straight to it), with noise. Compared are the
dataset; behaviour cloning and IQL from pictures, with one convolutional encoder for policy, critics
and V; and IQL from the coordinates that the pictures show, with the same actions, as a reference.
"""

from dataclasses import replace

from iql_torchrl import IQLConfig, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.report import text_table

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation

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

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.mark = self.np_random.uniform(-1, 1, (2, 2))
        self.clock = 0
        return self.observation(), {}

    def observation(self):
        return np.concatenate([self.point, self.mark]).astype(np.float32)

    def step(self, action):
        self.point = np.clip(self.point + SPEED * np.asarray(action, np.float64), -1, 1)
        self.clock += 1
        distance = float(np.linalg.norm(self.point - self.mark))
        info = {"success": distance < REACHED}
        return self.observation(), -distance, False, self.clock == STEPS, info


def picture(coordinates):
    """Pictures ``(N, 16, 16, 3)`` of coordinates ``(N, 4)``: the point in green, the mark in red."""
    line = np.linspace(-1, 1, SIDE)
    image = np.zeros((len(coordinates), SIDE, SIDE, 3), np.uint8)
    for channel, first in ((1, 0), (0, 2)):
        across, down = (coordinates[:, first + i, None] - line for i in (0, 1))
        square = across[:, None, :] ** 2 + down[:, :, None] ** 2
        image[..., channel] = 255 * np.exp(-square / (2 * 0.25**2))
    return image


def seen():
    """``Drive`` with pictures ``(16, 16, 3)`` uint8 as observations."""
    space = Box(0, 255, (SIDE, SIDE, 3), np.uint8)
    return TransformObservation(Drive(), lambda coordinates: picture(coordinates[None])[0], space)


def make_datasets(episodes, seed):
    """The same dataset with pictures and with coordinates."""
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


@cli.errors_in_one_line()
def main(updates: int = 2_000, episodes: int = 2_000, seed: int = 0) -> None:
    """Make the dataset, train three policies, and print a table.

    Args:
        updates: number of gradient updates of each policy.
        episodes: episodes of the dataset, >= 2.
        seed: seed of the dataset, the initial weights and the batches.
    """
    if episodes < 2:
        raise ValueError(f"episodes is {episodes}; expected at least 2.")
    config = replace(CONFIG, updates=updates, seed=seed)
    pictures, coordinates = make_datasets(episodes, seed)
    pictures.print_notes()
    table = [["policy", "return", "at the mark"]]
    table.append(["dataset", f"{pictures.episode_returns.mean():.2f}", ""])
    for name, chosen, dataset in (
        ("cloning, pictures", replace(config, temperature=0.0), pictures),
        ("IQL, pictures", config, pictures),
        ("IQL, coordinates", config, coordinates),
    ):
        print(f"Training: {name}", flush=True)
        agent = make_agent(chosen, dataset)
        OfflineTrainer(agent=agent, dataset=dataset).train()
        played = evaluate(agent.policy, dataset.make_env, episodes=100, num_envs=50, seed=10_000)
        table.append([name, f"{played.returns.mean():.2f}", f"{played.successes.mean():.0%}"])
    print("\n" + text_table(table))


if __name__ == "__main__":
    tyro.cli(main)
