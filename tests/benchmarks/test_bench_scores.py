"""``bench_scores.py``: its loop, what a second call leaves out, its tables; learners at small size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import small_agents
from extras import needs

from iql_torchrl.evaluation.statistics import interquartile_mean, stratified_interval

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_scores
import score_datasets
import score_methods
import score_tables

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


class Sum(gymnasium.Env):
    """Reward: the action; three steps; the observation counts them and repeats the seed."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.number, self.seed = 0, seed
        return np.float32([0, seed]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.number += 1
        observation = np.float32([self.number, self.seed])
        return observation, float(action[0]), False, self.number == STEPS, {}


def data(discrete: bool = False) -> dict[str, np.ndarray]:
    draw, rows = np.random.default_rng(0), np.arange(40)
    observation = draw.standard_normal((40, 2)).astype(np.float32)
    action = draw.integers(2, size=40) if discrete else draw.uniform(-1, 1, (40, 1))
    ends = rows % 10 == 9
    return small_agents.small_columns(
        40, observation, action.astype(int if discrete else np.float32),
        terminated=ends & (rows < 20), truncated=ends & (rows >= 20),
    )  # fmt: skip


def small_data(play=None) -> score_datasets.Data:
    return score_datasets.Data(data(), Sum, (0.0, 2.0), np.array([1.0, 3.0]), play)


def options(*arguments: str):
    return bench_scores._options(arguments)


# -- the loop ----------------------------------------------------------------------------------------


def test_every_method_is_played_from_the_same_seeds_with_actions_inside_the_bounds():
    asked = []

    def act(observations):
        asked.append(observations.copy())
        return np.full((len(observations), 1), 5.0)  # above the bound of 1

    assert bench_scores.mean_return(small_data(), act, episodes=4) == STEPS
    assert [len(rows) for rows in asked] == [4] * STEPS
    seeds = bench_scores.EVALUATION_SEED + np.arange(4)
    assert sorted(asked[0][:, 1]) == seeds.tolist()


def test_an_exact_value_replaces_episodes():
    assert bench_scores.mean_return(small_data(play=lambda act: act(7) + 1), lambda x: x, 0) == 8


def test_a_score_is_relative_to_the_references():
    assert small_data().score(0.5) == 25.0


# -- processes ---------------------------------------------------------------------------------------


STUB = """
import json, sys
for line in sys.stdin:
    command = json.loads(line)
    if command.get("learn") == 13:
        sys.exit("unlucky number")
    print(json.dumps({"actions": command.get("act", sys.argv[1:])}), flush=True)
"""


def test_arrays_pass_to_a_process_and_back_without_rounding(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scores, "WORKER", tmp_path / "stub.py")
    bench_scores.WORKER.write_text(STUB)
    process = bench_scores.Worker(Path(sys.executable), "ours", tmp_path / "task.json")
    rows = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    np.testing.assert_array_equal(process.act(rows), rows)
    assert process.ask()["actions"] == ["ours", str(tmp_path / "task.json")]
    with pytest.raises(RuntimeError, match="unlucky number"):
        process.ask(learn=13)
    process.close()


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        bench_scores.subprocess, "run", lambda command, check: calls.append(command)
    )
    (tmp_path / "d3rlpy").mkdir()
    for _ in range(2):
        assert bench_scores.interpreter("d3rlpy", tmp_path) == tmp_path / "d3rlpy/bin/python"
    assert len(calls) == 2
    assert calls[1][-2:] == ["torch==2.13.0", "d3rlpy==2.8.1"]
    assert bench_scores.interpreter("ours", tmp_path) == Path(sys.executable)


# -- the learners ------------------------------------------------------------------------------------

SMALL = {
    "ours": {"hidden": [8, 8], "batch_size": 16, "reward": "raw"},
    "TorchRL": {**score_datasets.TORCHRL, "hidden": [8, 8], "batch_size": 16},
    "TorchRL, discrete": {**score_datasets.TORCHRL_DISCRETE, "hidden": [8, 8], "batch_size": 16},
}


