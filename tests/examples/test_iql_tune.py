"""The Tune example runs with tiny settings, with an environment and without."""

import sys
import warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from example_scripts import load, run, table, write_log
from extras import needs
from tune_session import Session

from iql_torchrl.data.builtin import make_dataset

PENDULUM = "pendulum/mixed-v0"
TINY = ["--updates", "8", "--hidden", "8", "--batch-size", "16", "--episodes", "2"]
TINY += ["--fit-updates", "10", "--seeds", "2", "--folder", "results"]
GRID = ["--temperature", "1", "3", "--expectile", "0.6", "0.9"]


class Results(list):
    errors = ()


@pytest.fixture
def example(empty_folder, monkeypatch):
    """The example with trials in this process; tests/test_tune.py has Ray."""
    tune = Session(empty_folder / "reports")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(tune=tune))
    module = load("iql_tune")

    def tune_grid(options, trial, folder):
        results = Results()
        for temperature, expectile in product(options.temperature, options.expectile):
            settings = {"temperature": temperature, "expectile": expectile}
            tune.checkpoint = None
            trial(settings)
            result = {"config": settings, "checkpoint": tune.checkpoint, "error": None}
            results.append(SimpleNamespace(**result))
        return results

    monkeypatch.setattr(module, "tune_grid", tune_grid)
    return module


NAMES = [f"temperature {t}, expectile {e} #{n}" for t in (1, 3) for e in (0.6, 0.9) for n in (0, 1)]


def test_a_grid_is_trained_evaluated_and_ranked(example, capsys):
    make_dataset(PENDULUM, episodes=12, progress=False)
    assert run(example, *TINY, *GRID) == 0
    rows = {row["candidate"]: row for row in table("results/policies.csv")}
    assert sorted(rows) == sorted(NAMES)
    for row in rows.values():
        for names in (
            ("return_low", "return_mean", "return_high"),
            ("value_low", "value", "value_high"),
        ):
            low, middle, high = (float(row[name]) for name in names)
            assert low <= middle <= high
    out = capsys.readouterr().out
    said = (
        "return",
        "to (95 %)",
        "the dataset",
        "From held-out episodes alone:",
        "Recommendation: ",
    )
    for words in (*said, *NAMES):
        assert words in out
    assert Path("results/tune.png").read_bytes().startswith(b"\x89PNG")


def test_without_an_environment_there_are_estimates(example, capsys):
    write_log("log.npz", np.linspace(-2, 2, 200, dtype=np.float32)[:, None])
    arguments = ["--dataset", "log.npz", "--temperature", "3", "--expectile", "0.7"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run(example, *TINY, *arguments, "--episodes", "0") == 0
    assert "return_mean" not in table("results/policies.csv")[0]
    assert "no environment says what their bounds are" in capsys.readouterr().err
    assert not Path("results/tune.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "1", "-1"], "temperature is -1"),
        (["--expectile", "0.3"], "expectile is 0.3"),
        (["--seeds", "0"], "at least 1"),
        (["--device", "nonsense"], "device is 'nonsense'"),
        (["--dataset", "no-such-file.npz"], "error: no-such-file.npz: no such file"),
    ],
)
def test_impossible_settings_end_before_anything_is_trained(example, capsys, arguments, words):
    assert run(example, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(Path().rglob("*.torchrl"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray, which differ between versions
def test_ray_trains_the_grid_and_continues_it(empty_folder, monkeypatch, capsys):
    needs("ray.tune")
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'examples'}")
    make_dataset(PENDULUM, episodes=12, progress=False)
    assert run("iql_tune", *TINY, *GRID) == 0
    first = table("results/policies.csv")
    assert sorted(row["candidate"] for row in first) == sorted(NAMES)
    saved = {p: p.stat().st_mtime_ns for p in Path("results/trials").rglob("*.torchrl")}
    assert run("iql_tune", *TINY, *GRID) == 0
    assert table("results/policies.csv") == first
    assert {p: p.stat().st_mtime_ns for p in saved} == saved
