"""Returns before and after the switch from the dataset to the environment, with several methods.

    python benchmarks/bench_finetune.py

Runs ``examples/iql_finetune.py`` on two Pendulum datasets: all 300 episodes, with too few offline
updates to learn the task, and the first two episodes, from which it cannot be learned. Methods:
fine-tuning; the same with half of each batch from the dataset; the same number of updates on the
dataset alone; and the online phase from new networks. Each run has one thread and its own process.
Writes benchmarks/results/finetune.json, which ``docs/pictures/finetune.py`` draws.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from iql_torchrl import PRESETS, IQLConfig, OfflineDataset, load_dataset
from iql_torchrl.data.builtin import ensure_dataset
from record import in_processes, place, save
from study import learn, play, table

from torchrl import logger
from torchrl.data import OfflineToOnlineReplayBuffer, ReplayBuffer, TensorStorage

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_finetune import Options, run

Row = dict[str, float]

EARLY = 0.2  # the part of the online phase in which a collapse would show
#: name: transitions (None: all) and offline updates
DATASETS = {"300 episodes": (None, 2_000), "2 episodes": (400, 4_000)}
#: name: part of each batch from the dataset, and whether it begins with the offline phase
METHODS = {
    "fine-tuned": (None, True),
    "fine-tuned, half dataset": (0.5, True),
    "dataset only": (None, True),
    "no pretraining": (None, False),
}


def prepare(
    options: argparse.Namespace, name: str, method: str, seed: int
) -> tuple[OfflineDataset, Options, IQLConfig]:
    limit, offline = DATASETS[name]
    _, pretrained = METHODS[method]
    phases = Options(
        limit=limit,
        offline_updates=offline if pretrained else 0,
        online_steps=options.online_steps,
        eval_every=options.eval_every,
        episodes=options.episodes,
    )
    updates = phases.offline_updates + phases.online_steps
    config = replace(PRESETS["quick"], schedule="constant", updates=updates, seed=seed)
    source = ensure_dataset(phases.dataset, progress=False)
    dataset = load_dataset(source, reward=config.reward, limit=limit, progress=False)
    return dataset, phases, config


def make_buffer(
    dataset: OfflineDataset, config: IQLConfig, room: int, fraction: float | None
) -> Any:
    """The dataset and ``room`` for online steps, as one pool or with ``fraction`` of a batch from it.

    The latter as RLPD (arXiv:2302.02948); ``sample()`` draws from the dataset alone while there are no
    online steps.
    """
    if fraction is None:
        capacity = len(dataset) + room
        return dataset.replay_buffer(config.batch_size, seed=config.seed, capacity=capacity)
    # Not a TensorDictReplayBuffer, whose additional key "index" only one half of a batch would have.
    rows = ReplayBuffer(storage=TensorStorage(dataset.transitions))
    return OfflineToOnlineReplayBuffer(
        rows, online_capacity=room, offline_fraction=fraction, batch_size=config.batch_size
    )


def stay_offline(dataset: OfflineDataset, config: IQLConfig, options: Options) -> list[Row]:
    """The same number of updates and the same evaluations, on the dataset alone."""
    ends = range(options.eval_every, config.updates + 1, options.eval_every)
    return [
        {"update": row["updates"], **play(agent.policy, dataset, options.episodes).summary()}
        for row, agent in learn(dataset, [config], ends)
    ]


def around_switch(rows: list[Row], switch: int) -> dict[str, float]:
    """Mean returns: at update ``switch``, lowest in the first fifth after it, at the end."""
    (before,) = (row["return_mean"] for row in rows if row["update"] == switch)
    online = [row for row in rows if row["update"] > switch]
    last = switch + EARLY * (online[-1]["update"] - switch)
    early = [row for row in online if row["update"] <= last] or online[:1]
    lowest = min(row["return_mean"] for row in early)
    return {"before": before, "lowest early": lowest, "end": online[-1]["return_mean"]}


def one_run(options: argparse.Namespace, name: str, method: str, seed: int) -> dict[str, Any]:
    logger.setLevel("WARNING")
    dataset, parsed, config = prepare(options, name, method, seed)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        if method == "dataset only":
            rows = stay_offline(dataset, config, parsed)
        else:
            buffer = make_buffer(dataset, config, parsed.online_steps, METHODS[method][0])
            rows = list(run(dataset, config, parsed, buffer))
    levels = around_switch(rows, parsed.offline_updates)
    shown = " ".join(f"{value:.0f}" for value in levels.values())
    print(f"{name}, {method}, seed {seed}: {shown}", flush=True)
    names = {"updates": "update", "return_mean": "return_mean"}
    points = {key: [round(row[name], 1) for row in rows] for key, name in names.items()}
    return {"dataset": name, "method": method, "seed": seed, **levels, "curve": points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3)
    add("--online-steps", type=int, default=8_000)
    add("--eval-every", type=int, default=200, help="updates between evaluations")
    add("--episodes", type=int, default=16, help="of each evaluation")
    add("--workers", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    levels, configs = {}, {}
    for name in DATASETS:
        dataset, _, config = prepare(options, name, "fine-tuned", 0)
        levels[name], configs[name] = float(dataset.episode_returns.mean()), asdict(config)
    seeds = range(options.seeds)
    jobs = [
        (options, name, method, seed) for name in DATASETS for method in METHODS for seed in seeds
    ]
    runs = in_processes(one_run, jobs, options.workers)
    content = {"configs": configs, "dataset_returns": levels, "online_steps": options.online_steps}
    save(place("finetune"), {**content, "runs": runs})
    rows = [{name: value for name, value in run.items() if name != "curve"} for run in runs]
    print(f"\n{table(rows, ('dataset', 'method'))}")


if __name__ == "__main__":
    main()
