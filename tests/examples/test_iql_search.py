"""The search example: proposals follow the estimates, and the last comparison has fresh episodes."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from example_scripts import load, perform_here, run, table
from extras import needs

from iql_torchrl.data.builtin import make_dataset

PENDULUM = "pendulum/mixed-v0"
TINY = ["--updates", "6", "--hidden", "8", "--batch-size", "16", "--fit-updates", "8"]
TINY += ["--batch", "2", "--folder", "results"]


@pytest.fixture
def search(empty_folder, monkeypatch):
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)
    monkeypatch.setattr("iql_torchrl.sweep.result.draw", lambda *_, **__: None)  # takes seconds
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
    assert "another sweep: " in capsys.readouterr().err


def rows_of(self, *args, **kwargs) -> SimpleNamespace:
    """In place of a sweep: values with their maximum at temperature 1 and expectile 0.6."""
    rows = {}
    for name, config in self.configs.items():
        value = -(math.log(config.temperature) ** 2) - 30 * (config.expectile - 0.6) ** 2
        rows[name] = {"value": value, "caveats": ""}
        if config.temperature > 20:
            rows[name] = {"error": "it failed"}
    return SimpleNamespace(rows=rows, notes=(), agent=lambda name: name)


def test_proposals_follow_the_estimates(search, monkeypatch, tmp_path):
    needs("optuna")
    monkeypatch.setattr(search.Sweep, "run", rows_of)
    monkeypatch.setattr(search.Sweep, "parts", lambda self: ())
    options = search.Options(folder=tmp_path, rounds=6, batch=8)
    agents, _ = search.search(options, search.PRESETS["quick"])
    rows = table(tmp_path / "trials.csv")
    assert len(rows) == 48
    known = {row["trial"]: float(row["value"]) for row in rows if row["value"]}
    values = list(known.values())
    assert max(values) > -0.15
    assert sum(values[-16:]) / 16 > sum(values[:8]) / 8 + 1
    assert list(agents) == [max(known, key=known.get), "trial 0"]


def test_a_search_without_any_estimate_ends_with_the_reason(search, monkeypatch, tmp_path):
    needs("optuna")
    monkeypatch.setattr(search.Sweep, "run", rows_of)
    options = search.Options(folder=tmp_path, rounds=1, batch=2)
    config = replace(search.PRESETS["quick"], temperature=29.9)
    monkeypatch.setitem(search.RANGES, "temperature", (25.0, 30.0, True))
    with pytest.raises(RuntimeError, match="no trial has an estimate: it failed"):
        search.search(options, config)


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
