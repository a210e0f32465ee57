"""What studies of learning share: tasks, variants of settings, several seeds, rows of scores, a table.

A task is a dataset, settings, variants of these and the scores of a trained agent. Runs that differ
in settings of a single run alone are one ``IQLPopulation``. A result file has the options, each task's
settings, and ``rows``: one for each task, variant, seed and number of updates (and way to act), with
the scores and the seconds of a run's training. It is written after each population.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from iql_torchrl import (
    PRESETS,
    Agent,
    Evaluation,
    IQLConfig,
    IQLPopulation,
    OfflineDataset,
    evaluate,
    load_dataset,
)
from iql_torchrl.config import config_settings
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.report import text_table
from record import RESULTS, place, save

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
EVALUATION_SEED = 10_000  # episodes of all agents start alike
Row = dict[str, Any]
Settings = Mapping[str, Any]  # of IQLConfig; others are attributes of the actor's objective
OPTIONS = {
    "seeds": "training seeds",
    "updates": "gradient updates of each run (the task's)",
    "episodes": "episodes of each evaluation",
    "points": "evaluations of each run",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """``scores``: rows of an agent, one for each way to act; ``references``: scores by name."""

    data: Any
    config: IQLConfig
    variants: Mapping[str, Settings]
    scores: Callable[[Agent], Iterable[Row]]
    references: Mapping[str, Row] = field(default_factory=dict)


Tasks = Mapping[str, Callable[[argparse.Namespace], Task]]


def make_parser(
    doc: str, result: str, *, tasks: Iterable[str] = (), **defaults: int | None
) -> argparse.ArgumentParser:
    """The options that studies share; of ``OPTIONS`` those with a default."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    add = parser.add_argument
    if tasks:
        add("--tasks", nargs="+", choices=tasks, default=list(tasks))
    for name, value in defaults.items():
        add(f"--{name}", type=int, default=value, help=OPTIONS[name])
    add("--only", nargs="+", metavar="WORD", help="variants whose names contain one of the words")
    add("--keep", action="store_true", help="keep the file's rows, and train what it lacks")
    add("--compile", action="store_true")
    add("--result", default=result, metavar="NAME", help="name of the result file")
    add("--output", type=Path, default=RESULTS, help="folder of the result file")
    return parser


def run(
    o: argparse.Namespace,
    tasks: Tasks,
    *,
    keys: Sequence[str] = ("task", "variant"),
    batches: str = "shared",
    points: Sequence[int] = (),
    packages: Sequence[str] = (),
    **more: Any,
) -> list[Row]:
    """Train and score every variant of the tasks; write the file with ``more``, print the table.

    ``keys`` identify a line of the table. ``points``: numbers of updates after which runs are scored,
    by default those of ``--points``.
    """
    torch.set_num_threads(1)
    path = place(o.result, folder=o.output)
    content = _begin(o, path, more)
    rows: list[Row] = content["rows"]
    for name in getattr(o, "tasks", tasks):
        task = tasks[name](o)
        size = {"updates": o.updates} if getattr(o, "updates", None) else {}
        config = replace(task.config, compile=o.compile, **size)
        if content["configs"].get(name) != (described := _plain(config.to_dict())):
            rows[:] = [row for row in rows if row["task"] != name]
        content["configs"][name] = described
        known = {row["variant"] for row in rows if row["task"] == name}
        references = {} if known else task.references
        rows += [{"task": name, "variant": each} | scores for each, scores in references.items()]
        words = o.only or [""]
        left = {variant: each for variant, each in task.variants.items() if variant not in known}
        left = {v: settings for v, settings in left.items() if any(word in v for word in words)}
        for configs, objective in populations(config, left):
            runs = [
                (v, replace(c, seed=c.seed + i)) for v, c in configs.items() for i in range(o.seeds)
            ]
            ends = [end for end in points if end <= runs[0][1].updates] or spaced(runs[0][1], o)
            for row, agent in learn(task.data, [c for _, c in runs], ends, batches, objective):
                begin = {"task": name, "variant": runs[row.pop("run")][0], **row}
                rows += [begin | scores for scores in task.scores(agent)]
            save(path, content, packages)
            new = [row for row in rows if row["task"] == name and row["variant"] in configs]
            print(f"{table(new, keys)}\n", flush=True)
    print(table(rows, keys))
    return rows


