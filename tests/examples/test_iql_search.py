"""The search example: proposals follow the estimates, and the last comparison has fresh episodes."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from iql_torchrl.data.builtin import make_dataset

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PENDULUM = "pendulum/mixed-v0"
TINY = ["--updates", "6", "--hidden", "8", "--batch-size", "16", "--fit-updates", "8"]
TINY += ["--batch", "2", "--finalists", "1", "--folder", "results"]


@pytest.fixture
def search(tmp_path, monkeypatch):
    """The example's names, in an empty folder with an empty Minari root."""
    pytest.importorskip("optuna")
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["iql_search"])
    return module(monkeypatch)


def module(monkeypatch):
    spec = importlib.util.spec_from_file_location("iql_search", EXAMPLES / "iql_search.py")
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "iql_search", loaded)  # as its dataclasses need
    spec.loader.exec_module(loaded)
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)
    monkeypatch.setattr("iql_torchrl.sweep.result.draw", lambda *_, **__: None)  # takes seconds
    return loaded


def perform_here(calls, watch, *, workers, threads):
    for call in calls.values():
        call()
    return {}


def trials() -> list[dict[str, str]]:
    with Path("results/trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_search_is_continued_and_ends_with_reserved_episodes(search, capsys):
    make_dataset(PENDULUM, episodes=20, progress=False)
    assert search.main([*TINY, "--rounds", "1"]) == 0
    first = trials()
    assert [row["trial"] for row in first] == ["trial 0", "trial 1"]
    preset = search.PRESETS["quick"]
    assert float(first[0]["expectile"]) == preset.expectile
    assert float(first[0]["temperature"]) == preset.temperature
    assert all(math.isfinite(float(row["value"])) for row in first)
    written = {p: p.stat().st_mtime_ns for p in Path("results/round-000").rglob("*.torchrl")}
    assert search.main([*TINY, "--rounds", "2"]) == 0
    both = trials()
    assert both[:2] == first, "the first round is read, not made again"
    assert len(both) == 4
    assert {path: path.stat().st_mtime_ns for path in written} == written
    best = max(both, key=lambda row: float(row["value"]))["trial"]
    final = json.loads(Path("results/final.json").read_text())
    assert {row["member"] for row in final["rows"]} == {f"{best} #0", "trial 0 #0"}
    assert final["episodes"] == 6, "30 % of 20 episodes"
    assert all(row["seen"] == 0 for row in final["rows"])
    assert Path("results/search.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "round 1: the best of 4 is " in out
    assert "On 6 reserved episodes:" in out
    assert search.main([*TINY, "--rounds", "2", "--reserved", "0.4"]) == 2
    error = capsys.readouterr().err
    assert "another sweep: reserved differs (it was 0.3, now 0.4)" in error


def test_proposals_follow_the_estimates(search, monkeypatch, tmp_path):
    """In place of a ranking, a value with its maximum at temperature 1 and expectile 0.6."""

    def run(self, *args, **kwargs):
        rows = {}
        for name, config in self.configs.items():
            value = -(math.log(config.temperature) ** 2) - 30 * (config.expectile - 0.6) ** 2
            rows[name] = {"settings": name.split(" #")[0], "value": value, "doubts": ""}
            if config.temperature > 20:
                rows[name] = {"settings": name.split(" #")[0], "error": "it failed"}
        return SimpleNamespace(rows=rows, notes=())

    monkeypatch.setattr(search.Sweep, "run", run)
    options = search.Options(folder=tmp_path, rounds=6, batch=8, seeds=2)
    rows, _, _ = search.search(options, search.PRESETS["quick"])
    assert len(rows) == 48
    values = [search.value_of(row) for row in rows.values()]
    assert max(values) > -0.15
    known = [value for value in values if math.isfinite(value)]
    early, late = known[:8], known[-16:]
    assert sum(late) / len(late) > sum(early) / len(early) + 1
    assert all(row["runs"] == 2 for row in rows.values())


def test_a_search_without_any_estimate_ends_with_the_reason(search, monkeypatch, tmp_path):
    def run(self, *args, **kwargs):
        rows = {n: {"settings": n.split(" #")[0], "error": "bad"} for n in self.configs}
        return SimpleNamespace(rows=rows, notes=())

    monkeypatch.setattr(search.Sweep, "run", run)
    options = search.Options(folder=tmp_path, rounds=1, batch=2)
    with pytest.raises(RuntimeError, match="no trial has an estimate: bad"):
        search.search(options, search.PRESETS["quick"])


def test_without_optuna_there_is_one_sentence(monkeypatch, tmp_path):
    loaded = module(monkeypatch)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "iql_torchrl\[search\]"'):
        loaded.search(loaded.Options(folder=tmp_path), loaded.PRESETS["quick"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--temperature", "0"], "temperature is 0; it is searched in [0.1, 30]"),
        (["--search", "hidden"], "invalid choice"),
    ],
)
def test_impossible_settings_are_refused(monkeypatch, capsys, arguments, words):
    loaded = module(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["iql_search"])
    with pytest.raises(SystemExit, match="2"):
        loaded.main(arguments)
    assert words in capsys.readouterr().err
