"""``iql_offline.py``, ``train.py`` and ``custom_actor.py`` as a user runs them; what they refuse."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, load, run, table, write_log

from iql_torchrl import Agent, IQLStep
from iql_torchrl.data.builtin import make_dataset

pytestmark = pytest.mark.usefixtures("empty_folder")
TINY = ["--updates", "20", "--hidden", "8", "--batch-size", "16", "--episodes", "2"]
TINY += ["--final-episodes", "3", "--eval-every", "10"]
METHODS = ("behaviour-cloning", "IQL")


@pytest.fixture
def small_pendulum(empty_folder):
    make_dataset("pendulum/mixed-v0", episodes=8, progress=False)


@pytest.mark.usefixtures("small_pendulum")
def test_the_main_example_writes_everything(capsys):
    assert run("iql_offline", *TINY, "--name", "first") == 0
    assert run("iql_offline", *TINY, "--name", "first") == 0
    folder = Path("runs/first")
    assert Path("runs/first-2").is_dir(), "an earlier run must be kept"
    out = capsys.readouterr().out
    for line in ("the dataset", "behaviour cloning", "IQL", "score 0..100"):
        assert line in out
    for method, temperature in zip(METHODS, (0.0, 3.0), strict=True):
        run_folder = folder / method
        config = json.loads((run_folder / "config.json").read_text())
        assert (config["updates"], config["temperature"]) == (20, temperature)
        rows = table(run_folder / "metrics.csv")
        assert [row["update"] for row in rows if row["return_mean"]] == ["0", "10", "20"]
        assert all(np.isfinite(float(row["loss_value"])) for row in rows[1:])
        assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert (run_folder / "best.torchrl").is_file()
        policy = torch.export.load(run_folder / "policy.pt2").module()
        assert policy(torch.zeros(2, 3)).shape == (2, 1)
        again = Path("runs/first-2", method, "metrics.csv")
        assert (run_folder / "metrics.csv").read_text() == again.read_text(), "the same seed"
    assert {float(row["weight_mean"]) for row in rows[1:]} != {1.0}
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("**/.*")), "no temporary file may stay"


@pytest.mark.slow  # tests/trainers has the same of a run of one method
@pytest.mark.usefixtures("small_pendulum")
def test_a_stopped_run_continues_from_its_last_update(capfd, tmp_path, monkeypatch):
    run("iql_offline", *TINY, "--name", "whole")
    step, calls = IQLStep.__call__, []

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) == 27:  # the seventh update of IQL, after 20 of cloning
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(IQLStep, "__call__", interrupted)
    assert run("iql_offline", *TINY, "--name", "stopped") == 130
    folder = Path("runs/stopped")
    assert f"--resume {folder}" in capfd.readouterr().err
    assert run("iql_offline", "--resume", folder) == 0
    assert len(calls) == 40
    for method in METHODS:
        tables = [Path("runs") / name / method / "metrics.csv" for name in ("whole", "stopped")]
        assert tables[0].read_text() == tables[1].read_text()
    assert run("iql_offline", "--resume", folder, "--updates", "30") == 2
    assert run("iql_offline", "--resume", tmp_path) == 2
    assert "no run to continue" in capfd.readouterr().err


@pytest.mark.usefixtures("small_pendulum")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "pendulum/mixed"], "ends in a version"),
        (["--dataset", "no-such-file.hdf5"], "no such file"),
        (["--policy", "categorical"], "policy is 'categorical'"),
        (["--name", "../elsewhere"], "--name is '../elsewhere'"),
        (["--output", "afile"], "afile"),
        (["--expectile", "0.3"], "expectile"),
        (["--temperature", "-1"], "temperature"),
        (["--preset", "nope"], "preset"),
        (["--device", "nonsense"], "device"),
        (["--eval-every", "0"], "--eval-every is 0; expected at least 1"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_no_folder(capsys, arguments, words):
    Path("afile").write_text("")
    assert run("iql_offline", *TINY, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "error: " in err or words == "preset"
    assert "Traceback" not in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("iql_offline", ("--dataset", "--preset", "--expectile", "--max-grad-norm")),
        ("iql_finetune", ("--offline-updates", "--limit", "--temperature", "--seed")),
    ],
)
def test_help_explains_every_option(capsys, name, options):
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in options)


@pytest.mark.parametrize("wrong", [("--updates", "-1"), ("--updates", "0"), ("--seed", "-1")])
def test_custom_actor_refuses_numbers_out_of_range(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["custom_actor", *wrong])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "custom_actor.py"), run_name="__main__")
    assert "--updates is a number of at least 1, --seed of at least 0." in capsys.readouterr().err


@pytest.mark.usefixtures("small_pendulum")
def test_the_short_script_trains_evaluates_and_keeps_earlier_runs(capsys):
    main = load("train").main
    means = [main(updates=20, episodes=2) for _ in range(2)]
    assert means[0] == means[1], "the same seed gives the same result"
    assert -2000 < means[0] < 0
    assert f"IQL: {means[0]:.1f}, standard error " in capsys.readouterr().out
    for folder in (Path("runs/train"), Path("runs/train-2")):
        assert (folder / "metrics.csv").read_text().startswith("update,")
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert Agent.load(folder).config.updates == 20


@pytest.mark.parametrize(("name", "lines"), [("train", 31), ("plain_iql", 115)])
def test_short_scripts_fit_on_a_screen(name, lines):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= lines


@pytest.mark.usefixtures("small_pendulum")
def test_custom_actor(capsys):
    assert np.isfinite(load("custom_actor").main(updates=10))
    assert "mean return of 20 episodes" in capsys.readouterr().out


def test_a_file_with_discrete_actions_and_the_notes_on_it(capsys):
    write_log("log.npz", np.arange(200) // 3 % 2)
    assert run("iql_offline", "--dataset", "log.npz", "--env", "CartPole-v1", *TINY) == 0
    out = capsys.readouterr().out
    assert "note: dropped 4 truncated last rows of 200" in out
    assert "IQL" in out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_that_loads_data_prints_its_notes(path):
    text = path.read_text()
    assert ("load_dataset(" in text) == (".print_notes()" in text)
