"""Scores of populations on the datasets of bench_scores.py: trained on a GPU, played on any machine.

    python benchmarks/score_population.py train FOLDER --datasets d4rl-umaze d4rl-umaze-noisy --seeds 4
    python benchmarks/score_population.py play FOLDER --datasets d4rl-umaze d4rl-umaze-noisy --seeds 4

``train`` trains one ``IQLPopulation`` for each dataset, whose runs are those of ``bench_scores.py``
with the seeds 0, 1, ... (own batches, captured updates). On CUDA each population has a stream, so that
several share the card. At ``--points`` numbers of updates the policies' weights are written to FOLDER.
Where ``--seconds`` would not suffice for all, the last population waits for the others and is trained
as far as the time allows. ``play`` evaluates them with the environments, episodes and seeds of
``bench_scores.py`` and puts the runs into its result file, which draw_scores.py draws.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from bench_scores import EVALUATION_SEED, changes
from iql_torchrl import IQLConfig, IQLPopulation, captured
from iql_torchrl.files import atomic_write
from record import RESULTS, machine, processor, save
from score_datasets import CACHE, DATASETS, OURS, OWN, about_dataset, options_of, scored_data
from score_tables import add, identity, read

import numpy as np
import torch

UPDATES_A_CALL = 100
CALLS_A_CHECK = 100
PART = "actor_network"
PACKAGES = ("torch", "torchrl", "tensordict")


def population(name: str, o: argparse.Namespace, device: str) -> Any:
    """One run a seed, with the settings of ``o.method`` in bench_scores.py."""
    data, _ = scored_data(name, o.peers)
    settings = options_of(DATASETS[name], o.method, data, None)
    settings |= {"hidden": tuple(OURS["hidden"])} | o.change  # type: ignore[arg-type]
    configs = [
        IQLConfig(seed=seed, updates=o.updates, device=device, **settings)
        for seed in range(o.seeds)
    ]
    return IQLPopulation(configs, data.dataset(configs[0].reward), batches="own")


class Training:
    """A population in training on its own stream, which writes its policies at each point."""

    def __init__(self, name: str, o: argparse.Namespace) -> None:
        data, _ = scored_data(name, o.peers)
        self.name, self.folder, self.device = name, o.folder / name, torch.device(o.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.population = population(name, o, o.device)
        self.last, self.calls = o.updates // UPDATES_A_CALL, 0
        self.points = {self.last * (i + 1) // o.points for i in range(o.points)}
        self.call = captured(self.population.step, self.population.sampler, updates=UPDATES_A_CALL)
        self.stream = torch.cuda.Stream(self.device) if o.device.startswith("cuda") else None
        self.began = time.perf_counter()
        self.about = {
            "seeds": o.seeds, "updates": o.updates, "rows": len(data.rows["reward"]),
            "rows_md5": _digest(data.rows), "machine": machine(o.device),
        }  # fmt: skip

    def advance(self) -> None:
        """One captured call; on CUDA it returns before the device has finished."""
        with torch.cuda.stream(self.stream):
            self.call()
            self.calls += 1
            if self.calls in self.points:
                self.write()

    def write(self) -> None:
        updates = self.calls * UPDATES_A_CALL
        weights = {
            name: value.cpu()
            for name, value in self.population.loss.state_dict().items()
            if name.startswith(PART) and isinstance(value, torch.Tensor)
        }
        with atomic_write(self.folder / f"{updates}.pt") as temporary:
            torch.save(weights, temporary)
        spent = time.perf_counter() - self.began
        about = self.about | {"made": updates, "wall_seconds": spent}
        with atomic_write(self.folder / "about.json") as temporary:
            temporary.write_text(json.dumps(about, indent=1))
        print(f"{self.name}: {updates:,} updates after {spent:.0f} s", flush=True)


def _digest(rows: dict[str, Any]) -> str:
    digest = hashlib.md5()
    for name in sorted(rows):
        digest.update(np.ascontiguousarray(rows[name]).tobytes())
    return digest.hexdigest()


def train(o: argparse.Namespace) -> None:
    began = time.perf_counter()
    trainings = [Training(name, o) for name in o.datasets]
    for each in trainings:
        each.advance()  # compiles
    compiled, active = time.perf_counter(), list(trainings)
    while active:
        for each in active:
            each.advance()
        unfinished = [each for each in trainings if each.calls < each.last]
        active = [each for each in active if each in unfinished] or unfinished
        if not active or active[0].calls % CALLS_A_CHECK:
            continue
        if o.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        to_come = (active[0].last - active[0].calls) * (now - compiled) / active[0].calls
        if now - began > o.seconds:
            for each in unfinished:
                each.write()
            return
        if len(active) > 1 and now - began + to_come > o.seconds:
            waiting = active.pop()
            print(f"{waiting.name} waits after {waiting.calls * UPDATES_A_CALL:,} updates")


def play(o: argparse.Namespace) -> None:
    path = RESULTS / f"{o.result}.json"
    for name in o.datasets:
        folder, scored = o.folder / name, DATASETS[name]
        about = json.loads((folder / "about.json").read_text())
        data, _ = scored_data(name, o.peers)
        if about["rows_md5"] != _digest(data.rows):
            print(f"{name}: the rows made here are not those of the training, bit for bit")
        o.updates, o.seeds = about["updates"], about["seeds"]
        runs = population(name, o, "cpu")
        points = sorted(int(file.stem) for file in folder.glob("*.pt"))
        played_at: list[list[Any]] = [[] for _ in range(o.seeds)]
        for point in points:
            own = runs.loss.state_dict()
            own.update(torch.load(folder / f"{point}.pt", weights_only=True))
            runs.loss.load_state_dict(own)
            played = runs.evaluate(
                data.make_env,
                episodes=scored.episodes,
                num_envs=scored.episodes,
                seed=EVALUATION_SEED,
            )
            for curve, each in zip(played_at, played, strict=True):
                value = float(each.returns.mean())
                curve.append([point, value, data.score(value)])
            scores = [f"{curve[-1][2]:.1f}" for curve in played_at]
            print(f"{name}: {point:,} updates: {', '.join(scores)}", flush=True)
        content = read(path)
        content["datasets"][name] = about_dataset(name, o.peers)
        trained_on = about["machine"]
        versions = {package: trained_on[package] for package in PACKAGES}
        new = {(name, o.method, config.seed, points[-1]) for config in runs.configs}
        content["cells"] = [each for each in content["cells"] if identity(each) not in new]
        for config, curve in zip(runs.configs, played_at, strict=True):
            add(content, {
                "dataset": name, "method": o.method, "seed": config.seed, "updates": points[-1],
                "return": curve[-1][1], "score": curve[-1][2], "curve": curve,
                "population": o.seeds, "wall_seconds": about["wall_seconds"],
                "trained_on": trained_on["name"], "processor": processor(),
                "settings": {**config.to_dict(), "form": "captured"}, "versions": versions,
            })  # fmt: skip
        save(path, content, packages=("gymnasium", "mujoco"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("work", choices=("train", "play"))
    option("folder", type=Path, help="of the policies' weights")
    option("--peers", type=Path, default=CACHE, help="folder of the datasets; may be new")
    option("--datasets", nargs="+", choices=DATASETS, default=["d4rl-umaze"])
    option("--method", choices=OWN, default="ours")
    option("--seeds", type=int, default=4, help="runs of a population")
    option("--updates", type=int, default=1_000_000)
    option("--points", type=int, default=10, help="how often the policies are written")
    option("--change", nargs="+", default=[], metavar="KEY=VALUE", help="settings of IQLConfig")
    option("--device", default="cuda", help="of the training")
    option("--seconds", type=float, default=float("inf"), help="of all training, at most")
    option("--result", default="scores_million", help="name of the result file")
    o = parser.parse_args()
    o.change = changes(o.change)
    {"train": train, "play": play}[o.work](o)


if __name__ == "__main__":
    main()
