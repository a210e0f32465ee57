"""A grid of settings and seeds trained as populations, scored, and ranked from the log alone.

The command line of ``iql_torchrl.sweep``: started again with the same arguments, it continues, or
reads the results. Without arguments: a Pendulum log and 14 policies (cloning; temperature x
expectile; two seeds). Part of the log is held out: from it fitted Q evaluation estimates the value
of every policy, and the ranking recommends one. Evaluating all of them shows how good the
recommendation was. With ``--dataset icu-sepsis/clinician-v0`` the truth is the exact probability of
survival.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from iql_sepsis import CONFIG as SEPSIS
from iql_sepsis import POINTS, probabilities
from iql_torchrl import PRESETS, Agent, IQLConfig, OfflineDataset
from iql_torchrl.config import cli, knobs
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import ENVIRONMENT, NAME, SepsisTables
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.selection import Ranking
from iql_torchrl.sweep import Sweep

from tyro.conf import arg

EXPECTED = (ImportError, ValueError, OSError, RuntimeError, AssertionError)
FIRST = {"temperature": "0, the preset's, 3 times that", "expectile": "0.5, 0.7, 0.9"}
GRID = dict.fromkeys([*FIRST, *(name for name, knob in knobs(IQLConfig).items() if knob.per_run)])
GRID.pop("seed")
Rows = Mapping[str, dict[str, Any]]
Level = tuple[str, float] | None
# each setting in which the runs of a population may differ, with several values
Grid = make_dataclass(
    "Grid",
    [
        (
            name,
            Annotated[
                tuple[float, ...],
                arg(help=f"values to try; by default {FIRST.get(name, 'that of the preset')}"),
            ],
            (),
        )
        for name in GRID
    ],
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
    threads: int = 1
    """of each task"""
    address: str | None = None
    """of a Ray cluster: HOST:PORT or auto"""
    slurm: tuple[str, ...] = ()
    """NAME=VALUE: options of submitit, such as slurm_partition=cpu timeout_min=60"""
    seeds: int = 2
    """runs of each setting"""
    episodes: int = 20
    """episodes of each policy's evaluation"""
    ranking: bool = True
    """rank the policies from held-out episodes; without, learn from the complete log"""
    held_out: float = 0.4
    """part of the episodes that is held out, in (0, 1)"""
    fit_updates: int = 2_000
    """updates of fitted Q evaluation"""
    grid: Grid = field(default_factory=Grid)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options, runs = parse(arguments)
    began, exact = time.monotonic(), options.dataset == NAME
    words = "probability of survival" if exact else "mean return, 95 % interval"
    print(f"{options.dataset}: {len(runs)} policies.")
    try:
        result = Sweep(
            runs,
            ensure_dataset(options.dataset) if options.dataset in BUILTIN else options.dataset,
            options.folder,
            members_per_task=options.members_per_task,
            env=options.env,
            reward=(POINTS, 0.0) if exact else None,
            score=survival if exact else "environment",
            episodes=options.episodes,
            score_words=words,
            log_score=clinicians() if exact else None,
            held_out=options.held_out if options.ranking else None,
            fit_updates=options.fit_updates,
            # every stay in hospital terminates, so the undiscounted value is the probability
            discount=1.0 if exact else None,
        ).run(
            options.engine,
            workers=options.workers,
            threads=options.threads,
            address=options.address,
            slurm=dict(map(slurm_option, options.slurm)),
        )
    except EXPECTED as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.", file=sys.stderr)
        return 130
    for note in result.notes:
        print(note)
    for name, sentence in result.failures.items():
        print(f"{name} failed: {sentence}")
    rows = {name: row for name, row in result.rows.items() if name not in result.failures}
    if rows:
        report(rows, result.ranking, result.log_score)
    print(f"{time.monotonic() - began:.0f} s. Written to {options.folder}/")
    return 1 if result.failures else 0


def slurm_option(text: str) -> tuple[str, int | str]:
    name, _, value = text.partition("=")
    return name, int(value) if value.isdecimal() else value


def survival(agent: Agent, log: OfflineDataset) -> dict[str, float]:
    """The exact probability of survival."""
    tables = SepsisTables(log.make_env())
    return {"score": tables.value(probabilities(agent, tables.admissible))}


def clinicians() -> tuple[str, float]:
    import gymnasium
    import icu_sepsis  # noqa: F401  (registers the environment)

    tables = SepsisTables(gymnasium.make(ENVIRONMENT, disable_env_checker=True))
    return "the clinicians", tables.value(tables.clinician)


