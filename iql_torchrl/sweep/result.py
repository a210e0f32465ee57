"""What a sweep gives: names of its runs, one row for each, a ranking, their table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.agent.build import Agent
from iql_torchrl.config import IQLConfig, knobs
from iql_torchrl.report.figures import save
from iql_torchrl.report.tables import write_rows
from iql_torchrl.selection import Ranking
from iql_torchrl.sweep.task import Row, Task


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep, in the order of its configs.

    Attributes:
        rows: by name: ``member``, ``settings`` (the name without its seed), ``seed``, the settings
            in which runs of a population may differ and those in which these do, ``task``, the mean
            losses before the last checkpoint, ``score`` with ``score_low`` and ``score_high`` where
            the runs were evaluated, the columns of ``Ranking.rows`` where they were ranked, and
            ``error`` where a run failed.
        ranking: None without ``held_out``, or where nothing could be ranked.
        log_score: name and mean score of the policy that made the log; None without scores.
        failures: a sentence for each run that failed, by name.
        notes: what was left out, and why.
        tasks: the finished units of work, with the checkpoints of the runs.
        folder: has ``members.csv`` and ``sweep.png``.
    """

    rows: Mapping[str, Row]
    ranking: Ranking | None
    log_score: tuple[str, float] | None
    failures: Mapping[str, str]
    notes: tuple[str, ...]
    folder: Path
    tasks: tuple[Task, ...] = field(default=(), repr=False)

    def agent(self, name: str, device: str | None = None) -> Agent:
        """The trained agent of a run, from its checkpoint; ``ranking.recommended``, for example.

        ``device``: by default the one that it was trained on.

        Raises ``KeyError`` for a name that is no run, or that was not trained.
        """
        for task in self.tasks:
            if name in task.configs:
                return next(agent for other, agent in task.agents(device) if other == name)
        why = self.failures.get(name, "it is none of the runs")
        raise KeyError(f"there is no agent {name!r}: {why}")

    def write(self, *, words: str) -> None:
        """Replace ``members.csv`` and, where there is a number, ``sweep.png`` of what did not fail."""
        columns = dict.fromkeys(key for row in self.rows.values() for key in row if key != "error")
        blank = columns | {"error": None}
        write_rows(self.folder / "members.csv", [blank | row for row in self.rows.values()])
        rows = {
            name: row
            for name, row in self.rows.items()
            if name not in self.failures
            and (self.log_score is None or "score" in row)
            and (self.ranking is None or "value" in row)
        }
        if rows and (self.log_score is not None or self.ranking is not None):
            title = f"{self.folder.name}: {len(rows)} policies"
            draw(self.folder / "sweep.png", rows, self.ranking, self.log_score, title, words)


def named(configs: Mapping[str, IQLConfig] | Sequence[IQLConfig]) -> dict[str, IQLConfig]:
    """The configs by name; those of a sequence are named by the settings in which they differ.

    ``expectile 0.9, temperature 3 #1``: the seed follows ``#``. Raises ``TypeError`` for other
    values, and ``ValueError`` where there is none or two are equal.
    """
    if isinstance(configs, IQLConfig) or not isinstance(configs, Mapping | Sequence):
        raise TypeError(
            f"configs is {type(configs).__name__}; expected a dict of name to IQLConfig, or a list."
        )
    values = list(configs.values()) if isinstance(configs, Mapping) else list(configs)
    for number, config in enumerate(values):
        if not isinstance(config, IQLConfig):
            raise TypeError(f"configs[{number}] is {type(config).__name__}; expected an IQLConfig.")
    if not values:
        raise ValueError("configs is empty; a sweep has at least one run.")
    names = list(map(str, configs)) if isinstance(configs, Mapping) else _names(values)
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(
                f"configs[{number}] is given twice ({name}); each run of a sweep once."
            )
    return dict(zip(names, values, strict=True))


def _names(configs: Sequence[IQLConfig]) -> list[str]:
    names = []
    different = [name for name in differing(configs) if name != "seed"]
    for config in configs:
        values = ((name, getattr(config, name)) for name in different)
        words = [f"{name} {x:g}" if isinstance(x, float) else f"{name} {x}" for name, x in values]
        names.append(f"{', '.join(words) or 'run'} #{config.seed}")
    return names