@pytest.mark.parametrize(
    ("method", "given"),
    [("ours", "ours"), ("ours", "ours, discrete"), ("TorchRL", "TorchRL"),
     ("TorchRL", "TorchRL, discrete")],
)  # fmt: skip
def test_a_learner_learns_and_acts(method, given):
    discrete = given.endswith("discrete")
    chosen = SMALL.get(given, SMALL["ours"])
    task = score_methods.Task(data(discrete=discrete), 0, 10, 5, chosen, actions=2)
    if not discrete:
        task.actions, task.low, task.high = None, [-1.0], [1.0]
    learner = score_methods.LEARNERS[method](task)
    rows = {"act": np.zeros((3, 2)).tolist()}
    before = score_methods.answer(learner, rows)["actions"]
    assert score_methods.answer(learner, {"learn": 5})["seconds"] > 0
    after = score_methods.answer(learner, rows)["actions"]
    assert np.shape(before) == np.shape(after) == ((3,) if discrete else (3, 1))
    assert score_methods.answer(learner, rows)["actions"] == after  # deterministic
    if not discrete:
        assert before != after
    about = score_methods.answer(learner, {"about": True})
    assert about["settings"]["batch_size"] == 16
    assert "torch" in about["versions"]


def test_one_hot_rows_of_categories():
    task = score_methods.Task({}, 0, 1, 1, {}, states=3)
    assert task.inputs([2, 0]).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_file_is_imported_without_packages_that_it_only_names(tmp_path):
    (tmp_path / "single.py").write_text(
        "from dataclasses import dataclass\nimport absent_package\n"
        "@dataclass\nclass Config:\n    size: int = 3\n"
        "@absent_package.wrap()\ndef train(env: absent_package.Env): ...\n"
    )
    module = score_methods.import_file(tmp_path / "single.py", ("absent_package",))
    assert module.Config().size == 3
    assert "absent_package" not in sys.modules


# -- results -----------------------------------------------------------------------------------------


