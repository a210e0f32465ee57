"""Scores during training, from the result files of bench_scores.py and score_population.py.

    python benchmarks/draw_scores.py scores_million --together --published
    python benchmarks/draw_scores.py scores --datasets hopper-replay halfcheetah-replay

A line is the interquartile mean of the seeds' scores, a band its 95 % interval of the bootstrap over
seeds, as in the tables of docs/scores.md. Each dataset has a panel of its own, unless ``--together``.
The picture is ``benchmarks/results/RESULT.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from iql_torchrl.evaluation.statistics import interquartile_mean, stratified_interval
from iql_torchrl.report.figures import save
from record import RESULTS
from score_tables import PUBLISHED, curves, read

import numpy as np
from matplotlib.figure import Figure


def draw_line(axes: Any, runs: Sequence[dict[int, float]], **look: Any) -> None:
    """The scores of ``runs``, each a score by number of updates, at the points that all have."""
    points = sorted(set.intersection(*(set(run) for run in runs)))
    scores = [np.array([run[point] for run in runs]) for point in points]
    line = [interquartile_mean(each) for each in scores]
    axes.plot(points, line, marker="o", markersize=3, **look)
    if len(runs) > 2:  # of two seeds the bootstrap has three values
        bands = [stratified_interval(interquartile_mean, [each], seed=0) for each in scores]
        axes.fill_between(points, *np.transpose(bands), color=look["color"], alpha=0.2, linewidth=0)


def picture(
    content: dict[str, Any], names: Sequence[str] | None, together: bool, published: bool
) -> Figure:
    """The curves of the datasets ``names`` (all, if None) in ``content``, a result file."""
    runs = {
        key: each for key, each in sorted(curves(content).items()) if not names or key[0] in names
    }
    datasets = list(dict.fromkeys(name for name, _ in runs))
    panels = 1 if together else len(datasets)
    across = panels if panels < 4 else (panels + 1) // 2  # four and more in two rows
    down = -(-panels // across)
    size = (max(7.0, 4.5 * across), 4.8 * down)
    figure = Figure(figsize=size, layout="constrained")
    areas = figure.subplots(down, across, squeeze=False).ravel()
    for unused in areas[panels:]:
        unused.set_axis_off()
    methods = sorted({method for _, method in runs})
    for number, ((name, method), each) in enumerate(runs.items()):
        axes = areas[0 if together else datasets.index(name)]
        color = f"C{number if together else methods.index(method)}"
        label = f"{method}, {name}" if together else method
        seeds = f"{len(each)} seed{'s' if len(each) > 1 else ''}"
        width = 2.5 if method == "ours" and not together else 1.5
        draw_line(axes, each, color=color, linewidth=width, label=f"{label} ({seeds})")
    for axes, title in zip(areas[:panels], [""] if together else datasets, strict=True):
        axes.set(xlabel="updates", ylabel="score", title=title)
        axes.grid(alpha=0.3, linewidth=0.5)
        if not together and title in content["datasets"]:
            of_dataset = content["datasets"][title]["score"]
            axes.axhline(of_dataset, color="grey", linestyle=":", label="mean of the dataset")
        if published:
            mean, deviation = PUBLISHED["d4rl-umaze"]["CORL"]
            axes.errorbar([1_000_000], [mean], [deviation], color="black", marker="s", capsize=3,
                          label="CORL's README, maze2d-umaze-v1")  # fmt: skip
        axes.xaxis.set_major_formatter(lambda count, _: f"{count / 1000:,.0f} k")
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2}
        axes.legend(fontsize=8, frameon=False, **place)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("result", help="name of the result file")
    option("--datasets", nargs="+", help="datasets; all of the file")
    option("--together", action="store_true", help="one panel for all datasets")
    option("--published", action="store_true", help="the published score of maze2d-umaze")
    o = parser.parse_args(arguments)
    content = read(RESULTS / f"{o.result}.json")
    save(picture(content, o.datasets, o.together, o.published), RESULTS / f"{o.result}.png")


if __name__ == "__main__":
    main()
