"""Settings tuned on a log alone: Optuna proposes them, ``rank_members``' estimate judges them.

Each round is one ``Sweep``: the runs that Optuna proposes are trained as a population on one part of
the log, and their estimated values on held-out episodes are told to Optuna. Of many trials, the
highest estimate is too high. So at the end the best trials and the preset are compared on reserved
episodes, which nothing has read before. No environment is used, except to check the result
(``--check``). Started again with the same arguments, it continues; a larger ``--rounds`` adds rounds.
It needs ``pip install -e ".[search]"``.
"""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from iql_torchrl import PRESETS, Agent, IQLConfig, evaluate, load_dataset
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.report.figures import save
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_members
from iql_torchrl.sweep import Sweep, SweepResult
from iql_torchrl.sweep.result import write_table

import numpy as np

EXPECTED = (ImportError, ValueError, OSError, RuntimeError)
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
Setting = Literal[
    "expectile", "temperature", "max_weight", "discount", "actor_lr", "critic_lr", "value_lr"
]
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id, file, or one of the built-in datasets (python -m iql_torchrl.data)"""
    env: str | None = None
    """Gymnasium id, for files that record none"""
    folder: Path = Path("runs/search")
    """of the results; a search that is there is continued"""
    search: tuple[Setting, ...] = ("expectile", "temperature")
    """settings to search; the others keep the preset's values"""
    rounds: int = 4
    """of proposals"""
    batch: int = 8
    """trials of each round"""
    seeds: int = 1
    """runs of each trial; their mean estimate judges it"""
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
    members_per_task: int = 16
    """runs that are trained together"""
    address: str | None = None
    """of a Ray cluster"""
    check: bool = False
    """evaluate the finalists in the environment, to see how good the choice was"""
    episodes: int = 20
    """episodes of each evaluation of --check"""


def main(arguments: list[str] | None = None) -> int:
    options, config = parse(sys.argv[1:] if arguments is None else arguments)
    began = time.monotonic()
    try:
        data = options.folder / "data"
        name = options.dataset
        load_dataset(
            ensure_dataset(name) if name in BUILTIN else name, env=options.env, memmap=data
        ).print_notes()
        rows, results, last = search(options, config)
        write_table(options.folder / "trials.csv", rows)
        ranking, agents = final(options, config, rows, results, last)
    except EXPECTED as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    ranking.to_json(options.folder / "final.json")
    draw(options.folder / "search.png", options.search, rows, ranking)
    print(f"\nOn {ranking.episodes} reserved episodes:\n{ranking}")
    if options.check:
        check(options, agents)
    print(f"{time.monotonic() - began:.0f} s. Written to {options.folder}/")
    return 0


def search(options: Options, config: IQLConfig) -> tuple[Rows, dict[str, SweepResult], Sweep]:
    """Rows of all trials, the results that have them, and the last sweep.

    Nothing of the search is stored: its proposals follow from the seed and the estimates, which the
    folders of the rounds keep.
    """
    optuna = imported()
    space = {
        name: optuna.distributions.FloatDistribution(low, high, log=log)
        for name, (low, high, log) in RANGES.items()
        if name in options.search
    }
    study = optuna.create_study(
        direction="maximize",
        # trials of a round that are not judged yet count as bad, so that a round is diverse
        sampler=optuna.samplers.TPESampler(
            seed=config.seed, constant_liar=True, n_startup_trials=options.batch
        ),
    )
    study.enqueue_trial({name: getattr(config, name) for name in space})  # the preset itself
    rows: Rows = {}
    results: dict[str, SweepResult] = {}
    for number in range(options.rounds):
        trials = [study.ask(space) for _ in range(options.batch)]
        sweep = sweep_of(options, number, {trial.number: trial.params for trial in trials}, config)
        result = sweep.run(options.engine, workers=options.workers, address=options.address)
        print(*result.notes, sep="\n", end="\n" if result.notes else "")
        for trial in trials:
            row = judged(trial.number, trial.params, result)
            rows[row["trial"]], results[row["trial"]] = row, result
            failed = math.isnan(row["value"])
            state = optuna.trial.TrialState.FAIL if failed else None
            study.tell(trial, None if failed else row["value"], state=state)
        if all(math.isnan(row["value"]) for row in rows.values()):
            raise RuntimeError(f"no trial has an estimate: {next(iter(rows.values()))['error']}")
        best = max(rows.values(), key=value_of)
        words = ", ".join(f"{name} {best[name]:.3g}" for name in space)
        print(f"round {number}: the best of {len(rows)} is {best['trial']} ({words}), "
              f"estimate {best['value']:.4g}; the preset's {rows['trial 0']['value']:.4g}")  # fmt: skip
    return rows, results, sweep


