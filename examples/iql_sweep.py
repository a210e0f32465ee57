"""A grid of settings and seeds trained as populations, scored, and ranked from the log alone.

The command line of ``iql_torchrl.sweep``: started again with the same arguments, it continues, or
reads the results. Without arguments: a Pendulum log and 14 policies (cloning; temperature x
expectile; two seeds). Part of the log is held out: from it fitted Q evaluation estimates the value
of every policy, and the ranking recommends one. Evaluating all of them shows how good the
recommendation was. With ``--dataset icu-sepsis/clinician-v0`` the truth is the exact probability of
survival.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from iql_sepsis import CONFIG as SEPSIS
from iql_sepsis import POINTS, dynamics, survival
from iql_torchrl import PRESETS, Agent, IQLConfig, OfflineDataset
from iql_torchrl.config import cli, knobs
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.data.builtin.icu_sepsis import NAME, SepsisTables
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.report import text_table
from iql_torchrl.selection import Ranking
from iql_torchrl.sweep import Sweep

# settings in which the runs of a population may differ
PER_RUN = [name for name, knob in knobs(IQLConfig).items() if knob.per_run and name != "seed"]
GRID = tuple(dict.fromkeys(["temperature", "expectile", *PER_RUN]))
HELD_OUT = 0.4  # part of the episodes
COUNTS = ("seeds", "episodes", "fit_updates", "members_per_task", "workers")
Rows = Mapping[str, dict[str, Any]]
Grid = make_dataclass("Grid", [(name, tuple[float, ...], ()) for name in GRID])
Grid.__doc__ = (
    """Values to try; by default the preset's, three temperatures and three expectiles."""
)


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id, file, or one of the built-in datasets (python -m iql_torchrl.data)"""
    env: str | None = None
    """Gymnasium id to play in, for files that record none"""
    folder: Path = Path("runs/sweep")
    """of the results; a sweep that is there is continued"""
    engine: Literal["local", "ray", "slurm"] = "local"
    """what performs the tasks: processes here, Ray, or Slurm by submitit"""
    workers: int = 1
    """tasks at once"""
    members_per_task: int = 16
    """policies that are trained together"""
    address: str | None = None
    """of a Ray cluster: HOST:PORT or auto"""
    slurm: tuple[str, ...] = ()
    """NAME=VALUE: options of submitit, such as slurm_partition=cpu timeout_min=60"""
    seeds: int = 2
    """runs of each setting"""
    episodes: int = 20
    """episodes of each policy's evaluation"""
    ranking: bool = True
    """rank the policies from 40 % of the episodes; without, learn from all"""
    fit_updates: int = 2_000
    """updates of fitted Q evaluation"""
    grid: Grid = field(default_factory=Grid)


@cli.errors_in_one_line()
def main(arguments: list[str] | None = None) -> int:
    options, runs = parse(sys.argv[1:] if arguments is None else arguments)
    print(f"{options.dataset}: {len(runs)} policies.")
    how: dict[str, Any] = {}
    if options.dataset == NAME:
        tables = dynamics()
        how = {"reward": (POINTS, 0.0), "score": exact, "score_words": "probability of survival"}
        how["log_score"] = "the clinicians", tables.value(tables.clinician)
        how["discount"] = 1.0  # every stay ends, so the undiscounted value is the probability
    sweep = Sweep(
        runs,
        ensure_source(options.dataset),
        options.folder,
        members_per_task=options.members_per_task,
        env=options.env,
        episodes=options.episodes,
        held_out=HELD_OUT if options.ranking else None,
        fit_updates=options.fit_updates,
        **how,
    )
    slurm = {}
    for name, _, value in (option.partition("=") for option in options.slurm):
        slurm[name] = int(value) if value.isdecimal() else value
    try:
        result = sweep.run(
            options.engine,
            workers=options.workers,
            address=options.address,
            slurm=slurm,
        )
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.", file=sys.stderr)
        return 130
    failures = [f"{name} failed: {sentence}" for name, sentence in result.failures.items()]
    print(*result.notes, *failures, sep="\n")
    if rows := {name: row for name, row in result.rows.items() if name not in result.failures}:
        report(rows, result.ranking, result.log_score)
    print(f"Written to {options.folder}/")
    return 1 if failures else 0