def _begin(o: argparse.Namespace, path: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file before training; with ``--keep`` the rows that it has."""
    others = {"tasks", "only", "keep", "result", "output"}
    options = _plain({name: value for name, value in vars(o).items() if name not in others})
    before = json.loads(path.read_text()) if o.keep and path.exists() else {}
    if before.get("options") != options:
        before = {"configs": {}, "rows": []}
    kept = {key: before[key] for key in ("configs", "rows")}
    return {"options": options, **_plain(more), **kept}


def _plain(value: Any) -> Any:
    """As it will be read from the file."""
    return json.loads(json.dumps(value, default=str))


def spaced(config: IQLConfig, o: argparse.Namespace) -> list[int]:
    points = getattr(o, "points", 1)
    return [config.updates * (number + 1) // points for number in range(points)]


def populations(
    config: IQLConfig, variants: Mapping[str, Settings]
) -> list[tuple[dict[str, IQLConfig], Settings]]:
    """The configs of each population by variant, and the attributes of its actor's objective."""
    found: dict[str, tuple[dict[str, IQLConfig], Settings]] = {}
    described = config_settings(IQLConfig)
    for name, settings in variants.items():
        each = replace(config, **{k: v for k, v in settings.items() if k in described})
        objective = {k: v for k, v in settings.items() if k not in described}
        shared = {k: v for k, v in each.to_dict().items() if not described[k].per_run}
        found.setdefault(str((shared, objective)), ({}, objective))[0][name] = each
    return list(found.values())


def learn(
    data: Any,
    runs: Sequence[IQLConfig],
    ends: Sequence[int],
    batches: str = "shared",
    objective: Settings = MappingProxyType({}),
) -> Iterator[tuple[Row, Agent]]:
    """Train ``runs`` as one population; after each number of updates in ``ends`` the row's beginning
    and the agent of every run."""
    torch.manual_seed(0)
    population, seconds = IQLPopulation(list(runs), data, batches=batches), 0.0
    for name, value in objective.items():
        setattr(population.loss.actor_objective, name, value)
    for end in ends:
        began = time.perf_counter()
        population.train_now(end - population.updates)
        seconds += (time.perf_counter() - began) / len(runs)
        for number, config in enumerate(runs):
            row = {"run": number, "seed": config.seed, "updates": end, "seconds": seconds}
            yield row, population.member(number)


def table(rows: Sequence[Row], keys: Sequence[str] = ("task", "variant")) -> str:
    """Means over seeds after the last updates, with Student's 95 % intervals: a line for each value of
    ``keys``."""
    last: dict[str, dict[Any, Row]] = {}
    for row in rows:
        label = ", ".join(str(row[key]) for key in keys if row.get(key, "") != "")
        last.setdefault(label, {})[row.get("seed")] = row
    others = {*keys, "task", "variant", "seed", "updates", "seconds"}
    measures = dict.fromkeys(name for row in rows for name in row if name not in others)
    lines = [["", *measures]]
    for label, seeds in last.items():
        values = ([row.get(name) for row in seeds.values()] for name in measures)
        lines.append([label, *map(_cell, values)])
    return text_table(lines)


def _cell(values: Sequence[float | None]) -> str:
    known = np.array([value for value in values if value is not None and np.isfinite(value)])
    if len(known) < 2:
        return f"{known[0]:.4g}" if len(known) else ""
    return "{:.4g} ({:.4g} to {:.4g})".format(*mean_interval(known))


def play(policy: Any, data: OfflineDataset, episodes: int, **how: Any) -> Evaluation:
    return evaluate(policy, data.make_env, episodes=episodes, seed=EVALUATION_SEED, **how)


def mean_return(policy: Any, data: OfflineDataset, episodes: int, **how: Any) -> float:
    return float(play(policy, data, episodes, **how).returns.mean())


def returns_task(
    data: OfflineDataset,
    config: IQLConfig,
    variants: Mapping[str, Settings],
    episodes: int,
    **how: Any,
) -> Task:
    """A task whose score is the mean return of so many episodes; the dataset has that of its own."""
    return Task(
        data=data,
        config=config,
        variants=variants,
        scores=lambda agent: [{"return": mean_return(agent.policy, data, episodes, **how)}],
        references={"the dataset": {"return": float(data.episode_returns.mean())}},
    )


def pendulum() -> tuple[OfflineDataset, IQLConfig]:
    config = replace(PRESETS["quick"], hidden=(64, 64))
    return load_dataset(ensure_dataset("pendulum/mixed-v0"), reward=config.reward), config


def pointmaze() -> tuple[OfflineDataset, IQLConfig]:
    """One distant goal in the small maze, from drives to other targets; a return above 0 reaches it."""
    from iql_pointmaze import FIXED, fixed_goal

    return fixed_goal(load_dataset(ensure_dataset("pointmaze/umaze-v0")), "umaze")[0], FIXED


def sepsis(variants: Mapping[str, Settings]) -> Task:
    """ICU-Sepsis; the score is the exact probability of survival."""
    from iql_torchrl.data.builtin.icu_sepsis import NAME, SepsisTables

    import iql_sepsis

    data = load_dataset(ensure_dataset(NAME), reward=(iql_sepsis.POINTS, 0.0))
    tables = SepsisTables(data.make_env())

    def scores(agent: Agent) -> list[Row]:
        policy = iql_sepsis.probabilities(agent, tables.admissible)
        return [{"survival": tables.value(policy)}]

    level = {"the dataset": {"survival": float(data.episode_returns.mean())}}
    config = iql_sepsis.CONFIG
    return Task(data=data, config=config, variants=variants, scores=scores, references=level)


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call."""
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * float(np.median(taken))
