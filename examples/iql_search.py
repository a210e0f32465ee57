"""Settings tuned without an environment: Optuna proposes them, ``rank_policies``' estimate judges them.

Each round is one ``IQLPopulation``: the trials that Optuna proposes are trained together on one part of
the dataset, and Optuna gets their estimated values on held-out episodes. Of many trials, the highest
estimate is too high. So at the end the best trials and the preset are compared on reserved episodes,
which nothing has read before. No environment is used. Started again with the same arguments, it
continues; a larger ``--rounds`` adds rounds. It needs ``pip install -e ".[search]"``.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from iql_torchrl import PRESETS, IQLPopulation, load_dataset
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.report import write_rows
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_policies

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
HELD_OUT, RESERVED = 0.4, 0.3  # parts of the episodes; the reserved ones are taken first
FINALISTS = 3  # best trials that are compared with the preset on reserved episodes


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
    fit_updates: int = 2_000
    """updates of fitted Q evaluation"""


@cli.errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    presets = {"search": replace(PRESETS["quick"], updates=3_000)} | dict(PRESETS)
    how = {"least": dict.fromkeys(("rounds", "batch", "fit_updates"), 1)}
    how["description"] = __doc__.split("\n\n")[0]
    options, config = cli.parse(Options, arguments, presets=presets, **how)
    for name in options.search:
        (low, high, _), value = RANGES[name], getattr(config, name)
        if not low <= value <= high:
            cli.refuse(f"{name} is {value:g}; it is searched in [{low:g}, {high:g}].")
    source = ensure_source(options.dataset)
    how = {"env": options.env, "reward": config.reward}
    dataset = load_dataset(source, memmap=options.folder / "data", **how)
    dataset.print_notes()
    rest, reserved = dataset.split(1 - RESERVED, seed=1)
    learn, held_out = rest.split(1 - HELD_OUT, seed=0)
    agents = search(options, config, learn, held_out)
    ranking = rank(agents, held_out, reserved, config.discount, options.fit_updates)
    ranking.to_json(options.folder / "final.json")
    print(f"\nOn {ranking.episodes} reserved episodes:\n{ranking}\nWritten to {options.folder}/")


def rank(agents, fit, test, discount, updates):
    fitted = fitted_q_evaluation(agents, fit, test, discount=discount, updates=updates)
    return rank_policies(agents, fit, test, discount=discount, fitted_q=fitted)


def train_round(options, configs, discount, learn, held_out, folder):
    """The agents of a round and the rows of their ranking, by name; ``folder`` keeps both."""
    saved, table = folder / "population.torchrl", folder / "ranking.json"
    if saved.exists():
        population = IQLPopulation.load(saved, learn)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        population = IQLPopulation(list(configs.values()), learn)
        population.train_now()
        population.save(saved)
    if list(population.configs) != list(configs.values()):
        raise ValueError(
            f"{folder} has another search; choose another --folder, or delete this one."
        )
    agents = {name: population.member(number) for number, name in enumerate(configs)}
    finite = {name: agent for name, agent in agents.items() if is_finite(agent)}
    if finite and not table.exists():
        fit, test = held_out.split(0.5, seed=0)
        rank(finite, fit, test, discount, options.fit_updates).to_json(table)
    return agents, {
        row["candidate"]: row for row in Ranking.from_json(table).rows
    } if finite else {}


def is_finite(agent):
    return all(parameter.isfinite().all() for parameter in agent.loss.parameters())


def search(options, config, learn, held_out):
    """The agents of the best trials and of the preset.

    Nothing of the search is stored: its proposals follow from the seed and the estimates, which the
    folders of the rounds keep.
    """
    try:
        import optuna
    except ImportError as error:
        remedy = 'the search needs optuna; install it with pip install "iql_torchrl[search]".'
        raise ImportError(remedy) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distribution = optuna.distributions.FloatDistribution
    space = {name: distribution(*RANGES[name][:2], log=RANGES[name][2]) for name in options.search}
    # trials of a round that are not judged yet count as bad, so that a round is diverse
    how = {"constant_liar": True, "n_startup_trials": options.batch}
    sampler = optuna.samplers.TPESampler(seed=config.seed, **how)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({name: getattr(config, name) for name in space})  # the preset itself
    rows, agents = {}, {}
    for number in range(options.rounds):
        trials = {f"trial {t.number}": t for t in (study.ask(space) for _ in range(options.batch))}
        configs = {name: replace(config, **trial.params) for name, trial in trials.items()}
        folder = options.folder / f"round-{number:03d}"
        # one discount for all estimates, also of trials that learn with another
        parts = config.discount, learn, held_out
        trained, ranked = train_round(options, configs, *parts, folder)
        for name, trial in trials.items():
            row = {"value": math.nan, "caveats": ["diverged"]} | ranked.get(name, {})
            kept = {key: row.get(key) for key in ("value", "value_low", "value_high")}
            caveats = " ".join(row["caveats"])
            rows[name] = {"trial": name, **trial.params, **kept, "caveats": caveats}
            failed = math.isnan(row["value"])
            state = optuna.trial.TrialState.FAIL if failed else None
            study.tell(trial, None if failed else row["value"], state=state)
        agents |= trained
        write_rows(options.folder / "trials.csv", list(rows.values()))
        known = [name for name in rows if not math.isnan(rows[name]["value"])]
        if not known:
            raise RuntimeError("no trial has an estimate: all diverged. Lower the learning rates.")
        known.sort(key=lambda name: -rows[name]["value"])
        best = rows[known[0]]
        words = ", ".join(f"{name} {best[name]:.3g}" for name in space)
        print(f"round {number}: the best of {len(rows)} is {best['trial']} ({words}), "
              f"estimate {best['value']:.4g}; the preset's {rows['trial 0']['value']:.4g}")  # fmt: skip
    chosen = dict.fromkeys(known[:FINALISTS] + [name for name in known if name == "trial 0"])
    return {name: agents[name] for name in chosen}


if __name__ == "__main__":
    main()
