"""Tables of metrics come back bit for bit; runs are grouped, averaged and drawn as they should."""

import json
import math
import os
import re
import runpy
import struct
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from small_agents import small_columns

from iql_torchrl import Evaluation, IQLConfig, load_dataset, report
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.losses import DIAGNOSTICS, LOSSES
from iql_torchrl.report import draw, group_runs, main, results_table, series, table, write_rows
from iql_torchrl.report.comparison import aggregate_table, method_scores
from iql_torchrl.report.figures import Series, comparison_figure, run_figure
from iql_torchrl.report.runs import Run, find_runs, read_run
from iql_torchrl.report.tables import EVALUATION, TRAINING, read_csv, write_csv

ROWS = [
    {"update": 0, "return_mean": -9.0, "return_low": -11.0, "return_high": -6.0, "episodes": 4},
    {"update": 10, "loss_value": 100.0, "loss_qvalue": 2000.0, "loss_actor": -1.0, "mine": 0.5},
    {
        "update": 20,
        "loss_value": 0.5,
        "loss_qvalue": 3.0,
        "loss_actor": 2.0,
        "return_mean": -3.0,
        "return_low": -4.0,
        "return_high": -2.0,
        "episodes": 4,
    },
]


# -- tables ----------------------------------------------------------------------------------------

# not st.characters(), which takes seconds to make its table of all characters
LETTERS = st.integers(0x20, 0x2FFFF).map(chr).filter(str.isprintable)
NAMES = st.sampled_from([*TRAINING, *EVALUATION]) | st.text(LETTERS, min_size=1, max_size=8).filter(
    lambda s: s == s.strip() and s != "update"
)
VALUES = st.floats() | st.integers(-(2**53), 2**53)


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2**53), st.dictionaries(NAMES, VALUES, max_size=5)), max_size=5
    )
)
def test_a_table_comes_back_bit_for_bit(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "table.csv"
    rows = [{"update": update, **values} for update, values in rows]
    write_csv(path, rows)
    back = read_csv(path)
    assert [row.keys() for row in back] == [row.keys() for row in rows]
    for row, again in zip(rows, back, strict=True):
        for name, value in row.items():
            nan = math.isnan(value) and math.isnan(again[name])
            assert nan or struct.pack("d", again[name]) == struct.pack("d", value)


def test_the_order_of_columns_does_not_depend_on_when_a_value_comes(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [
        {"update": 0, "zeta": 1.5},
        {"update": 5, "alpha": np.float32(0.1), "loss_value": 1, "loss_actor": 0.1},
    ]
    rows[0] |= {"score_mean": 7.0, "return_mean": math.nan}
    write_csv(path, rows)
    assert path.read_text() == (
        "update,loss_actor,loss_value,return_mean,score_mean,alpha,zeta\n"
        "0,,,nan,7.0,,1.5\n"
        "5,0.1,1,,,0.10000000149011612,\n"
    )
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_the_known_columns_are_those_of_loss_and_evaluation():
    assert set(TRAINING) == {*LOSSES, *DIAGNOSTICS, "entropy", "policy_value_gap"}
    array = np.ones(3)
    everything = Evaluation(array, array.astype(int), array.astype(bool), array).summary()
    assert set(everything) <= set(EVALUATION)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"loss_value": 1.0}, "row 0 needs an 'update'"),
        ({"update": -1}, "row 0 needs an 'update'"),
        ({"update": math.nan}, "row 0 needs an 'update'"),
        ({"update": 1, "loss": "0.5"}, "row 0, 'loss' is '0.5'; expected one number"),
        ({"update": 1, "loss": None}, "expected one number"),
        ({"update": 1, "a\nb": 1.0}, "column 'a\\\\nb': a name must be printable"),
        ({"update": 1, "": 1.0}, "column '': a name"),
    ],
)
def test_what_is_no_row_is_refused(tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        write_csv(tmp_path / "metrics.csv", [row])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "has the header ''"),
        (b"loss,update\n1,2\n", "header 'loss,update'"),
        (b"update,a,a\n1,2,3\n", "each once"),
        (b"update,a\n1,2\n3\n", "line 3: 1 cells under 2 columns"),
        (b"update,a\n1,x\n", "line 2: a is 'x', not a number"),
        (b"update,a\n,1\n", "line 2: update is ''"),
        (b"update,a\ninf,1\n", "line 2: update is 'inf'"),
        (b'update,a\n1,"2\n', "not a table of metrics"),
        (b"update,\xff\n", "not a table of metrics"),
    ],
)
def test_a_broken_table_gets_a_sentence(tmp_path, text, words):
    path = tmp_path / "metrics.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=words) as error:
        read_csv(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("runs", "t"),
    [
        (2, math.tan(0.475 * math.pi)),  # Cauchy's distribution
        (3, 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        (11, 2.228138852),  # tables
    ],
)
def test_intervals_over_runs_by_hand(runs, t):
    values = np.linspace(-1.0, 2.0, runs)[:, None] * [1.0, 3.0] + [0.0, 5.0]
    mean, low, high = mean_interval(values)
    half = t * values.std(0, ddof=1) / math.sqrt(runs)
    assert mean == pytest.approx(values.mean(0))
    assert high - mean == pytest.approx(half, rel=1e-9)
    assert mean - low == pytest.approx(half, rel=1e-9)
    mean, low, high = mean_interval(np.full((runs, 1), 0.1))
    assert (low, high) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="at least two runs; there are 1"):
        mean_interval(values[:1])


