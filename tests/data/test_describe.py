"""``python -m iql_torchrl.data describe`` and its picture: what a newcomer sees of a dataset."""

import subprocess
import sys
import warnings

import gymnasium as gym
import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from small_logs import counted, drift, save

from iql_torchrl.config import cli
from iql_torchrl.data import DatasetWarning, load_dataset
from iql_torchrl.data.__main__ import as_typed, main
from iql_torchrl.data.picture import dataset_figure, draw

LENGTH, EPISODES = 20, 12
pytestmark = pytest.mark.filterwarnings("ignore::iql_torchrl.data.DatasetWarning")


def walk(*, shift=0, end="truncated", following=True):
    """Random walks from random places; the flags of the ends are ``shift`` rows late."""
    data, ends = drift([LENGTH] * EPISODES, width=2, successors=following)
    return data | {"action": data["action"][:, :1], end: np.roll(ends, shift)}


def texts(figure):
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def panel(figure, title):
    """The axes whose title begins with ``title``."""
    (found,) = (axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))
    return found


def discontinuities(figure):
    names = panel(figure, "Observations row by row").get_legend_handles_labels()[1]
    return names.count("discontinuity inside an episode")


def heights(axes):
    return [bar.get_height() for bar in axes.patches if bar.get_height()]


@pytest.mark.parametrize(
    ("end", "following", "shifts"),
    [
        ("terminated", True, (0, 1, 2, -1)), ("truncated", False, (0, 1, 2, -1)),
        ("terminated", False, (0, 1)), ("truncated", True, (0, 1)),
    ],
)  # fmt: skip
def test_a_shifted_flag_is_seen(end, following, shifts):
    said = {
        0: "Right: the largest steps are those across the boundaries",
        1: "1 row before the boundaries: the flags are probably 1 row too late",
        2: "2 rows before the boundaries: the flags are probably 2 rows too late",
        -1: "1 row after the boundaries: the flags are probably 1 row too early",
    }
    for shift in shifts:
        dataset = load_dataset(walk(shift=shift, end=end, following=following))
        figure = dataset_figure(dataset)
        assert said[shift] in texts(figure)
        assert bool(discontinuities(figure)) == (shift != 0), "a red area is in the curves"


def test_missing_flags_are_seen():
    data = walk(following=False)
    data["truncated"] &= np.arange(len(data["truncated"])) % (2 * LENGTH) >= LENGTH
    figure = dataset_figure(load_dataset(data))
    curves = panel(figure, "The same, enlarged")
    (area,) = curves.patches
    assert (area.get_x(), area.get_width()) == (-0.5, 1.0)
    assert not any("end of an episode" in text for text in curves.get_legend_handles_labels()[1])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_independent_rows_get_no_verdict(rows):
    """Contexts of a bandit, and short episodes of independent rows."""
    draw, count = np.random.default_rng(0), 400
    ends = np.arange(count) % rows == rows - 1
    dataset = load_dataset(
        {
            "observation": draw.normal(size=(count, 1)), "reward": draw.normal(size=count),
            "action": draw.integers(0, 3, count), "terminated": ends, "truncated": ends & False,
        }
    )  # fmt: skip
    figure = dataset_figure(dataset)
    assert "At no offset are the steps regularly the largest" in texts(figure)
    assert discontinuities(figure) == 0


def test_steps_and_curves_are_those_of_the_rows():
    """Two episodes count 0, 1, 2, 3 and 100, ..., 103; the last next observations are 4 and 104."""
    dataset = load_dataset(counted(4, 4, terminated=[0]))
    figure = dataset_figure(dataset)
    deviation = np.std([0, 1, 2, 3, 100, 101, 102, 103])
    inside = [1 / deviation] * 4
    expected = [*inside, 96 / deviation, *inside]
    assert heights(panel(figure, "Steps")) == pytest.approx(expected, rel=1e-5)
    first, second = panel(figure, "Observations").lines[:2]
    np.testing.assert_allclose(first.get_xdata(), np.arange(-5, 0) + 0.5)
    np.testing.assert_allclose(second.get_xdata(), np.arange(5) + 0.5)
    middle = np.mean([0, 1, 2, 3, 100, 101, 102, 103])
    np.testing.assert_allclose(first.get_ydata() * deviation + middle, [0, 1, 2, 3, 4], atol=1e-4)
    names = panel(figure, "Observations").get_legend_handles_labels()[1]
    assert "end of an episode: terminated" in names


def test_histograms_count_and_keep_the_raw_reward():
    data = counted(3, 3, 5, terminated=[2])  # rewards 0, 1, 2, ...; returns 3, 3, 10
    figure = dataset_figure(load_dataset(data, reward=(10.0, 5.0)))
    assert heights(panel(figure, "Returns")) == [2, 1]
    assert sorted(heights(panel(figure, "Episode lengths"))) == [1, 2]
    assert heights(panel(figure, "Rewards")) == [3, 3, 3, 1, 1]
    assert "0 to 4, mean 1.4545" in texts(figure)


