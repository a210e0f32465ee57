"""Sweeps: the table is the same however often work was interrupted; failures are named."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_populations import BASE
from small_sweeps import first_weight, grid, perform_here, reference, table, write_log

from iql_torchrl import IQLPopulation, OfflineTrainer, load_dataset
from iql_torchrl.data import OfflineDataset
from iql_torchrl.files import CheckpointError
from iql_torchrl.sweep import Sweep
from iql_torchrl.sweep.result import named
from iql_torchrl.sweep.sweep import divided
from iql_torchrl.trainers import run_folder


@pytest.fixture
def source(tmp_path):
    return write_log(tmp_path)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)


def test_a_second_run_only_reads(source, tmp_path, here, monkeypatch):
    options = {"score": first_weight, "held_out": 0.4, "fit_updates": 10}
    first = Sweep(grid(updates=20), source, tmp_path / "sweep", **options).run()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").rglob("*") if p.is_file()}

    def fail(*args, **kwargs):
        raise AssertionError("nothing is to be loaded or performed")

    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", fail)
    monkeypatch.setattr("iql_torchrl.sweep.sweep.load_dataset", fail)
    source.unlink()
    again = Sweep(grid(updates=20), source, tmp_path / "sweep", **options).run()
    assert str(again.rows) == str(first.rows)  # NaN is not equal to itself
    assert str(again.ranking) == str(first.ranking)
    assert again.log_score == first.log_score
    changed = {p.name for p, at in written.items() if p.stat().st_mtime_ns != at}
    assert changed <= {"members.csv", "sweep.png"}


class Stop(BaseException):
    pass


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="gaussian"),
        pytest.param({"policy": "flow"}, id="flow", marks=pytest.mark.slow),
        pytest.param({"history": 2}, id="history"),
    ],
)
def test_interrupted_at_every_checkpoint_the_scores_have_the_same_bits(
    source, tmp_path, monkeypatch, options
):
    """A flow policy draws noise from torch's generator; a history is trained by OfflineTrainer."""
    monkeypatch.setattr(run_folder, "draw", lambda *_, **__: None)  # pictures take seconds
    configs = grid(seeds=1, updates=30, **options)
    given = {"score": first_weight, "save_every": 10}
    expected = reference(configs, source, tmp_path / "reference", **given)
    stops = []

    def interrupted(save):
        def then_stop(self, *args, **kwargs):
            result = save(self, *args, **kwargs)
            if self.updates in (10, 20):  # where there is a checkpoint
                stops.append(self.updates)
                torch.rand(7)  # another process has another state
                raise Stop
            return result

        return then_stop

    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)
    with monkeypatch.context() as patch:
        patch.setattr(IQLPopulation, "save", interrupted(IQLPopulation.save))
        patch.setattr(OfflineTrainer, "_event", interrupted(OfflineTrainer._event))
        while True:
            try:
                Sweep(configs, source, tmp_path / "sweep", **given).run()
                break
            except Stop:
                continue
    assert len(stops) >= 2
    assert (tmp_path / "sweep" / "members.csv").read_bytes() == expected
    assert len(table(tmp_path / "sweep")) == 2


def test_configs_are_divided_into_populations_and_single_runs(source):
    configs = [
        *grid(),
        replace(BASE, history=2),
        *grid(hidden=(4,)),
        replace(BASE, history=2, seed=1),
    ]
    configs += [replace(BASE, policy="categorical"), replace(BASE, seed=7)]
    runs = named(configs)
    names = list(runs)
    groups, failed = divided(runs, load_dataset(source), 3)
    groups = [([names.index(n) for n in group], stacked) for group, stacked in groups]
    assert groups == [
        ([0, 1, 2], True), ([3, 11], True), ([4], False), ([9], False), ([5, 6, 7], True), ([8], True),
    ]  # fmt: skip
    assert [names.index(name) for name in failed] == [10]


def test_names_of_a_list_are_the_settings_that_differ():
    names = list(named([*grid(), replace(BASE, temperature=1.0)]))
    assert names[0] == "expectile 0.6, temperature 3 #0"
    assert names[-1] == "expectile 0.7, temperature 1 #0"
    assert list(named([BASE, replace(BASE, seed=4)])) == ["run #0", "run #4"]
    with pytest.raises(ValueError, match=r"configs\[1\] is given twice \(run #0\)"):
        named([BASE, BASE])


def test_a_member_that_fails_is_named_and_the_others_finish(source, tmp_path, here, monkeypatch):
    def fails_for_one(agent, dataset):
        if agent.config.seed == 1 and agent.config.expectile == 0.6:
            raise RuntimeError("the simulator\nis broken")
        return {"score": 1.0}

    configs = [*grid(updates=20), replace(BASE, updates=20, actor_lr=1e30, seed=9)]
    result = Sweep(configs, source, tmp_path / "sweep", score=fails_for_one).run()
    names = list(result.rows)
    assert result.failures == {
        names[1]: "its evaluation failed: the simulator",
        names[4]: "loss_actor is not finite",
    }
    assert [result.rows[name].get("score") for name in names] == [1.0, None, 1.0, 1.0, None]