# -- one run's picture -----------------------------------------------------------------------------


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_only_panels_with_data_and_scales_that_fit():
    shown = panels(run_figure(ROWS, title="run $1", reference=("the dataset", -5.0)))
    assert list(shown) == ["Return", "Losses of critics and V", "Loss of the policy", "mine"]
    assert [axes.get_yscale() for axes in shown.values()] == ["linear", "log", "linear", "linear"]
    assert [len(axes.get_lines()) for axes in shown.values()] == [2, 2, 1, 1]  # with the level
    line, level = shown["Return"].get_lines()
    assert line.get_xydata().tolist() == [[0.0, -9.0], [20.0, -3.0]]
    assert set(level.get_ydata()) == {-5.0}
    assert [text.get_text() for text in shown["Return"].get_legend().get_texts()] == ["the dataset"]
    legend = shown["Losses of critics and V"].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["critics", "V"]
    band = shown["Return"].collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band.tolist()} >= {(0, -11), (0, -6), (20, -4), (20, -2)}


def test_groups_are_in_order_of_appearance_also_where_data_split_them():
    settings = [{"seed": 0, "data": "a"}, {"seed": 0, "lr": 1.0}, {"seed": 0, "data": "b"}]
    runs = [Run(Path(name), each, []) for name, each in zip("xyz", settings, strict=True)]
    assert [group.runs for group in group_runs(runs)] == [(run,) for run in runs]


def test_any_order_a_single_point_and_values_that_are_not_finite():
    (group,) = group_runs([Run(Path(), {}, [row | {"return_min": -20.0} for row in ROWS[:1]])])
    assert series(group, "return_min").low is None  # the interval is that of the mean
    (axes,) = run_figure([{"update": u, "loss_actor": -u} for u in (3, 1, 2)]).axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[1, -1], [2, -2], [3, -3]]
    (axes,) = run_figure(ROWS[:1]).axes  # a mark with a bar
    assert axes.get_lines()[0].get_marker() == "o"
    assert axes.collections[0].get_segments()[0].tolist() == [[0, -11], [0, -6]]
    low, high = axes.get_ylim()
    assert low < -11 < -6 < high
    rows = [{"update": u, "td_error_mean": v} for u, v in enumerate([1.0, math.nan, math.inf])]
    (axes,) = run_figure(rows).axes
    assert len(axes.get_lines()[0].get_xdata()) == 1
    assert "2 of 3 values are not finite" in axes.get_xlabel()
    figure = run_figure([{"update": 1}])
    assert not figure.axes
    assert "no numbers yet" in [text.get_text() for text in figure.texts]


def test_a_wide_band_does_not_squeeze_the_lines():
    points = np.array([0.0, 1.0])
    line = Series("a", points, np.array([1.0, 2.0]), np.array([0.9, -90.0]), np.array([1.1, 90.0]))
    (axes,) = comparison_figure({"score_mean": [line]}).axes
    assert axes.get_ylim() == pytest.approx((0.0, 3.0))


def settings_of_matplotlib():
    backend = matplotlib.get_backend(auto_select=False)  # asking rcParams would choose one
    return backend, {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}


