"""One picture of a dataset: returns, lengths, rewards, actions, and observations at boundaries.

Its main purpose is to show whether the episode boundaries are right. Rows, columns and episodes are
sampled at even distances: costs are bounded, and the same dataset gives the same picture.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from iql_torchrl.data.codec import leaf_spaces
from iql_torchrl.data.dataset import OfflineDataset
from iql_torchrl.data.schema import ACTION, MASK, REWARD, TERMINATED
from iql_torchrl.data.spaces import is_image
from iql_torchrl.descriptions import describe_space
from iql_torchrl.files import atomic_write, make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
REACH, FRAMES, DIMENSIONS, HINTS = 6, 8, 12, 14  # most that are drawn; REACH: steps on each side
PICTURES = " ".join(f"picture{n}" for n in range(FRAMES))
BOUNDARIES, NUMBERS, SCANNED = 200, 64, 4_000_000  # most that are read; SCANNED: numbers in a row
# Okabe and Ito's colours, which colour-blind readers tell apart too.
BLUE, RED, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.35"
ENDS = {"terminated": (RED, "-"), "truncated": (BLUE, "--")}
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "legend.frameon": False,
    "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1, "lines.markersize": 5, "text.parse_math": False,
}  # fmt: skip


def check_picture_path(path: Path) -> None:
    """Raise ``ValueError`` for another suffix than .png, .pdf and .svg, or an unusable folder."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"output is {path}; expected a name that ends in {', '.join(SUFFIXES)}.")
    make_folder("output", path, above=True)


