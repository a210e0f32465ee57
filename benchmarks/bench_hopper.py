"""How early IQL learns on a mixed log of Hopper: initial weights, rates and expectile compared.

    python benchmarks/make_hopper.py hopper_replay.npz
    python benchmarks/bench_hopper.py hopper_replay.npz --compile

Every variant changes ``BASE``, the defaults of ``IQLConfig``, in the settings that its line of
``VARIANTS`` names. Its seeds are trained as one population, each with its own batches, and evaluated
after each of ``--updates``; falling rates reach 0 at the last of them. ``plain`` is another
implementation (``plain_population.py``: CORL's) with the same seeds. Writes
benchmarks/results/NAME.json after each variant.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from iql_torchrl import Evaluation, IQLConfig, IQLPopulation, OfflineDataset, evaluate, load_dataset
from iql_torchrl.evaluation.statistics import (
    mean_interval,
    probability_of_improvement,
    stratified_interval,
)
from plain_population import PlainPopulation
from record import RESULTS, save

import numpy as np
import torch
from tqdm import tqdm

ENVIRONMENT = "Hopper-v5"
EVALUATION_SEED = 10_000
BASE = IQLConfig()
PLAIN, FIRST = "plain", "default"

#: Settings on top of ``BASE``; the others are compared with the first.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    FIRST: {},
    "torch": {"initialisation": "torch"},
    PLAIN: {},
    "constant": {"schedule": "constant"},
    "expectile 0.9": {"expectile": 0.9},
    "raw observations": {"standardise": False},
    "torch, raw observations": {"initialisation": "torch", "standardise": False},
    "torch, constant": {"initialisation": "torch", "schedule": "constant"},
    "torch, expectile 0.9": {"initialisation": "torch", "expectile": 0.9},
    "simultaneous": {"order": "simultaneous"},
}
Trained = Iterator[tuple[int, list[Evaluation]]]


def ours(o: argparse.Namespace, name: str, dataset: OfflineDataset) -> Trained:
    """Updates and the evaluation of each seed, at every one of ``o.updates``."""
    general = {"updates": o.updates[-1], "hidden": (o.width, o.width), "compile": o.compile}
    config = replace(BASE, **{**general, **VARIANTS[name]}, device=o.device)
    configs = [replace(config, seed=seed) for seed in range(o.seeds)]
    population = IQLPopulation(configs, dataset, batches="own")
    for updates in o.updates:
        with _bar(o, name, updates - population.updates) as bar:
            for event in population.train(updates - population.updates, every=o.every):
                bar.update(event.updates - (updates - bar.total) - bar.n)
        yield updates, population.evaluate(dataset.make_env, **_evaluation(o))


def plain(o: argparse.Namespace, name: str, dataset: OfflineDataset) -> Trained:
    """As :func:`ours`, of the plain implementation."""
    population = PlainPopulation(
        dataset.transitions, range(o.seeds), width=o.width, total=o.updates[-1]
    )
    for updates in o.updates:
        with _bar(o, name, updates - population.updates) as bar:
            for _ in range(bar.total):
                population.update()
                bar.update()
        policies = [population.policy(number) for number in range(o.seeds)]
        yield updates, [evaluate(p, dataset.make_env, **_evaluation(o)) for p in policies]


def _bar(o: argparse.Namespace, name: str, updates: int) -> Any:
    return tqdm(total=updates, desc=name, unit="update", disable=None, leave=False)


def _evaluation(o: argparse.Namespace) -> dict[str, int]:
    return {"episodes": o.episodes, "num_envs": o.episodes, "seed": EVALUATION_SEED}


def run(o: argparse.Namespace, name: str, dataset: OfflineDataset) -> dict[str, Any]:
    """One variant: the mean return of each seed at each number of updates."""
    train: Callable[..., Trained] = plain if name == PLAIN else ours
    began, curve = time.perf_counter(), []
    for updates, evaluations in train(o, name, dataset):
        returns = [float(each.returns.mean()) for each in evaluations]
        curve.append({"updates": updates, "returns": returns})
        shown = ", ".join(f"{each:.0f}" for each in returns)
        print(f"{name}, {updates:,} updates: {shown}", flush=True)
    return {
        "variant": name,
        "settings": dict(VARIANTS[name]),
        "seconds": time.perf_counter() - began,
        "curve": curve,
    }


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a variant and number of updates, with 95 % intervals over seeds.

    ``mean``: with Student's t interval. ``better``: the probability that a run of the variant has a
    higher return than one of the first variant, with the interval of the stratified bootstrap.
    """
    compared = [p for each in runs if each["variant"] == FIRST for p in each["curve"]]
    first = {p["updates"]: np.array(p["returns"]) for p in compared}
    lines = []
    for each in runs:
        for point in each["curve"]:
            seeds = np.array(point["returns"])
            mean, low, high = (float(v) for v in mean_interval(seeds))
            line = {
                "variant": each["variant"],
                "updates": point["updates"],
                "mean": mean,
                "interval": [low, high],
            }
            if first and each["variant"] != FIRST:
                both = [seeds, first[point["updates"]]]
                line["better"] = float(probability_of_improvement(*both))
                line["better_interval"] = list(
                    stratified_interval(probability_of_improvement, both, seed=0)
                )
            lines.append(line)
    return lines