def test_a_huge_reward_leaves_the_others_visible():
    data = walk()
    data["reward"][7] = 1e12
    rewards = panel(dataset_figure(load_dataset(data)), "Rewards")
    assert rewards.get_xscale() == "symlog"
    assert len(heights(rewards)) > 4
    data["reward"] = (np.arange(240) % 80 == 79).astype(np.float32)  # 3 of 240
    assert panel(dataset_figure(load_dataset(data)), "Rewards").get_yscale() == "log"
    rewards = panel(dataset_figure(load_dataset(walk())), "Rewards")
    assert (rewards.get_xscale(), rewards.get_yscale()) == ("linear", "linear")


def test_actions_against_their_bounds():
    data = walk()
    data["action"] = np.tile(np.float32([[0.0, -2.0]]), (len(data["reward"]), 1))
    data["action"][:5] = [1.0, 4.0]
    space = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 4]), dtype=np.float32)
    actions = panel(dataset_figure(load_dataset(data, action_space=space)), "Actions")
    assert actions.lines[0].get_xdata().tolist() == [50.0, 0.0], "medians, per cent of the bounds"
    whole = [line[:, 0].tolist() for line in actions.collections[0].get_segments()]
    assert whole == [[50.0, 100.0], [0.0, 100.0]]
    assert [label.get_text() for label in actions.get_yticklabels()] == [
        "[0] -1 to 1",
        "[1] -2 to 4",
    ]


def test_discrete_actions_with_masks():
    data = walk()
    rows = len(data["reward"])
    data["action"] = np.arange(rows) % 2
    data["action_mask"] = np.stack([np.ones(rows), np.ones(rows), np.arange(rows) < 7], 1)
    actions = panel(dataset_figure(load_dataset(data)), "Actions")
    assert heights(actions) == [rows / 2, rows / 2]
    assert actions.lines[0].get_ydata().tolist() == [rows, rows, 7]
    assert "1 of 3 are never taken" in texts(actions.figure)


def test_pictures_across_a_boundary():
    data = walk(following=False)
    rows = len(data["reward"])
    data["observation"] = np.zeros((rows, 8, 8, 3), np.uint8) + np.arange(rows)[:, None, None, None]
    data["observation"] = data["observation"].astype(np.uint8)
    figure = dataset_figure(load_dataset(data))
    shown = [axes.images[0].get_array().flat[0] for axes in figure.axes if axes.images]
    # The last row of a truncated episode is the next observation of the row before.
    assert shown == [16, 17, 18, 19, 20, 21, 22, 23]
    assert "NEW episode 1,\nof transition 19" in texts(figure)
    assert not any("row by row" in axes.get_title(loc="left") for axes in figure.axes)


def test_dicts_categories_and_one_row():
    data = walk()
    data = {k: v[:1] for k, v in data.items()}
    nested = {"arm": data["observation"], "gripper": np.array([1])}
    data |= {"observation": nested, "next_observation": nested, "truncated": np.array([True])}
    said = texts(dataset_figure(load_dataset(data)))
    assert "One single episode: there is no boundary" in said
    assert "arm[0]" in said
    assert "gripper[0]" in said


MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_file_is_complete_or_the_old_one(tmp_path, monkeypatch, suffix):
    before = dict(matplotlib.rcParams)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    dataset, path = load_dataset(walk()), tmp_path / f"report{suffix}"
    draw(dataset, path, ["warning: 5 $ cost x_1$", "note: \u4e2d"])
    assert path.read_bytes().startswith(MAGIC[suffix])
    assert "matplotlib.pyplot" not in sys.modules
    assert dict(matplotlib.rcParams) == before
    path.write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(dataset, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# -- the command line


def test_long_names_are_separated_from_their_values(tmp_path, capsys):
    data = walk()
    for key in ("observation", "next_observation"):
        data[f"{key}/camera_positions"] = data.pop(key)
    assert main(["describe", str(save(tmp_path / "log.npz", data))]) == 0
    assert "space of observation/camera_positions Box of shape" in capsys.readouterr().out


def test_describe_prints_spaces_warnings_once_and_writes_the_picture(tmp_path, capsys):
    path = save(tmp_path / "log.npz", walk(shift=1))
    report = tmp_path / "report.png"
    with warnings.catch_warnings(record=True) as caught:
        assert main(["describe", str(path), "--output", str(report)]) == 0
    out, err = capsys.readouterr()
    assert (caught, err) == ([], "")
    assert "space of observation      Box of shape (2,), float32, [-inf, inf]\n" in out
    assert "space of action           Box of shape (1,), float32, [-1, 1]\n" in out
    dataset = load_dataset(path)
    assert dataset.warnings
    for text in dataset.warnings:
        assert out.count(f"warning: {as_typed(text)}\n") == 1
        assert f"note: {as_typed(text)}" not in out
    assert "columns=" not in out
    assert f"picture: {report}\n" in out
    assert report.read_bytes().startswith(MAGIC[".png"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.jpg", "expected a name that ends in .png, .pdf, .svg"),
        ("log.npz/report.png", "log.npz is a file"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_first(tmp_path, capsys, name, message):
    path = save(tmp_path / "log.npz", walk())
    assert main(["describe", str(path), "--output", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_options_reach_the_reader(tmp_path, capsys):
    data = counted(6, 6) | {"profit": np.arange(12.0)}
    del data["next_observation"], data["truncated"], data["reward"]
    data["action"] = data["action"] * 1.5
    path = save(tmp_path / "log.npz", data)
    names = ["--columns", "reward=profit", "observation=observation"]
    options = ["--max-episode-steps", "6", "--reward-offset", "1", "--limit", "3"]
    assert main(["describe", *names, *options, "--reward", "2", "0", str(path)]) == 0
    out = capsys.readouterr().out
    # One row earlier: the reward of row 0 is that of row 1; the map r' = 2 r.
    assert "steps                     3\n" in out
    assert "next/reward               2 to 6, float32 (1,)\n" in out
    assert "return                    mean 6," in out


def test_a_file_of_another_format_exists(tmp_path, capsys):
    path = tmp_path / "log.xlsx"
    path.write_bytes(b"PK")
    assert main(["describe", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"{path}: exists, but is not of a kind that is read; expected a file of one of" in error
    assert ".csv" in error


def test_clip_actions(tmp_path, capsys):
    data = walk() | {"observation": np.zeros((240, 3)), "next_observation": np.zeros((240, 3))}
    data["action"][3] = 2.5
    path = save(tmp_path / "log.npz", data)
    command = ["describe", str(path), "--env", "Pendulum-v1"]
    assert main(command) == 1
    assert "--clip-actions" in capsys.readouterr().err
    assert main([*command, "--clip-actions"]) == 0
    assert "to 2, float32 (1,)\n" in capsys.readouterr().out


def test_build_prints_warnings_once(tmp_path, capsys):
    path = save(tmp_path / "log.npz", walk(shift=1))
    for options in ([], ["--shards", "2"]):
        folder = tmp_path / f"built{len(options)}"
        assert main(["build", str(path), str(folder), *options]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert "columns=" not in out
        (text,) = load_dataset(path).warnings[:1]
        assert out.count(as_typed(text)) == 1
        assert f"warning: {as_typed(text)}\n" in out


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        (
            "pass columns={'terminated': None, 'truncated': 'done'}.",
            "pass --columns terminated= truncated=done.",
        ),
        ("columns={'reward': ...}", "--columns reward=NAME"),
        ("name one with columns={...}, or", "name one with --columns KEY=NAME, or"),
        ("columns={'observation': [...]}.", "--columns observation=NAME,NAME."),
        (
            "columns={'observation': ['a', 'b'], 'reward': 'my r'}",
            "--columns observation=a,b 'reward=my r'",
        ),
        ("columns={'truncated': timeouts}", "--columns truncated=timeouts"),
        ("with max_episode_steps=, or", "with --max-episode-steps, or"),
        ("limit=5 cannot", "--limit 5 cannot"),
        ("pass env= if", "pass --env if"),
        ("clip_actions=True, or the env", "--clip-actions, or the env"),
        ("reward_offset=1; if", "--reward-offset 1; if"),
        ("concatenate=['a', 'b'], but", "--concatenate a b, but"),
        ("reward='return_range' needs", "--reward return_range needs"),
        ("env=lambda: make(..., limit=3)", "env=lambda: make(..., limit=3)"),
        ("make_env=3 and action_space= stay", "make_env=3 and action_space= stay"),
    ],
)
def test_arguments_of_python_become_options(message, typed):
    assert as_typed(message) == typed


def test_warnings_of_a_script_have_no_source_line(capsys):
    with cli.errors_in_one_line(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look at it", DatasetWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: look at it\n"
    with pytest.warns(DatasetWarning):
        warnings.warn("as before", DatasetWarning, stacklevel=1)


@pytest.mark.slow
def test_a_process_prints_no_source_line(tmp_path):
    path = save(tmp_path / "log.npz", walk(shift=1))
    command = [sys.executable, "-m", "iql_torchrl.data", "describe", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "DatasetWarning" not in done.stderr
    assert "warning: " in done.stdout
