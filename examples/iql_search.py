"""Settings tuned on a log alone: Optuna proposes them, ``rank_members``' estimate judges them.

Each round is one ``Sweep``: the runs that Optuna proposes are trained as a population on one part of
the log, and Optuna gets their estimated values on held-out episodes. Of many trials, the highest
estimate is too high. So at the end the best trials and the preset are compared on reserved episodes,
which nothing has read before. No environment is used, except to check the result (``--check``).
Started again with the same arguments, it continues; a larger ``--rounds`` adds rounds.
It needs ``pip install -e ".[search]"``.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from iql_torchrl import PRESETS, IQLConfig, evaluate, load_dataset
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.report import text_table, write_rows
from iql_torchrl.report.figures import save
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_members
from iql_torchrl.sweep import Sweep, SweepResult

import numpy as np
from matplotlib.figure import Figure

# smallest and largest value, and whether the logarithm is searched; all may differ in a population
RANGES = {
    "expectile": (0.5, 0.95, False),
    "temperature": (0.1, 30.0, True),
    "max_weight": (3.0, 1000.0, True),
    "discount": (0.9, 0.999, False),
    "actor_lr": (1e-4, 3e-3, True),
    "critic_lr": (1e-4, 3e-3, True),
    "value_lr": (1e-4, 3e-3, True),
}
COUNTS = ("rounds", "batch", "finalists", "fit_updates", "workers")
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id, file, or one of the built-in datasets (python -m iql_torchrl.data)"""
    env: str | None = None
    """Gymnasium id, for files that record none"""
    folder: Path = Path("runs/search")
    """of the results; a search that is there is continued"""
    search: tuple[Literal[tuple(RANGES)], ...] = ("expectile", "temperature")
    """settings to search; the others keep the preset's values"""
    rounds: int = 4
    """of proposals"""
    batch: int = 8
    """trials of each round"""
    finalists: int = 3
    """best trials that are compared with the preset on reserved episodes"""
    held_out: float = 0.4
    """part of the episodes that judges trials, in (0, 1)"""
    reserved: float = 0.3
    """part of the episodes for the last comparison, taken first, in (0, 1)"""
    fit_updates: int = 2_000
    """updates of fitted Q evaluation"""
    engine: Literal["local", "ray"] = "local"
    """what performs the rounds"""
    workers: int = 1
    """tasks at once"""
    check: bool = False
    """evaluate the finalists in the environment, to see how good the choice was"""


@cli.errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    presets = {"search": replace(PRESETS["quick"], updates=3_000)} | dict(PRESETS)
    least, description = dict.fromkeys(COUNTS, 1), __doc__.split("\n\n")[0]
    options, config = cli.parse(
        Options, arguments, presets=presets, least=least, description=description
    )
    for name in options.search:
        low, high, _ = RANGES[name]
        if not low <= getattr(config, name) <= high:
            value = getattr(config, name)
            cli.refuse(f"{name} is {value:g}; it is searched in [{low:g}, {high:g}].")
    for name in ("held_out", "reserved"):
        if not 0 < getattr(options, name) < 1:
            cli.refuse(f"{name} is {getattr(options, name):g}; it must lie in (0, 1).")
    source = ensure_source(options.dataset)
    log = load_dataset(source, env=options.env, memmap=options.folder / "data")
    log.print_notes()
    rows, results, last = search(options, config)
    write_rows(options.folder / "trials.csv", list(rows.values()))
    ranking, agents = compare(options, config, rows, results, last)
    ranking.to_json(options.folder / "final.json")
    draw(options.folder / "search.png", options.search, rows, ranking)
    print(f"\nOn {ranking.episodes} reserved episodes:\n{ranking}")
    if options.check:
        table = [["In the environment", "return", "from", "to (95 %)"]]
        table += [["the log", f"{log.episode_returns.mean():.4g}", "", ""]]
        for name, agent in agents.items():
            result = evaluate(agent.policy, log.make_env, episodes=20, seed=10_000).summary()
            ends = (result[f"return_{end}"] for end in ("mean", "low", "high"))
            table.append([name, *(f"{value:.4g}" for value in ends)])
        print("\n" + text_table(table))
    print(f"Written to {options.folder}/")


