"""Table and picture of what bench_step.py measured.

    python benchmarks/report.py            # prints Markdown, draws step.png and step_sweeps.png
    python benchmarks/report.py --readme   # also replaces the table of benchmarks/README.md

Reads benchmarks/results/step_*.json. Files of one device and setting are runs of one measurement. The
table has the runs with the most competitors: the median of their medians, the least and the greatest of
them, and the ratio of these medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_step import FLOOR, REFERENCE
from iql_torchrl.files import atomic_write
from iql_torchrl.report.figures import save

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- step table -->", "<!-- /step table -->"
#: axis of a sweep: its words
AXES = {"width": "width", "batch": "batch", "critics": "critics", "rows": "dataset size"}
#: family of competitors: colour of its bars
COLOURS = {"ours": "#0072B2", "JAX": "#E69F00", "": "0.5"}
#: competitors that are not updates: what they are
SHOWN = {FLOOR: "matmuls alone, by torch.mm", "floor of ours": "matmuls of ours alone",
         "floor graph": "matmuls alone, in a CUDA graph",
         "floor of ours graph": "matmuls of ours alone, in a CUDA graph"}  # fmt: skip
#: competitors of the picture of the sweeps: how their lines look
SWEPT = {
    "TorchRL eager": {"color": "0.5", "marker": "o"},
    "ours sequential eager": {"color": "#56B4E9", "marker": "s"},
    "ours sequential compiled": {"color": "#009E73", "marker": "v"},
    "ours sequential captured": {"color": "#0072B2", "marker": "D"},
    "JAX scan": {"color": "#E69F00", "marker": "^"},
}
Sizes = tuple[tuple[str, Any], ...]
Runs = dict[str, float]


@dataclass
class Setting:
    """One device with one setting of everything but the swept axes."""

    device: str
    point: Sizes
    #: (axis, value) or ("default", None): competitor: median of each run, in ms, by its file
    runs: dict[tuple[str, Any], dict[str, Runs]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def default(self) -> dict[str, Runs]:
        """The default point, in the runs that have the most competitors: a ratio needs both."""
        results = self.runs[("default", None)]
        names = {run: {n for n, runs in results.items() if run in runs} for run in self.files}
        most = max(map(len, names.values()))
        used = [run for run in self.files if len(names[run]) == most]
        chosen = {n: {r: runs[r] for r in used if r in runs} for n, runs in results.items()}
        return {name: runs for name, runs in chosen.items() if runs}

    @property
    def files(self) -> list[str]:
        return sorted({run for runs in self.runs[("default", None)].values() for run in runs})

    @property
    def words(self) -> str:
        sizes = dict(self.point)
        text = f"{self.device}: width {sizes['width']}, batch {sizes['batch']}, "
        text += f"{sizes['critics']} critics, {sizes['rows']:,} rows"
        precision = sizes["matmul_precision"]
        text += "" if sizes["dtype"] == "float32" else f", products in {sizes['dtype']}"
        return text + ("" if precision == "highest" else f", matmul precision {precision}")


def read(folder: Path) -> list[Setting]:
    """Every setting in the files of ``folder``, CPUs first."""
    settings: dict[tuple[str, Sizes], Setting] = {}
    for path in sorted(folder.glob("step_*.json")):
        record = json.loads(path.read_text())
        if "points" not in record or not record["points"]:
            print(f"{path.name} contains no points of bench_step.py and is left out.")
            continue
        machine = record["machine"]
        device = machine["name"]
        if not machine["device"].startswith("cuda"):
            device += f", {machine['threads']} threads"
        point = tuple(record["points"][0]["sizes"].items())
        setting = settings.setdefault((device, point), Setting(device, point))
        for entry in record["points"]:
            axis = entry["axis"]
            place = setting.runs.setdefault((axis, entry["sizes"].get(axis)), {})
            for name, result in entry["competitors"].items():
                if "failed" not in result:
                    place.setdefault(name, {})[path.stem] = result["median_ms"]
                elif axis == "default":
                    setting.failed[name] = result["failed"]
    if not settings:
        raise SystemExit(f"{folder} contains no step_*.json: run benchmarks/bench_step.py first.")
    return sorted(settings.values(), key=lambda setting: "threads" not in setting.device)


def middle(runs: Runs) -> float:
    return statistics.median(runs.values())


def table(setting: Setting) -> str:
    """Markdown: the default point of one setting."""
    results = setting.default
    counts = [len(values) for values in results.values()]
    runs = max(counts)
    number_of_runs = f"{runs} runs" if min(counts) == runs else f"{min(counts)} to {runs} runs"
    columns = ["", "ms an update", "updates/s", f"of {REFERENCE}"]
    columns += ["ms, least to greatest run"] if runs > 1 else []
    lines = [setting.words + (f"; {number_of_runs}" if runs > 1 else ""), ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, result in results.items():
        cells = [SHOWN.get(name, name), f"{middle(result):.3g}", f"{1e3 / middle(result):,.0f}"]
        other = results.get(REFERENCE)
        cells.append(f"{middle(result) / middle(other):.2f}" if other else "")
        values = result.values()
        cells += [f"{min(values):.3g} to {max(values):.3g}"] if runs > 1 else []
        lines.append("| " + " | ".join(cells) + " |")
    for name, reason in setting.failed.items():
        if name not in results:
            lines.append("| " + " | ".join([name, reason] + [""] * (len(columns) - 2)) + " |")
    return "\n".join(lines)


def replace_table(path: Path, text: str, first: str = BEGIN, last: str = END) -> None:
    """``text`` between the two marker lines of ``path``, atomically."""
    before, begin, rest = path.read_text().partition(first + "\n")
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise SystemExit(
            f"{path} lacks the lines {first} and {last}, in this order: add them where the table "
            "belongs."
        )
    with atomic_write(path) as temporary:
        temporary.write_text(f"{before}{begin}{text}\n{end}{after}")


def colour(name: str) -> str:
    return next(colour for family, colour in COLOURS.items() if name.startswith(family))


def bars(setting: Setting, axes: Any) -> None:
    """Bars of one setting's default point, the slowest first."""
    results = {name: middle(runs) for name, runs in setting.default.items()}
    names = sorted(results.keys() - SHOWN.keys(), key=lambda name: -results[name])
    drawn = axes.barh(names, [results[n] for n in names], color=[colour(n) for n in names])
    axes.bar_label(drawn, [f"{results[n]:.3g}" for n in names], padding=3, fontsize=9)
    axes.set_xlim(0, 1.1 * max(results.values()))
    axes.set_xlabel("ms an update, sampling included", fontsize=9)
    axes.set_title(setting.words, fontsize=10, loc="left")
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bars(path: Path, settings: list[Setting]) -> None:
    """Bars of the default point, a panel for each setting."""
    from matplotlib.figure import Figure

    heights = [0.9 + 0.24 * len(setting.default) for setting in settings]
    figure = Figure(figsize=(8.6, sum(heights)), layout="constrained")
    panels = figure.subplots(len(settings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, setting in zip(panels, settings, strict=True):
        bars(setting, panel)
    save(figure, path)


def draw_sweep(setting: Setting, axis: str, axes: Any) -> None:
    """The milliseconds of ``SWEPT`` over one axis, with the default point."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    default = dict(setting.point)[axis]
    points = {value: runs for (name, value), runs in setting.runs.items() if name == axis}
    points = dict(sorted({**points, default: setting.default}.items()))
    for name, look in SWEPT.items():
        times = {value: middle(runs[name]) for value, runs in points.items() if name in runs}
        if len(times) > 1:
            axes.plot(list(times), list(times.values()), label=name, markersize=5, **look)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(AXES[axis], fontsize=10)
    axes.set_ylabel("ms an update", fontsize=9)
    axes.set_xticks(list(points), [f"{value:,}" for value in points], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_sweeps(path: Path, setting: Setting) -> None:
    """A panel for each axis that was swept; nothing where none was."""
    from matplotlib.figure import Figure

    swept = [axis for axis in AXES if any(axis == name for name, _ in setting.runs)]
    if not swept:
        return
    rows = -(-len(swept) // 2)
    figure = Figure(figsize=(8.6, 0.7 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False, sharey=True).flat
    for panel, axis in zip(panels, swept, strict=False):
        draw_sweep(setting, axis, panel)
    for panel in list(panels)[len(swept) :]:
        panel.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=9, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="folder of the result files")
    add("--readme", type=Path, nargs="?", const=README, help="file whose table to replace")
    options = parser.parse_args()
    settings = read(options.results)
    text = "\n\n".join(map(table, settings))
    print(text)
    if options.readme is not None:
        replace_table(options.readme, text)
    draw_bars(options.results / "step.png", settings)
    draw_sweeps(options.results / "step_sweeps.png", settings[0])


if __name__ == "__main__":
    main()
