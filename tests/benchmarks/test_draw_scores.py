"""``draw_scores.py``: what its lines and bands show."""

from __future__ import annotations

import draw_scores
import numpy as np
import pytest

from iql_torchrl.evaluation.statistics import interquartile_mean, stratified_interval


def content(scores: dict[str, list[list[float]]]) -> dict:
    """A result file with one dataset; ``scores``: of each method a list of curves."""
    cells = [
        {
            "dataset": "maze",
            "method": method,
            "curve": [[n + 1, 0.0, s] for n, s in enumerate(curve)],
        }
        for method, curves in scores.items()
        for curve in curves
    ]
    return {"cells": cells, "unfinished": {}, "datasets": {"maze": {"score": 7.0}}}


def test_a_line_is_the_interquartile_mean_and_its_band_the_interval_of_the_tables():
    four = [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [10.0, 60.0]]
    figure = draw_scores.picture(content({"ours": four, "CORL": [[5.0]]}), None, False, False)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["ours (4 seeds)"].get_xydata().tolist() == [[1, 2.5], [2, 5.0]]
    assert lines["CORL (1 seed)"].get_xydata().tolist() == [[1, 5.0]]
    assert set(lines["mean of the dataset"].get_ydata()) == {7.0}
    (band,) = axes.collections  # one seed has no interval
    values = band.get_paths()[0].vertices[:, 1]
    last = stratified_interval(interquartile_mean, [np.array([2.0, 4.0, 6.0, 60.0])], seed=0)
    assert values.max() == pytest.approx(last[1])


def test_datasets_have_panels_of_their_own_or_share_one():
    both = content({"ours": [[1.0]]})
    both["cells"].append({"dataset": "other", "method": "ours", "curve": [[1, 0.0, 2.0]]})
    apart = draw_scores.picture(both, None, False, False)
    assert [axes.get_title() for axes in apart.axes] == ["maze", "other"]
    assert len(draw_scores.picture(both, ["other"], False, False).axes) == 1
    (axes,) = draw_scores.picture(both, None, True, True).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "ours, maze (1 seed)",
        "ours, other (1 seed)",
        "CORL's README, maze2d-umaze-v1",
    ]


def test_four_datasets_have_two_rows_of_panels():
    both = content({"ours": [[1.0]]})
    for name in ("b", "c", "d", "e"):
        both["cells"].append({"dataset": name, "method": "ours", "curve": [[1, 0.0, 2.0]]})
    panels = draw_scores.picture(both, ["b", "c", "d", "e"], False, False).axes
    assert panels[0].get_gridspec().get_geometry() == (2, 2)
    assert [axes.get_title() for axes in panels] == ["b", "c", "d", "e"]
    five = draw_scores.picture(both, None, False, False).axes
    assert [axes.axison for axes in five] == [True] * 5 + [False]
