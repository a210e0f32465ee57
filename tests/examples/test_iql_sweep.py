"""The sweep example runs with tiny settings, with an environment and without."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from example_scripts import load, perform_here, run, table, write_log

from iql_torchrl import IQLPopulation, load_dataset
from iql_torchrl.data.builtin import make_dataset

PENDULUM = "pendulum/mixed-v0"
TINY = ["--updates", "8", "--hidden", "8", "--batch-size", "16", "--episodes", "2"]
TINY += ["--fit-updates", "10", "--seeds", "2", "--folder", "results"]


@pytest.fixture
def sweep(empty_folder, monkeypatch):
    # the engines have tests of their own, in tests/sweep
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)
    return load("iql_sweep")


def test_ctrl_c_says_that_the_command_continues(sweep, monkeypatch, capsys):
    make_dataset(PENDULUM, episodes=12, progress=False)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", interrupted)
    assert run(sweep, *TINY) == 130
    assert "Stopped. The same command continues." in capsys.readouterr().err


def test_a_grid_is_trained_scored_ranked_and_kept(sweep, capsys):
    make_dataset(PENDULUM, episodes=12, progress=False)
    grid = ["--temperature", "0", "3", "--expectile", "0.6", "0.9"]
    assert run(sweep, *TINY, *grid) == 0
    rows = table("results/members.csv")
    names = ["cloning", "temperature 3, expectile 0.6", "temperature 3, expectile 0.9"]
    assert [row["member"] for row in rows] == [f"{n} #{seed}" for n in names for seed in (0, 1)]
    for row in rows:
        for key in ("score", "value"):
            low, middle, high = (float(row[f"{key}{end}"]) for end in ("_low", "", "_high"))
            assert low <= middle <= high
    assert sorted(int(row["rank"]) for row in rows) == [1, 2, 3, 4, 5, 6]
    out = capsys.readouterr().out
    for words in ("score", "to (95 %)", "the log", "From the log alone:", "Recommendation: "):
        assert words in out
    for name in names:
        assert name in out
    folder = Path("results")
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    dataset = load_dataset(PENDULUM, reward="return_range", progress=False)
    own = dataset.split(0.6, seed=0)[0]
    population = IQLPopulation.load(folder / "tasks" / "from-00000" / "population.torchrl", own)
    assert population.updates == 8
    assert [config.expectile for config in population.configs] == [0.6] * 4 + [0.9] * 2
    assert not list(folder.rglob(".*")), "no temporary file may stay"
    written = (folder / "members.csv").read_bytes()
    assert run(sweep, *TINY, *grid) == 0
    assert (folder / "members.csv").read_bytes() == written
    assert run(sweep, *TINY, "--temperature", "3", "--expectile", "0.7") == 2
    refused = capsys.readouterr().err
    assert "results has another sweep: temperature 3, expectile 0.7 #0 was None, now " in refused
    assert " in 'configs'; choose another folder" in refused


def test_without_an_environment_there_are_estimates(sweep, capsys):
    write_log("log.npz", np.linspace(-2, 2, 200, dtype=np.float32)[:, None])
    arguments = ["--dataset", "log.npz", "--temperature", "0", "3", "--expectile", "0.7"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run(sweep, *TINY, *arguments) == 0
    assert "score" not in table("results/members.csv")[0]
    printed = capsys.readouterr()
    assert "There are no scores: " in printed.out
    assert "no environment says what their bounds are" in printed.err
    assert (Path("results") / "sweep.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "1", "-1"], "temperature is -1"),
        (["--expectile", "0.3"], "expectile is 0.3"),
        (["--seeds", "0"], "at least 1"),
        (["--slurm", "partition"], "--slurm has 'partition'; expected NAME=VALUE"),
        (["--device", "nonsense"], "device is 'nonsense'"),
        (["--dataset", "no-such-file.npz"], "error: no-such-file.npz: no such file"),
    ],
)
def test_impossible_settings_end_before_anything_is_trained(sweep, capsys, arguments, words):
    assert run(sweep, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(Path().rglob("*.torchrl"))


def test_options_of_slurm_are_text_or_whole_numbers(sweep, monkeypatch):
    given = {}

    def perform(self, engine, **options):
        given.update(options, engine=engine)
        raise RuntimeError("stop")

    monkeypatch.setattr("iql_torchrl.sweep.Sweep.run", perform)
    slurm = ["--slurm", "slurm_partition=gpu", "timeout_min=60"]
    assert run(sweep, "--dataset", "log.npz", "--engine", "slurm", *slurm) == 2
    assert given["slurm"] == {"slurm_partition": "gpu", "timeout_min": 60}
    assert given["engine"] == "slurm"
