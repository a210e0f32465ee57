"""Returns before and after the switch from the log to the environment, with several methods.

    python benchmarks/bench_finetune.py

Runs ``examples/iql_finetune.py`` on two Pendulum logs: all 300 episodes, with too few offline
updates to learn the task, and the first two episodes, from which it cannot be learned. Methods:
fine-tuning; the same with half of each batch from the log; the same number of updates on the log
alone; and the online phase from new networks. Each run has one thread and its own process.
Writes benchmarks/results/finetune.json and finetune.png.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, OfflineDataset, evaluate, load_dataset, make_agent
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.report.figures import save as save_figure
from record import RESULTS, save

import numpy as np
import torch
from torchrl import logger

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_finetune import EARLY, EVALUATION_SEED, Options, Row, parse, run

#: name: transitions (None: all) and offline updates
LOGS = {"300 episodes": (None, 2_000), "2 episodes": (400, 4_000)}
#: name: options of the example, and whether it begins with the offline phase
METHODS = {
    "fine-tuned": ([], True),
    "fine-tuned, half log": (["--log-fraction", "0.5"], True),
    "log only": ([], True),
    "no pretraining": ([], False),
}


def prepare(
    options: argparse.Namespace, log: str, method: str, seed: int
) -> tuple[OfflineDataset, Options, IQLConfig]:
    limit, offline = LOGS[log]
    more, pretrained = METHODS[method]
    settings = {
        "offline-updates": offline if pretrained else 0,
        "online-steps": options.online_steps,
        "eval-every": options.eval_every,
        "episodes": options.episodes,
    }
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    parsed, config = parse(given + more)
    source = ensure_dataset(parsed.dataset, progress=False)
    dataset = load_dataset(source, reward=config.reward, limit=limit, progress=False)
    return dataset, parsed, replace(config, seed=seed)


def stay_offline(dataset: OfflineDataset, config: IQLConfig, options: Options) -> Iterator[Row]:
    """The same number of updates and the same evaluations, on the log alone."""
    agent = make_agent(config, dataset)
    buffer = dataset.replay_buffer(config.batch_size, seed=config.seed)
    for update in range(1, config.updates + 1):
        agent.step(buffer.sample())
        if update % options.eval_every == 0:
            played = evaluate(
                agent.policy, dataset.make_env, episodes=options.episodes, seed=EVALUATION_SEED
            )
            phase = "offline" if update <= options.offline_updates else "online"
            steps = max(0, update - options.offline_updates)
            identity = {"phase": phase, "updates": update, "online_steps": steps}
            yield {"seed": config.seed, **identity, **played.summary()}


def one_run(job: tuple[argparse.Namespace, str, str, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    _, log, method, seed = job
    began = time.perf_counter()
    logger.setLevel("WARNING")
    dataset, parsed, config = prepare(*job)
    learn = stay_offline if method == "log only" else run
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        curve = list(learn(dataset, config, parsed))
    identity = {"log": log, "method": method, "seed": seed, **around(curve)}
    kept = ("updates", "online_steps", "return_mean", "return_low", "return_high")
    columns = {name: [round(row[name], 1) for row in curve] for name in kept}
    return {**identity, "seconds": round(time.perf_counter() - began), "curve": columns}


def around(curve: list[Row]) -> dict[str, float | None]:
    """Mean returns at the switch, lowest and mean in the first fifth after it, and at the end."""
    online = [row for row in curve if row["online_steps"] > 0]
    steps = online[-1]["online_steps"]
    early = [row["return_mean"] for row in online if row["online_steps"] <= EARLY * steps]
    before = [row["return_mean"] for row in curve if row["online_steps"] == 0][-1]
    late = [row["return_mean"] for row in online if row["online_steps"] > (1 - EARLY) * steps]
    return {
        "before": before,
        "lowest_early": min(early),
        "mean_early": float(np.mean(early)),
        "lowest_late": min(late),
        "end": online[-1]["return_mean"],
    }


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per log and method: mean over seeds, and the seeds in order; printed as a table."""
    results = []
    names = ("before", "lowest_early", "mean_early", "lowest_late", "end")
    print(f"{'':36}" + "".join(f"{name:>14}" for name in names))
    for log in LOGS:
        for method in METHODS:
            entry = [r for r in runs if (r["log"], r["method"]) == (log, method)]
            if not entry:
                continue
            line: dict[str, Any] = {"log": log, "method": method}
            for name in names:
                values = [r[name] for r in entry]
                line |= {name: float(np.mean(values)), f"{name}_per_seed": values}
            results.append(line)
            print(f"{log:13}{method:23}" + "".join(f"{line[name]:14.1f}" for name in names))
    return results


def draw(path: Path, runs: list[dict[str, Any]], logs: dict[str, float]) -> None:
    """Mean over seeds of the mean return, lowest to highest seed shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (log, level) in zip(figure.subplots(1, 2, sharey=True), logs.items(), strict=True):
        axes.axhline(level, color="0.4", linestyle="--", label="the log")
        axes.axvline(LOGS[log][1], color="0.4", linestyle=":", label="switch")
        for method in METHODS:
            curves = [r["curve"] for r in runs if (r["log"], r["method"]) == (log, method)]
            values = np.array([curve["return_mean"] for curve in curves])
            # without pretraining, runs begin at the switch
            start = 0 if METHODS[method][1] else LOGS[log][1]
            updates = [start + update for update in curves[0]["updates"]]
            (line,) = axes.plot(updates, values.mean(0), label=method)
            low, high = values.min(0), values.max(0)
            axes.fill_between(updates, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel="gradient updates", title=f"log of {log}")
    figure.axes[0].set_ylabel("mean return per episode")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3)
    add("--online-steps", type=int, default=8_000)
    add("--eval-every", type=int, default=200, help="updates between evaluations")
    add("--episodes", type=int, default=16, help="of each evaluation")
    add("--workers", type=int, default=2, help="runs at a time")
    options = parser.parse_args()

    logs, configs = {}, {}
    for log in LOGS:
        dataset, _, config = prepare(options, log, "fine-tuned", 0)
        logs[log], configs[log] = float(dataset.episode_returns.mean()), asdict(config)
    jobs = [
        (options, log, method, seed)
        for seed in range(options.seeds)
        for log in LOGS
        for method in METHODS
    ]
    runs = []
    with get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        for results in pool.imap_unordered(one_run, jobs):
            runs.append(results)
            shown = " ".join(f"{results[key]:.0f}" for key in ("before", "lowest_early", "end"))
            name = f"{results['log']}, {results['method']}, seed {results['seed']}"
            print(f"{name}: {shown} ({results['seconds']:.0f} s)", flush=True)
    runs.sort(
        key=lambda r: (list(LOGS).index(r["log"]), list(METHODS).index(r["method"]), r["seed"])
    )
    content = {
        "configs": configs,
        "online_steps": options.online_steps,
        "episodes": options.episodes,
        "log_returns": logs,
        "summary": summarise(runs),
        "runs": runs,
    }
    save(RESULTS / "finetune.json", content)
    draw(RESULTS / "finetune.png", runs, logs)


if __name__ == "__main__":
    main()
