"""Sweeps: the table is the same however often work was interrupted; failures are named."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch
from small_populations import BASE
from small_sweeps import Killing, first_weight, grid, holder_of, perform_here, write_log

from iql_torchrl import IQLPopulation, OfflineTrainer, load_dataset
from iql_torchrl.sweep import Sweep, plan
from iql_torchrl.sweep.local_processes import perform_locally

UPDATES, EVERY = 400, 50


@pytest.fixture
def source(tmp_path):
    return write_log(tmp_path)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)


def table(folder) -> list[dict[str, str]]:
    with (folder / "members.csv").open() as file:
        return list(csv.DictReader(file))


def reference(monkeypatch, configs, source, folder, **options):
    """The table of an uninterrupted run in this process."""
    with monkeypatch.context() as patch:
        patch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)
        Sweep(configs, source, folder, **options).run()
    return (folder / "members.csv").read_bytes()


def test_after_a_killed_worker_the_table_is_that_of_an_uninterrupted_run(
    source, tmp_path, monkeypatch, capsys
):
    configs = [*grid(updates=UPDATES), replace(BASE, updates=UPDATES, policy="categorical")]
    options = {"members_per_task": 2, "score": first_weight, "save_every": EVERY}
    expected = reference(monkeypatch, configs, source, tmp_path / "reference", **options)

    folder = tmp_path / "sweep"
    task = folder / "tasks" / "from-00000"
    killing = Killing(task, 120, lambda: holder_of(task))
    killing.start()
    result = Sweep(configs, source, folder, **options).run(workers=2)
    killing.join()
    assert killing.at is not None
    assert 120 <= killing.at < UPDATES, "the worker was killed in the middle"
    assert (folder / "members.csv").read_bytes() == expected

    (failed,) = result.failures
    assert "categorical" in failed
    assert "cannot be built: policy is 'categorical'" in result.failures[failed]
    rows = {row["member"]: row for row in table(folder)}
    assert [bool(row["score"]) for row in rows.values()] == [True] * 4 + [False]
    assert rows[failed]["error"] == result.failures[failed]
    assert failed in capsys.readouterr().err
    # the table is that of populations which are trained without a sweep
    own = load_dataset(source, reward=configs[0].reward)
    population = IQLPopulation(configs[2:4], own)
    for _ in population.train():
        pass
    for number, row in enumerate(list(rows.values())[2:4]):
        score = first_weight(population.member(number), own)["score"]
        assert float(row["score"]) == pytest.approx(score, rel=1e-6)


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
    "options", [{}, {"policy": "flow"}, {"history": 2}], ids=["gaussian", "flow", "history"]
)
def test_interrupted_at_every_checkpoint_the_scores_have_the_same_bits(
    source, tmp_path, monkeypatch, options
):
    """A flow policy draws noise from torch's generator; a history is trained by OfflineTrainer."""
    configs = grid(seeds=1, updates=30, **options)
    given = {"score": first_weight, "save_every": 10}
    expected = reference(monkeypatch, configs, source, tmp_path / "reference", **given)
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
    named = plan.named(configs)
    names = list(named)
    made = plan.make_plan(named, load_dataset(source), 3)
    groups = [([names.index(n) for n in group], stacked) for group, stacked in made.groups]
    assert groups == [
        ([0, 1, 2], True), ([3, 11], True), ([4], False), ([9], False), ([5, 6, 7], True), ([8], True),
    ]  # fmt: skip
    assert [names.index(name) for name in made.failed] == [10]


def test_names_of_a_list_are_the_settings_that_differ():
    names = list(plan.named([*grid(), replace(BASE, temperature=1.0)]))
    assert names[0] == "expectile 0.6, temperature 3 #0"
    assert names[-1] == "expectile 0.7, temperature 1 #0"
    assert list(plan.named([BASE, replace(BASE, seed=4)])) == ["run #0", "run #4"]
    assert plan.settings_of("run #4", replace(BASE, seed=4)) == "run"
    with pytest.raises(ValueError, match=r"configs\[1\] is given twice \(run #0\)"):
        plan.named([BASE, BASE])


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


def test_other_folders_and_engines_are_refused(source, tmp_path, here):
    Sweep(grid(updates=1), source, tmp_path / "sweep", score=None).run()
    with pytest.raises(
        ValueError, match=r"another sweep: save_every differs \(it was 5000, now 7\)"
    ):
        Sweep(grid(updates=1), source, tmp_path / "sweep", score=None, save_every=7).run()
    with pytest.raises(ValueError, match="another sweep: configs differs"):
        Sweep(grid(updates=2), source, tmp_path / "sweep", score=None).run()
    with pytest.raises(ValueError, match="engine is 'dask'; choose one of local, ray, slurm"):
        Sweep(grid(), source, tmp_path / "other").run("dask")
    with pytest.raises(ValueError, match="workers is 0"):
        Sweep(grid(), source, tmp_path / "other").run(workers=0)
    assert not (tmp_path / "other").exists()
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json is not JSON"):
        Sweep(grid(updates=1), source, tmp_path / "sweep", score=None).run()


class Deadly:
    """A job that kills its process."""

    name, finished, total, done = "deadly", False, 1, 0

    def perform(self):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


class Raising(Deadly):
    name = "raising"

    def perform(self):
        raise ValueError("first line\nsecond line")


class Writing(Deadly):
    name = "writing"

    def __init__(self, path):
        self.path = path

    def perform(self):
        self.path.write_text(json.dumps(torch.get_num_threads()))


@pytest.mark.slow
def test_a_job_that_always_kills_its_process_is_given_up_and_the_others_finish(tmp_path):
    jobs = [Deadly(), Raising(), Writing(tmp_path / "done")]
    failures = perform_locally(jobs, lambda: None, workers=2, threads=1)
    assert failures["raising"] == "ValueError: first line"
    assert failures["deadly"].startswith("its process ended 3 times (SIGKILL)")
    assert len(failures) == 2
    assert (tmp_path / "done").read_text() == "1"


@pytest.mark.slow
def test_200_members_over_two_workers_one_of_which_is_killed(source, tmp_path, monkeypatch):
    configs = grid(seeds=100, updates=60)
    options = {"score": first_weight, "save_every": 20, "held_out": 0.4, "fit_updates": 20}
    expected = reference(monkeypatch, configs, source, tmp_path / "reference", **options)
    folder = tmp_path / "sweep"
    task = folder / "tasks" / "from-00080"
    killing = Killing(task, 25, lambda: holder_of(task))
    killing.start()
    result = Sweep(configs, source, folder, **options).run(workers=2)
    killing.join()
    assert killing.at is not None
    assert 25 <= killing.at < 60
    assert not result.failures
    assert len(table(folder)) == 200
    assert len(list((folder / "tasks").iterdir())) == 25
    assert (folder / "members.csv").read_bytes() == expected
