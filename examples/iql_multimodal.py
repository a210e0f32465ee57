"""One log, seven policies: an obstacle that the log passes on both sides, and whose middle is a hit.

An action is a point in the plane through which one goes from the left to the right. Each observation
is a wind in [-1, 1], which makes one of the sides better. The log passes above and below equally
often in every wind. A policy with one mode that imitates it goes through the middle, where the
obstacle is. Compared are the log; cloning and IQL with a Gaussian; IQL with a mixture; DDPG+BC; a flow
that clones the log; the same flow with IQL's weights; and the clone with the best of 32 actions by the
critics (IFQL). Each is scored exactly, as it draws its actions and without randomness.

The log covers all good actions here, so the critics are right about them. Where a log is small or
leaves actions out, DDPG+BC and the best of many actions follow the critics' errors, and weighted
regression can be better.
"""

import csv
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, IQLPopulation, OfflineDataset, load_dataset, policies
from iql_torchrl.losses import LossCritics

import numpy as np
import torch
import tyro
from gymnasium.spaces import Box
from numpy.typing import NDArray
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

Array = NDArray[np.float64]
START, GOAL, RADIUS = np.array([-1.5, 0.0]), np.array([1.5, 0.0]), 0.4
HIT = -2.0  # the return of a hit
ROWS = 20_000
STATES = 2_000  # winds in which a policy is scored
DRAWN = 400  # samples of a picture
CONFIG = IQLConfig(
    batch_size=256,
    hidden=(64, 64),
    reward="raw",
    temperature=5.0,
    expectile=0.9,
    actor_lr=1e-3,
    critic_lr=1e-3,
    value_lr=1e-3,
)
# Policies that differ in the temperature alone are trained as one population.
METHODS: tuple[tuple[dict[str, Any], dict[str, float]], ...] = (
    ({}, {"cloning": 0.0, "IQL": CONFIG.temperature}),
    ({"policy": "mixture"}, {"IQL, mixture": CONFIG.temperature}),
    ({"actor_objective": "ddpg_bc", "bc_weight": 0.1}, {"DDPG+BC": CONFIG.temperature}),
    ({"policy": "flow"}, {"flow, IQL": CONFIG.temperature, "flow": 0.0}),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    updates: int = 1_500
    """number of gradient updates of each policy, >= 1"""
    seed: int = 0
    """seed of the log, the initial weights and the batches, >= 0"""
    output: Path = Path("runs")
    """where the results are written"""

    def __post_init__(self) -> None:
        if self.updates < 1 or self.seed < 0:
            raise ValueError(
                f"updates is {self.updates} and seed {self.seed}; expected at least 1 and 0."
            )


def hits(point: Array) -> NDArray[np.bool_]:
    """Whether the way from start to goal through ``point`` ``(N, 2)`` crosses the obstacle."""
    return np.minimum(distance(START, point), distance(point, GOAL)) < RADIUS


def distance(one: Array, other: Array) -> Array:
    """Distance of the origin from the segments between two points."""
    along = other - one
    nearest = np.clip(-(one * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return np.linalg.norm(one + nearest[..., None] * along, axis=-1)


def returns(wind: Array, point: Array) -> Array:
    """4 less the length of the way, plus wind / 2 above and minus wind / 2 below; ``HIT`` on a hit."""
    length = np.linalg.norm(point - START, axis=-1) + np.linalg.norm(GOAL - point, axis=-1)
    return np.where(hits(point), HIT, 4 - length + 0.5 * wind * np.sign(point[:, 1]))


def make_log(seed: int) -> OfflineDataset:
    """Ways around the obstacle, above and below with equal probability; some touch it."""
    generator = np.random.default_rng(seed)
    wind = generator.uniform(-1, 1, ROWS)
    side = generator.choice([-1.0, 1.0], ROWS)
    noise = generator.normal(size=(ROWS, 2))
    point = np.stack([0.3 * noise[:, 0], side * (0.7 + 0.12 * noise[:, 1])], -1).clip(-1, 1)
    columns = {
        "observation": wind[:, None].astype(np.float32),
        "action": point.astype(np.float32),
        "reward": returns(wind, point).astype(np.float32),
        "next_observation": wind[:, None].astype(np.float32),
        "terminated": np.ones(ROWS, bool),
        "truncated": np.zeros(ROWS, bool),
    }
    space = Box(-1.0, 1.0, (2,), np.float32)
    dataset = replace(load_dataset(columns), action_space=space)
    dataset.print_notes()
    return dataset


def act(policy: Any, wind: Array, *, random: bool) -> Array:
    """Actions ``(N, 2)`` of ``policy`` in the states ``wind`` ``(N,)``."""
    kind = ExplorationType.RANDOM if random else ExplorationType.DETERMINISTIC
    states = torch.as_tensor(wind[:, None], dtype=torch.float32)
    with torch.no_grad(), set_exploration_type(kind):
        data = policy(TensorDict({"observation": states}, [len(wind)]))
    return data["action"].double().numpy()


def train(log: OfflineDataset, updates: int, seed: int) -> dict[str, Any]:
    """Policies by method."""
    trained: dict[str, Any] = {}
    for settings, temperatures in METHODS:
        began = time.perf_counter()
        config = replace(CONFIG, updates=updates, seed=seed, **settings)
        torch.manual_seed(seed)  # of the flow's noise
        population = IQLPopulation(
            [replace(config, temperature=value) for value in temperatures.values()], log
        )
        for _ in population.train(every=updates):
            print(f"  {', '.join(temperatures)}: {time.perf_counter() - began:.0f} s")
        for number, method in enumerate(temperatures):
            agent = population.member(number)
            trained[method] = agent.policy.eval()
            if method == "flow":
                critics = LossCritics(agent.loss)
                trained["flow, best of 32"] = policies.best_of(agent.actor, critics, 32)
    return trained


def scores(wind: Array, point: Array) -> dict[str, float]:
    return {"return": float(returns(wind, point).mean()), "hits": float(hits(point).mean())}


def draw(path: Path, samples: dict[str, Array]) -> None:
    """The points that each policy draws where there is no wind, and the obstacle."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    columns = (len(samples) + 1) // 2
    figure = Figure(figsize=(2.4 * columns, 5.2), layout="constrained")
    panels = figure.subplots(2, columns, sharex=True, sharey=True).flat
    for axes, (method, points) in zip(panels, samples.items(), strict=False):
        axes.add_patch(Circle((0, 0), RADIUS, color="0.75"))
        for hit, colour in ((False, "tab:blue"), (True, "tab:red")):
            chosen = points[hits(points) == hit]
            axes.scatter(*chosen.T, s=4, color=colour, alpha=0.6)
        axes.set(title=method, xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    for axes in list(panels):
        axes.set_visible(False)
    figure.suptitle("Actions without wind: red ones hit the grey obstacle", fontsize=11)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    options = tyro.cli(Options, args=arguments, description=__doc__.split("\n\n")[0])
    torch.set_num_threads(1)  # the networks are small: a second thread costs more than it gives
    folder = options.output / f"multimodal-seed{options.seed}"
    log = make_log(options.seed)
    print(f"Training, {options.updates:,} updates of each policy:")
    trained = train(log, options.updates, options.seed)

    wind = np.random.default_rng(options.seed + 1).uniform(-1, 1, STATES)
    logged = log.transitions["action"].double().numpy()
    winds = log.transitions["observation"].squeeze(-1).double().numpy()
    upwind = np.where(wind < 0, -1.0, 1.0)
    best = returns(wind, np.stack([0 * wind, 0.4151 * upwind], -1))  # a tangent of the obstacle
    samples = {"log": logged[:DRAWN]}
    still = np.zeros(DRAWN)
    rows = [{"policy": "log", **scores(winds, logged)}]
    torch.manual_seed(options.seed)
    for method, policy in trained.items():
        samples[method] = act(policy, still, random=True)
        drawn = scores(wind, act(policy, wind, random=True))
        fixed = scores(wind, act(policy, wind, random=False))
        fixed = {f"{name}, deterministic": value for name, value in fixed.items()}
        rows.append({"policy": method, **drawn, **fixed})

    folder.mkdir(parents=True, exist_ok=True)
    names = list(rows[-1])
    with open(folder / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *([row.get(n, "") for n in names] for row in rows)])
    print(f"\n{'':18}{'as it draws':>18}{'without randomness':>22}")
    print(f"{'policy':18}{'return':>10}{'hits':>8}{'return':>14}{'hits':>8}")
    for row in rows:
        one, other, *rest = (row[n] for n in names[1:5] if n in row)
        text = f"{row['policy']:18}{one:10.2f}{other:8.1%}"
        print(text + (f"{rest[0]:14.2f}{rest[1]:8.1%}" if rest else ""))
    print(f"{'best possible':18}{best.mean():10.2f}{0:8.1%}")
    draw(folder / "samples.png", samples)
    print(f"\nWritten to {folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