def differing(configs: Sequence[IQLConfig]) -> list[str]:
    """The settings in which the configs differ, in the order of ``IQLConfig``."""
    return [
        name
        for name in knobs(type(configs[0]))
        if any(getattr(config, name, None) != getattr(configs[0], name) for config in configs)
    ]


def joined(
    configs: Mapping[str, IQLConfig],
    trained: Mapping[str, Row],
    ranking: Ranking | None,
    failures: Mapping[str, str],
) -> dict[str, Row]:
    """The rows of a result; ``trained``: rows of tasks by name."""
    values = list(configs.values())
    different = differing(values)
    columns = [n for n, knob in knobs(type(values[0])).items() if knob.per_run or n in different]
    ranked = {} if ranking is None else {row["candidate"]: row for row in ranking.rows}
    rows = {}
    for name, config in configs.items():
        # equal settings: the name without its seed
        row: Row = {"member": name, "settings": name.removesuffix(f" #{config.seed}")}
        row |= {column: getattr(config, column) for column in ["seed", *columns]}
        row |= trained.get(name, {})
        own = ranked.get(name, {})
        own = {k: v for k, v in own.items() if k != "candidate"}
        row |= {k: " ".join(v) if k == "caveats" else v for k, v in own.items()}
        if name in failures:
            row["error"] = failures[name]
        rows[name] = row
    return rows


def draw(
    path: Path,
    rows: Mapping[str, Row],
    ranking: Ranking | None,
    level: tuple[str, float] | None,
    title: str,
    words: str,
) -> None:
    """Score and estimate of every policy, its seeds next to each other; means over the grid.

    ``level``: name and score of the log's own policy. ``words`` describe the score.
    """
    from matplotlib.figure import Figure

    panels = {"score": (words, *level)} if level else {}
    if ranking:
        panels["value"] = (
            "estimate from the log, 95 % interval",
            "the behaviour policy",
            ranking.behaviour_value,
        )
    groups, seeds = ([*dict.fromkeys(r[k] for r in rows.values())] for k in ("settings", "seed"))
    size = 3.4 * len(panels) + 5.6, min(2.4 + 0.2 * len(groups) + 0.08 * len(rows), 14)
    figure = Figure(size, layout="constrained")
    shown: dict[str, Any] = {}
    figure.suptitle(title, parse_math=False)
    *columns, right = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for axes, (key, (label, name, at)) in zip(columns, panels.items(), strict=True):
        style = "--" if name in shown or not shown else ":"
        shown[name] = axes.axvline(at, color="0.4", linestyle=style)
        for row in rows.values():
            best = ranking is not None and row["member"] == ranking.recommended
            place: float = groups.index(row["settings"])
            place += 0.6 * ((seeds.index(row["seed"]) + 0.5) / len(seeds) - 0.5)
            ends = [[row[key] - row[f"{key}_low"]], [row[f"{key}_high"] - row[key]]]
            look = {"color": "C1" if best else "C0", "markersize": 7 if best else 4}
            bar = axes.errorbar(row[key], place, xerr=ends, fmt="D" if best else "o", **look)
            shown["recommended from the log" if best else "a policy"] = bar
        axes.set_yticks(range(len(groups)), groups if axes is columns[0] else [], fontsize=9)
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel(label)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, frameon=False)
    _draw_map(right, list(rows.values()), next(iter(panels)))
    save(figure, path)


def _draw_map(axes: Any, rows: list[Row], key: str) -> None:
    across, up = (sorted({row[name] for row in rows}) for name in ("temperature", "expectile"))
    mean = np.full((len(up), len(across)), np.nan)
    for (i, expectile), (j, temperature) in product(enumerate(up), enumerate(across)):
        near = [row for row in rows if row["temperature"] == temperature]
        numbers = [row[key] for row in near if temperature == 0 or row["expectile"] == expectile]
        if numbers:  # a grid may be incomplete
            mean[i, j] = np.mean(numbers)
    picture = axes.imshow(mean, origin="lower", aspect="auto", cmap="cividis")
    for (i, j), value in np.ndenumerate(mean):
        if not np.isnan(value):
            dark = picture.norm(value) < 0.5
            axes.text(j, i, f"{value:.4g}", ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(across)), [f"{v:g}" + " (cloning)" * (v == 0) for v in across])
    axes.set_yticks(range(len(up)), [f"{value:g}" for value in up])
    axes.set(xlabel="temperature", ylabel="expectile", title=f"mean {key}")