def search(options: Options, config: IQLConfig) -> tuple[Rows, dict[str, SweepResult], Sweep]:
    """Rows of all trials, the results that have them, and the last sweep.

    Nothing of the search is stored: its proposals follow from the seed and the estimates, which the
    folders of the rounds keep.
    """
    try:
        import optuna
    except ImportError as error:
        remedy = 'the search needs optuna; install it with pip install "iql_torchrl[search]".'
        raise ImportError(remedy) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {
        name: optuna.distributions.FloatDistribution(low, high, log=log)
        for name, (low, high, log) in RANGES.items()
        if name in options.search
    }
    # trials of a round that are not judged yet count as bad, so that a round is diverse
    sampler = optuna.samplers.TPESampler(
        seed=config.seed, constant_liar=True, n_startup_trials=options.batch
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({name: getattr(config, name) for name in space})  # the preset itself
    rows: Rows = {}
    results: dict[str, SweepResult] = {}
    for number in range(options.rounds):
        trials = {f"trial {t.number}": t for t in (study.ask(space) for _ in range(options.batch))}
        sweep = Sweep(
            {name: replace(config, **trial.params) for name, trial in trials.items()},
            options.folder / "data",
            options.folder / f"round-{number:03d}",
            members_per_task=16,
            env=options.env,
            score=None,
            held_out=options.held_out,
            reserved=options.reserved,
            fit_updates=options.fit_updates,
            discount=config.discount,  # of all estimates, also of runs that learn with another
        )
        result = sweep.run(options.engine, workers=options.workers)
        for note in result.notes:
            print(note)
        for name, trial in trials.items():
            row = {"value": math.nan, "error": " ".join(result.notes)} | result.rows[name]
            kept = ("value", "value_low", "value_high", "doubts", "error")
            rows[name] = {"trial": name, **trial.params, **{key: row.get(key) for key in kept}}
            results[name], failed = result, math.isnan(row["value"])
            state = optuna.trial.TrialState.FAIL if failed else None
            study.tell(trial, None if failed else row["value"], state=state)
        if all(math.isnan(row["value"]) for row in rows.values()):
            raise RuntimeError(f"no trial has an estimate: {rows['trial 0']['error']}")
        best = rows[best_first(rows)[0]]
        words = ", ".join(f"{name} {best[name]:.3g}" for name in space)
        print(f"round {number}: the best of {len(rows)} is {best['trial']} ({words}), "
              f"estimate {best['value']:.4g}; the preset's {rows['trial 0']['value']:.4g}")  # fmt: skip
    return rows, results, sweep


def best_first(rows: Rows) -> list[str]:
    """The trials that have an estimate, the highest first."""
    known = [trial for trial, row in rows.items() if not math.isnan(row["value"])]
    return sorted(known, key=lambda trial: -rows[trial]["value"])


def compare(options, config, rows, results, last):
    """The best trials and the preset, compared on episodes that no round has read."""
    chosen = dict.fromkeys([*best_first(rows)[: options.finalists], "trial 0"])
    known = [trial for trial in chosen if not math.isnan(rows[trial]["value"])]
    agents = {trial: results[trial].agent(trial) for trial in known}
    _, fit, reserved = last.parts()
    discount, updates = config.discount, options.fit_updates
    fitted = fitted_q_evaluation(agents, fit, reserved, discount=discount, updates=updates)
    return rank_members(agents, fit, reserved, discount=discount, fitted_q=fitted), agents


def draw(path: Path, searched: tuple[str, ...], rows: Rows, ranking: Ranking) -> None:
    """The estimates by trial, and over each setting that was searched."""
    known = [row for row in rows.values() if not math.isnan(row["value"])]
    values = [row["value"] for row in known]
    figure = Figure((3.6 * (1 + len(searched)), 3.2), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(searched), sharey=True)
    first.plot(values, "o", markersize=4)
    first.plot(np.maximum.accumulate(values), label="best so far")
    first.axhline(values[0], color="0.5", linestyle=":", label=known[0]["trial"])
    first.set(xlabel="trial", ylabel="estimate from held-out episodes")
    first.legend(fontsize=8)
    for axes, name in zip(others, searched, strict=True):
        axes.scatter([row[name] for row in known], values, s=16)
        axes.set(xlabel=name, xscale="log" if RANGES[name][2] else "linear")
    figure.suptitle(ranking.recommendation, fontsize=7, wrap=True, parse_math=False)
    save(figure, path)


if __name__ == "__main__":
    main()
