"""The sweep example runs with tiny settings, on both kinds of truth and on none."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from iql_torchrl import IQLConfig, IQLPopulation, load_dataset
from iql_torchrl.data.builtin import make_dataset

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PENDULUM, SEPSIS = "pendulum/mixed-v0", "icu-sepsis/clinician-v0"
TINY = ["--updates", "8", "--hidden", "8", "--batch-size", "16", "--episodes", "2"]
TINY += ["--fit-updates", "10", "--seeds", "2", "--folder", "results"]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The example's names, in an empty folder with an empty Minari root."""
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["iql_sweep"])
    spec = importlib.util.spec_from_file_location("iql_sweep", EXAMPLES / "iql_sweep.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "iql_sweep", module)  # as its dataclasses need
    spec.loader.exec_module(module)
    # the engines have tests of their own, in tests/sweep
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)
    return vars(module)


def perform_here(calls, watch, *, workers, threads):
    for call in calls.values():
        call()
    return {}


def table(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "members.csv").open() as file:
        return list(csv.DictReader(file))


def test_ctrl_c_says_that_the_command_continues(sweep, monkeypatch, capsys):
    make_dataset(PENDULUM, episodes=12, progress=False)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", interrupted)
    assert sweep["main"](TINY) == 130
    assert "Stopped. The same command continues." in capsys.readouterr().err


def test_a_grid_is_trained_scored_ranked_and_kept(sweep, capsys):
    make_dataset(PENDULUM, episodes=12, progress=False)
    grid = ["--temperature", "0", "3", "--expectile", "0.6", "0.9"]
    assert sweep["main"]([*TINY, *grid]) == 0
    rows = table("results")
    names = ["cloning", "temperature 3, expectile 0.6", "temperature 3, expectile 0.9"]
    assert [row["member"] for row in rows] == [f"{n} #{seed}" for n in names for seed in (0, 1)]
    for row in rows:
        for key in ("score", "value"):
            low, middle, high = (float(row[f"{key}{end}"]) for end in ("_low", "", "_high"))
            assert low <= middle <= high
    assert sorted(int(row["rank"]) for row in rows) == [1, 2, 3, 4, 5, 6]
    out = capsys.readouterr().out
    for words in ("score (95 %)", "estimate (95 %)", "the log", "Recommendation: ", "In truth"):
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
    assert sweep["main"]([*TINY, *grid]) == 0
    assert (folder / "members.csv").read_bytes() == written
    other = [*TINY, "--temperature", "3", "--expectile", "0.7", "--no-ranking"]
    assert sweep["main"](other) == 2
    refused = capsys.readouterr().err
    assert "results has another sweep: IQL #0 was None, now " in refused
    assert " in 'configs'; choose another folder" in refused
    assert sweep["main"]([*other, "--folder", "results-2"]) == 0
    assert [row["member"] for row in table("results-2")] == ["IQL #0", "IQL #1"]
    assert "value" not in table("results-2")[0]


def test_sepsis_is_judged_by_exact_survival(sweep, capsys):
    pytest.importorskip("icu_sepsis")
    make_dataset(SEPSIS, episodes=60, progress=False)
    arguments = ["--dataset", SEPSIS, "--temperature", "0", "2", "--expectile", "0.7"]
    assert sweep["main"]([*TINY, *arguments]) == 0
    rows = table("results")
    assert all(0.5 < float(row["score"]) < 0.9 for row in rows)
    assert all(row["score"] == row["score_low"] == row["score_high"] for row in rows)
    assert all(float(row["importance_value"]) > 0 for row in rows)
    assert "the clinicians" in capsys.readouterr().out


def test_without_an_environment_there_are_estimates(sweep, capsys):
    make_dataset(PENDULUM, episodes=8, progress=False)
    rows = load_dataset(PENDULUM, progress=False).transitions
    columns = {"observations": rows["observation"], "actions": rows["action"]}
    columns |= {"rewards": rows["next", "reward"], "terminals": rows["next", "terminated"]}
    columns |= {"timeouts": rows["next", "truncated"]}
    columns |= {"next_observations": rows["next", "observation"]}
    np.savez("log.npz", **{k: v.squeeze(-1).numpy() if k in ("rewards", "terminals", "timeouts")
                           else v.numpy() for k, v in columns.items()})  # fmt: skip
    arguments = ["--dataset", "log.npz", "--temperature", "0", "3", "--expectile", "0.7"]
    with pytest.warns(UserWarning, match="no environment says what their bounds are"):
        assert sweep["main"]([*TINY, *arguments]) == 0
    assert "score" not in table("results")[0]
    assert "There are no scores: " in capsys.readouterr().out
    assert (Path("results") / "sweep.png").exists()


def test_cloning_is_there_once(sweep):
    grid = {"temperature": [0.0, 1.0], "expectile": [0.5, 0.9], "actor_lr": [1e-3, 1e-4]}
    runs = sweep["runs_of"](IQLConfig(seed=5), grid, 1)
    cloning = [name for name in runs if name.startswith("cloning")]
    assert cloning == ["cloning, actor_lr 0.001 #5", "cloning, actor_lr 0.0001 #5"]
    assert len(runs) == 2 + 4
    assert runs["temperature 1, expectile 0.9, actor_lr 0.0001 #5"].actor_lr == 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "1", "-1"], "temperature is -1"),
        (["--expectile", "0.3"], "expectile is 0.3"),
        (["--seeds", "0"], "at least 1"),
        (["--slurm", "partition"], "--slurm has 'partition'; expected NAME=VALUE"),
        (["--device", "nonsense"], "device is 'nonsense'"),
    ],
)
def test_impossible_settings_end_before_any_data_is_read(sweep, capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        sweep["main"](arguments)
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()


def test_options_of_slurm_are_text_or_whole_numbers(sweep, monkeypatch):
    given = {}

    def run(self, engine, **options):
        given.update(options, engine=engine)
        raise RuntimeError("stop")

    monkeypatch.setattr("iql_torchrl.sweep.Sweep.run", run)
    slurm = ["--slurm", "slurm_partition=gpu", "timeout_min=60"]
    assert sweep["main"](["--dataset", "log.npz", "--engine", "slurm", *slurm]) == 2
    assert given["slurm"] == {"slurm_partition": "gpu", "timeout_min": 60}
    assert given["engine"] == "slurm"


def test_mistakes_get_one_sentence(sweep, capsys):
    assert sweep["main"](["--dataset", "no-such-file.npz"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
