"""A grid of settings and seeds trained as populations, scored, and ranked from the log alone.

The command line of ``iql_torchrl.sweep``: started again with the same arguments, it continues, or
reads the results. By default: a Pendulum log and 14 policies (cloning; three temperatures, three
expectiles; two seeds). 40 % of the episodes are held out: from them fitted Q evaluation estimates
the value of every policy, and the ranking recommends one, or none. Evaluating all of them in the
environment shows how good the recommendation was.
"""

import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from iql_torchrl import PRESETS
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.report import text_table
from iql_torchrl.sweep import Sweep

COUNTS = ("seeds", "episodes", "fit_updates", "members_per_task", "workers")


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id, file, or one of the built-in datasets (python -m iql_torchrl.data)"""
    env: str | None = None
    """Gymnasium id to play in, for files that record none"""
    folder: Path = Path("runs/sweep")
    """of the results; a sweep that is there is continued"""
    temperature: tuple[float, ...] = (0.0, 3.0, 9.0)
    """values to try"""
    expectile: tuple[float, ...] = (0.5, 0.7, 0.9)
    """values to try"""
    seeds: int = 2
    """runs of each setting"""
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
    episodes: int = 20
    """episodes of each policy's evaluation"""
    fit_updates: int = 2_000
    """updates of fitted Q evaluation"""


@cli.errors_in_one_line()
def main(arguments: list[str] | None = None) -> int:
    options, config = cli.parse(
        Options,
        arguments,
        presets={"sweep": replace(PRESETS["quick"], updates=3_000)} | dict(PRESETS),
        without=("temperature", "expectile"),
        least=dict.fromkeys(COUNTS, 1),
        description=__doc__.split("\n\n")[0],
    )
    runs = {}  # every combination by name; cloning, on which the expectile has no effect, only once
    seeds = range(config.seed, config.seed + options.seeds)
    for temperature, expectile, seed in product(options.temperature, options.expectile, seeds):
        name = f"temperature {temperature:g}, expectile {expectile:g}" if temperature else "cloning"
        varied = replace(config, temperature=temperature, expectile=expectile, seed=seed)
        runs.setdefault(f"{name} #{seed}", varied)
    print(f"{options.dataset}: {len(runs)} policies.")
    slurm = {}
    for option in options.slurm:
        name, equals, value = option.partition("=")
        if not equals:
            cli.refuse(f"--slurm has {option!r}; expected NAME=VALUE.")
        slurm[name] = int(value) if value.isdecimal() else value
    sweep = Sweep(
        runs,
        ensure_source(options.dataset),
        options.folder,
        members_per_task=options.members_per_task,
        env=options.env,
        episodes=options.episodes,
        held_out=0.4,
        fit_updates=options.fit_updates,
    )
    how = {"workers": options.workers, "address": options.address, "slurm": slurm}
    try:
        result = sweep.run(options.engine, **how)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.", file=sys.stderr)
        return 130
    table = [["", "score", "from", "to (95 %)"]]
    for name, row in result.rows.items():
        if "score" in row:
            table.append([name, *(f"{row[f'score{end}']:.4g}" for end in ("", "_low", "_high"))])
    if result.log_score:
        table.append([result.log_score[0], f"{result.log_score[1]:.4g}", "", ""])
        print(f"\n{text_table(table)}")
    if result.ranking:
        print(f"\nFrom the log alone:\n{result.ranking}")
    failures = [f"{name} failed: {sentence}" for name, sentence in result.failures.items()]
    print(*result.notes, *failures, f"Written to {options.folder}/", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
