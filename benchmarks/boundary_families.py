"""Families of datasets for ``bench_boundaries.py``: episodes with known boundaries, by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Episode:
    """One more observation than rewards; a Dict observation is a dict of arrays by leaf."""

    observation: Array | dict[str, Array]
    reward: Array
    terminates: bool = False

    def __len__(self) -> int:
        return len(self.reward)


#: ``(generator, episodes, length)``: a length of 0 leaves it to the family. ``NATURAL`` ignore it.
Family: TypeAlias = Callable[[np.random.Generator, int, int], Iterator[Episode]]


def _lengths(rng: np.random.Generator, episodes: int, length: int) -> list[int]:
    return [length or int(rng.integers(30, 120)) for _ in range(episodes)]


def walk(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Random walks in three columns, from random places."""
    for steps in _lengths(rng, episodes, length):
        path = 3 * rng.standard_normal(3) + np.cumsum(0.1 * rng.standard_normal((steps + 1, 3)), 0)
        yield Episode(path.astype("f4"), rng.standard_normal(steps))


def true_horizon(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Walks that terminate after exactly 40 steps."""
    for episode in walk(rng, episodes, length or 40):
        yield Episode(episode.observation, episode.reward, True)


def pendulum(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Gymnasium's Pendulum under random torques, episodes of 200 steps."""
    for _ in range(episodes):
        angle, speed, states, rewards = rng.uniform(-np.pi, np.pi), rng.uniform(-1, 1), [], []
        for step in range((length or 200) + 1):
            states.append([np.cos(angle), np.sin(angle), speed])
            if step == (length or 200):
                break
            torque = rng.uniform(-2, 2)
            wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
            rewards.append(-(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2))
            speed = np.clip(speed + (15 * np.sin(angle) + 3 * torque) * 0.05, -8, 8)
            angle += speed * 0.05
        yield Episode(np.array(states, "f4"), np.array(rewards))


def _rollouts(name: str, rng: np.random.Generator, episodes: int, act: Any) -> Iterator[Episode]:
    env = gym.make(name)
    for _ in range(episodes):
        states, rewards, done = [env.reset(seed=int(rng.integers(2**31)))[0]], [], False
        while not done:
            state, reward, terminated, truncated, _ = env.step(act(states[-1]))
            states.append(state)
            rewards.append(reward)
            done = terminated or truncated
        yield Episode(np.array(states, "f4"), np.array(rewards, "f4"), bool(terminated))
    env.close()


def cartpole(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Gymnasium's CartPole: a noisy balancing policy that falls at some time."""

    def act(state: Array) -> int:
        push = int(state[2] + 0.5 * state[3] > 0)
        return push if rng.random() > 0.35 else int(rng.integers(2))

    yield from _rollouts("CartPole-v1", rng, episodes, act)


def mountain_car(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Gymnasium's MountainCar by a noisy energy pump; it starts where it often passes."""

    def act(state: Array) -> int:
        return 2 * int(state[1] > 0) if rng.random() > 0.2 else int(rng.integers(3))

    yield from _rollouts("MountainCar-v0", rng, episodes, act)


def halfcheetah(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """20 of the 100 episodes of ``halfcheetah_medium.npz``, 1,000 steps each."""
    with np.load(SHARED / "halfcheetah_medium.npz") as file:
        here, following, reward = (file[key] for key in ("obs", "next_obs", "reward"))
    for number in rng.permutation(100)[: min(episodes, 20)]:
        rows = slice(1000 * number, 1000 * number + min(length or 1000, 1000))
        path = np.concatenate([here[rows], following[rows][-1:]])
        yield Episode(path, reward[rows])


def door(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """D4RL's ``door-human-v0``, in a random order of its 25 episodes, which its ``terminals`` end."""
    import h5py

    with h5py.File(SHARED / "d4rl_door_human_v0.hdf5") as file:
        states, reward, ends = (file[key][:] for key in ("observations", "rewards", "terminals"))
    stops = np.flatnonzero(ends) + 1
    for number in rng.permutation(len(stops)):
        rows = slice(stops[number - 1] if number else 0, stops[number])
        yield Episode(states[rows], reward[rows][:-1])


def locomotion(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """A gait of six joints from rest: angles, speeds, contacts that change speeds at once."""
    for steps in _lengths(rng, episodes, length or 200):
        time = np.arange(steps + 1)[:, None]
        phase = 0.5 * time + rng.uniform(0, 6, 1) + np.arange(6)
        strength = 1 - np.exp(-time / 20)
        angles = strength * np.sin(phase) + 0.05 * rng.standard_normal((steps + 1, 6))
        speeds = strength * np.cos(phase) + 0.2 * rng.standard_normal((steps + 1, 6))
        speeds += 2.0 * (np.sin(phase) > 0.97)
        torso = np.cumsum(0.05 * rng.standard_normal((steps + 1, 3)), 0) * 0.3
        path = np.concatenate([angles, speeds, torso], 1)
        yield Episode(path.astype("f4"), speeds[1:, 0])


def maze(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """A point with velocity in a maze of two rooms, random starts and goals; some goals are reached."""
    for _ in range(episodes):
        place, goal, speed = rng.uniform(0, 8, 2), rng.uniform(0, 8, 2), np.zeros(2)
        states, reached = [[*place, *speed]], False
        while len(states) <= (length or 100) and not reached:
            pull = goal - place if len(states) < 300 else rng.standard_normal(2)
            speed = np.clip(0.9 * speed + 0.05 * pull + 0.05 * rng.standard_normal(2), -0.3, 0.3)
            moved = place + speed
            if (moved[0] - 4) * (place[0] - 4) < 0 and not 3 < moved[1] < 5:  # a wall with a door
                moved[0], speed[0] = place[0], 0.0
            place = np.clip(moved, 0, 8)
            states.append([*place, *speed])
            reached = not length and bool(np.linalg.norm(goal - place) < 0.4)
        rewards = np.zeros(len(states) - 1)
        rewards[-1] = reached
        yield Episode(np.array(states, "f4"), rewards, reached)


def collisions(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """A ball in a box: each collision reverses a speed at once."""
    for steps in _lengths(rng, episodes, length):
        place, speed = rng.uniform(0, 1, 2), rng.uniform(-0.12, 0.12, 2)
        states = [[*place, *speed]]
        for _ in range(steps):
            place = place + speed
            outside = (place < 0) | (place > 1)
            speed = np.where(outside, -speed, speed) + 0.004 * rng.standard_normal(2)
            place = np.clip(place, 0, 1)
            states.append([*place, *speed])
        yield Episode(np.array(states, "f4"), rng.standard_normal(steps))


def irregular(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Processes that return to a mean, seen at irregular times: some gaps are 30 times others."""
    for steps in _lengths(rng, episodes, length):
        gaps = rng.exponential(0.06, steps) * np.where(rng.random(steps) < 0.03, 15, 1)
        values = [rng.standard_normal(4)]
        for gap in gaps:
            keep = np.exp(-gap)
            noise = rng.standard_normal(4) * np.sqrt(1 - keep**2)
            values.append(keep * values[-1] + noise)
        yield Episode(np.array(values, "f4"), rng.standard_normal(steps))


def inventory(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Stock of three goods that falls by demand and jumps when it is replenished; many episodes."""
    for steps in _lengths(rng, episodes, length):
        stock, demand = rng.uniform(20, 100, 3), rng.uniform(3, 6, 3)
        states = [[*stock, *demand]]
        for _ in range(steps):
            stock = np.maximum(stock - rng.poisson(demand), 0.0)
            stock = np.where(stock < 15, 100.0, stock)
            demand = np.clip(demand + 0.1 * rng.standard_normal(3), 2, 8)
            states.append([*stock, *demand])
        yield Episode(np.array(states, "f4"), rng.standard_normal(steps))


def clinic(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Glucose of a patient each: slow, with rises after meals; insulin, and hours since a meal."""
    for steps in _lengths(rng, episodes, length):
        base, glucose, insulin, since = rng.uniform(90, 180), 0.0, 0.0, 0.0
        states = []
        for _ in range(steps + 1):
            meal = rng.random() < 0.08
            glucose = 0.92 * glucose + 4 * rng.standard_normal() + 70 * meal - 3 * insulin
            insulin = 0.8 * insulin + 2.0 * meal
            since = 0.0 if meal else since + 0.25
            states.append([base + glucose, insulin, since])
        yield Episode(np.array(states, "f4"), rng.standard_normal(steps))


def bandit(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Contexts that are independent; every row terminates."""
    for _ in range(20 * episodes):
        yield Episode(rng.standard_normal((2, 5)).astype("f4"), rng.standard_normal(1), True)


def contexts(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Sessions of independent contexts, 2 to 30 long; half of them terminate."""
    for _ in range(episodes):
        steps = length or int(rng.integers(2, 30))
        path = rng.standard_normal((steps + 1, 4)).astype("f4")
        yield Episode(path, rng.standard_normal(steps), bool(rng.random() < 0.5))


def _grid(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Array]:
    for steps in _lengths(rng, episodes, length):
        moves = rng.choice([-1, 1, -8, 8], steps)
        states = [int(rng.integers(64))]
        for move in moves:
            states.append(states[-1] + move if 0 <= states[-1] + move < 64 else states[-1])
        yield np.array(states)


def tabular(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Numbers of the states of a grid of 8 x 8, in a random order."""
    names = rng.permutation(64)
    for states in _grid(rng, episodes, length):
        yield Episode(names[states], rng.standard_normal(len(states) - 1), bool(rng.random() < 0.5))


def one_hot(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """The states of the grid as one-hot floats."""
    for states in _grid(rng, episodes, length):
        rows = np.eye(64, dtype="f4")[states]
        yield Episode(rows, rng.standard_normal(len(states) - 1), bool(rng.random() < 0.5))


def near_constant(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """Sensors that hardly ever change, and one that flickers by its last digit."""
    for steps in _lengths(rng, episodes, length):
        rare = np.cumsum(rng.random((steps + 1, 4)) < 0.02, 0) % 3
        flicker = 20 + 0.01 * rng.integers(-1, 2, (steps + 1, 2))
        path = np.concatenate([rare, flicker], 1)
        yield Episode(path.astype("f4"), rng.standard_normal(steps))


def pictures(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """A bright square that moves over noise, uint8 of 16 x 16 x 3."""
    for steps in _lengths(rng, min(episodes, 20), length):
        rows = rng.integers(0, 30, (steps + 1, 16, 16, 3)).astype(np.uint8)
        place = (np.cumsum(rng.integers(-1, 2, (steps + 1, 2)), 0) + rng.integers(16, size=2)) % 14
        for row, (y, x) in zip(rows, place, strict=True):
            row[y : y + 3, x : x + 3] = 255
        yield Episode(rows, rng.standard_normal(steps))


def mixed(rng: np.random.Generator, episodes: int, length: int) -> Iterator[Episode]:
    """A Dict of an arm's angles, a small camera, a gripper of two states."""
    for arm in walk(rng, min(episodes, 20), length):
        rows = len(arm) + 1
        camera = rng.integers(0, 255, (rows, 8, 8, 3)).astype(np.uint8)
        gripper = np.cumsum(rng.random(rows) < 0.1) % 2
        leaves = {"arm": arm.observation, "camera": camera, "gripper": gripper}
        yield Episode(leaves, arm.reward)


#: Families whose observations move from row to row; then those where rows do not show boundaries.
MOVING: tuple[Family, ...] = (
    walk, true_horizon, pendulum, cartpole, mountain_car, halfcheetah, door, locomotion, maze,
    collisions, irregular, inventory, clinic, mixed,
)  # fmt: skip
OTHERS: tuple[Family, ...] = (
    bandit, contexts, tabular, one_hot, near_constant, pictures,
)  # fmt: skip
#: Families whose episodes cannot have another length.
NATURAL = (cartpole, mountain_car, door, true_horizon, bandit)