def draw(dataset: OfflineDataset, path: Path, hints: Sequence[str] = ()) -> None:
    """Write the picture to ``path`` in the format of its suffix, with ``hints`` as text below it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_write(path) as temporary, warnings.catch_warnings(), rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # drawn as a box
        figure = dataset_figure(dataset, hints)
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=110)


def dataset_figure(dataset: OfflineDataset, hints: Sequence[str] = ()) -> Figure:
    """The figure that :func:`draw` writes."""
    from matplotlib.figure import Figure

    observed = _Observed(dataset)
    lines = [(line, hint) for hint in hints[:HINTS] for line in textwrap.wrap(hint, 180)]
    panels = {"returns lengths rewards actions": 2.5, "rows": 3.0, "near steps": 3.0, PICTURES: 1.7}
    if observed.image is None:
        del panels[PICTURES]
    if not len(observed.shown):
        panels = {"returns lengths rewards actions": 2.5, "steps": 2.5, PICTURES: 1.7}
    panels["text"] = 0.2 + 0.18 * len(lines)
    figure = Figure(figsize=(15, sum(panels.values()) + 0.8), layout="constrained")
    figure.suptitle(
        f"{dataset.name}: {len(dataset):,} transitions in {len(observed.stops):,} episodes\n"
        f"observation: {describe_space(dataset.observation_space)}\n"
        f"action: {describe_space(dataset.action_space)}", x=0.01, ha="left", size=10,
    )  # fmt: skip
    rows = [np.repeat(row.split(), FRAMES // len(row.split())).tolist() for row in panels]
    axes = figure.subplot_mosaic(rows, height_ratios=list(panels.values()))
    _histogram(
        axes["returns"], "Returns", "sum of an episode's rewards", {"": dataset.episode_returns}
    )
    lengths = {end: dataset.episode_lengths[observed.ends == end] for end in ENDS}
    kept = {end: values for end, values in lengths.items() if len(values)}
    _histogram(axes["lengths"], "Episode lengths", "steps; red: terminated, blue: truncated", kept)
    rewards = dataset.reward_map.inverse(dataset.transitions[REWARD].flatten().double().numpy())
    _histogram(axes["rewards"], "Rewards", "reward of a step", {"": rewards})
    _actions(axes["actions"], dataset)
    _steps(axes["steps"], observed)
    if "rows" in axes:
        _curves(axes["rows"], observed, *observed.window())
        handles, names = axes["rows"].get_legend_handles_labels()
        named = dict(zip(names, handles, strict=True))  # each name once
        axes["rows"].legend(named.values(), named, loc="upper left", bbox_to_anchor=(1, 1))
        title = f"Observations row by row: {len(observed.shown)} of {len(observed.names)} numbers"
        _titles(axes["rows"], title, "Those that change least. Right if they are continuous between "
                "the vertical lines. A red area marks a discontinuity inside an episode.")  # fmt: skip
        _curves(axes["near"], observed, observed.place - REACH, observed.place + REACH + 2)
        _titles(axes["near"], "The same, enlarged", "each dot is a row")
    if observed.image is not None:
        _frames([axes[name] for name in PICTURES.split()], observed)
    axes["text"].set(xlim=(0, 1), ylim=(-max(1, len(lines)), 0))
    axes["text"].axis("off")
    for number, (line, hint) in enumerate(lines):
        colour = RED if hint.startswith("warning") else "black"
        axes["text"].text(0, -number, line, color=colour, va="top")
    return figure


class _Points(NamedTuple):
    """Consecutive observations ``(P, C)``, also the last next observation of each episode.

    ``row``, ``episode``: of each; ``final``: it is the next observation of ``row``.
    """

    values: NDArray[np.float64]
    row: NDArray[np.int64]
    episode: NDArray[np.int64]
    final: NDArray[np.bool_]

    def first(self) -> NDArray[np.int64]:
        """Positions of the first points of episodes, without the first of all."""
        return np.flatnonzero(np.diff(self.episode)) + 1


class _Observed:
    """The standardised numbers of observations, in at most 64 columns of all leaves.

    ``threshold``: a longer step is a discontinuity. ``place``: the transition at whose end the picture
    looks: the largest discontinuity inside an episode or the boundary near it; else the first boundary.
    """

    def __init__(self, dataset: OfflineDataset) -> None:
        self.table, self.stops = dataset.transitions, dataset.episode_lengths.cumsum()
        self.starts = self.stops - dataset.episode_lengths
        ended = self.table[TERMINATED].flatten().numpy()[self.stops - 1]
        self.ends = np.where(ended, "terminated", "truncated")
        leaves = leaf_spaces(dataset.observation_space)
        self.image = next((key for key, space in leaves.items() if is_image(space)), None)
        numbers = [(key, n) for key in leaves for n in range(self.table[key][0].numel())]
        chosen = [numbers[n] for n in evenly(len(numbers), NUMBERS)]
        self.columns = {key: [n for k, n in chosen if k == key] for key in dict(chosen)}
        self.names = [f"{'/'.join(key[1:] or key)}[{n}]" for key, n in chosen]
        kinds = spaces.Discrete | spaces.MultiDiscrete
        self.category = np.array([isinstance(leaves[key], kinds) for key, _ in chosen])
        pixel = np.array([is_image(leaves[key]) for key, _ in chosen])
        self.mean, self.std = np.zeros(len(chosen)), np.ones(len(chosen))
        sample = self.read(evenly(len(dataset), 2000))
        self.constant = sample.min(0) == sample.max(0)
        self.mean, self.std = sample.mean(0), np.where(self.constant, 1, sample.std(0))
        points = self.points(0, max(1000, SCANNED // len(numbers)))
        inside = np.flatnonzero(np.diff(points.episode) == 0)
        size = np.append(0, self.steps(points.values)[inside])
        self.threshold = max(0.5, *(np.quantile(size, [0.5, 0.9]) * [6, 2]))
        self.place = int(self.stops[0]) - 1
        if size.max() > self.threshold:
            self.place = int(points.row[inside[size.argmax() - 1]])
        near = np.abs(self.stops[:-1] - 1 - self.place) <= REACH
        self.place = int(self.stops[:-1][near][0] - 1) if near.any() else self.place
        change = np.abs(np.diff(points.values, axis=0)).sum(0)
        change[self.constant | pixel] = np.inf
        self.shown = np.sort(change.argsort()[: min(4, int((~pixel).sum()))])

    def window(self) -> tuple[int, int]:
        """The transitions of about three episodes around ``place``."""
        episode = int(np.searchsorted(self.stops, self.place, side="right"))
        high = int(self.stops[min(episode + 2, len(self.stops) - 1)])
        low = max(int(self.starts[episode]), self.place - 120)
        return low, max(self.place + 24, min(high, self.place + 240))

    def read(self, rows: NDArray[np.int64], *side: str) -> NDArray[np.float64]:
        parts = [
            self.table[(*side, *key)][rows].unsqueeze(-1).flatten(1)[:, places].double().numpy()
            for key, places in self.columns.items()
        ]
        return (np.concatenate(parts, 1) - self.mean) / self.std

    def points(self, low: int, high: int) -> _Points:
        """The points of the transitions ``low`` to ``high``, as far as these exist.

        A last next observation is left out where it is the state of a neighbouring row.
        """
        rows = np.arange(max(low, 0), min(high, self.stops[-1]))
        lasts = rows[np.isin(rows, self.stops - 1)]
        final, ahead = self.read(lasts, "next"), np.minimum(lasts + 1, self.stops[-1] - 1)
        new = (final != self.read(lasts)).any(1) & (final != self.read(ahead)).any(1)
        places = lasts[new] + 1 - rows[0]
        values = np.insert(self.read(rows), places, final[new], axis=0)
        added = np.insert(np.zeros(len(rows), np.bool_), places, True)
        rows = np.insert(rows, places, lasts[new])
        return _Points(values, rows, np.searchsorted(self.stops, rows, side="right"), added)

    def steps(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distances of consecutive points: root mean square over columns; of random rows about 1.4."""
        change = np.diff(values[:, ~self.constant], axis=0)
        different = self.category[~self.constant]
        change[:, different] = np.sqrt(2) * (change[:, different] != 0)
        return np.sqrt((change**2).sum(1) / max(change.shape[1], 1))

    def around(self) -> NDArray[np.float64]:
        """Steps around some boundaries ``(B, 13)``: across them in column 6; NaN: no such row."""
        chosen = evenly(len(self.stops) - 1, BOUNDARIES)
        lines = np.full((len(chosen), 2 * REACH + 1), np.nan)
        for line, e in zip(lines, chosen, strict=True):
            points = self.points(self.stops[e] - REACH - 1, self.stops[e] + REACH + 1)
            offset = np.arange(1, len(points.row)) - np.argmax(points.episode > e) + REACH
            near = (offset >= 0) & (offset <= 2 * REACH)
            near &= (points.episode[:-1] >= e) & (points.episode[1:] <= e + 1)
            line[offset[near]] = self.steps(points.values)[near]
        return lines


def evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the numbers below ``count``, at even distances."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _titles(axes: Axes, title: str, explained: str, colour: str = GREY) -> None:
    axes.set_title(title, pad=17, loc="left")
    axes.text(0, 1.03, explained, transform=axes.transAxes, size=8.5, color=colour)


def _histogram(axes: Axes, title: str, unit: str, parts: Mapping[str, NDArray[Any]]) -> None:
    """Stacked counts of each part; axes are logarithmic where a few values dominate."""
    values = np.concatenate(list(parts.values())).astype(np.float64)
    size = np.abs(values[values != 0])
    typical = float(np.median(size)) if size.size else 1.0
    wide = bool(size.size) and size.max() > 1e3 * typical
    scaled = np.arcsinh(values / typical) if wide else values
    low, high = scaled.min(), scaled.max()
    edges = np.linspace(low, high, 31)
    if low == high:
        edges = low + max(1, abs(low)) * np.array([-0.5, 0.5])
    elif not wide and high - low < 30 and (values == np.round(values)).all():
        edges = np.arange(low - 0.5, high + 1)
    edges = np.sinh(edges) * typical if wide else edges
    colours = [ENDS.get(name, (GREEN,))[0] for name in parts]
    axes.hist([*parts.values()], edges.tolist(), stacked=True, color=colours, ec="white")
    most = np.histogram(values, edges)[0].max()
    few = 0.9 * len(values) < most < len(values)
    axes.set(xlabel=unit, ylabel="number (log scale)" if few else "number")
    if wide:
        axes.set_xscale("symlog", linthresh=typical)
        axes.set_xticks([*{values.min(), values.max()}])
        axes.xaxis.set_major_formatter("{x:.4g}")
    elif len(edges) < 8:
        axes.set_xticks((edges[:-1] + edges[1:]) / 2)
    if few:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    _titles(axes, title, f"{values.min():.5g} to {values.max():.5g}, mean {values.mean():.5g}")


