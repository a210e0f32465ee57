"""Methods over several tasks: which runs are one method, and what is printed about them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from iql_torchrl import IQLConfig
from iql_torchrl.report import group_runs, main
from iql_torchrl.report.comparison import aggregate_table, method_scores
from iql_torchrl.report.runs import read_run
from iql_torchrl.report.tables import write_csv


@pytest.fixture
def make_run(tmp_path):
    def make(task, temperature, seed, value, column="score_mean"):
        folder = tmp_path / f"{task}-{temperature}-{seed}"
        folder.mkdir()
        config = IQLConfig(temperature=temperature, seed=seed).to_dict()
        (folder / "config.json").write_text(json.dumps({"dataset": task, **config}))
        rows = [{"update": 0, column: 99.0}, {"update": 10, column: value}]
        write_csv(folder / "metrics.csv", rows)
        return read_run(folder)

    return make


SCORES = {
    ("hop", 3.0): [4.0, 5.0, 9.0],
    ("walk", 3.0): [7.0, 8.0, 8.0],
    ("hop", 0.0): [1.0, 5.0, 2.0],
    ("walk", 0.0): [8.0, 6.0, 6.0],
}


def runs_of(make_run, **options):
    return [
        make_run(task, temperature, seed, value, **options)
        for (task, temperature), values in SCORES.items()
        for seed, value in enumerate(values)
    ]


def test_runs_that_differ_in_task_and_seed_are_one_method(make_run, capsys):
    name, scores = method_scores(group_runs(runs_of(make_run)))
    assert name == "score_mean"
    assert {m: {t: v.tolist() for t, v in s.items()} for m, s in scores.items()} == {
        f"temperature {t:g}": {"hop": SCORES["hop", t], "walk": SCORES["walk", t]}
        for t in (3.0, 0.0)
    }
    lines = aggregate_table(scores, name=name).splitlines()
    assert lines[0].startswith("Last score_mean of all runs on 2 tasks")
    for line, t in zip(lines[2:4], (3.0, 0.0), strict=True):
        expected = stats.trim_mean(SCORES["hop", t] + SCORES["walk", t], 0.25)
        assert line.startswith(f"temperature {t:g}      6  {expected:.3g} [")
    assert lines[4] == "Probability that a run of temperature 3 is better than one of"
    # hop: 4 beats two, 5 beats two and equals one, 9 beats three; walk: 7 two, 8 two and a half twice
    assert lines[5].startswith(f"temperature 0         {(7.5 / 9 + 7 / 9) / 2:.3g} [")
    assert not capsys.readouterr().err


def test_a_method_without_a_task_is_left_out(make_run, capsys):
    runs = runs_of(make_run)
    _, scores = method_scores(group_runs([*runs, make_run("hop", 9.0, 0, 1.0)]))
    assert list(scores) == ["temperature 3", "temperature 0"]
    assert "note: temperature 9 is not compared over tasks" in capsys.readouterr().err
    _, scores = method_scores(group_runs(runs[::3]))  # one run of each
    assert not scores
    assert not capsys.readouterr().err


def test_returns_are_not_compared_between_tasks(make_run):
    runs = runs_of(make_run, column="return_mean")
    assert method_scores(group_runs(runs)) == ("", {})
    name, scores = method_scores(group_runs([r for r in runs if r.settings["dataset"] == "hop"]))
    assert name == "return_mean"
    assert [list(of_tasks) for of_tasks in scores.values()] == [["hop"], ["hop"]]
    np.testing.assert_array_equal(scores["temperature 0"]["hop"], SCORES["hop", 0.0])


def test_the_report_prints_it_below_the_table(make_run, tmp_path, capsys):
    runs_of(make_run, column="success_rate")
    output = ["--output", str(tmp_path / "x.png")]
    assert main([str(tmp_path), *output]) == 0
    text = capsys.readouterr().out
    assert "Last success_rate of all runs on 2 tasks" in text
    assert main([str(tmp_path), *output, "--each"]) == 0
    assert "of all runs on" not in capsys.readouterr().out


def test_one_method_of_two_versions_over_two_tasks(make_run):
    runs = runs_of(make_run)
    for run in runs:
        if run.folder.name.startswith("hop"):
            config = json.loads((run.folder / "config.json").read_text())
            del config["bc_weight"]
            (run.folder / "config.json").write_text(json.dumps(config))
    name, scores = method_scores(group_runs([read_run(run.folder) for run in runs]))
    assert name == "score_mean"
    assert {method: sorted(tasks) for method, tasks in scores.items()} == {
        "temperature 3": ["hop", "walk"],
        "temperature 0": ["hop", "walk"],
    }
