"""The examples that make their own worlds: these by hand, and runs with tiny settings."""

from pathlib import Path

import numpy as np
import pytest
from example_scripts import load, run

from iql_torchrl.data.builtin import make_dataset

multimodal = load("iql_multimodal")
guidance = load("iql_guidance")


def test_a_picture_shows_where_point_and_mark_are():
    example = load("iql_pixels")
    (image,) = example.picture(np.array([[1.0, -1.0, -1.0, 0.0]], np.float32))
    assert image.shape == (16, 16, 3)
    green, red = image[..., 1], image[..., 0]
    assert np.unravel_index(green.argmax(), green.shape) == (0, 15)  # row: y, column: x
    row, column = np.unravel_index(red.argmax(), red.shape)
    assert (row in (7, 8), column) == (True, 0)
    assert green.max() == 255
    assert not image[..., 2].any()


def test_a_driver_moves_and_is_rewarded_by_the_distance():
    example = load("iql_pixels")
    env = example.Drive()
    x, y, mark_x, mark_y = env.reset(seed=0)[0]
    observation, reward, terminated, truncated, info = env.step(np.array([1.0, -1.0], np.float32))
    moved = np.clip([x + 0.15, y - 0.15], -1, 1)
    np.testing.assert_allclose(observation, [*moved, mark_x, mark_y], rtol=1e-5)
    assert reward == pytest.approx(-np.hypot(moved[0] - mark_x, moved[1] - mark_y), rel=1e-5)
    assert (terminated, truncated, info["success"]) == (False, False, reward > -0.15)


@pytest.mark.parametrize(
    ("name", "options", "rows", "least"),
    [
        (
            "iql_pixels",
            ("--updates", 1, "--episodes", 4),
            ("dataset", "cloning, pictures", "IQL, pictures", "IQL, coordinates"),
            -60,
        ),
        (
            "iql_history",
            ("--updates", 2, "--seeds", 1, "--episodes", 1),
            ("(the dataset)", "angle", "last 4 angles", "angle and velocity"),
            -2000,
        ),
    ],
)
def test_each_prints_a_table(empty_folder, capsys, name, options, rows, least):
    make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
    assert run(name, *options) == 0
    printed = capsys.readouterr().out.splitlines()[-4:]
    for row, line in zip(rows, printed, strict=True):
        assert line.startswith(row)
        assert least < float(line.removeprefix(row).split()[0]) < 0


def test_ways_around_the_obstacle():
    points = np.array([[0.0, 0.0], [0.0, 0.5], [0.0, -0.5], [0.0, 0.41], [1.0, 1.0], [0.0, 0.42]])
    # through (0, y) a segment passes the origin at 1.5 y / sqrt(1.5**2 + y**2)
    assert multimodal.hits(points).tolist() == [True, False, False, True, False, False]
    result = multimodal.returns(np.array([0.4, 0.4, 0.4]), points[:3])
    way = 2 * np.sqrt(1.5**2 + 0.5**2)
    np.testing.assert_allclose(result, [-2.0, 4 - way + 0.2, 4 - way - 0.2])


def test_the_log_passes_on_both_sides_and_its_mean_hits():
    dataset = multimodal.make_dataset(0)
    points = dataset.transitions["action"].numpy()
    assert 0.48 < (points[:, 1] > 0).mean() < 0.52
    assert multimodal.hits(points).mean() < 0.1
    assert multimodal.hits(points.mean(0, keepdims=True)).all()
    assert (dataset.episode_lengths == 1).all()


def test_it_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(multimodal, "ROWS", 400)
    monkeypatch.setattr(multimodal, "STATES", 50)
    assert run(multimodal, "--updates", 3) == 0
    rows = capsys.readouterr().out.splitlines()[-9:]
    names = ["dataset", "cloning", "IQL", "IQL, mixture", "DDPG+BC", "flow, IQL", "flow"]
    names += ["flow, best of 32", "best possible"]
    for name, row in zip(names, rows, strict=True):
        assert row.startswith(name)
        mean, hits, *others = row.removeprefix(name).split()
        assert -2 <= float(mean) <= 1.5
        assert 0 <= float(hits.removesuffix("%")) <= 100
        assert len(others) == (0 if name in ("dataset", "best possible") else 2)


