"""The picture of a sweep: scores and estimates of all members, and their means over the grid."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.report.figures import save
from iql_torchrl.selection import Ranking

Rows = dict[str, dict[str, Any]]
Level = tuple[str, float] | None


def draw(
    path: Path, rows: Rows, ranking: Ranking | None, level: Level, *, title: str, words: str
) -> None:
    """Score and estimate of every policy, its seeds next to each other; means over the grid.

    ``rows``: per policy its ``settings``, ``seed``, ``temperature``, ``expectile``; ``score`` and
    ``value``, each with ``_low`` and ``_high``, where they are known. ``level``: name and score of
    the log's own policy. ``words`` describe the score.
    """
    from matplotlib.figure import Figure

    panels = {"score": (words, *level)} if level else {}
    if ranking:
        panels["value"] = ("estimate from the log, 95 % interval", "the log", ranking.log_value)
    groups, seeds = ([*dict.fromkeys(r[k] for r in rows.values())] for k in ("settings", "seed"))
    size = 3.4 * len(panels) + 5.6, min(2.4 + 0.2 * len(groups) + 0.08 * len(rows), 14)
    figure = Figure(size, layout="constrained")
    shown: dict[str, Any] = {}
    figure.suptitle(f"{title}: {len(rows)} policies", parse_math=False)
    *columns, right = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for axes, (key, (label, name, at)) in zip(columns, panels.items(), strict=True):
        shown[name] = axes.axvline(
            at, color="0.4", linestyle="--" if name in shown or not shown else ":"
        )
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
    draw_map(right, list(rows.values()), next(iter(panels)))
    save(figure, path)


def draw_map(axes: Any, rows: list[dict[str, Any]], key: str) -> None:
    across, up = (sorted({row[name] for row in rows}) for name in ("temperature", "expectile"))
    mean = np.full((len(up), len(across)), np.nan)
    for (i, expectile), (j, temperature) in product(enumerate(up), enumerate(across)):
        near = [row for row in rows if row["temperature"] == temperature]
        numbers = [row[key] for row in near if temperature == 0 or row["expectile"] == expectile]
        if numbers:  # a grid may be incomplete
            mean[i, j] = np.mean(numbers)
    picture = axes.imshow(mean, origin="lower", aspect="auto", cmap="cividis")
    for (i, j), value in np.ndenumerate(mean):
        if np.isnan(value):
            continue
        dark = picture.norm(value) < 0.5
        axes.text(j, i, f"{value:.4g}", ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(across)), [f"{v:g}" + " (cloning)" * (v == 0) for v in across])
    axes.set_yticks(range(len(up)), [f"{value:g}" for value in up])
    axes.set(xlabel="temperature", ylabel="expectile", title=f"mean {key}")