def table(lines: Sequence[Mapping[str, Any]], log: Mapping[str, Any]) -> str:
    """Markdown: a row a variant; the mean return with its interval, and the share of better runs."""
    points = list(dict.fromkeys(line["updates"] for line in lines))
    head = ["", *(f"{updates:,} updates" for updates in points), f"better than {FIRST}"]
    text = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(points) + 1) + "|"]
    for name in dict.fromkeys(line["variant"] for line in lines):
        of_variant = [line for line in lines if line["variant"] == name]
        cells = ["{:.0f} ({:.0f} to {:.0f})".format(e["mean"], *e["interval"]) for e in of_variant]
        better = [f"{e['better']:.2f}" for e in of_variant if "better" in e]
        text.append("| " + " | ".join([name, *cells, ", ".join(better)]) + " |")
    quartiles = ", ".join(f"{value:.0f}" for value in log["quartiles"])
    return "\n".join(text) + (
        f"\n\nThe log: {log['episodes']} episodes, mean return {log['mean']:.0f}, quartiles "
        f"{quartiles}."
    )


def of_the_log(dataset: OfflineDataset) -> dict[str, Any]:
    returns = dataset.episode_returns
    return {
        "rows": len(dataset),
        "episodes": len(returns),
        "mean": float(returns.mean()),
        "quartiles": [float(value) for value in np.percentile(returns, (25, 50, 75))],
        "greatest": float(returns.max()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    o = _options(arguments)
    torch.set_num_threads(o.threads)
    dataset = load_dataset(o.dataset, env=ENVIRONMENT, reward=BASE.reward, progress=False)
    log, runs = of_the_log(dataset), []
    for name in o.variants:
        runs.append(run(o, name, dataset))
        content = {
            # what decides a figure besides its variant
            "settings": {n: getattr(o, n) for n in ("updates", "width", "seeds", "episodes")},
            "base": replace(BASE, updates=o.updates[-1], hidden=(o.width, o.width)).to_dict(),
            "log": log,
            "summary": summarise(runs) if o.seeds > 1 else [],
            "runs": runs,
        }
        save(RESULTS / f"{o.result}.json", content, packages=["gymnasium", "mujoco"])
    if o.seeds > 1:
        print(f"\n{table(summarise(runs), log)}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("dataset", help="the file that make_hopper.py wrote")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--seeds", type=int, default=8)
    add("--updates", type=int, nargs="+", default=[20_000, 50_000, 100_000, 200_000])
    add("--width", type=int, default=256, help="of both hidden layers of every network")
    add("--episodes", type=int, default=10, help="of each evaluation of a seed")
    add("--every", type=int, default=1000, help="updates between two movements of the bar")
    add("--threads", type=int, default=1)
    add("--device", default="cpu", help="of the populations; plain is trained on the CPU")
    add("--compile", action="store_true")
    add("--result", default="hopper", help="name of the result file")
    o = parser.parse_args(arguments)
    if o.seeds < 1 or o.updates != sorted(set(o.updates)) or o.updates[0] < 1:
        parser.error("--updates must be whole numbers in rising order, and --seeds at least 1")
    return o


if __name__ == "__main__":
    main()
