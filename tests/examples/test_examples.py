"""The examples run as a user runs them, with tiny settings; and what they say when they cannot."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from iql_torchrl import IQLStep
from iql_torchrl.data.builtin import make_dataset

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ["--updates", "20", "--hidden", "8", "--batch-size", "16", "--episodes", "2"]
TINY += ["--final-episodes", "3", "--eval-every", "10"]


def load(name: str, monkeypatch):
    """The example as a module, known to Python by its name as its dataclasses need."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(name, *arguments)`` an example in an empty folder with an empty Minari root."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return load(name, monkeypatch).main()

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
    for method, temperature in (("behaviour-cloning", 0.0), ("IQL", 3.0)):
        run_folder = folder / method
        config = json.loads((run_folder / "config.json").read_text())
        assert (config["updates"], config["temperature"]) == (20, temperature)
        rows = list(csv.DictReader((run_folder / "metrics.csv").read_text().splitlines()))
        assert [row["update"] for row in rows if row["return_mean"]] == ["0", "10", "20"]
        assert all(np.isfinite(float(row["loss_value"])) for row in rows[1:])
        assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert (run_folder / "best.torchrl").is_file()
        policy = torch.export.load(run_folder / "policy.pt2").module()
        assert policy(torch.zeros(2, 3)).shape == (2, 1)
    assert {float(row["weight_mean"]) for row in rows[1:]} != {1.0}
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("**/.*")), "no temporary file may stay"


@pytest.mark.slow  # tests/trainers has the same of a run of one method
@pytest.mark.usefixtures("small_pendulum")
def test_a_stopped_run_continues_from_its_last_update(run, capfd, tmp_path, monkeypatch):
    run("iql_offline", *TINY, "--name", "whole")
    step, calls = IQLStep.__call__, []

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) == 27:  # the seventh update of IQL, after 20 of cloning
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(IQLStep, "__call__", interrupted)
    assert run("iql_offline", *TINY, "--name", "stopped") == 130
    folder = Path("runs") / "stopped"
    assert f"--resume {folder}" in capfd.readouterr().err
    assert run("iql_offline", "--resume", str(folder)) == 0
    assert len(calls) == 40
    for method in ("behaviour-cloning", "IQL"):
        tables = [Path("runs") / name / method / "metrics.csv" for name in ("whole", "stopped")]
        assert tables[0].read_text() == tables[1].read_text()
    with pytest.raises(SystemExit, match="2"):
        run("iql_offline", "--resume", str(folder), "--updates", "30")
    with pytest.raises(SystemExit, match="2"):
        run("iql_offline", "--resume", str(tmp_path))
    assert "no run to continue" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("small_pendulum")
def test_same_seed_same_numbers(run, tmp_path):
    for name in ("a", "b"):
        run("iql_offline", *TINY, "--name", name)
    first, second = (tmp_path / "runs" / name / "IQL" / "metrics.csv" for name in "ab")
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
        (["--output", "afile"], "afile"),
    ],
)
def test_what_cannot_be_built_leaves_no_folder(run, capsys, tmp_path, arguments, words):
    (tmp_path / "afile").write_text("")
    assert run("iql_offline", *TINY, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--expectile", "0.3"],
        ["--temperature", "-1"],
        ["--preset", "nope"],
        ["--device", "nonsense"],
    ],
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
@pytest.mark.parametrize("wrong", [("--updates", "-1"), ("--updates", "0"), ("--seed", "-1")])
def test_custom_actor_refuses_numbers_out_of_range(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["custom_actor", *wrong])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "custom_actor.py"), run_name="__main__")
    assert "--updates is a number of at least 1, --seed of at least 0." in capsys.readouterr().err


def test_custom_actor(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["custom_actor"])
    main = load("custom_actor", monkeypatch).main
    assert np.isfinite(main(updates=10))
    assert "mean return of 20 episodes" in capsys.readouterr().out


def test_the_notes_of_a_dataset_are_printed(run, capsys, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "log.npz",
        observations=rng.uniform(-1, 1, (200, 3)).astype(np.float32),
        actions=rng.uniform(-2, 2, (200, 1)).astype(np.float32),
        rewards=rng.standard_normal(200),
        terminals=np.zeros(200, bool),
        timeouts=np.arange(200) % 50 == 49,
    )
    assert run("iql_offline", "--dataset", "log.npz", "--env", "Pendulum-v1", *TINY) == 0
    assert "note: dropped 4 truncated last rows of 200" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_that_loads_data_prints_its_notes(path):
    text = path.read_text()
    assert ("load_dataset(" in text) == (".print_notes()" in text)
