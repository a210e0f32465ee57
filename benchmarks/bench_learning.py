"""Returns of the dataset, behaviour cloning and IQL over several training seeds.

    python benchmarks/bench_learning.py --result pendulum
    python benchmarks/bench_learning.py --result halfcheetah --dataset halfcheetah_medium.npz \\
        --env HalfCheetah-v5 --preset locomotion --updates 100000 --seeds 2

Each run has one thread and its own process. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from iql_torchrl import (
    PRESETS,
    Evaluation,
    IQLConfig,
    OfflineDataset,
    OfflineTrainer,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.evaluation.statistics import standard_error
from iql_torchrl.report import text_table
from record import in_processes, place, save

import numpy as np

METHODS = ("behaviour cloning", "IQL")
EVALUATION_SEED = 10_000  # episodes start alike at every point of every run


def curve(
    config: IQLConfig, dataset: OfflineDataset, *, every: int, episodes: int
) -> list[tuple[int, Evaluation]]:
    """A run of ``config``, and its evaluation after each ``every`` updates."""
    agent, results = make_agent(config, dataset), []

    def play() -> Evaluation:
        played = evaluate(
            agent.policy, dataset.make_env, episodes=episodes, num_envs=8, seed=EVALUATION_SEED
        )
        results.append((trainer.updates, played))
        return played

    trainer = OfflineTrainer(
        agent=agent,
        dataset=dataset,
        total_updates=config.updates // every * every,
        evaluation=play,
        eval_interval=every,
        evaluate_first=False,
        progress_bar=False,
    )
    trainer.train()
    return results


def load(options: argparse.Namespace) -> OfflineDataset:
    source, reward = ensure_source(options.dataset), configure(options).reward
    return load_dataset(source, env=options.env, reward=reward, progress=False)


def configure(options: argparse.Namespace) -> IQLConfig:
    config = replace(PRESETS[options.preset], compile=options.compile)
    return replace(config, updates=options.updates) if options.updates else config


def run(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """One training run, evaluated ``options.points`` times."""
    config = replace(configure(options), seed=seed)
    if method == "behaviour cloning":
        config = replace(config, temperature=0.0)
    every = config.updates // options.points
    points = curve(config, load(options), every=every, episodes=options.episodes)
    means = [{"updates": n, "return": float(played.returns.mean())} for n, played in points]
    print(f"{method}, seed {seed}: {means[-1]['return']:.1f}", flush=True)
    return {"method": method, "seed": seed, "curve": means}


def summarise(dataset: OfflineDataset, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of the last evaluation, and its standard error over seeds."""
    values = {"the dataset": dataset.episode_returns}
    for method in dict.fromkeys(each["method"] for each in runs):
        last = [each["curve"][-1]["return"] for each in runs if each["method"] == method]
        values[method] = np.array(last)
    return [
        {"name": name, "mean": float(each.mean()), "standard_error": standard_error(each)}
        for name, each in values.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--result", required=True, help="name of the result file")
    add("--dataset", default="pendulum/mixed-v0", help="Minari id or file")
    add("--env", help="Gymnasium id, for files without one")
    add("--preset", default="quick", choices=list(PRESETS))
    add("--updates", type=int, help="gradient updates (the preset's)")
    add("--seeds", type=int, default=5)
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--episodes", type=int, default=100, help="episodes of each evaluation")
    add("--points", type=int, default=5, help="evaluations per run")
    add("--workers", type=int, default=2, help="runs at a time")
    add("--compile", action="store_true")
    options = parser.parse_args()
    dataset = load(options)
    jobs = [(options, m, seed) for seed in range(options.seeds) for m in options.methods]
    runs = in_processes(run, jobs, options.workers)
    rows = summarise(dataset, runs)
    save(
        place(options.result), {"config": asdict(configure(options)), "summary": rows, "runs": runs}
    )
    table = [["", "mean return", "std. error"]]
    table += [[r["name"], f"{r['mean']:.1f}", f"{r['standard_error']:.1f}"] for r in rows]
    print(f"\n{text_table(table)}")


if __name__ == "__main__":
    main()
