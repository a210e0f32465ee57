"""A grid of settings and seeds trained as one population, scored, and ranked from the log alone.

Without arguments: a Pendulum log and 14 policies (cloning; temperature x expectile; two seeds).
Part of the log is held out: from it fitted Q evaluation estimates the value of every policy, and
the ranking recommends one. Evaluating all of them shows how good the recommendation was. With
``--dataset icu-sepsis/clinician-v0`` the truth is the exact probability of survival.
"""

import csv
import sys
import time
from dataclasses import dataclass, field, make_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from iql_sepsis import CONFIG as SEPSIS
from iql_sepsis import POINTS, probabilities
from sweep_picture import draw
from tqdm import tqdm
from tyro.conf import arg

from iql_torchrl import (
    PRESETS,
    IQLConfig,
    IQLPopulation,
    OfflineDataset,
    cli,
    evaluate,
    load_dataset,
)
from iql_torchrl.config import knobs
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import NAME, SepsisTables
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.files import whole_file
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_members
from iql_torchrl.trainers.run_folder import new_folder

EXPECTED = (ImportError, ValueError, OSError, RuntimeError, AssertionError)
FIRST = {"temperature": "0, the preset's, 3 times that", "expectile": "0.5, 0.7, 0.9"}
GRID = dict.fromkeys([*FIRST, *(name for name, knob in knobs(IQLConfig).items() if knob.per_run)])
GRID.pop("seed")
EVALUATION_SEED = 10_000  # every policy has the same initial states
Rows = dict[str, dict[str, Any]]
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
    """of the results"""
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
    config, began = next(iter(runs.values())), time.monotonic()
    exact = options.dataset == NAME
    try:
        source = ensure_dataset(options.dataset) if options.dataset in BUILTIN else options.dataset
        reward: Any = (POINTS, 0.0) if exact else config.reward
        log = load_dataset(source, env=options.env, reward=reward)
        log.print_notes()
        own, rest = log.split(1 - options.held_out, seed=0) if options.ranking else (log, log)
        population = IQLPopulation(list(runs.values()), own)
        folder = new_folder(options.folder.parent, options.folder.name, arguments)
    except EXPECTED as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{options.dataset}: {len(runs)} policies from {len(own):,} of {len(log):,} transitions.")
    playable = can_play(log)
    train(population, config.updates)
    population.save(folder / "population.torchrl")
    members = {name: population.member(number) for number, name in enumerate(runs)}
    rows: Rows = {
        name: {"member": name, "settings": name.rpartition(" #")[0], "seed": run.seed}
        | {field: getattr(run, field) for field in GRID}
        for name, run in runs.items()
    }
    level = play(members, rows, log, options) if playable else None
    ranking = rank(members, rest, options, config) if options.ranking else None
    for row in ranking.rows if ranking else ():
        rows[row["member"]] |= {key: row[key] for key in row if key != "doubts"}
    report(rows, ranking, level)
    with whole_file(folder / "members.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(rows.values()))))
        writer.writeheader()
        writer.writerows(rows.values())
    if level or ranking:
        words = "probability of survival" if exact else "mean return, 95 % interval"
        draw(folder / "sweep.png", rows, ranking, level, title=options.dataset, words=words)
    print(f"{time.monotonic() - began:.0f} s. Written to {folder}/")
    return 0


def train(population: IQLPopulation, updates: int) -> None:
    with tqdm(total=updates, unit="update", desc="training", disable=None) as bar:
        for event in population.train(every=min(100, updates)):
            losses = {name: event.metrics[f"loss_{name}"] for name in ("value", "qvalue", "actor")}
            spread = [f"{k} {float(v.min()):.3g}..{float(v.max()):.3g}" for k, v in losses.items()]
            bar.set_postfix_str("loss of " + ", ".join(spread), refresh=False)
            bar.update(event.updates - bar.n)


def can_play(log: OfflineDataset) -> bool:
    try:
        log.make_env().close()
    except EXPECTED as error:
        print(f"There will be no scores: {error}")
        return False
    return True


def play(members: Any, rows: Rows, log: OfflineDataset, options: Options) -> Level:
    """Write scores into the rows; returns the name and the score of the log's own policy."""
    if options.dataset == NAME:
        tables = SepsisTables(log.make_env())
        for name, member in members.items():
            exact = tables.value(probabilities(member, tables.admissible))
            rows[name] |= {"score": exact, "score_low": exact, "score_high": exact}
        return "the clinicians", tables.value(tables.clinician)
    for name, member in tqdm(members.items(), desc="playing", unit="policy", disable=None):
        evaluation = evaluate(
            member.policy, log.make_env, episodes=options.episodes, seed=EVALUATION_SEED
        )
        summary = evaluation.summary()
        ends = {"score": "mean", "score_low": "low", "score_high": "high"}
        rows[name] |= {key: summary[f"return_{end}"] for key, end in ends.items()}
    return "the log", float(log.episode_returns.mean())


def rank(members: Any, rest: OfflineDataset, options: Options, config: IQLConfig) -> Ranking:
    """Estimates are fitted on half of the held-out episodes and corrected by the other half."""
    fit, held_out = rest.split(0.5, seed=0)
    print(
        f"Estimating {len(members)} policies on {len(held_out.episode_lengths)} held-out episodes."
    )
    # every stay in hospital terminates, so the undiscounted value is the probability of survival
    discount = 1.0 if options.dataset == NAME else config.discount
    fitted = fitted_q_evaluation(
        members, fit, held_out, discount=discount, updates=options.fit_updates
    )
    return rank_members(members, fit, held_out, discount=discount, fitted_q=fitted)


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
        print(f"In truth that scores {advised:.4g}, {top}; {level[0]} {level[1]:.4g}. "
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
    if min(options.seeds, options.episodes, options.fit_updates) < 1:
        cli.refuse("--seeds, --episodes and --fit-updates are numbers of at least 1.")
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