def sweep_of(
    options: Options, number: int, proposals: Mapping[int, dict[str, float]], config: IQLConfig
) -> Sweep:
    runs = {
        f"trial {trial} #{config.seed + seed}": replace(config, **params, seed=config.seed + seed)
        for trial, params in proposals.items()
        for seed in range(options.seeds)
    }
    return Sweep(
        runs,
        options.folder / "data",
        options.folder / f"round-{number:03d}",
        members_per_task=options.members_per_task,
        env=options.env,
        score=None,
        held_out=options.held_out,
        reserved=options.reserved,
        fit_updates=options.fit_updates,
        discount=config.discount,  # all are estimated with this one, also those that learn with another
    )


def judged(number: int, params: Mapping[str, float], result: SweepResult) -> dict[str, Any]:
    """The row of a trial: the mean estimate of its runs, NaN where one has none."""
    own = [row for row in result.rows.values() if row["settings"] == f"trial {number}"]
    values = [row.get("value", math.nan) for row in own]
    doubts = sorted({doubt for row in own for doubt in row.get("doubts", "").split()})
    errors = [row["error"] for row in own if "error" in row]
    return {
        "trial": f"trial {number}",
        **params,
        "value": float(np.mean(values)),
        "lowest": min(values),
        "highest": max(values),
        "doubts": " ".join(doubts),
        "runs": len(own),
        "error": "; ".join(errors or result.notes),
    }


def value_of(row: Mapping[str, Any]) -> float:
    return -math.inf if math.isnan(row["value"]) else float(row["value"])


def final(
    options: Options,
    config: IQLConfig,
    rows: Rows,
    results: Mapping[str, SweepResult],
    last: Sweep,
) -> tuple[Ranking, dict[str, Agent]]:
    """The best trials and the preset, compared on episodes that no round has read."""
    order = sorted(rows, key=lambda trial: -value_of(rows[trial]))
    chosen = dict.fromkeys([*order[: options.finalists], "trial 0"])
    agents = {
        name: results[trial].agent(name)
        for trial in chosen
        for name, row in results[trial].rows.items()
        if row["settings"] == trial and "value" in row
    }
    _, fit, reserved = last.parts()
    fitted = fitted_q_evaluation(
        agents, fit, reserved, discount=config.discount, updates=options.fit_updates
    )
    return rank_members(agents, fit, reserved, discount=config.discount, fitted_q=fitted), agents


def check(options: Options, agents: Mapping[str, Agent]) -> None:
    log = load_dataset(options.folder / "data", env=options.env)
    print(f"\nIn the environment (the log: {log.episode_returns.mean():.4g}):")
    for name, agent in agents.items():
        summary = evaluate(
            agent.policy, log.make_env, episodes=options.episodes, seed=10_000
        ).summary()
        low, mean, high = (summary[f"return_{end}"] for end in ("low", "mean", "high"))
        print(f"{name}: {mean:.4g} (95 %: {low:.4g} to {high:.4g})")


def draw(path: Path, searched: tuple[str, ...], rows: Rows, ranking: Ranking) -> None:
    """The estimates by trial, and over each setting that was searched."""
    from matplotlib.figure import Figure

    known = [row for row in rows.values() if not math.isnan(row["value"])]
    figure = Figure((3.6 * (1 + len(searched)), 3.2), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(searched), sharey=True, squeeze=False)[0]
    numbers, values = zip(*[(int(r["trial"].split()[1]), r["value"]) for r in known], strict=True)
    first.plot(numbers, values, "o", color="C0", markersize=4)
    first.plot(numbers, np.maximum.accumulate(values), color="C1", label="best so far")
    first.axhline(values[0], color="0.5", linestyle=":", label=known[0]["trial"])
    first.set(xlabel="trial", ylabel="estimate from held-out episodes")
    first.legend(fontsize=8)
    for axes, name in zip(others, searched, strict=True):
        seen = axes.scatter([r[name] for r in known], values, c=numbers, s=16, cmap="viridis")
        axes.set(xlabel=name, xscale="log" if RANGES[name][2] else "linear")
    figure.colorbar(seen, ax=others, label="trial")
    figure.suptitle(ranking.recommendation, fontsize=7, wrap=True, parse_math=False)
    save(figure, path)


def imported() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            'the search needs optuna; install it with pip install "iql_torchrl[search]".'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def parse(arguments: list[str]) -> tuple[Options, IQLConfig]:
    presets = {"search": replace(PRESETS["quick"], updates=3_000)} | dict(PRESETS)
    options, config = cli.parse(
        Options, arguments, presets=presets, description=__doc__.split("\n\n")[0]
    )
    counts = ("rounds", "batch", "seeds", "finalists", "fit_updates", "workers", "episodes")
    if min(getattr(options, name) for name in counts) < 1:
        cli.refuse(f"--{', --'.join(counts).replace('_', '-')} are numbers of at least 1.")
    if not options.search:
        cli.refuse("--search is empty; name at least one setting.")
    for name in options.search:
        low, high, _ = RANGES[name]
        if not low <= getattr(config, name) <= high:
            cli.refuse(
                f"{name} is {getattr(config, name):g}; it is searched in [{low:g}, {high:g}]."
            )
    return options, config


if __name__ == "__main__":
    sys.exit(main())
