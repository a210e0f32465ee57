"""Table and picture of what bench_step.py measured.

    python benchmarks/report.py            # prints Markdown, draws benchmarks/results/step.png
    python benchmarks/report.py --readme   # also replaces README.md's table

Reads benchmarks/results/step_*.json. Files of one device and setting are runs of one measurement:
the table has the median of their medians, and the least and greatest of them; a ratio is the median
of the ratios within each run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_step import FLOOR, REFERENCE

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- step table -->", "<!-- /step table -->"
#: axis of a sweep: its words
AXES = {"width": "width", "batch": "batch", "critics": "critics", "rows": "dataset size"}
#: family of competitors: colour and marker
LOOKS = {
    "TorchRL": ("#7f7f7f", "o"),
    "plain torch": ("#8c564b", "s"),
    "JAX": ("#ff7f0e", "^"),
    "ours sequential": ("#1f77b4", "D"),
    "ours simultaneous": ("#2ca02c", "v"),
    "floor": ("black", ""),
}
DASHES = {"eager": ":", "compiled": "--", "captured": "-", "scan": "-", "step": "--"}
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
        return self.runs[("default", None)]

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


def ratio(runs: Runs, others: Runs | None) -> float | None:
    """Median of the ratios within the runs that contain both, so that runs may differ in speed."""
    ratios = [ms / others[run] for run, ms in runs.items() if others and run in others]
    return statistics.median(ratios) if ratios else None


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(setting: Setting) -> str:
    """Markdown: the default point of one setting."""
    results = setting.default
    counts = [len(values) for values in results.values()]
    runs = max(counts)
    number_of_runs = f"{runs} runs" if min(counts) == runs else f"{min(counts)} to {runs} runs"
    columns = ["", "ms an update", "updates/s", "of TorchRL eager", "of the floor"]
    columns += ["ms, least to greatest run"] if runs > 1 else []
    lines = [setting.words + (f"; {number_of_runs}" if runs > 1 else ""), ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, result in results.items():
        cells = [name, f"{middle(result):.3g}", f"{1e3 / middle(result):,.0f}"]
        cells += [cell(ratio(result, results.get(other))) for other in (REFERENCE, FLOOR)]
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
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(f"{before}{begin}{text}\n{end}{after}")
    os.replace(temporary, path)


def look(name: str) -> dict[str, Any]:
    known = [look for family, look in LOOKS.items() if name.startswith(family)]
    colour, marker = known[0] if known else ("#d62728", "x")
    return {"color": colour, "marker": marker, "linestyle": DASHES.get(name.split()[-1], "-")}


def draw_bars(axes: Any, setting: Setting) -> None:
    results = {name: middle(runs) for name, runs in setting.default.items()}
    names = sorted(results, key=lambda name: -results[name])
    bars = axes.barh(names, [results[n] for n in names], color=[look(n)["color"] for n in names])
    axes.bar_label(bars, [f"{results[n]:.3g}" for n in names], padding=3, fontsize=8)
    axes.set_xlim(0, 1.15 * max(results.values()))
    axes.set(xlabel="ms an update, sampling included")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_axis(axes: Any, setting: Setting, axis: str) -> None:
    """Lines over one swept axis with the default point: ratios where TorchRL was run."""
    default = dict(setting.point)[axis]
    points = {value: runs for (name, value), runs in setting.runs.items() if name == axis}
    points = dict(sorted({**points, default: setting.default}.items()))
    flat = axis == "rows"  # times should be constant here, so times are drawn and not ratios
    relative = not flat and all(REFERENCE in runs for runs in points.values())
    for name in setting.default:
        there = {value: runs for value, runs in points.items() if name in runs}
        known = {
            value: ratio(runs[name], runs[REFERENCE]) if relative else middle(runs[name])
            for value, runs in there.items()
        }
        axes.plot(known.keys(), known.values(), label=name, markersize=4, **look(name))
    linear = relative or flat
    axes.set(xscale="log", yscale="linear" if linear else "log", xlabel=AXES[axis])
    if linear:
        axes.set_ylim(bottom=0)
    axes.set_title(f"time over that of {REFERENCE}" if relative else "ms an update", fontsize=9)
    axes.set_xticks(list(points), [f"{value:,}" for value in points], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.tick_params(labelsize=8)


def draw(path: Path, settings: list[Setting]) -> None:
    """A row for each setting: bars of its default point, then a panel for each swept axis."""
    from matplotlib.figure import Figure

    swept = [[a for a in AXES if any(a == name for name, _ in s.runs)] for s in settings]
    columns = 1 + max(map(len, swept))
    width = 7.5 if columns == 1 else 5 + 3.2 * (columns - 1)
    figure = Figure(figsize=(width, 4.1 * len(settings)), layout="constrained")
    rows = figure.subfigures(len(settings), 1, squeeze=False)[:, 0]
    for row, setting, axes in zip(rows, settings, swept, strict=True):
        row.suptitle(setting.words, fontsize=10)
        ratios = [1.3] + [1] * (columns - 1)
        panels = row.subplots(1, columns, squeeze=False, width_ratios=ratios)[0]
        draw_bars(panels[0], setting)
        for panel, axis in zip(panels[1:], axes, strict=False):
            draw_axis(panel, setting, axis)
        for panel in panels[1 + len(axes) :]:
            panel.set_visible(False)
        if axes:
            handles, labels = panels[1].get_legend_handles_labels()
            row.legend(
                handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False
            )
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)


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
    draw(options.results / "step.png", settings)


if __name__ == "__main__":
    main()
