"""The search example: proposals follow the estimates, and the last comparison has fresh episodes."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from example_scripts import load, run, table
from extras import needs

from iql_torchrl import load_dataset
from iql_torchrl.data.builtin import make_dataset

PENDULUM = "pendulum/mixed-v0"
TINY = ["--updates", "6", "--hidden", "8", "--batch-size", "16", "--fit-updates", "8"]
TINY += ["--batch", "2", "--folder", "results"]


@pytest.fixture
def search(empty_folder, monkeypatch):
    module = load("iql_search")
    monkeypatch.setattr(module, "FINALISTS", 1)
    return module


def test_a_search_is_continued_and_ends_with_reserved_episodes(search, capsys):
    needs("optuna")
    make_dataset(PENDULUM, episodes=20, progress=False)
    assert run(search, *TINY, "--rounds", "1") == 0
    first = table("results/trials.csv")
    assert [row["trial"] for row in first] == ["trial 0", "trial 1"]
    preset = search.PRESETS["quick"]
    assert float(first[0]["expectile"]) == preset.expectile
    assert float(first[0]["temperature"]) == preset.temperature
    assert all(math.isfinite(float(row["value"])) for row in first)
    written = {p: p.stat().st_mtime_ns for p in Path("results/round-000").rglob("*.torchrl")}
    assert run(search, *TINY, "--rounds", "2") == 0
    both = table("results/trials.csv")
    assert both[:2] == first, "the first round is read, not made again"
    assert len(both) == 4
    assert {path: path.stat().st_mtime_ns for path in written} == written
    best = max(both, key=lambda row: float(row["value"]))["trial"]
    final = json.loads(Path("results/final.json").read_text())
    assert {row["candidate"] for row in final["rows"]} == {best, "trial 0"}
    assert final["episodes"] == 6, "30 % of 20 episodes"
    assert all(row["seen"] == 0 for row in final["rows"])
    out = capsys.readouterr().out
    assert "round 1: the best of 4 is " in out
    assert "On 6 reserved episodes:" in out
    assert run(search, *TINY, "--rounds", "2", "--seed", "1") == 2
    assert "round-000 has another search; choose another --folder" in capsys.readouterr().err


def judged(options, configs, *parts):
    """In place of training: values with their maximum at temperature 1 and expectile 0.6."""
    rows = {}
    for name, config in configs.items():
        value = -(math.log(config.temperature) ** 2) - 30 * (config.expectile - 0.6) ** 2
        if config.temperature <= 20:  # the others diverge
            rows[name] = {"value": value, "caveats": []}
    return {name: name for name in configs}, rows


def test_proposals_follow_the_estimates(search, monkeypatch, tmp_path):
    needs("optuna")
    monkeypatch.setattr(search, "train_round", judged)
    options = search.Options(folder=tmp_path, rounds=6, batch=8)
    agents = search.search(options, search.PRESETS["quick"], None, None)
    rows = table(tmp_path / "trials.csv")
    assert len(rows) == 48
    known = {row["trial"]: float(row["value"]) for row in rows if row["value"]}
    values = list(known.values())
    assert max(values) > -0.15
    assert sum(values[-16:]) / 16 > sum(values[:8]) / 8 + 1
    assert list(agents) == [max(known, key=known.get), "trial 0"]


def test_a_search_without_any_estimate_ends_with_the_reason(search, monkeypatch, tmp_path):
    needs("optuna")
    monkeypatch.setattr(search, "train_round", judged)
    options = search.Options(folder=tmp_path, rounds=1, batch=2)
    config = replace(search.PRESETS["quick"], temperature=29.9)
    monkeypatch.setitem(search.RANGES, "temperature", (25.0, 30.0, True))
    with pytest.raises(RuntimeError, match="no trial has an estimate: all diverged"):
        search.search(options, config, None, None)


def test_a_diverged_trial_is_not_ranked(search, tmp_path):
    """A learning rate of 1e30 makes the weights of trial 1 infinite."""
    make_dataset(PENDULUM, episodes=8, progress=False)
    options = search.Options(fit_updates=4)
    parts = load_dataset(PENDULUM, reward="return_range", progress=False).split(0.5, seed=0)
    config = replace(search.PRESETS["quick"], updates=4, hidden=(8,))
    configs = {"trial 0": config, "trial 1": replace(config, critic_lr=1e30)}
    agents, ranked = search.train_round(options, configs, 0.99, *parts, tmp_path)
    assert (list(agents), list(ranked)) == (["trial 0", "trial 1"], ["trial 0"])


def test_without_optuna_there_is_one_sentence(search, monkeypatch, capsys):
    make_dataset(PENDULUM, episodes=4, progress=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run(search, *TINY) == 2
    assert 'pip install "iql_torchrl[search]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--temperature", "0"], "temperature is 0; it is searched in [0.1, 30]"),
        (["--search", "hidden"], "invalid choice"),
    ],
)
def test_impossible_settings_are_refused(search, capsys, arguments, words):
    assert run(search, *arguments) == 2
    assert words in capsys.readouterr().err