def _actions(axes: Axes, dataset: OfflineDataset) -> None:
    """Counts of discrete actions; else where the values lie between the bounds."""
    space, rows = dataset.action_space, evenly(len(dataset), 100_000)
    values = dataset.transitions[ACTION][rows].reshape(len(rows), -1).double().numpy()
    if isinstance(space, spaces.Discrete):
        counts = np.bincount(values[:, 0].astype(int), minlength=int(space.n))
        axes.bar(range(len(counts)), counts, color=GREEN)
        if dataset.masked:
            allowed = dataset.transitions[MASK][rows].sum(0).numpy()
            axes.step(range(len(counts)), allowed, where="mid", color=GREY)
        axes.set(xlabel=f"action{'; line: allowed' * dataset.masked}", ylabel="number")
        axes.locator_params(axis="x", integer=True)
        _titles(axes, "Actions", f"{(counts == 0).sum()} of {len(counts)} are never taken")
        return
    low, high, what = values.min(0), values.max(0), "range"
    if isinstance(space, spaces.Box) and space.is_bounded():
        low, high = space.low.flatten().astype(float), space.high.flatten().astype(float)
        what = "bounds"
    if len(low) == 1:
        _histogram(axes, "Actions", f"action; red: its {what}", {"": values[:, 0]})
        axes.vlines([*low, *high], *axes.get_ylim(), color=RED)
        return
    shown = evenly(len(low), DIMENSIONS)
    scaled = 100 * (values - low)[:, shown] / np.maximum(high - low, 1e-300)[shown]
    least, few, middle, most, largest = np.quantile(scaled, [0, 0.05, 0.5, 0.95, 1], axis=0)
    lines = np.arange(len(shown))
    axes.hlines(lines, least, largest, color=GREEN, linewidth=1)
    axes.hlines(lines, few, most, color=GREEN, linewidth=6)
    axes.plot(middle, lines, "o", color="black", markersize=4)
    axes.vlines([0, 100], -0.5, len(shown) - 0.5, color=RED)
    axes.set_yticks(lines, [f"[{n}] {low[n]:.3g} to {high[n]:.3g}" for n in shown])
    axes.set(xlabel=f"% of the {what}: 0 lower, 100 upper")
    axes.invert_yaxis()
    _titles(axes, "Actions", "thin: all values; thick: 90 %; dot: median")


