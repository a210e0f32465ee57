"""The examples with images and with histories: their worlds by hand, and runs with tiny settings."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from test_examples import load

from iql_torchrl.data.builtin import make_dataset


def test_a_picture_shows_where_point_and_mark_are(monkeypatch):
    example = load("iql_pixels", monkeypatch)
    (image,) = example.picture(np.array([[1.0, -1.0, -1.0, 0.0]], np.float32))
    assert image.shape == (16, 16, 3)
    green, red = image[..., 1], image[..., 0]
    assert np.unravel_index(green.argmax(), green.shape) == (0, 15)  # row: y, column: x
    row, column = np.unravel_index(red.argmax(), red.shape)
    assert (row in (7, 8), column) == (True, 0)
    assert green.max() == 255
    assert not image[..., 2].any()


def test_a_driver_moves_and_is_rewarded_by_the_distance(monkeypatch):
    example = load("iql_pixels", monkeypatch)
    env = example.Drive(pictures=False)
    x, y, mark_x, mark_y = env.reset(seed=0)[0]
    observation, reward, terminated, truncated, info = env.step(np.array([1.0, -1.0], np.float32))
    moved = np.clip([x + 0.15, y - 0.15], -1, 1)
    np.testing.assert_allclose(observation, [*moved, mark_x, mark_y], rtol=1e-5)
    assert reward == pytest.approx(-np.hypot(moved[0] - mark_x, moved[1] - mark_y), rel=1e-5)
    assert (terminated, truncated, info["success"]) == (False, False, reward > -0.15)


def test_pixels_prints_a_table(monkeypatch, tmp_path, capsys):
    example = load("iql_pixels", monkeypatch)
    assert example.main(["--updates", "1", "--episodes", "4", "--output", str(tmp_path)]) == 0
    with open(tmp_path / "pixels-seed0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = ["log", "cloning, pictures", "IQL, pictures", "IQL, coordinates"]
    assert [row["policy"] for row in rows] == names
    assert all(-60 < float(row["return"]) < 0 for row in rows)
    assert all(name in capsys.readouterr().out for name in names[:1])
    assert (tmp_path / "pixels-seed0" / "returns.png").stat().st_size > 5_000


def test_history_prints_a_table(monkeypatch, tmp_path, capsys):
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
    example = load("iql_history", monkeypatch)
    arguments = ["--updates", "2", "--seeds", "1", "--episodes", "1", "--output", str(tmp_path)]
    assert example.main(arguments) == 0
    with open(tmp_path / "history" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["policy reads"] for row in rows] == list(example.METHODS)
    assert all(-2000 < float(row["seed 0"]) < 0 for row in rows)
    assert (tmp_path / "history" / "returns.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("name", "arguments"), [("iql_pixels", ["--episodes", "1"]), ("iql_history", ["--seeds", "0"])]
)
def test_impossible_numbers_are_an_error(monkeypatch, capsys, name, arguments):
    with pytest.raises(SystemExit, match="2"):
        load(name, monkeypatch).main(arguments)
    assert "expected" in capsys.readouterr().err
