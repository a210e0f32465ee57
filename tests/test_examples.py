"""The examples run as a user runs them, with tiny settings; and what they say when they cannot."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from iql_torchrl.data.builtin import make_dataset

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = ["--updates", "20", "--hidden", "8", "--batch-size", "16", "--episodes", "2"]
TINY += ["--final-episodes", "3", "--eval-every", "10"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(name, *arguments)`` an example in an empty folder with an empty Minari root."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()

    return call


@pytest.fixture
def small_pendulum(run):
    make_dataset("pendulum/mixed-v0", episodes=8, progress=False)


@pytest.mark.usefixtures("small_pendulum")
def test_the_main_example_writes_everything(run, capsys, tmp_path):
    assert run("iql_offline", *TINY, "--name", "first") == 0
    assert run("iql_offline", *TINY, "--name", "first") == 0
    folder = tmp_path / "runs" / "first"
    assert (tmp_path / "runs" / "first-2").is_dir(), "an earlier run must be kept"
    out = capsys.readouterr().out
    for line in ("the log", "behaviour cloning", "IQL", "score 0..100"):
        assert line in out
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset"] == "pendulum/mixed-v0"
    assert config["updates"] == 20
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [(r["method"], r["update"]) for r in rows] == [
        ("behaviour cloning", "10"),
        ("behaviour cloning", "20"),
        ("IQL", "10"),
        ("IQL", "20"),
    ]
    assert all(np.isfinite(float(r["loss_value"])) for r in rows)
    assert {float(r["weight_mean"]) for r in rows[:2]} == {1.0}
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert set(state) == {"config", "behaviour cloning", "IQL"}
    assert not list(folder.glob(".*")), "no temporary file may stay"


@pytest.mark.usefixtures("small_pendulum")
def test_same_seed_same_numbers(run, tmp_path):
    for name in ("a", "b"):
        run("iql_offline", *TINY, "--name", name)
    first, second = (tmp_path / "runs" / name / "metrics.csv" for name in "ab")
    assert first.read_text() == second.read_text()


def test_discrete_actions(run, capsys):
    env = gymnasium.make("CartPole-v1")
    generator = np.random.default_rng(0)
    episodes = []
    for number in range(6):
        observation, _ = env.reset(seed=number)
        buffer = EpisodeBuffer(number, None, None, [observation], [], [], [], [])
        over = False
        while not over:
            action = int(generator.integers(2))
            observation, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            buffer.observations.append(observation)
            buffer.actions.append(action)
            buffer.rewards.append(float(reward))
            buffer.terminations.append(terminated)
            buffer.truncations.append(truncated)
        episodes.append(buffer)
    with pytest.warns(UserWarning, match="set to None"):
        minari.create_dataset_from_buffers(
            "cartpole/random-v0", buffer=episodes, env="CartPole-v1", algorithm_name="random"
        )
    env.close()
    with pytest.warns(UserWarning, match="every reward is 1"):
        assert run("iql_offline", *TINY, "--dataset", "cartpole/random-v0") == 0
    assert "IQL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "pendulum/mixed"], "ends in a version"),
        (["--dataset", "no-such-file.hdf5"], "no such file"),
    ],
)
def test_mistakes_get_one_sentence(run, capsys, arguments, words):
    assert run("iql_offline", *TINY, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("small_pendulum")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "categorical"], "policy is 'categorical'"),
        (["--name", "../elsewhere"], "--name is '../elsewhere'"),
        (["--device", "nonsense"], "nonsense"),
        (["--output", "afile"], "afile"),
    ],
)
def test_what_cannot_be_built_leaves_no_folder(run, capsys, tmp_path, arguments, words):
    (tmp_path / "afile").write_text("")
    assert run("iql_offline", *TINY, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments", [["--expectile", "0.3"], ["--temperature", "-1"], ["--preset", "nope"]]
)
def test_impossible_settings_end_before_any_data_is_read(run, capsys, arguments, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run("iql_offline", *arguments)
    assert arguments[0].strip("-") in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_explains_every_option(run, capsys):
    with pytest.raises(SystemExit, match="0"):
        run("iql_offline", "--help")
    text = capsys.readouterr().out
    for option in ("--dataset", "--preset", "--expectile", "--temperature", "--max-grad-norm"):
        assert option in text


@pytest.mark.usefixtures("small_pendulum")
def test_custom_actor(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["custom_actor"])
    main = runpy.run_path(str(EXAMPLES / "custom_actor.py"))["main"]
    assert np.isfinite(main(updates=10))
    assert "mean return of 20 episodes" in capsys.readouterr().out
