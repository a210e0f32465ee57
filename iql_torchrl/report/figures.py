"""Figures of runs: the curves of one run on one page, and several runs in comparison."""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.files import atomic_write
from iql_torchrl.report.tables import EVALUATION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FloatArray = NDArray[np.float64]
Row = Mapping[str, float | int]

#: For a column, the columns with the bounds of its 95 % confidence interval.
INTERVALS = {
    "return_mean": ("return_low", "return_high"),
    "score_mean": ("score_low", "score_high"),
    "success_rate": ("success_low", "success_high"),
}
MAX_MARKED = 40  # a line with more points has no marks
COLUMNS, WIDTH, HEIGHT, DPI = 3, 4.4, 2.9, 110
# Okabe and Ito's colours, which colour-blind readers tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Series:
    """One line: ``values`` at ``updates``, and the bounds of its band, all ``(points,)``."""

    label: str
    updates: FloatArray
    values: FloatArray
    low: FloatArray | None = None
    high: FloatArray | None = None


@dataclass(frozen=True)
class Quantity:
    """How a column is drawn. ``logarithmic``: a logarithmic axis is used for a range of decades."""

    title: str
    unit: str
    logarithmic: bool = False
    share: bool = False


QUANTITIES = {
    "return_mean": Quantity("Return", "mean return per episode"),
    "score_mean": Quantity("Score", "mean normalised score"),
    "success_rate": Quantity("Successes", "share of episodes", share=True),
    "loss_qvalue": Quantity("Loss of the critics", "loss", logarithmic=True),
    "loss_value": Quantity("Loss of V", "loss", logarithmic=True),
    "loss_actor": Quantity("Loss of the policy", "loss", logarithmic=True),
    "td_error_mean": Quantity("TD error", "mean squared TD error", logarithmic=True),
    "qvalue_mean": Quantity("Q", "mean value, scaled reward"),
    "value_mean": Quantity("V", "mean value, scaled reward"),
    "advantage_mean": Quantity("Advantage", "mean of min Q' - V"),
    "weight_mean": Quantity("Weights of the policy", "mean weight", logarithmic=True),
    "clip_fraction": Quantity("Clipped weights", "share of the batch", share=True),
    "effective_sample_size": Quantity("Effective sample size", "transitions of the batch"),
    "entropy": Quantity("Negative log-likelihood of logged actions", "mean of -log pi(a|s), nats"),
    "length_mean": Quantity("Episode length", "mean steps per episode"),
}
#: Columns that share a panel if a run has both, and the title and unit of that panel.
WITH = {"loss_value": "loss_qvalue", "value_mean": "qvalue_mean"}
JOINT = {
    "loss_qvalue": Quantity("Losses of critics and V", "loss", logarithmic=True),
    "qvalue_mean": Quantity("Values", "mean value, scaled reward"),
}
NAMES = {"loss_qvalue": "critics", "loss_value": "V", "qvalue_mean": "Q", "value_mean": "V"}


