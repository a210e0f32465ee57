"""Learn from a log without velocities: Pendulum, of which only the angle is seen.

One observation does not say in which direction the pendulum swings, so no policy that reads one can
swing it up reliably. Compared, over several seeds: a policy that reads one observation, one that reads
the last four joined into a vector, and, as a reference, one that sees the velocity.
"""

import csv
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iql_torchrl import (
    PRESETS,
    IQLConfig,
    OfflineDataset,
    OfflineTrainer,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.data.builtin import ensure_dataset

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.spaces import Box
from numpy.typing import NDArray

EVALUATION_SEED = 10_000
METHODS: dict[str, dict[str, Any]] = {
    "angle": {},
    "last 4 angles": {"history": 4, "history_encoder": "stack"},
    "angle and velocity": {},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    updates: int = 5_000
    """number of gradient updates of each policy, >= 1"""
    seeds: int = 3
    """number of seeds, >= 1"""
    episodes: int = 50
    """episodes of each evaluation, >= 1"""
    output: Path = Path("runs")
    """where the results are written"""

    def __post_init__(self) -> None:
        for name in ("updates", "seeds", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")


class Angle(gym.ObservationWrapper[Any, Any, Any]):
    """Cosine and sine of the angle, without the velocity."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = Box(-1.0, 1.0, (2,), np.float32)

    def observation(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        return observation[:2]


def without_velocity(dataset: OfflineDataset) -> OfflineDataset:
    """The same log with the first two columns of the observations."""
    rows = dataset.transitions.clone()
    for side in (("observation",), ("next", "observation")):
        rows[side] = rows[side][:, :2].contiguous()
    return load_dataset(rows, env=lambda: Angle(dataset.make_env()))


def train(config: IQLConfig, dataset: OfflineDataset, episodes: int) -> float:
    """Mean return of an agent of ``config`` after its training."""
    agent = make_agent(config, dataset)
    OfflineTrainer(agent=agent, dataset=dataset, progress_bar=False).train()
    result = evaluate(agent.policy, dataset.make_env, episodes=episodes, seed=EVALUATION_SEED)
    return float(np.mean(result.returns))


def draw(path: Path, results: dict[str, list[float]], log: float) -> None:
    """One dot for each seed, and the mean return of the log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for place, (name, returns) in enumerate(results.items()):
        axes.plot(returns, [place] * len(returns), "o", alpha=0.7, label=name)
    axes.axvline(log, color="0.5", linestyle=":")
    axes.text(log, 0.5, " the log", transform=axes.get_xaxis_transform(), color="0.4")
    axes.margins(y=0.2)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set(xlabel="mean return of an episode, one dot for each seed")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    options = tyro.cli(Options, args=arguments, description=__doc__.split("\n\n")[0])
    full = load_dataset(ensure_dataset("pendulum/mixed-v0"), reward="return_range")
    full.print_notes()
    angles = without_velocity(full)
    base = replace(PRESETS["quick"], updates=options.updates)
    results: dict[str, list[float]] = {name: [] for name in METHODS}
    for name, settings in METHODS.items():
        dataset = full if name == "angle and velocity" else angles
        for seed in range(options.seeds):
            began = time.perf_counter()
            score = train(replace(base, seed=seed, **settings), dataset, options.episodes)
            results[name].append(score)
            spent = time.perf_counter() - began
            print(f"  {name}, seed {seed}: {score:.0f} ({spent:.0f} s)", flush=True)
    log = float(full.episode_returns.mean())
    folder = options.output / "history"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        header = ["policy reads", *(f"seed {seed}" for seed in range(options.seeds))]
        csv.writer(file).writerows([header, *([n, *r] for n, r in results.items())])
    print(f"\n{'policy reads':22}{'mean return':>12}{'worst seed':>12}{'best seed':>12}")
    print(f"{'(the log)':22}{log:12.0f}")
    for name, returns in results.items():
        print(f"{name:22}{np.mean(returns):12.0f}{min(returns):12.0f}{max(returns):12.0f}")
    draw(folder / "returns.png", results, log)
    print(f"\nWritten to {folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
