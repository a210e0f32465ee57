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

from dataclasses import replace
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, IQLPopulation, OfflineDataset, load_dataset, policies
from iql_torchrl.config import cli
from iql_torchrl.losses import LossCritics
from iql_torchrl.report import text_table, write_rows
from iql_torchrl.report.figures import save

import numpy as np
import torch
import tyro
from gymnasium.spaces import Box
from matplotlib.figure import Figure
from matplotlib.patches import Circle
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
    hidden=(64, 64),
    reward="raw",
    temperature=5.0,
    expectile=0.9,
    actor_lr=1e-3,
    critic_lr=1e-3,
    value_lr=1e-3,
)
# Policies that differ in the temperature alone are trained as one population.
METHODS = (
    ({}, {"cloning": 0.0, "IQL": CONFIG.temperature}),
    ({"policy": "mixture"}, {"IQL, mixture": CONFIG.temperature}),
    ({"actor_objective": "ddpg_bc", "bc_weight": 0.1}, {"DDPG+BC": CONFIG.temperature}),
    ({"policy": "flow"}, {"flow, IQL": CONFIG.temperature, "flow": 0.0}),
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
    return replace(load_dataset(columns), action_space=Box(-1.0, 1.0, (2,), np.float32))


def act(policy: Any, wind: Array, kind: ExplorationType) -> Array:
    """Actions ``(N, 2)`` of ``policy`` in the states ``wind`` ``(N,)``."""
    states = torch.as_tensor(wind[:, None], dtype=torch.float32)
    with torch.no_grad(), set_exploration_type(kind):
        data = policy(TensorDict({"observation": states}, [len(wind)]))
    return data["action"].double().numpy()


def train(log: OfflineDataset, config: IQLConfig) -> dict[str, Any]:
    """Policies by method."""
    trained: dict[str, Any] = {}
    for settings, temperatures in METHODS:
        print(f"Training, {config.updates:,} updates: {', '.join(temperatures)}", flush=True)
        torch.manual_seed(config.seed)  # of the flow's noise
        configs = [replace(config, temperature=t, **settings) for t in temperatures.values()]
        population = IQLPopulation(configs, log)
        for _ in population.train(every=config.updates):
            pass
        for number, method in enumerate(temperatures):
            agent = population.member(number)
            trained[method] = agent.policy.eval()
            if method == "flow":
                critics = LossCritics(agent.loss)
                trained["flow, best of 32"] = policies.best_of(agent.actor, critics, 32)
    return trained


def draw(path: Path, samples: dict[str, Array]) -> None:
    """The points that each policy draws where there is no wind, and the obstacle."""
    figure = Figure(figsize=(2.4 * len(samples) / 2, 5.2), layout="constrained")
    panels = figure.subplots(2, len(samples) // 2, sharex=True, sharey=True).flat
    for axes, (method, points) in zip(panels, samples.items(), strict=True):
        axes.add_patch(Circle((0, 0), RADIUS, color="0.75"))
        colours = np.where(hits(points), "tab:red", "tab:blue")
        axes.scatter(*points.T, s=4, color=colours, alpha=0.6)
        axes.set(title=method, xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    figure.suptitle("Actions without wind: red ones hit the grey obstacle", fontsize=11)
    save(figure, path)


@cli.errors_in_one_line()
def main(updates: int = 1_500, seed: int = 0, output: Path = Path("runs")) -> None:
    """Make the log, train all policies, and print how they score.

    Args:
        updates: number of gradient updates of each policy.
        seed: seed of the log, the initial weights and the batches.
        output: where the results are written.
    """
    config = replace(CONFIG, updates=updates, seed=seed)
    torch.set_num_threads(1)  # the networks are small: a second thread costs more than it gives
    log = make_log(seed)
    log.print_notes()
    trained = train(log, config)

    def scores(wind: Array, point: Array, suffix: str = "") -> dict[str, float]:
        return {f"return{suffix}": returns(wind, point).mean(), f"hits{suffix}": hits(point).mean()}

    logged, winds = (log.transitions[k].double().numpy() for k in ("action", "observation"))
    samples = {"log": logged[:DRAWN]}
    rows: list[dict[str, Any]] = [{"policy": "log", **scores(winds[:, 0], logged)}]
    wind = np.random.default_rng(seed + 1).uniform(-1, 1, STATES)
    torch.manual_seed(seed)
    for method, policy in trained.items():
        samples[method] = act(policy, np.zeros(DRAWN), ExplorationType.RANDOM)
        drawn = scores(wind, act(policy, wind, ExplorationType.RANDOM))
        fixed = act(policy, wind, ExplorationType.DETERMINISTIC)
        rows.append({"policy": method} | drawn | scores(wind, fixed, ", deterministic"))
    folder = output / f"multimodal-seed{seed}"
    write_rows(folder / "metrics.csv", rows)

    upwind = np.where(wind < 0, -1.0, 1.0)
    best = returns(wind, np.stack([0 * wind, 0.4151 * upwind], -1))  # a tangent of the obstacle
    rows.append({"policy": "best possible", "return": best.mean(), "hits": 0.0})
    table = [["", "as it draws", "", "without randomness", ""]]
    table += [["policy", "return", "hits", "return", "hits"]]
    for name, *numbers in (row.values() for row in rows):
        cells = [f"{n:.2f}" if i % 2 == 0 else f"{n:.1%}" for i, n in enumerate(numbers)]
        table.append([name, *cells, *[""] * (4 - len(cells))])
    print("\n" + text_table(table))
    draw(folder / "samples.png", samples)
    print(f"\nWritten to {folder}/")


if __name__ == "__main__":
    tyro.cli(main)