def exact(agent: Agent, log: OfflineDataset) -> dict[str, float]:
    return {"score": survival(agent, SepsisTables(log.make_env()))}


def report(rows: Rows, ranking: Ranking | None, level: tuple[str, float] | None) -> None:
    """The table, best first, the recommendation from the log alone, and its true score."""
    key = "score" if level else "value"
    order = sorted(rows, key=lambda name: -rows[name].get(key, 0.0))
    table = [["", "score (95 %)", "estimate (95 %)"]]
    table += [[name, *(cell(rows[name], k) for k in ("score", "value"))] for name in order]
    table += [[level[0], f"{level[1]:.4g}", ""]] if level else []
    print("\n" + text_table(table))
    if ranking:
        print("", *map("Warning: {}".format, ranking.warnings), ranking.recommendation, sep="\n")
    if ranking and level:
        estimates, scores = ([rows[name][k] for name in order] for k in ("value", "score"))
        correlation, _ = rank_correlations(estimates, scores)
        chosen, truth = f"{level[0]} (none is recommended)", level[1]
        if ranking.recommended:
            chosen, truth = ranking.recommended, rows[ranking.recommended]["score"]
        print(f"In truth {chosen} scores {truth:.4g}; the best, {order[0]}, {scores[0]:.4g}; "
              f"{level[0]} {level[1]:.4g}. Rank correlation {correlation:.2f}.")  # fmt: skip


def cell(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "-"
    low, high = (row.get(f"{key}_{end}") for end in ("low", "high"))
    return f"{row[key]:.4g}" + ("" if low == high else f" ({low:.4g} to {high:.4g})")


def runs_of(
    config: IQLConfig, grid: dict[str, tuple[float, ...]], seeds: int
) -> dict[str, IQLConfig]:
    """Every combination and seed by name; cloning, on which few knobs have an effect, only once."""
    runs: dict[str, IQLConfig] = {}
    for values, seed in product(product(*grid.values()), range(config.seed, config.seed + seeds)):
        knobs = dict(zip(grid, values, strict=True))
        words = [f"{name} {knobs[name]:g}" for name in grid if len(grid[name]) > 1]
        if knobs["temperature"] == 0:
            knobs |= {k: grid[k][0] for k in grid if k not in ("temperature", "actor_lr")}
            words = ["cloning"] + [word for word in words if word.startswith("actor_lr")]
        name = f"{', '.join(words) or 'IQL'} #{seed}"
        runs.setdefault(name, replace(config, **knobs, seed=seed))
    return runs


def parse(arguments: list[str]) -> tuple[Options, dict[str, IQLConfig]]:
    presets = {"sweep": replace(PRESETS["quick"], updates=3_000), "sepsis": SEPSIS}
    first = "sepsis" if NAME in arguments else "sweep"
    options, config = cli.parse(
        Options,
        arguments,
        presets={first: presets[first]} | presets | dict(PRESETS),
        without=GRID,
        least=dict.fromkeys(COUNTS, 1),
        description=__doc__.split("\n\n")[0],
    )
    for option in options.slurm:
        if "=" not in option:
            cli.refuse(f"--slurm has {option!r}; expected NAME=VALUE.")
    usual = {name: (getattr(config, name),) for name in GRID}
    usual["temperature"] = (0.0, config.temperature, 3 * config.temperature)
    usual["expectile"] = (0.5, 0.7, 0.9)
    grid = {name: getattr(options.grid, name) or usual[name] for name in GRID}
    return options, runs_of(config, grid, options.seeds)


if __name__ == "__main__":
    sys.exit(main())