def report(rows: Rows, ranking: Ranking | None, level: Level) -> None:
    """The table, best first, the recommendation from the log alone, and its true score."""
    key, width = "score" if level else "value", max(map(len, rows))
    order = sorted(rows, key=lambda name: -rows[name].get(key, 0.0))
    heads = f"{'importance':>12}{'outside the log':>17}" if ranking else ""
    print(f"\n{'':{width}}{'score (95 %)':>31}{'estimate (95 %)':>31}{heads}")
    for name in order:
        row = rows[name]
        more = f"{row['importance_value']:12.4g}{row['extrapolation']:17.0%}" if ranking else ""
        print(f"{name:{width}}{cell(row, 'score')}{cell(row, 'value')}{more}")
    if level:
        print(f"{level[0]:{width}}{level[1]:31.4g}")
    if ranking:
        print("", *map("Warning: {}".format, ranking.warnings), ranking.recommendation, sep="\n")
    if ranking and level:
        estimates, scores = ([rows[name][key] for name in order] for key in ("value", "score"))
        correlation, _ = rank_correlations(estimates, scores)
        advised = rows[ranking.recommended]["score"] if ranking.recommended else level[1]
        top = (
            "the best"
            if ranking.recommended == order[0]
            else f"the best, {order[0]}, {scores[0]:.4g}"
        )
        chosen = ranking.recommended or f"{level[0]} (none is recommended)"
        print(f"In truth {chosen} scores {advised:.4g}, {top}; {level[0]} {level[1]:.4g}. "
              f"Rank correlation {correlation:.2f}.")  # fmt: skip


def cell(row: dict[str, Any], key: str) -> str:
    low, high = (row.get(f"{key}_{end}") for end in ("low", "high"))
    ends = "" if low == high else f" ({low:.4g} to {high:.4g})"
    return f"{row[key]:.4g}{ends}".rjust(31) if key in row else f"{'-':>31}"


def runs_of(
    config: IQLConfig, grid: dict[str, tuple[float, ...]], seeds: int
) -> dict[str, IQLConfig]:
    """Every combination and seed by name; cloning, on which few knobs have an effect, only once."""
    runs: dict[str, IQLConfig] = {}
    for values, seed in product(product(*grid.values()), range(seeds)):
        knobs = dict(zip(grid, values, strict=True))
        words = [f"{name} {knobs[name]:g}" for name in grid if len(grid[name]) > 1]
        if knobs["temperature"] == 0:
            knobs |= {k: grid[k][0] for k in grid if k not in ("temperature", "actor_lr")}
            words = ["cloning"] + [word for word in words if word.startswith("actor_lr")]
        name = f"{', '.join(words) or 'IQL'} #{config.seed + seed}"
        runs.setdefault(name, replace(config, **knobs, seed=config.seed + seed))
    return runs


def parse(arguments: list[str]) -> tuple[Options, dict[str, IQLConfig]]:
    presets = {"sweep": replace(PRESETS["quick"], updates=3_000), "sepsis": SEPSIS}
    first = "sepsis" if any(NAME in word for word in arguments) else "sweep"
    options, config = cli.parse(
        Options,
        arguments,
        presets={first: presets[first]} | presets | dict(PRESETS),
        without=GRID,
        description=__doc__.split("\n\n")[0],
    )
    counts = ("seeds", "episodes", "fit_updates", "members_per_task", "workers", "threads")
    if min(getattr(options, name) for name in counts) < 1:
        cli.refuse(f"--{', --'.join(counts).replace('_', '-')} are numbers of at least 1.")
    for option in options.slurm:
        if "=" not in option:
            cli.refuse(f"--slurm has {option!r}; expected NAME=VALUE.")
    if not 0 < options.held_out < 1:
        cli.refuse(f"--held-out is {options.held_out:g}; it must lie in (0, 1).")
    usual = {name: (getattr(config, name),) for name in GRID}
    usual["temperature"] = (0.0, config.temperature, 3 * config.temperature)
    usual["expectile"] = (0.5, 0.7, 0.9)
    grid = {name: getattr(options.grid, name) or usual[name] for name in GRID}
    try:
        return options, runs_of(config, grid, options.seeds)
    except ValueError as error:
        cli.refuse(error)


if __name__ == "__main__":
    sys.exit(main())
