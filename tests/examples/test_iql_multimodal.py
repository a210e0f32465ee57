"""The example of an obstacle: its geometry by hand, and a run with tiny settings."""

from __future__ import annotations

import numpy as np
from example_scripts import load, run

example = load("iql_multimodal")


def test_ways_around_the_obstacle():
    points = np.array([[0.0, 0.0], [0.0, 0.5], [0.0, -0.5], [0.0, 0.41], [1.0, 1.0], [0.0, 0.42]])
    # through (0, y) a segment passes the origin at 1.5 y / sqrt(1.5**2 + y**2)
    assert example.hits(points).tolist() == [True, False, False, True, False, False]
    result = example.returns(np.array([0.4, 0.4, 0.4]), points[:3])
    way = 2 * np.sqrt(1.5**2 + 0.5**2)
    np.testing.assert_allclose(result, [-2.0, 4 - way + 0.2, 4 - way - 0.2])


def test_the_log_passes_on_both_sides_and_its_mean_hits():
    log = example.make_log(0)
    points = log.transitions["action"].numpy()
    assert 0.48 < (points[:, 1] > 0).mean() < 0.52
    assert example.hits(points).mean() < 0.1
    assert example.hits(points.mean(0, keepdims=True)).all()
    assert (log.episode_lengths == 1).all()


def test_it_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(example, "ROWS", 400)
    monkeypatch.setattr(example, "STATES", 50)
    assert run(example, "--updates", 3) == 0
    rows = capsys.readouterr().out.splitlines()[-9:]
    names = ["log", "cloning", "IQL", "IQL, mixture", "DDPG+BC", "flow, IQL", "flow"]
    names += ["flow, best of 32", "best possible"]
    for name, row in zip(names, rows, strict=True):
        assert row.startswith(name)
        mean, hits, *others = row.removeprefix(name).split()
        assert -2 <= float(mean) <= 1.5
        assert 0 <= float(hits.removesuffix("%")) <= 100
        assert len(others) == (0 if name in ("log", "best possible") else 2)