def _curves(axes: Axes, observed: _Observed, low: int, high: int) -> None:
    """The columns that change least from row to row, with boundaries and discontinuities."""
    points = observed.points(low, high)
    first = np.concatenate([[0], points.first(), [len(points.row)]])
    x = np.arange(len(points.row)) - np.searchsorted(points.row, observed.place, side="right") + 0.5
    for n, colour in zip(observed.shown, (BLUE, RED, GREEN, PINK), strict=False):
        for part in starmap(slice, pairwise(first)):
            axes.plot(x[part], points.values[part, n], ".-", color=colour, label=observed.names[n])
    found = (np.diff(points.episode) == 0) & (observed.steps(points.values) > observed.threshold)
    for i in np.flatnonzero(found):
        axes.axvspan(
            x[i], x[i + 1], color="red", alpha=0.25, lw=0, label="discontinuity inside an episode"
        )
    for i in first[1:-1] - 1:
        end = observed.ends[points.episode[i]]
        colour, style = ENDS[end]
        axes.axvline(x[i] + 0.5, color=colour, linestyle=style, label=f"end of an episode: {end}")
    axes.locator_params(axis="x", integer=True)
    axes.set(ylabel="standard deviations")
    axes.set(xlabel=f"rows from the end of transition {observed.place:,}")


def _steps(axes: Axes, observed: _Observed) -> None:
    """Median step at each offset from the boundaries, and what it says."""
    around = observed.around()
    known = ~np.isnan(around).all(0)
    title, offsets = "Steps at the boundaries", np.arange(-REACH, REACH + 1)[known]
    if not len(offsets):
        _titles(axes, title, "One single episode: there is no boundary in the data.", RED)
        axes.axis("off")
        return
    low, middle, high = np.nanquantile(around[:, known], [0.25, 0.5, 0.75], axis=0)
    peak, clear = _peak(around)
    text = "At no offset are the steps regularly the largest."
    if clear and peak == 0:
        text = "Right: the largest steps are those across the boundaries, at 0."
    elif clear:
        rows, side = "1 row" if abs(peak) == 1 else f"{abs(peak)} rows", peak < 0
        text = (f"SHIFTED? The largest steps are {rows} {'before' if side else 'after'} the boundaries:"
                f" the flags are probably {rows} too {'late' if side else 'early'}.")  # fmt: skip
    suspicious = clear & (offsets == peak) & (peak != 0)
    axes.bar(offsets, middle, color=np.where(suspicious, RED, np.where(offsets == 0, BLUE, "0.6")))
    axes.vlines(offsets, low, high, color="black", linewidth=1)
    axes.axhline(np.sqrt(2), color=GREY, linestyle=":", label="distance of two random rows")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.04))
    axes.set(xlabel="rows from the boundary (0: across it)", xlim=(-REACH - 1, REACH + 1))
    axes.set(ylabel="distance of consecutive\nobservations")
    _titles(axes, f"{title}: medians of {len(around)}", text, RED if clear and peak else GREY)


def _peak(around: NDArray[np.float64]) -> tuple[int, bool]:
    """The offset at which most boundaries have their largest step, and if this is regular.

    Regular: at least 4 boundaries and more than half of them, by 30 % above their second largest.
    """
    values = np.nan_to_num(around[(~np.isnan(around)).sum(1) > 4], nan=-1)
    second, largest = np.sort(values, 1)[:, -2:].T
    votes = np.bincount(values.argmax(1)[largest > 1.3 * second], minlength=2 * REACH + 1)
    return int(votes.argmax()) - REACH, bool(votes.max() > max(3, len(around) / 2))


def _frames(panels: Sequence[Axes], observed: _Observed) -> None:
    """Consecutive pictures on both sides of a boundary."""
    assert observed.image is not None
    points = observed.points(observed.place - FRAMES // 2 + 2, observed.place + FRAMES)
    for n, axes in enumerate(panels):
        axes.axis("off")
        if n >= len(points.row):
            continue
        key = ("next", *observed.image) if points.final[n] else observed.image
        image = observed.table[key][points.row[n]].numpy()
        image = np.moveaxis(image, np.argmin(image.shape), -1)
        axes.imshow(image if image.shape[-1] == 3 else image[..., -1], cmap="gray")
        of = "after" if points.final[n] else "of"
        new = n in points.first()
        title = f"{'NEW ' * new}episode {points.episode[n]},\n{of} transition {points.row[n]}"
        axes.set_title(title, size=8, weight="bold" if new else "normal")