def draw(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    title: str = "",
    reference: tuple[str, float] | None = None,
) -> None:
    """Write the :func:`run_figure` to ``path`` as PNG."""
    save(run_figure(rows, title=title, reference=reference), path)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Replace ``path`` by the figure as PNG."""
    with atomic_write(Path(path)) as temporary, warnings.catch_warnings():
        # a letter that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(temporary, format="png", dpi=DPI)


def run_figure(
    rows: Sequence[Row], *, title: str = "", reference: tuple[str, float] | None = None
) -> Figure:
    """One panel per kind of quantity in the rows of one run, which may be in any order.

    Known columns come in the order evaluation, losses, values, weights, then every other column
    that is not one of ``EVALUATION``. ``reference`` is a label and a mean return, drawn as a level
    line. Values that are not finite are left out, and the panel gives their number.
    """
    present = {name for row in rows for name in row if name != "update"}
    names = [name for name in QUANTITIES if name in present and name != "length_mean"]
    names += sorted(present - set(QUANTITIES) - set(EVALUATION))
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(WITH[name] if WITH.get(name) in present else name, []).append(name)
    figure, grid = _grid(len(panels), title or "Run")
    end = max((float(row["update"]) for row in rows), default=0.0)
    for axes, (first, columns) in zip(grid, panels.items(), strict=True):
        lines = [column(rows, name, NAMES.get(name, name)) for name in columns]
        handles = [_plot(axes, *look, "-") for look in zip(lines, COLOURS, strict=False)]
        labelled = handles if len(handles) > 1 else []
        if reference is not None and first == "return_mean":
            labelled = [axes.axhline(reference[1], color="0.35", linestyle="--", linewidth=1)]
            labelled[0].set_label(_literal(_short(reference[0], 32)))
        _dress(axes, JOINT[first] if len(columns) > 1 else _quantity(first), lines, end)
        if labelled:  # the legend is above the panel, right of the title, where it covers no data
            place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98)}
            place |= {"borderaxespad": 0, "ncols": 2}
            axes.legend(handles=labelled, fontsize=8, frameon=False, **place)
    return figure


def comparison_figure(panels: Mapping[str, Sequence[Series]], *, note: str = "") -> Figure:
    """One panel per column name, one line per series; series of one label share a colour.

    The legend is below the panels under ``note``, which says what the bands are.
    """
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    looks = {
        label: (COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)])
        for i, label in enumerate(labels)
    }
    figure, grid = _grid(len(panels), "")
    end = max((float(s.updates.max()) for ss in panels.values() for s in ss), default=0.0)
    handles = {}
    for axes, (name, lines) in zip(grid, panels.items(), strict=True):
        for number, line in enumerate(lines):
            handle = handles[line.label] = _plot(axes, line, *looks[line.label])
            if under := sum(_coincide(line, other) for other in lines[:number]):
                handle.set_linestyle((0, (4, 4 * under)))  # those below show in the gaps
        _dress(axes, _quantity(name), lines, end)
    across = int(figure.get_figwidth() * 13)  # characters in one line
    texts = [textwrap.fill(_literal(label), across - 8) for label in labels]
    ncols = min(4, max(1, across // (max(map(len, texts), default=1) + 8)))
    height = 0.19 * sum(text.count("\n") + 1 for text in texts) / ncols
    figure.set_figheight(figure.get_figheight() + height + 0.5)
    look: dict[str, Any] = {"ncols": ncols, "frameon": False, "fontsize": 9, "title_fontsize": 8}
    shown = [handles[label] for label in labels]
    figure.legend(shown, texts, loc="outside lower center", title=note or None, **look)
    return figure


def _coincide(line: Series, other: Series) -> bool:
    """Return True if the lines differ by less than their width."""
    if line.values.shape != other.values.shape or not np.array_equal(line.updates, other.updates):
        return False
    spread = float(np.ptp(other.values)) if len(other.values) else 0.0
    return np.allclose(line.values, other.values, rtol=0.0, atol=0.01 * spread, equal_nan=True)


def column(rows: Sequence[Row], name: str, label: str = "") -> Series:
    """The rows that have ``name``, by update, with its interval where ``INTERVALS`` are recorded."""
    having = sorted((row for row in rows if name in row), key=lambda row: row["update"])

    def read(key: str) -> FloatArray:
        return np.array([row.get(key, math.nan) for row in having], dtype=np.float64)

    low, high = INTERVALS.get(name, ("", ""))
    if not any(low in row and high in row for row in having):
        return Series(label or name, read("update"), read(name))
    return Series(label or name, read("update"), read(name), read(low), read(high))


def _quantity(name: str) -> Quantity:
    known = QUANTITIES.get(name)
    return known or Quantity(_short(name, 40), "value", logarithmic=name not in EVALUATION)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}\u2026"


def _literal(label: str) -> str:
    """A label that matplotlib neither hides, as with a leading underscore, nor reads as mathematics."""
    return f"{' ' * label.startswith('_')}{label}".replace("$", r"\$")


def _grid(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = 2 if panels == 4 else min(COLUMNS, max(panels, 1))
    lines = max(1, math.ceil(panels / columns))
    single = 1.4 if panels == 1 else 1.0
    size = (WIDTH * columns * single, HEIGHT * lines * single + 0.3 * bool(title))
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(_short(title, int(12 * size[0])), fontsize=11, parse_math=False)
    if not panels:
        figure.text(0.5, 0.5, "no numbers yet", ha="center", color="0.4")
    grid = [figure.add_subplot(lines, columns, number + 1) for number in range(panels)]
    for number, axes in enumerate(grid):
        if number + columns >= panels:  # nothing below it
            axes.set_xlabel("gradient updates", fontsize=9)
    return figure, grid


def _plot(axes: Axes, line: Series, colour: str, style: str) -> Line2D:
    """Draw one line with its band; a single point is a mark with a bar."""
    finite = np.isfinite(line.values)
    updates, values = line.updates[finite], line.values[finite]
    mark = "o" if len(values) <= MAX_MARKED else None
    (handle,) = axes.plot(
        updates,
        values,
        color=colour,
        linestyle=style,
        linewidth=1.4,
        marker=mark,
        markersize=3.5,
        label=_literal(line.label),
    )
    if line.low is not None and line.high is not None:
        low, high = line.low[finite], line.high[finite]
        if len(values) == 1:
            axes.vlines(updates, low, high, color=colour, linewidth=1.2)
        else:
            axes.fill_between(updates, low, high, color=colour, alpha=0.2, linewidth=0)
    return handle


def _dress(axes: Axes, quantity: Quantity, lines: Sequence[Series], end: float) -> None:
    """Set title, unit, scales, and a note on values that are not finite."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_title(quantity.title, fontsize=10, parse_math=False, loc="left")
    axes.set_ylabel(quantity.unit, fontsize=9, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(-0.03 * (end or 1.0), 1.03 * (end or 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    values = np.concatenate([line.values for line in lines]) if lines else np.empty(0)
    finite = values[np.isfinite(values)]
    if quantity.logarithmic and len(finite) and 0 < 100 * finite.min() <= finite.max():
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    _limit(axes, quantity.share)
    if len(finite) < len(values):
        lost = f"{len(values) - len(finite)} of {len(values)} values are not finite"
        axes.set_xlabel(f"{axes.get_xlabel()}  ({lost})".strip(), fontsize=9, color="#B00020")


def _limit(axes: Axes, share: bool) -> None:
    """Axes of shares start at 0; others are limited so that lines fill at least a third of them."""
    if share:
        top = min(max(axes.get_ylim()[1], 0.1), 1.03)
        axes.set_ylim(-0.03 * top, top)
        return
    heights = np.concatenate([[np.nan], *(line.get_ydata() for line in axes.get_lines())])
    to_axis = axes.transScale.transform
    heights = heights[np.isfinite(heights)]
    if len(heights) and heights.min() < heights.max():
        ends = to_axis([(0.0, y) for y in (heights.min(), heights.max(), *axes.get_ylim())])[:, 1]
        reach = ends[1] - ends[0]
        inner = [(0.0, max(ends[2], ends[0] - reach)), (0.0, min(ends[3], ends[1] + reach))]
        axes.set_ylim(*axes.transScale.inverted().transform(inner)[:, 1])