def test_guidance_has_exact_values_and_a_picture(capsys, monkeypatch, tmp_path):
    mdp = guidance.MDP(0)
    for policy in (mdp.logged, mdp.positive(), mdp.best()):
        np.testing.assert_allclose(policy.sum(1), 1)
        value = np.zeros(guidance.STATES)
        for _ in range(400):  # values by iteration, not by the linear solve
            ahead = guidance.DISCOUNT * (1 - guidance.ENDING) * mdp.following @ value
            value = (policy * (mdp.reward + ahead)).sum(1)
        assert mdp.value(policy) == pytest.approx(value.mean())
    monkeypatch.setattr(guidance, "ROWS", 400)
    monkeypatch.setattr(guidance, "DRAWS", 20)
    picture = tmp_path / "values.png"
    assert run(guidance, "--updates", 3, "--picture", picture) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    values = {row.split()[0]: float(row.split()[1]) for row in printed.splitlines()[1:10]}
    assert [float(w) for w in values] == list(guidance.WEIGHTS)
    assert max(values.values()) <= mdp.value(mdp.best()) + 1e-9
    assert f"the behaviour policy            {mdp.value(mdp.logged):.3f}" in printed


def test_a_walker_arrives_and_the_log_ends_there():
    example = load("iql_chunks")
    env = example.Square()
    place = env.reset(seed=0)[0]
    seen, reward, terminated, truncated, info = env.step(np.array([1.0, -1.0], np.float32))
    np.testing.assert_allclose(seen, np.clip([place[0] + 0.04, place[1] - 0.04], -1, 1), rtol=1e-5)
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
    env.place = np.array([0.7, 0.7], np.float32)
    assert env.step(np.array([1.0, 1.0], np.float32))[1:3] == (1.0, True)
    dataset = example.make_dataset(0, episodes=30)
    assert dataset.episode_returns.max() == 1
    assert dataset.episode_lengths.max() == 100


@pytest.mark.slow
def test_chunks_print_a_table_and_draw(empty_folder, capsys):
    assert run("iql_chunks", "--updates", 10, "--seeds", 1, "--episodes", 1) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["10", "0", "%", "0", "%"]
    assert (empty_folder / "runs/chunks/chunks.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("iql_pixels", "--episodes", 1, "episodes is 1; expected at least 2"),
        ("iql_history", "--seeds", 0, "seeds is 0; expected at least 1"),
        ("iql_multimodal", "--updates", 0, "updates is 0"),
        ("iql_guidance", "--updates", 0, "updates is 0"),
        ("iql_chunks", "--updates", 15, "updates is 15"),
        ("iql_pointmaze", "--seed", -1, "seed is -1"),
    ],
)
def test_impossible_numbers_are_an_error(capsys, name, option, value, words):
    assert run(name, option, value) == 2
    assert words in capsys.readouterr().err


def test_exact_values_are_the_mean_and_the_soft_maximum():
    example = load("iql_objectives")
    each = example.rewards(example.SHOWN)
    mean = example.exact_values(example.OBJECTIVES["expectile"][1], 0.5)
    np.testing.assert_allclose(mean, each.mean(1), atol=1e-4)
    soft = example.exact_values(example.OBJECTIVES["exponential"][1], 0.5)
    np.testing.assert_allclose(soft, 0.5 * np.log(np.exp(each / 0.5).mean(1)), atol=1e-4)


@pytest.mark.slow
def test_learned_values_are_printed_beside_exact_ones_and_drawn(empty_folder, capsys):
    assert run("iql_objectives", "--updates", 20) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum(": V off by" in line for line in printed) == 9
    assert (empty_folder / "objectives.png").is_file()


@pytest.mark.usefixtures("empty_folder")
def test_the_example_of_goals_prints_the_rate_of_every_cell_and_a_picture(capsys):
    example = load("iql_goals")
    maze = example.Maze()
    maze.reset(options={"start": example.CELLS.index((4, 2))})
    places = [example.CELLS[maze.step(action)[0]] for action in (0, 1, 3, 1)]
    assert places == [(4, 2), (4, 2), (4, 1), (4, 1)]  # walls at the right, and at the left twice
    assert run("iql_goals", "--updates", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "goals.png"
    assert Path("goals.png").read_bytes().startswith(b"\x89PNG")
    assert [line.rsplit(None, 1)[0] for line in lines[-20:-2]] == [str(c) for c in example.CELLS]
    rates = [float(line.split()[-1].rstrip("%")) for line in lines[-20:-1]]
    assert rates[-1] == pytest.approx(np.mean(rates[:-1]), abs=0.5)