def test_a_failed_evaluation_is_tried_again_in_the_call_and_in_the_next(
    source, tmp_path, here, capsys
):
    calls = []

    def sometimes(agent, dataset):
        calls.append(agent.config.seed)
        if agent.config.seed == 0 and calls.count(0) in fails:
            raise RuntimeError("the simulator is busy")
        return {"score": float(len(calls))}

    configs = [replace(BASE, updates=2, seed=seed) for seed in range(2)]
    fails = [1]
    result = Sweep(configs, source, tmp_path / "one", score=sometimes).run()
    assert calls == [0, 0, 1]
    assert not result.failures
    assert "evaluation 1 of 2 failed: the simulator is busy" in capsys.readouterr().err
    calls.clear()
    fails = [1, 2, 3]
    sweep = Sweep(configs, source, tmp_path / "two", score=sometimes)
    assert len(sweep.run(attempts=3).failures) == 1
    assert calls == [0, 0, 0, 1]
    assert not sweep.run(attempts=1).failures  # the next call evaluates that member alone
    assert calls == [0, 0, 0, 1, 0]
    assert [row["score"] for row in sweep.run().rows.values()] == [5.0, 4.0]
    with pytest.raises(ValueError, match="attempts is 0"):
        sweep.run(attempts=0)


def test_each_run_has_its_own_reward_map(source, tmp_path, here):
    configs = [replace(BASE, updates=2, reward=r) for r in ("raw", "return_range", "minus_one")]

    def maps(agent, dataset):
        return {"score": dataset.reward_map.scale, "shift": dataset.reward_map.shift}

    result = Sweep(configs, source, tmp_path / "sweep", score=maps).run()
    returns = load_dataset(source).episode_returns
    shown = [(row["score"], row["shift"]) for row in result.rows.values()]
    scale = 1000 / (returns.max() - returns.min())
    assert shown == [(1, 0), (pytest.approx(scale), 0), (1, -1)]


def test_a_built_table_is_read_where_it_is(source, tmp_path, here):
    load_dataset(source, memmap=tmp_path / "table")
    options = {"score": first_weight}
    first = Sweep(grid(updates=5), tmp_path / "table", tmp_path / "a", **options).run()
    source_too = Sweep(grid(updates=5), source, tmp_path / "b", **options).run()
    assert str(first.rows) == str(source_too.rows)
    assert not (tmp_path / "a" / "data").exists()
    assert (tmp_path / "b" / "data").exists()


def test_the_agent_of_a_run_is_read_from_its_checkpoint(source, tmp_path, here):
    configs = [*grid(updates=10), replace(BASE, updates=10, history=2)]
    configs += [replace(BASE, updates=10, policy="categorical")]
    options = {"members_per_task": 3, "score": first_weight, "held_out": 0.4, "fit_updates": 5}
    result = Sweep(configs, source, tmp_path / "sweep", **options).run()
    *trained, failed = result.rows
    for name in trained:
        agent = result.agent(name)
        config = result.rows[name]
        assert (agent.config.expectile, agent.config.seed) == (config["expectile"], config["seed"])
        assert first_weight(agent, None)["score"] == config["score"]
    assert str(result.agent(trained[0], "cpu").config.device) == "cpu"
    with pytest.raises(KeyError, match=r"no agent 'expectile 0\.7.*cannot be built"):
        result.agent(failed)
    with pytest.raises(KeyError, match="no agent 'x': it is none of the runs"):
        result.agent("x")


def test_runs_are_evaluated_when_the_environment_can_be_made(source, tmp_path, here, monkeypatch):
    """The first call finds no environment; the next evaluates what that has trained."""
    made = []

    def environment(dataset):
        if not made:
            raise ModuleNotFoundError("No module named 'simulator'")
        return SimpleNamespace(close=lambda: None)

    def scores(agent, dataset, *, episodes, seed):
        return {"score": 1.0, "score_low": 0.5, "score_high": 1.5}

    monkeypatch.setattr(OfflineDataset, "make_env", environment)
    monkeypatch.setattr("iql_torchrl.sweep.sweep.played", scores)
    sweep = Sweep(grid(updates=5), source, tmp_path / "sweep")
    first = sweep.run()
    assert first.notes == ("There are no scores: No module named 'simulator'",)
    assert not any("score" in row for row in first.rows.values())
    assert first.log_score is None
    made.append(1)
    source.unlink()
    monkeypatch.setattr(IQLPopulation, "train", None)  # nothing is trained again
    second = sweep.run()
    assert second.notes == ()
    assert [row["score"] for row in second.rows.values()] == [1.0] * 4
    assert [row["loss_actor"] for row in second.rows.values()] == [
        row["loss_actor"] for row in first.rows.values()
    ]


def test_parts_are_disjoint_and_complete(source, tmp_path, here):
    """Episodes have different first observations; the sweep trains on its own part only."""
    options = {"score": None, "held_out": 0.5, "reserved": 0.4, "fit_updates": 5}
    sweep = Sweep(grid(updates=2), source, tmp_path / "sweep", **options)
    result = sweep.run()

    def starts(log):
        first = np.cumsum([0, *log.episode_lengths[:-1]])
        return {tuple(row.tolist()) for row in log.transitions["observation"][first]}

    train, held_out, reserved = (starts(part) for part in sweep.parts())
    assert [len(part) for part in (train, held_out, reserved)] == [6, 6, 8]
    assert train | held_out | reserved == starts(load_dataset(source))
    assert result.ranking.episodes == 3, "half of those that are held out"
    (path,) = (tmp_path / "sweep").rglob("population.torchrl")
    IQLPopulation.load(path, sweep.parts().train)
    with pytest.raises(CheckpointError):
        IQLPopulation.load(path, load_dataset(source))
