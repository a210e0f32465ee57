"""Returns of the log, behaviour cloning and IQL over several training seeds.

    python benchmarks/bench_learning.py --result pendulum
    python benchmarks/bench_learning.py --result halfcheetah --dataset halfcheetah_medium.npz \\
        --env HalfCheetah-v5 --preset locomotion --updates 100000 --seeds 2

Each run has one thread and its own process. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context

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
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from record import RESULTS, save

import numpy as np
import torch

METHODS = ("behaviour cloning", "IQL")


def load(options: argparse.Namespace, config: IQLConfig) -> OfflineDataset:
    source = options.dataset
    if source in BUILTIN:
        ensure_dataset(source, progress=False)
    return load_dataset(source, env=options.env, reward=config.reward, progress=False)


def run(options: argparse.Namespace, method: str, seed: int) -> dict[str, object]:
    """One training run, evaluated ``options.points`` times."""
    torch.set_num_threads(1)
    config = configure(options, seed)
    if method == "behaviour cloning":
        config = replace(config, temperature=0.0)
    dataset = load(options, config)
    agent = make_agent(config, dataset)
    curve: list[dict[str, object]] = []

    def play() -> Evaluation:
        result = evaluate(
            agent.policy, dataset.make_env, episodes=options.episodes, num_envs=8, seed=10_000
        )
        curve.append({"updates": trainer.updates, "returns": result.returns.tolist()})
        print(
            f"{method}, seed {seed}, {trainer.updates:,}: {result.returns.mean():.1f}", flush=True
        )
        return result

    trainer = OfflineTrainer(
        agent=agent,
        replay_buffer=dataset.replay_buffer(config.batch_size, seed=seed),
        total_updates=config.updates // options.points * options.points,
        evaluation=play,
        eval_interval=config.updates // options.points,
        evaluate_first=False,
        progress_bar=False,
    )
    trainer.train()
    return {
        "method": method,
        "seed": seed,
        "curve": curve,
        "ms_per_update": 1e3 / trainer.updates_per_second,
    }


def configure(options: argparse.Namespace, seed: int) -> IQLConfig:
    config = replace(PRESETS[options.preset], seed=seed, compile=options.compile)
    if options.standardise:
        config = replace(config, standardise=True)
    return replace(config, updates=options.updates) if options.updates else config


def summarise(dataset: OfflineDataset, runs: list[dict[str, object]]) -> list[dict[str, object]]:
    """Mean over seeds of the last evaluation, and its standard error over seeds."""
    log = dataset.episode_returns
    rows = [
        {"name": "the log", "mean": log.mean(), "standard_error": log.std(ddof=1) / len(log) ** 0.5}
    ]
    for method in dict.fromkeys(r["method"] for r in runs):
        means = [np.mean(r["curve"][-1]["returns"]) for r in runs if r["method"] == method]
        error = np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
        rows.append(
            {
                "name": method,
                "mean": float(np.mean(means)),
                "standard_error": float(error),
                "per_seed": [float(m) for m in means],
            }
        )
    return rows


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
    add("--standardise", action="store_true", help="standardise observations whatever the preset")
    options = parser.parse_args()

    dataset = load(options, configure(options, 0))
    jobs = [(method, seed) for seed in range(options.seeds) for method in options.methods]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run, *zip(*((options, *job) for job in jobs), strict=True)))
    rows = summarise(dataset, runs)
    content = {"config": asdict(configure(options, 0)), "summary": rows, "runs": runs}
    save(RESULTS / f"{options.result}.json", content)
    print(f"\n{'':18} {'mean return':>12} {'std. error':>11}")
    for row in rows:
        print(f"{row['name']:18} {row['mean']:12.1f} {row['standard_error']:11.1f}")


if __name__ == "__main__":
    main()
