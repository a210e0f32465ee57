"""Learn from a log without velocities: Pendulum, of which only the angle is seen.

One observation does not say in which direction the pendulum swings, so no policy that reads one can
swing it up reliably. Compared, over several seeds: a policy that reads one observation, one that reads
the last four joined into a vector, and, as a reference, one that sees the velocity.
"""

from dataclasses import replace
from pathlib import Path

from iql_torchrl import PRESETS, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.report import text_table, write_rows
from iql_torchrl.report.figures import save

import numpy as np
import tyro
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation
from matplotlib.figure import Figure

METHODS = {
    "angle": {},
    "last 4 angles": {"history": 4, "history_encoder": "stack"},
    "angle and velocity": {},
}


def without_velocity(dataset):
    """The same log with the first two columns of the observations: cosine and sine of the angle."""
    rows = dataset.transitions.clone()
    for side in (("observation",), ("next", "observation")):
        rows[side] = rows[side][:, :2].contiguous()
    space = Box(-1.0, 1.0, (2,), np.float32)
    return load_dataset(
        rows, env=lambda: TransformObservation(dataset.make_env(), lambda seen: seen[:2], space)
    )


def draw(path: Path, results: dict[str, list[float]], log: float) -> None:
    """One dot for each seed, and the mean return of the log."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for place, returns in enumerate(results.values()):
        axes.plot(returns, [place] * len(returns), "o", alpha=0.7)
    axes.axvline(log, color="0.5", linestyle=":")
    axes.set_title(f"the log: {log:.0f} (dotted)", fontsize=10)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set(xlabel="mean return of an episode, one dot for each seed")
    save(figure, path)


@cli.errors_in_one_line()
def main(
    updates: int = 5_000, seeds: int = 3, episodes: int = 50, output: Path = Path("runs")
) -> None:
    """Train each policy from each seed, evaluate it, and print a table.

    Args:
        updates: number of gradient updates of each policy.
        seeds: number of seeds, >= 1.
        episodes: episodes of each evaluation.
        output: where the results are written.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; expected at least 1.")
    base = replace(PRESETS["quick"], updates=updates)
    full = load_dataset(ensure_dataset("pendulum/mixed-v0"), reward="return_range")
    full.print_notes()
    angles, log = without_velocity(full), float(full.episode_returns.mean())
    results = {name: [] for name in METHODS}
    for name, settings in METHODS.items():
        dataset = full if name == "angle and velocity" else angles
        for seed in range(seeds):
            agent = make_agent(replace(base, seed=seed, **settings), dataset)
            OfflineTrainer(agent=agent, dataset=dataset, progress_bar=False).train()
            played = evaluate(agent.policy, dataset.make_env, episodes=episodes, seed=10_000)
            results[name].append(float(played.returns.mean()))
            print(f"  {name}, seed {seed}: {results[name][-1]:.0f}", flush=True)
    rows, table = [], [["policy reads", "mean return", "worst seed", "best seed"]]
    table.append(["(the log)", f"{log:.0f}", "", ""])
    for name, returns in results.items():
        rows.append({"policy reads": name} | {f"seed {i}": r for i, r in enumerate(returns)})
        table.append([name, *(f"{f(returns):.0f}" for f in (np.mean, min, max))])
    folder = output / "history"
    write_rows(folder / "metrics.csv", rows)
    print("\n" + text_table(table))
    draw(folder / "returns.png", results, log)
    print(f"\nWritten to {folder}/")


if __name__ == "__main__":
    tyro.cli(main)
