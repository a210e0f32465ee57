"""Sweeps: the table is the same however often work was interrupted; failures and refusals are named."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_populations import BASE
from small_sweeps import first_weight, grid, perform_here, reference, table, write_log

from iql_torchrl import IQLPopulation, OfflineTrainer, load_dataset
from iql_torchrl.data import DatasetError, OfflineDataset
from iql_torchrl.files import CheckpointError
from iql_torchrl.sweep import Sweep, engines
from iql_torchrl.sweep.result import named
from iql_torchrl.sweep.sweep import divided, text_of
from iql_torchrl.trainers import run_folder


@pytest.fixture
def source(tmp_path):
    return write_log(tmp_path)


@pytest.fixture
def here(monkeypatch):
    """Work in this process, without pictures, which take seconds."""
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)
    monkeypatch.setattr("iql_torchrl.sweep.result.draw", lambda *_: None)
    monkeypatch.setattr(run_folder, "draw", lambda *_, **__: None)


def swept(folder, source, configs=None, **options):
    """The result of a sweep of ``configs``, by default four of one update, without scores."""
    given = {"score": None} | options
    return Sweep(grid(updates=1) if configs is None else configs, source, folder, **given).run()


def test_a_second_run_only_reads(source, tmp_path, monkeypatch):
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)
    options = {"score": first_weight, "held_out": 0.4, "fit_updates": 10}
    first = Sweep(grid(updates=20), source, tmp_path / "sweep", **options).run()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").rglob("*") if p.is_file()}
    assert {"members.csv", "sweep.png"} <= {path.name for path in written}

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
    source, tmp_path, here, monkeypatch, options
):
    """A flow policy draws noise from torch's generator; a history is trained by OfflineTrainer."""
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


def test_what_a_task_draws_depends_on_its_updates_alone(source, tmp_path, here, monkeypatch):
    """A loss draws from torch's generator, whose state is not in the checkpoint."""
    drawn, train = [], IQLPopulation.train

    def recorded(self, *args, **kwargs):
        drawn.append((self.updates, float(torch.rand(()))))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(IQLPopulation, "train", recorded)
    for seed in (1, 2):
        torch.manual_seed(seed)
        swept(tmp_path / str(seed), source, grid(updates=4), save_every=2)
    assert [updates for updates, _ in drawn] == [0, 2, 0, 2]
    assert drawn[:2] == drawn[2:]
    assert drawn[0][1] != drawn[1][1]


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
    result = swept(tmp_path / "sweep", source, configs, score=fails_for_one)
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
    result = swept(tmp_path / "one", source, configs, score=sometimes)
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

    result = swept(tmp_path / "sweep", source, configs, score=maps)
    returns = load_dataset(source).episode_returns
    shown = [(row["score"], row["shift"]) for row in result.rows.values()]
    scale = 1000 / (returns.max() - returns.min())
    assert shown == [(1, 0), (pytest.approx(scale), 0), (1, -1)]


def test_a_built_table_is_read_where_it_is(source, tmp_path, here):
    load_dataset(source, memmap=tmp_path / "table")
    options = {"score": first_weight}
    first = swept(tmp_path / "a", tmp_path / "table", **options)
    source_too = swept(tmp_path / "b", source, **options)
    assert str(first.rows) == str(source_too.rows)
    assert not (tmp_path / "a" / "data").exists()
    assert (tmp_path / "b" / "data").exists()


def test_the_agent_of_a_run_is_read_from_its_checkpoint(source, tmp_path, here):
    configs = [*grid(updates=10), replace(BASE, updates=10, history=2)]
    configs += [replace(BASE, updates=10, policy="categorical")]
    options = {"members_per_task": 3, "score": first_weight, "held_out": 0.4, "fit_updates": 5}
    result = swept(tmp_path / "sweep", source, configs, **options)
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
    options = {"score": None, "held_out": 1 / 3, "reserved": 0.4, "fit_updates": 5}
    sweep = Sweep(grid(updates=2), source, tmp_path / "sweep", **options)
    result = sweep.run()

    def starts(log):
        first = np.cumsum([0, *log.episode_lengths[:-1]])
        return {tuple(row.tolist()) for row in log.transitions["observation"][first]}

    train, held_out, reserved = (starts(part) for part in sweep.parts())
    assert [len(part) for part in (train, held_out, reserved)] == [8, 4, 8]
    assert train | held_out | reserved == starts(load_dataset(source))
    assert result.ranking.episodes == 2, "half of those that are held out"
    (path,) = (tmp_path / "sweep").rglob("population.torchrl")
    IQLPopulation.load(path, sweep.parts().train)
    with pytest.raises(CheckpointError):
        IQLPopulation.load(path, load_dataset(source))


