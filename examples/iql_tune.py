"""A grid of settings and seeds trained by Ray Tune, evaluated, and ranked without the environment.

By default: a Pendulum dataset and nine settings (three temperatures, three expectiles), each a
population of two seeds. 40 % of the episodes are held out: from them fitted Q evaluation estimates the
value of every policy, and the ranking recommends one, or none. The returns in the environment show how
good the recommendation was. Started again with the same arguments, it continues. It needs
``pip install -e ".[tune]"``.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from iql_torchrl import PRESETS, evaluate, load_dataset, rank_policies
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.report import text_table, write_rows
from iql_torchrl.selection import fitted_q_evaluation
from iql_torchrl.tune import agents_of, trainable

from matplotlib.figure import Figure

SHARE = 0.6  # of the episodes; the others are held out


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id, file, or one of the built-in datasets (python -m iql_torchrl.data)"""
    env: str | None = None
    """Gymnasium id of the environment, for files that record none"""
    folder: Path = Path("runs/tune")
    """folder of the results; trials that are there continue"""
    temperature: tuple[float, ...] = (1.0, 3.0, 9.0)
    """values to try"""
    expectile: tuple[float, ...] = (0.5, 0.7, 0.9)
    """values to try"""
    seeds: int = 2
    """seeds of each setting"""
    address: str | None = None
    """address of a Ray cluster: HOST:PORT or auto; by default Ray is started here"""
    cpus: int = 1
    """cores of each trial"""
    gpus: float = 0
    """GPUs of each trial"""
    episodes: int = 20
    """episodes of each policy's evaluation; 0: none"""
    fit_updates: int = 2_000
    """updates of fitted Q evaluation"""


@cli.errors_in_one_line()
def main(arguments: list[str] | None = None) -> int:
    options, config = cli.parse(
        Options,
        arguments,
        presets={"tune": replace(PRESETS["quick"], updates=3_000)} | dict(PRESETS),
        without=("temperature", "expectile"),
        least={"seeds": 1, "cpus": 1, "gpus": 0, "episodes": 0, "fit_updates": 1},
        description=__doc__.split("\n\n")[0],
    )
    for temperature, expectile in product(options.temperature, options.expectile):
        replace(config, temperature=temperature, expectile=expectile)  # refuses impossible values
    folder = options.folder.absolute()
    source, how = ensure_source(options.dataset), {"env": options.env, "reward": config.reward}
    dataset = load_dataset(source, memmap=folder / "data", **how)
    dataset.print_notes()
    load = partial(learning_part, folder / "data", **how)
    results = tune_grid(options, trainable(load, config, seeds=options.seeds), folder)
    agents, failed = {}, [f"failed: {error}" for error in results.errors]
    for result in results:
        name = ", ".join(f"{setting} {value:g}" for setting, value in result.config.items())
        if result.error is None:
            trained = enumerate(agents_of(result.checkpoint, load()), start=config.seed)
            agents |= {f"{name} #{seed}": agent for seed, agent in trained}
    if not agents:
        cli.refuse(failed[0])
    ranking = rank(agents, dataset.split(SHARE, seed=0)[1], config.discount, options.fit_updates)
    rows = {row["candidate"]: row for row in ranking.rows}
    if options.episodes:
        show_returns(agents, dataset, options.episodes, rows)
        draw(folder / "tune.png", rows, ranking, float(dataset.episode_returns.mean()))
    table = [row | {"caveats": " ".join(row["caveats"])} for row in rows.values()]
    write_rows(folder / "policies.csv", table)
    print(f"\nFrom held-out episodes alone:\n{ranking}", *failed, f"Written to {folder}/", sep="\n")
    return 1 if failed else 0


def learning_part(path, **how):
    """The episodes that are not held out, read from the dataset on disk by each trial."""
    return load_dataset(path, **how).split(SHARE, seed=0)[0]


def tune_grid(options, trial, folder):
    """Ray Tune's results; what is in ``folder`` already is continued."""
    import ray
    from ray import tune

    ray.init(options.address, include_dashboard=None if options.address else False)
    trial = tune.with_resources(trial, {"cpu": options.cpus, "gpu": options.gpus})
    place = folder / "trials"
    if tune.Tuner.can_restore(str(place)):
        tuner = tune.Tuner.restore(str(place), trial, resume_errored=True)
    else:
        names = ("temperature", "expectile")
        tuner = tune.Tuner(
            trial,
            param_space={name: tune.grid_search(list(getattr(options, name))) for name in names},
            run_config=tune.RunConfig(
                name=place.name,
                storage_path=str(folder),
                failure_config=tune.FailureConfig(max_failures=3),
                verbose=1,
            ),
        )
    try:
        return tuner.fit()
    finally:
        ray.shutdown()


def rank(agents, held_out, discount, updates):
    """The ranking; critics are fitted on half of the held-out episodes and corrected on the others."""
    fit, test = held_out.split(0.5, seed=0)
    fitted = fitted_q_evaluation(agents, fit, test, discount=discount, updates=updates)
    return rank_policies(agents, fit, test, discount=discount, fitted_q=fitted)


def show_returns(agents, dataset, episodes, rows):
    """Evaluate each policy, print the returns, and enter them into the ``rows``."""
    table = [["", "return", "from", "to (95 %)"]]
    for name, agent in agents.items():
        result = evaluate(agent.policy, dataset.make_env, episodes=episodes, seed=10_000).summary()
        rows[name] |= {f"return_{key}": result[f"return_{key}"] for key in ("mean", "low", "high")}
        table.append([name, *(f"{result[f'return_{key}']:.4g}" for key in ("mean", "low", "high"))])
    table.append(["the dataset", f"{dataset.episode_returns.mean():.4g}", "", ""])
    print(f"\n{text_table(table)}")


def draw(path, rows, ranking, level):
    """Estimates from held-out episodes against returns in the environment, with their intervals."""
    figure = Figure((6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in rows.values():
        x, y = row["return_mean"], row["value"]
        across = [[x - row["return_low"]], [row["return_high"] - x]]
        up = [[y - row["value_low"]], [row["value_high"] - y]]
        colour = "C1" if row["candidate"] == ranking.recommended else "C0"
        axes.errorbar(x, y, xerr=across, yerr=up, fmt="o", color=colour, elinewidth=0.7)
    axes.plot(level, ranking.behaviour_value, "k*", markersize=11, label="behaviour policy")
    axes.plot([], [], "o", color="C0", label="a policy, 95 % intervals")
    if ranking.recommended:
        axes.plot([], [], "o", color="C1", label="recommended policy")
    axes.set(xlabel="mean return in the environment", ylabel="estimate from held-out episodes")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