def test_a_picture_is_written_completely_and_changes_no_global_state(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = settings_of_matplotlib()
    # letters that the font lacks are no warning
    title = "a $ and _ \u8bad\u7ec3"
    draw(tmp_path / "curves.png", ROWS, title=title, reference=("_the $ log", 1.0))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert os.listdir(tmp_path) == ["curves.png"]
    assert "matplotlib.pyplot" not in sys.modules
    assert settings_of_matplotlib() == before


# -- several runs ----------------------------------------------------------------------------------


@pytest.fixture
def make_run(tmp_path):
    """A run with these values of a column; without settings it has no ``config.json``."""

    def make(
        name, values, *, every=10, column="score_mean", dataset="pendulum", data=None, **settings
    ):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        if settings:
            config = {"dataset": dataset, **IQLConfig(**settings).to_dict()}
            config |= {} if data is None else {"data": data}
            (folder / "config.json").write_text(json.dumps(config))
        rows = [{"update": every * i, column: v} for i, v in enumerate(values)]
        for row, v in zip(rows, values if column == "score_mean" else (), strict=False):
            row |= {"score_low": v - 1, "score_high": v + 1}
        write_csv(folder / "metrics.csv", rows)
        return read_run(folder)

    return make


def labels(groups):
    return [group.label for group in groups]


def names(groups):
    return [[run.name for run in group.runs] for group in groups]


def test_runs_that_differ_only_in_seed_are_one_group(make_run):
    runs = [
        make_run("a", [1.0], seed=0),
        make_run("b", [2.0], seed=0, expectile=0.9, hidden=(8, 8)),
        make_run("c", [3.0], seed=1),
        make_run("d", [4.0]),
    ]
    groups = group_runs(runs)
    usual, other = "expectile 0.7, hidden 256x256", "expectile 0.9, hidden 8x8"
    assert names(groups) == [["a", "c"], ["b"], ["d"]]
    assert labels(groups) == [usual, other, "d"]
    each = [f"{usual}, seed 0", f"{other}, seed 0", f"{usual}, seed 1", "d"]
    assert labels(group_runs(runs, each=True)) == each


def test_settings_are_sorted_as_numbers(make_run):
    """By name, 10 comes before 3."""
    runs = [make_run(f"t{t}", [1.0], temperature=t) for t in (10.0, 3.0, 0.5)]
    assert labels(group_runs(runs)) == ["temperature 0.5", "temperature 3", "temperature 10"]


def test_of_lines_that_coincide_both_are_seen():
    points = np.arange(5.0)
    lines = [Series(name, points, points + shift) for name, shift in (("a", 0), ("b", 0), ("c", 1))]
    (axes,) = comparison_figure({"loss_value": lines}).axes
    assert [line.is_dashed() for line in axes.get_lines()] == [False, True, False]


def test_one_group_is_named_by_its_folders(make_run):
    runs = [make_run(name, [1.0], seed=i) for i, name in enumerate("xyz")]
    assert labels(group_runs(runs)) == ["x and 2 more"]
    assert labels(group_runs(runs[:1])) == ["x"]
    again = group_runs([runs[0], make_run("w", [1.0], seed=0)], each=True)
    assert labels(again) == ["x", "w"]


def test_folders_of_equal_names_are_named_by_their_paths(tmp_path):
    """Groups of equal labels would be one line of the picture and one method."""
    runs = []
    for number, place in enumerate(("one/seed0", "two/seed0", "three")):
        (tmp_path / place).mkdir(parents=True)
        write_csv(tmp_path / place / "metrics.csv", [{"update": 0, "return_mean": float(number)}])
        runs.append(read_run(tmp_path / place))
    groups = group_runs(runs)
    assert labels(groups) == [f"{tmp_path}/one/seed0", f"{tmp_path}/two/seed0", "three"]
    same = [replace(run, settings={"seed": 0}) for run in runs[:2]]
    each = [f"seed 0, {tmp_path}/{place}/seed0" for place in ("one", "two")]
    assert (
        labels(group_runs([*same, replace(runs[2], settings={"seed": 1})], each=True))[:2] == each
    )


def test_the_same_seed_twice_is_no_second_sample(make_run, capsys):
    short, long = make_run("short", [1.0], seed=0), make_run("long", [1.0, 2.0], seed=0)
    other = make_run("other", [1.0, 2.0], seed=1)
    for order in ([short, long, other], [long, short, other]):
        assert names(group_runs(order)) == [["long", "other"]]
        assert "short is left out" in capsys.readouterr().err


def test_the_same_seed_on_other_data_is_another_run(make_run, capsys):
    """Such as a run with the right reward scaling or ends beside the faulty one."""
    runs = [make_run(f"{d}{s}", [1.0], seed=s, data=d) for s in (0, 1) for d in ("right", "wrong")]
    groups = group_runs(runs)
    assert names(groups) == [["right0", "right1"], ["wrong0", "wrong1"]]
    assert labels(groups) == ["right0 and 1 more", "wrong0 and 1 more"]
    name, scores = method_scores(groups)
    assert name == "score_mean"
    assert {t: v.tolist() for t, v in scores["right0 and 3 more"].items()} == {
        "pendulum": [1.0, 1.0],
        "pendulum of wrong0 and 1 more": [1.0, 1.0],
    }
    # seeds that were split or made on other machines: no seed is there twice
    assert names(group_runs([runs[0], runs[3]])) == [["right0", "wrong1"]]
    assert not capsys.readouterr().err


def test_a_setting_that_an_older_file_lacks_has_its_default(make_run):
    old = make_run("old", [1.0], seed=0)
    new = make_run("new", [1.0], seed=1)
    settings = {k: v for k, v in old.settings.items() if k != "schedule_steps"}
    (old.folder / "config.json").write_text(json.dumps(settings))
    assert len(group_runs([read_run(old.folder), new])) == 1


def test_mean_over_seeds_where_all_have_a_value(make_run):
    runs = [
        make_run("a", [1.0, 2.0, 5.0, 9.0], seed=0),
        make_run("b", [3.0, math.nan, 8.0], seed=1),
        make_run("c", [5.0, 4.0, 8.0], seed=2),
    ]
    (group,) = group_runs(runs)
    line = series(group, "score_mean")
    assert line.label == "a and 2 more (3 seeds)"
    assert line.updates.tolist() == [0, 20]
    assert line.values == pytest.approx([3.0, 7.0])
    for i, values in enumerate([[1.0, 3.0, 5.0], [5.0, 8.0, 8.0]]):
        expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        assert (line.low[i], line.high[i]) == pytest.approx(expected)
    (alone,) = group_runs(runs[:1])
    line = series(alone, "score_mean")
    assert line.values.tolist() == [1, 2, 5, 9]
    assert line.low.tolist() == [0, 1, 4, 8]
    assert series(alone, "return_mean") is None


def test_the_closing_table(make_run):
    groups = group_runs(
        [
            make_run("a", [40.0, 30.0], seed=0),
            make_run("b", [60.0, 32.0], seed=1),
            replace(make_run("c", []), rows=[{"update": 2500.0, "loss_value": 1.0}]),
            make_run("d", [5.0]),
        ]
    )
    lines = [line.split("  ") for line in table(groups).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    # t(1) = 12.706 and the standard error is 1
    assert cells[1:] == [
        ["a and 1 more", "2", "10", "10", "-", "31.00 [18.29, 43.71]", "50.00 at 0"],
        ["c", "1", "2,500", "-", "-", "-", "-"],
        ["d", "1", "0", "0", "-", "5.00 [4.00, 6.00]", "5.00 at 0"],
    ]


def test_the_comparison_has_a_line_per_group_and_a_panel_per_metric(make_run):
    groups = group_runs(
        [make_run(f"r{e}{s}", [e, s], expectile=e, seed=s) for e in (0.6, 0.8) for s in (0, 1)]
    )
    lines = [series(group, "score_mean") for group in groups]
    figure = comparison_figure({"score_mean": lines, "loss_value": lines[:1]}, note="bands")
    assert list(panels(figure)) == ["Score", "Loss of V"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1]
    first, second = (axes.get_lines()[0].get_color() for axes in figure.axes)
    assert first == second != figure.axes[0].get_lines()[1].get_color()
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["expectile 0.6 (2 seeds)", "expectile 0.8 (2 seeds)"]


# -- the command -----------------------------------------------------------------------------------


def test_a_parent_folder_is_drawn(make_run, tmp_path, capsys):
    for seed in (0, 1):
        make_run(f"deep/low-{seed}", [1.0, 2.0 + seed], seed=seed)
        make_run(f"high-{seed}", [1.0, 4.0 + seed], seed=seed, temperature=9)
    make_run("high-0/checkpoints/inner", [0.0])  # below a run: no run
    assert len(find_runs([tmp_path, tmp_path / "runs" / "high-1"])) == 4
    output = tmp_path / "new" / "all.png"
    assert main([str(tmp_path), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert "temperature 3  " in out
    assert "temperature 9  " in out
    assert f"Picture: {output}" in out
    assert not err


def test_the_message_names_what_is_left_out(make_run, tmp_path, capsys):
    make_run("a", [1.0, 2.0], seed=0)
    make_run("b", [], seed=1)
    make_run("c", [1.0, 2.0], seed=2, every=7)
    output = str(tmp_path / "x.png")
    assert main([str(tmp_path / "runs"), "--output", output]) == 0
    assert "b has no rows yet and is left out" in capsys.readouterr().err
    write_csv(tmp_path / "runs" / "a" / "metrics.csv", [{"update": 1, "score_mean": 1.0}])
    assert main([str(tmp_path / "runs"), "--output", output]) == 2
    err = capsys.readouterr().err
    assert "runs share no update at which all have a finite value" in err
    assert "error: there is nothing to draw" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/nowhere"], "nowhere is not a folder: give folders with a metrics.csv"),
        (["{}/empty"], "empty contains no run"),
        (["{}/runs", "--metrics", "scor_mean"], "did you mean score_mean?"),
        (["{}/runs", "--output", "x.pdf"], "expected a name that ends in .png"),
        (["{}/broken"], "line 2: 1 cells under 2 columns"),
        (["{}/settings"], "config.json is not JSON"),
        (["{}/list"], "expected an object with the run's settings"),
    ],
)
def test_what_cannot_be_drawn_gets_a_sentence(make_run, tmp_path, capsys, arguments, words):
    make_run("a", [1.0], seed=0)
    for name in ("empty", "broken", "settings", "list"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "metrics.csv").write_text("update,a\n1,1\n")
    (tmp_path / "broken" / "metrics.csv").write_text("update,a\n1\n")
    (tmp_path / "settings" / "config.json").write_text("{")
    (tmp_path / "list" / "config.json").write_text("[1]")
    given = [text.format(tmp_path) for text in arguments]
    assert main([*given, *([] if "--output" in given else ["--output", f"{tmp_path}/x.png"])]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith("error: ")
    assert not out
    assert not (tmp_path / "x.png").exists()


def test_the_module_is_a_command(make_run, tmp_path, monkeypatch):
    """runpy warns if importing the package has already imported the module."""
    make_run("a", [1.0], seed=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "runs"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("iql_torchrl.report", run_name="__main__")
    assert (tmp_path / "comparison.png").exists()


def test_compare_draws_the_runs_by_label_and_a_level(make_run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report.comparison, "save", lambda figure, path: drawn.append(figure))
    made = {"cloning": [1.0, 2.0], "IQL": [3.0, 4.0]}
    runs = {n: make_run(n, v, column="return_mean").folder for n, v in made.items()}
    report.compare(tmp_path / "x.png", runs, reference=("the dataset", 1.5))
    (axes,) = drawn[0].axes
    result = [line.get_ydata().tolist() for line in axes.get_lines()]
    assert sorted(result) == [[1.0, 2.0], [1.5, 1.5], [3.0, 4.0]]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["cloning", "IQL", "the dataset"]
    with pytest.raises(ValueError, match="has 'loss_value'"):
        report.compare(tmp_path / "x.png", runs, metric="loss_value")


# -- methods over several tasks

SCORES = {
    ("hop", 3.0): [4.0, 5.0, 9.0],
    ("walk", 3.0): [7.0, 8.0, 8.0],
    ("hop", 0.0): [1.0, 5.0, 2.0],
    ("walk", 0.0): [8.0, 6.0, 6.0],
}


@pytest.fixture
def make_seed(make_run):
    """The run of one task, temperature and seed, whose last value is given."""

    def make(task, temperature, seed, value, column="score_mean"):
        settings = {"dataset": task, "temperature": temperature, "seed": seed}
        return make_run(f"{task}-{temperature}-{seed}", [99.0, value], column=column, **settings)

    return make


def runs_of(make_seed, **options):
    return [
        make_seed(task, temperature, seed, value, **options)
        for (task, temperature), values in SCORES.items()
        for seed, value in enumerate(values)
    ]


def test_runs_that_differ_in_task_and_seed_are_one_method(make_seed, capsys):
    name, scores = method_scores(group_runs(runs_of(make_seed)))
    assert name == "score_mean"
    assert {m: {t: v.tolist() for t, v in s.items()} for m, s in scores.items()} == {
        f"temperature {t:g}": {"hop": SCORES["hop", t], "walk": SCORES["walk", t]}
        for t in (3.0, 0.0)
    }
    head, _, *lines = aggregate_table(scores, name=name).splitlines()
    assert head == (
        "Last score_mean of all runs on 2 tasks, 95 % intervals over seeds; probability that a run of "
        "temperature 3 is better:"
    )
    # hop: 4 beats two, 5 beats two and equals one, 9 beats three; walk: 7 two, 8 two and a half twice
    better = [f"{(7.5 / 9 + 7 / 9) / 2:.3f} [", "-"]
    for line, t, shown in zip(lines, (0.0, 3.0), better, strict=True):
        cells = re.split(" {2,}", line)
        expected = stats.trim_mean(SCORES["hop", t] + SCORES["walk", t], 0.25)
        assert cells[:2] == [f"temperature {t:g}", "6"]
        assert cells[2].startswith(f"{expected:.3f} [")
        assert cells[3].startswith(shown)
    assert not capsys.readouterr().err


def test_a_method_without_a_task_is_left_out(make_seed, capsys):
    runs = runs_of(make_seed)
    _, scores = method_scores(group_runs([*runs, make_seed("hop", 9.0, 0, 1.0)]))
    assert list(scores) == ["temperature 0", "temperature 3"]
    assert "note: temperature 9 is not compared over tasks" in capsys.readouterr().err
    _, scores = method_scores(group_runs(runs[::3]))  # one run of each
    assert not scores
    assert not capsys.readouterr().err


def test_returns_are_not_compared_between_tasks(make_seed):
    runs = runs_of(make_seed, column="return_mean")
    assert method_scores(group_runs(runs)) == ("", {})
    name, scores = method_scores(group_runs([r for r in runs if r.settings["dataset"] == "hop"]))
    assert name == "return_mean"
    assert [list(of_tasks) for of_tasks in scores.values()] == [["hop"], ["hop"]]
    np.testing.assert_array_equal(scores["temperature 0"]["hop"], SCORES["hop", 0.0])


def test_the_report_prints_it_below_the_table(make_seed, tmp_path, capsys):
    runs_of(make_seed, column="success_rate")
    output = ["--output", str(tmp_path / "x.png")]
    assert main([str(tmp_path), *output]) == 0
    text = capsys.readouterr().out
    assert "Last success_rate of all runs on 2 tasks" in text
    assert main([str(tmp_path), *output, "--each"]) == 0
    assert "of all runs on" not in capsys.readouterr().out


# -- the table of results


def test_means_standard_errors_and_counts():
    """The dataset has two episodes of returns 1 and 5."""
    ends = {"terminated": np.arange(4) % 2 == 1, "truncated": np.zeros(4, bool)}
    made = load_dataset(small_columns(4, reward=np.array([1.0, 0.0, 2.0, 3.0]), **ends))
    results = {
        "IQL": Evaluation(np.array([2.0, 4.0, 6.0, 8.0]), np.full(4, 2)),
        "once": Evaluation(np.array([7.0]), np.array([2])),
    }
    head, *lines = results_table(made, results).splitlines()
    assert re.split(" {2,}", head)[-3:] == ["mean return", "std. error", "episodes"]
    # log: deviation sqrt(8), over sqrt(2); IQL: deviation sqrt(20 / 3), over 2
    assert lines[0].split() == ["the", "dataset", "3.0", "2.0", "2"]
    assert lines[1].split() == ["IQL", "5.0", "1.3", "4"]
    assert lines[2].split() == ["once", "7.0", "-", "1"]


def test_rows_are_a_table_whose_unknown_cells_are_empty(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_rows(path, [{"name": "a", "value": np.nan}, {"name": "b", "more": None, "value": 0.1}])
    assert path.read_bytes() == b"name,value,more\na,,\nb,0.1,\n"