# -- what is refused, and how a sweep recognises its folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"members_per_task": 0}, "members_per_task is 0"),
        ({"held_out": 1.0}, r"held_out is 1.0; it must lie in \(0, 1\)"),
        ({"score": "reward"}, "score is 'reward'"),
        ({"source": {"observation": []}}, "source is a dict; a sweep reads a name or a path"),
        ({"configs": []}, "configs is empty"),
        ({"configs": BASE}, "configs is IQLConfig"),
        ({"configs": [BASE, 3]}, r"configs\[1\] is int"),
    ],
)
def test_bad_arguments_get_one_sentence(tmp_path, options, words):
    given = {"configs": [BASE], "source": "log.npz", "folder": tmp_path / "sweep"} | options
    with pytest.raises((ValueError, TypeError), match=words):
        Sweep(**given)


@pytest.mark.parametrize(
    ("updates", "options", "words"),
    [
        (1, {"save_every": 7}, r"another sweep: save_every was 5000, now 7;"),
        (1, {"evaluation_seed": 7}, r"evaluation_seed was 10000, now 7;"),
        (1, {"log_score": ("doctor", 0.5)}, r"log_score was None, now .*0\.5"),
        (2, {}, r"updates was 1, now 2 in 'expectile 0.6 #0' in 'configs'"),
    ],
)
def test_the_folder_of_another_sweep_is_refused(source, tmp_path, here, updates, options, words):
    swept(tmp_path / "sweep", source)
    with pytest.raises(ValueError, match=words):
        swept(tmp_path / "sweep", source, grid(updates=updates), **options)


def test_other_engines_and_damaged_folders_are_refused(source, tmp_path, here):
    with pytest.raises(ValueError, match="engine is 'dask'; choose one of local, ray, slurm"):
        Sweep(grid(), source, tmp_path / "other").run("dask")
    with pytest.raises(ValueError, match="workers is 0"):
        Sweep(grid(), source, tmp_path / "other").run(workers=0)
    assert not (tmp_path / "other").exists()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json is not JSON"):
        swept(tmp_path / "sweep", source)


def test_an_absent_source_or_one_bad_config_leaves_the_folder_to_a_corrected_sweep(
    source, tmp_path, here
):
    folder = tmp_path / "sweep"
    with pytest.raises((DatasetError, FileNotFoundError), match=r"logg\.npz") as caught:
        swept(folder, tmp_path / "logg.npz")
    assert "\n" not in str(caught.value)
    bad = replace(BASE, updates=1, policy="categorical")
    result = swept(folder, source, {"mine": bad})
    assert list(result.failures) == ["mine"]
    assert result.failures["mine"].startswith("cannot be built: policy is 'categorical'")
    result = swept(folder, source)
    assert not result.failures
    assert len(result.rows) == 4


def score_of(agent, weight=1.0):
    return weight


class Scorer:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, agent):
        return self.weight


def test_functions_with_other_arguments_or_code_differ():
    scores = [score_of, partial(score_of, weight=1.0), partial(score_of, weight=2.0)]
    scores += [lambda agent: 1.0, lambda agent: 2.0, Scorer(1.0), Scorer(2.0)]
    words = [text_of(score) for score in scores]
    assert len(set(words)) == len(words)
    assert text_of(partial(score_of, weight=2.0)) == words[2]
    assert text_of(Scorer(2.0)) == words[-1]
    assert words[0] == "score_of"


def test_a_sweep_recognises_its_folder_from_another_process(source, tmp_path, here):
    """Addresses in memory differ between processes; a path is the same as its text."""
    folder, saved = tmp_path / "sweep", tmp_path / "sweep" / "sweep.json"
    scores = [partial(first_weight) for _ in range(2)]
    assert repr(scores[0].func) in repr(scores[0])
    swept(folder, source, score=scores[0])
    assert " at 0x" not in saved.read_text()
    swept(folder, str(source), score=scores[1])
    fewer = grid(updates=1)[:1] + grid(updates=1)[2:]
    for path, configs, place, words in (
        ("other.npz", None, folder, r"source was .*now 'other.npz'"),
        (source, fewer, folder, r"expectile 0\.6 #1 was .*, now None"),
        (source, None, source, r"log\.npz is a file; a sweep needs a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            swept(place, path, configs, score=scores[1])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", "Connection refused"),
        ("my-cluster", "expected 'auto', 'HOST:PORT' or 'ray://HOST:PORT'"),
        ("host.invalid:6379", "no Ray cluster answers"),
    ],
)
def test_an_unreachable_address_gets_one_sentence_at_once(address, words):
    """Ray tries to connect for five minutes, and ends the process."""
    with pytest.raises(ConnectionError, match=r"start one with ray start --head") as caught:
        engines.connect(SimpleNamespace(init=None), address, 1)
    assert words in str(caught.value)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_absent_package_is_named(source, tmp_path, monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "iql_torchrl\[{engine}\]"'):
        Sweep(grid(updates=1), source, tmp_path / "sweep", score=None).run(engine)