def result(method: str, seed: int, score: float, updates: int = 5000) -> dict:
    return {
        "dataset": "pendulum", "method": method, "seed": seed, "updates": updates, "score": score,
        "return": 10 * score, "curve": [[updates // 2, 5 * score, score / 2], [updates, 0, score]],
        "settings": {"seed": seed, "rate": 0.1}, "versions": {"torch": "2"},
        "processor": f"Make(R) Chip{updates}(R) Processor, family 6",
    }  # fmt: skip


def filled(**scores: list[float]) -> dict:
    content = {
        "datasets": {"pendulum": {"score": 31.5}},
        "settings": {},
        "cells": [],
        "summary": [],
    }
    for method, values in scores.items():
        for seed, value in enumerate(values):
            score_tables.add(content, result(method, seed, value))
    return content


def test_a_second_call_leaves_out_what_is_there():
    o = options("--datasets", "pendulum", "--methods", "ours", "TorchRL", "CORL", "--seeds", "2")
    whole = bench_scores.missing(o, [])
    assert whole == [
        ("pendulum", method, seed) for seed in (0, 1) for method in ("ours", "TorchRL")
    ]  # CORL only with its file
    content = filled(ours=[1.0], TorchRL=[1.0, 2.0])
    assert bench_scores.missing(o, content["cells"]) == [("pendulum", "ours", 1)]
    other = options("--datasets", "pendulum", "--seeds", "2", "--updates", "pendulum=250")
    assert len(bench_scores.missing(other, content["cells"])) == 8


def test_every_cell_is_written_when_it_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scores, "about_dataset", lambda name, peers: {"score": 31.5})
    monkeypatch.setattr(bench_scores, "interpreter", lambda method, peers: None)
    done = []

    def cell(o, name, method, seed, evaluated):
        if len(done) == 2:
            raise RuntimeError("stopped")
        done.append((method, seed))
        return {**result(method, seed, float(seed)), "wall_seconds": 1.0}

    monkeypatch.setattr(bench_scores, "cell", cell)
    path = tmp_path / "a.json"
    for seeds, first in (("4", 0), ("5", 2)):
        done.clear()
        o = options("--datasets", "pendulum", "--methods", "ours", "--seeds", seeds)
        with pytest.raises(RuntimeError, match="stopped"):
            bench_scores.run(o, path)
        assert done == [("ours", first), ("ours", first + 1)]
        assert len(json.loads(path.read_text())["cells"]) == first + 2


def test_cells_of_other_files_are_added_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scores, "RESULTS", tmp_path)
    files = {
        "first": filled(ours=[1.0, 2.0]),
        "second": filled(ours=[1.0, 5.0, 3.0], TorchRL=[4.0]),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for _ in range(2):
        bench_scores.main(["--join", "second", "--result", "first"])
    content = json.loads((tmp_path / "first.json").read_text())
    scores = [(each["method"], each["score"]) for each in content["cells"]]
    assert scores == [("ours", 1.0), ("ours", 2.0), ("ours", 3.0), ("TorchRL", 4.0)]
    assert content["settings"]["pendulum"].keys() == {"ours", "TorchRL"}
    assert [line["seeds"] for line in content["summary"]] == [3, 1]
    files["second"]["datasets"]["pendulum"]["score"] = 30.0
    (tmp_path / "second.json").write_text(json.dumps(files["second"]))
    with pytest.raises(SystemExit, match="second: pendulum is another dataset"):
        bench_scores.main(["--join", "second", "--result", "first"])


def test_other_settings_are_refused():
    content = filled(ours=[1.0])
    changed = result("ours", 1, 2.0)
    changed["settings"]["rate"] = 0.2
    with pytest.raises(SystemExit, match="settings or versions are not those"):
        score_tables.add(content, changed)


def test_summary_and_table():
    content = filled(ours=[1.0, 2.0, 3.0, 4.0, 90.0], cloning=[0.0, 1.0, 2.0, 2.0, 2.0])
    line = content["summary"][0]
    assert (line["method"], line["seeds"], line["score"], line["return"]) == ("ours", 5, 3.0, 30.0)
    values = np.array([1.0, 2.0, 3.0, 4.0, 90.0])
    low, high = stratified_interval(interquartile_mean, [values], seed=0)
    assert line["score_interval"] == [low, high]
    # pairs in which ours is better: 1 of 5 (and an equal one), then 2 with 3 equal, then all
    assert content["summary"][1]["ours_better"] == pytest.approx((1.5 + 3.5 + 15) / 25)
    text = score_tables.table(content)
    assert (
        text.splitlines()[0]
        == "| dataset | updates | of the dataset | cloning | ours | processor |"
    )
    cells = f"1.7<br>(0.3 to 2.0) | 3.0<br>({low:.1f} to {high:.1f})"
    on = "Make Chip5000, family 6"
    assert text.splitlines()[-1] == f"| pendulum | 5,000 | 31.5 | {cells} | {on} |"
    assert "| pendulum | ours | 10.0, 20.0 |" in score_tables.learning_table(content)
    assert "| ours | pendulum |  | torch 2 |" in score_tables.settings_table(content)


def test_means_and_deviations_next_to_published_ones():
    """Unfinished runs have scores up to their last evaluation."""

    def curve(*scores):
        return [[(i + 1) * 100_000, 0.0, score] for i, score in enumerate(scores)]

    cells = [
        {"dataset": "d4rl-umaze", "method": "ours", "curve": curve(28.0, 30.0)},
        {"dataset": "d4rl-umaze", "method": "ours", "curve": curve(29.0, 34.0)},
        {"dataset": "d4rl-medium", "method": "cloning", "curve": curve(1.0)},
    ]
    unfinished = {"d4rl-umaze-noisy, CORL, 0, 1000000": {"curve": curve(7.25)}}
    text = score_tables.published_table(
        {
            "": {"cells": cells, "unfinished": unfinished},
            "torch's weights": {"cells": [cells[0]], "unfinished": {}},
        }
    )
    rest = " | -" * 5
    assert text.splitlines()[2:] == [
        f"| d4rl-medium | cloning | 1 | 1.0 | -{rest} | 0.79 ± 3.25 |",
        f"| d4rl-umaze | ours | 2 | 28.5 ± 0.5 | 32.0 ± 2.0{rest} | 42.11 ± 0.58 |",
        f"| d4rl-umaze | ours, torch's weights | 1 | 28.0 | 30.0{rest} | 42.11 ± 0.58 |",
        f"| d4rl-umaze-noisy | CORL | 1 | 7.2 | -{rest} | 42.11 ± 0.58 |",
    ]


def test_the_largest_difference_of_any_network_is_shown():
    content = {
        "command": "python",
        "hopper": {
            "differences": {"1": {"v": 1e-9, "q": 3e-9}, "1000": {"v": 2e-7, "q": 0.0}},
            "disturbed": {"1": {"v": 2e-8, "q": 0.0}, "1000": {"v": 0.05, "q": 0.1}},
        },
        "walker": {
            "differences": {"1": {"v": 5e-16}, "1000": {"v": 4e-5}},
            "disturbed": {"1": {"v": 6e-8}, "1000": {"v": 0.02}},
        },
    }
    assert score_tables.corl_table(content).splitlines() == [
        "| updates | hopper | walker |",
        "|---:|---:|---:|",
        "| 1 | 3e-09 (2e-08) | 5e-16 (6e-08) |",
        "| 1,000 | 2e-07 (1e-01) | 4e-05 (2e-02) |",
    ]


def test_times_are_ratios_of_neighbouring_blocks():
    times = [
        {"dataset": "pendulum", "method": "ours", "seconds": 5.0, "of_ours": 1.0},
        {"dataset": "pendulum", "method": "d3rlpy", "seconds": 9.96, "of_ours": 2.04},
    ]
    assert score_tables.times_table({"times": times}).splitlines()[-1] == "| d3rlpy | 10.0 (2.04) |"


def test_settings_of_ours_can_be_changed():
    changed = options("--change", "schedule=constant", "expectile=0.9").change
    assert changed == {"schedule": "constant", "expectile": 0.9}


def test_wrong_options_are_refused(capsys):
    wrongs = (["--updates", "pendulum=100"], ["--updates", "walker=250"], ["--seeds", "0"])
    for wrong in (*wrongs, ["--block", "33"]):
        with pytest.raises(SystemExit):
            options(*wrong)
    assert "multiple of 250" in capsys.readouterr().err


# -- the datasets and the page ------------------------------------------------------------------------


def test_the_cartpole_log(tmp_path):
    score_datasets.make_cartpole(tmp_path / "cartpole_mixed.npz", episodes=8)
    made = score_datasets.cartpole(tmp_path)
    assert len(made.returns) == 8
    assert made.rows["reward"].sum() == made.returns.sum() == len(made.rows["action"])
    assert set(made.rows["action"]) == {0, 1}
    assert made.score(500.0) == 100.0


def test_maze2d_rewards_the_surroundings_of_its_goal_and_never_terminates():
    needs("gymnasium_robotics")
    env = score_datasets.Maze2d(
        gymnasium.make("PointMaze_UMaze-v3", continuing_task=True, reset_target=False), (1, 1)
    )
    goal = env.maze.cell_rowcol_to_xy(np.array([1, 1]))
    assert env.reward_at(goal + np.array([[0.49, 0.0], [0.51, 0.0]])).tolist() == [1.0, 0.0]
    starts = [env.reset(seed=seed)[0] for seed in range(3)]
    assert all(start.shape == (4,) for start in starts)
    np.testing.assert_array_equal(env.reset(seed=0)[0], starts[0])
    total = 0.0
    for _ in range(300):
        observation, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
        assert not terminated
        assert reward == env.reward_at(observation[:2])
        total += reward
    assert truncated
    env.close()


def test_fewer_than_three_seeds_have_no_interval():
    line = {"score": 12.34, "score_interval": [11.0, 13.0], "seeds": 3}
    assert score_tables.score_cell(line) == "12.3<br>(11.0 to 13.0)"
    assert score_tables.score_cell(line | {"seeds": 2}) == "12.3<br>(2 seeds)"
    assert score_tables.score_cell(line | {"seeds": 1}) == "12.3<br>(1 seed)"


def test_the_cost_is_the_median_of_the_runs_and_their_sum():
    cells = [
        {"method": "ours", "updates": 2_000, "cpu_seconds": seconds} for seconds in (4, 6, 1790)
    ]
    cells.append({"method": "CORL", "updates": 1_000, "cpu_seconds": 36})
    cells.append({"method": "ours", "updates": 1_000, "population": 5, "wall_seconds": 9})
    lines = score_tables.cost_table({"cells": cells}).splitlines()[2:]
    assert lines == ["| ours | 3 | 3.0 | 0.50 |", "| CORL | 1 | 36.0 | 0.01 |"]


def test_the_page_has_the_tables_of_the_result_files(tmp_path):
    page, copy = ROOT / "docs" / "scores.md", tmp_path / "scores.md"
    copy.write_text(page.read_text())
    score_tables.write_page(copy, "scores")
    assert copy.read_text() == page.read_text(), (
        "run: python benchmarks/bench_scores.py --page docs/scores.md"
    )
