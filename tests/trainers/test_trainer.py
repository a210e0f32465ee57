"""OfflineTrainer: the same updates as a loop by hand, events on time, stopping, and its checks."""

import csv
import json
import math
import os
import signal
import time
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch
from small_agents import config as small_config
from small_agents import small_columns
from small_logs import counted
from small_trainers import Numbers, make_step, make_trainer, same_weights, table, weight
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from iql_torchrl import IQLConfig, IQLStep, OfflineTrainer, load_dataset, make_agent
from iql_torchrl.data import DeviceSampler, replay_buffer
from iql_torchrl.files import CheckpointError, newest
from iql_torchrl.trainers import run_folder

pytestmark = pytest.mark.usefixtures("no_pictures")


def by_hand(step, updates, seed=0):
    """The loop that a user would write; returns the metrics of every update."""
    buffer = replay_buffer(table(), 16, seed=seed)
    return [step(buffer.sample()).to_dict() for _ in range(updates)]


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_trains_as_the_loop_by_hand_and_rows_are_means(order):
    step, alone = make_step(order=order), make_step(order=order)
    trainer = make_trainer(step, 2.5e1, log_interval=1e1)  # integers
    trainer.train()
    if order == "sequential":  # parts in place of a step
        made = make_step()
        parts = {"loss_module": made.loss, "optimizer": made.optimizer, "progress_bar": False}
        parts |= {"target_net_updater": made.spare_updater, "total_updates": 25}
        OfflineTrainer(replay_buffer=replay_buffer(table(), 16, seed=0), **parts).train()
        assert same_weights(made, step)
    metrics = by_hand(alone, 25)
    assert same_weights(step, alone)
    assert [row["update"] for row in trainer.progress.rows] == [10, 20, 25]
    for row, (start, end) in zip(trainer.progress.rows, [(0, 10), (10, 20), (20, 25)], strict=True):
        for name in ("loss_actor", "loss_qvalue", "loss_value"):
            mean = np.mean([float(m[name]) for m in metrics[start:end]])
            assert row[name] == pytest.approx(mean, rel=1e-5)


def buffer_of(kind):
    if kind == "device sampler":
        return DeviceSampler(table(), 16, seed=0)
    if kind == "growing":
        return replay_buffer(table(60), 16, seed=0, capacity=100)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=16, prefetch=2)
    buffer.extend(table(60))
    return buffer


@pytest.mark.parametrize("kind", ["device sampler", "growing", "drawing ahead"])
def test_a_run_continues_with_its_buffer_and_what_it_was_extended_by(tmp_path, kind):
    def make(total, folder):
        return make_trainer(total=total, replay_buffer=buffer_of(kind), folder=tmp_path / folder)

    alone, stopped, again = make(12, "alone"), make(6, "stopped"), make(12, "stopped")
    for trainer in (alone, stopped):
        if kind == "growing":
            trainer.replay_buffer.extend(table(7))
        trainer.train()
    assert again.resume().updates == 6
    if kind != "device sampler":
        assert len(again.replay_buffer) == (67 if kind == "growing" else 60)
    again.train()
    if kind != "drawing ahead":  # which draws from torch's own generator
        assert same_weights(again, alone)


def test_events_come_on_time_and_every_number_is_logged():
    seen, logger = [], Numbers()

    def evaluation():
        seen.append(trainer.updates)
        return {"return_mean": -float(trainer.updates), "episodes": 3.0}

    trainer = make_trainer(
        make_step(), 23, log_interval=4, eval_interval=10, evaluation=evaluation, logger=logger
    )
    trainer.train()
    assert seen == [0, 10, 20, 23]
    assert [r["update"] for r in trainer.progress.rows] == [0, 4, 8, 10, 12, 16, 20, 23]
    assert logger.of("return_mean") == [(0.0, 0), (-10.0, 10), (-20.0, 20), (-23.0, 23)]
    assert [step for _, step in logger.of("loss_value")] == [4, 8, 10, 12, 16, 20, 23]
    assert all(value > 0 for value, _ in logger.of("updates_per_second"))
    assert trainer.progress.best_update == 0


def test_between_events_nothing_but_sampling_and_stepping():
    """The loop asks for as many batches as updates, and reads no tensor on the host."""

    class Unreadable(torch.Tensor):
        def item(self):
            raise AssertionError("read on the host")

        __float__ = __bool__ = tolist = item

    def step(batch):
        return TensorDict({"loss_value": Unreadable(torch.ones(()))})

    buffer, counted = Mock(spec=["sample"]), create_autospec(step, side_effect=step)
    trainer = make_trainer(counted, 50, replay_buffer=buffer, log_interval=50)
    trainer.progress.new_row = lambda update: {}  # the one place that may read
    trainer.train()
    assert (buffer.sample.call_count, counted.call_count) == (50, 50)


class Captured:
    """As ``captured`` returns: no arguments, several updates a call, draws its samples."""

    updates = 5

    def __init__(self):
        self.plain, self.calls = make_step(), 0
        self.buffer = replay_buffer(table(), 16, seed=0)

    def __call__(self):
        self.calls += 1
        return torch.stack([self.plain(self.buffer.sample()) for _ in range(5)]).mean(0)


def test_a_step_that_makes_several_updates_a_call():
    captured, alone = Captured(), make_step()
    trainer = make_trainer(captured, 20, log_interval=10)
    trainer.train()
    first = np.mean([float(m["loss_value"]) for m in by_hand(alone, 20)[:10]])
    assert captured.calls == 4
    assert same_weights(captured.plain, alone)
    assert trainer.loss_module is captured.plain.loss
    assert trainer.progress.rows[0]["loss_value"] == pytest.approx(first, rel=1e-5)
    with pytest.raises(ValueError, match="log_interval is 7, and the step makes 5 updates a call"):
        make_trainer(Captured(), 20, log_interval=7)


EACH_UPDATE = ("batch_process", "pre_epoch", "process_optim_batch", "post_optim", "post_optim_log")


@pytest.mark.parametrize("stage", EACH_UPDATE)
def test_hooks_of_each_update_are_called_or_refused(stage):
    calls = []

    def count(*batch):
        calls.append(stage)
        return None if stage == "post_optim_log" else (batch or (None,))[0]

    each, captured = make_trainer(make_step(), 20), make_trainer(Captured(), 20, log_interval=10)
    each.register_op(stage, count)
    each.train()
    assert len(calls) == 20
    with pytest.raises(ValueError, match=rf"stage '{stage}' .* makes 5 updates per call.*compiled"):
        captured.register_op(stage, count)
    captured.register_op("post_optim_complete_log", lambda updates, averages: calls.append(updates))
    captured.train()
    assert calls[20:] == [10, 20]


def stepping(before):
    """A step that calls ``before(number of this update, batch)`` first."""
    step, calls = make_step(), []

    class Stepping(IQLStep):
        def __call__(self, batch):
            calls.append(1)
            before(len(calls), batch)
            return super().__call__(batch)

    step.__class__ = Stepping
    return step, calls


SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}
FOLDER = "trainer.resume().train()"
NOTHING = "Nothing was saved, because the trainer has no folder=. In this process, continue with: "
FILE = "trainer.load_from_file('a.torchrl').train()"
AGAIN = {"folder": "run", "resume_command": "make again"}


@pytest.mark.parametrize(
    ("number", "destination", "words"),
    [
        *((number, {"folder": "run"}, f"Continue with: {FOLDER}") for number in SIGNALS),
        (signal.SIGINT, {}, f"{NOTHING}trainer.train()"),
        (signal.SIGINT, {"save_trainer_file": "a.torchrl"}, f"with: {FILE}"),
        (signal.SIGINT, AGAIN, "and saved run. Continue with: make again"),
    ],
)
def test_interruption_finishes_the_update_saves_and_prints_how_to_continue(
    tmp_path, capfd, monkeypatch, number, destination, words
):
    monkeypatch.chdir(tmp_path)
    step, calls = stepping(lambda update, _: update == 7 and os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    trainer = make_trainer(step, 20, **destination)
    with pytest.raises(SIGNALS[number]):
        trainer.train()
    assert signal.getsignal(number) is before
    assert trainer.updates == 7
    error = capfd.readouterr().err
    assert "Stopped after update 7 of 20" in error
    assert words in error
    alone = make_step()
    by_hand(alone, 20)
    if "folder" in destination:
        assert newest(tmp_path / "run" / "checkpoints").name == "checkpoint-000000000007.torchrl"
        resumed = make_step()
        make_trainer(resumed, 20, folder="run").resume().train()
        rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
        assert [row["update"] for row in rows] == ["5", "10", "15", "20"]
    else:
        resumed = step
        if destination:
            trainer.load_from_file("a.torchrl")
        trainer.train()
        assert trainer.updates == len(calls) == 20
    assert same_weights(resumed, alone)


def test_an_interruption_before_the_first_update_makes_none_and_the_run_can_be_continued(tmp_path):
    def evaluation():
        os.kill(os.getpid(), signal.SIGINT)
        return {"return_mean": 1.0}

    step, calls = stepping(lambda *_: None)
    trainer = make_trainer(step, 20, folder=tmp_path / "run", evaluation=evaluation)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (trainer.updates, len(calls)) == (0, 0)
    resumed, alone = make_step(), make_step()
    again = make_trainer(
        resumed, 20, folder=tmp_path / "run", evaluation=lambda: {"return_mean": 0.0}
    )
    again.resume().train()
    by_hand(alone, 20)
    assert same_weights(resumed, alone)
    assert again.progress.rows[0] == {"update": 0, "return_mean": 1.0}, "it is not made twice"


def test_a_second_interruption_stops_at_once():
    step, calls = stepping(lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        make_trainer(step, 20).train()
    assert len(calls) == 1
    assert not step.optimizer.state, "the update was not finished"


def test_the_best_checkpoint_is_kept_by_score(tmp_path):
    scores, weights, step = iter([1.0, 5.0, math.nan, 2.0, 4.0]), {}, make_step()

    def evaluation():
        score = next(scores)
        weights[score] = weight(step)
        return {"return_mean": score}

    options = {"eval_interval": 5, "folder": tmp_path, "keep_last": 1}
    make_trainer(step, evaluation=evaluation, **options).train()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-000000000020.torchrl"]
    best = make_step()
    make_trainer(best, folder=tmp_path / "other").load_from_file(tmp_path / "best.torchrl")
    assert weight(best) == weights[5.0]
    assert not list(tmp_path.glob("**/.*")), "no temporary file may stay"


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(tmp_path):
    def spoil(update, batch):
        if update == 13:
            batch["next", "reward"][:] = math.nan

    options = {"save_trainer_interval": 5, "folder": tmp_path}
    trainer = make_trainer(stepping(spoil)[0], 30, **options)
    with pytest.raises(FloatingPointError, match=r"loss_qvalue.* became nan before update 15"):
        trainer.train()
    assert newest(tmp_path / "checkpoints").name == "checkpoint-000000000010.torchrl"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replay_buffer": None}, "replay_buffer and total_updates are needed"),
        ({"step": None}, "nothing to train"),
        ({"optimizer": 1}, "optimizer is not the step's own"),
        ({"step": make_step().loss}, "step is a loss, which updates nothing"),
        ({"total_updates": 0}, "total_updates is 0"),
        ({"total_updates": True}, "total_updates is True"),
        ({"eval_interval": 2.5, "evaluation": dict}, r"eval_interval is 2\.5; it counts updates"),
        ({"log_interval": 0}, "log_interval is 0"),
        ({"replay_buffer": [1]}, "has no sample"),
        ({"evaluation": 5}, "evaluation is 5; expected a function"),
        ({"logger": "csv"}, "logger is 'csv'; expected one of TorchRL's"),
        ({"folder": "run", "save_trainer_file": "x"}, "leave out save_trainer_file"),
    ],
)
def test_wrong_parts_are_refused_before_training(options, words):
    buffer = Mock(spec=["sample"])
    options = {"step": make_step(), "replay_buffer": buffer, "total_updates": 3} | options
    with pytest.raises(ValueError, match=words):
        OfflineTrainer(**options)
    assert not buffer.sample.called


def test_a_step_of_another_agent_is_refused():
    dataset = load_dataset(small_columns())
    agent, other = (make_agent(small_config(seed=seed), dataset) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"step is not of the agent.*compiled\(agent\.step\)"):
        OfflineTrainer(agent=agent, step=other.step, dataset=dataset, progress_bar=False)
    OfflineTrainer(agent=agent, step=agent.step, dataset=dataset, progress_bar=False)


def test_folders_without_a_checkpoint_and_parts_that_could_not_be_read_again(tmp_path):
    with pytest.raises(ValueError, match="there is none; use load_from_file"):
        make_trainer().resume()
    trainer = make_trainer(folder=tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder of checkpoints"):
        trainer.resume()
    odd = Mock(**{"state_dict.return_value": {"object": np.float64(1.0)}})
    trainer.register_module("odd", odd)
    with pytest.raises(CheckpointError, match="Mock holds something other than plain data"):
        trainer.train()
    assert not odd.load_state_dict.called


def test_a_folder_that_holds_another_run_is_refused_and_resume_continues_it(tmp_path):
    make_trainer(total=10, folder=tmp_path).train()
    words = r"contains a run \(\d checkpoints\): call trainer\.resume\(\)\.train\(\)"
    with pytest.raises(ValueError, match=words):
        make_trainer(total=5, folder=tmp_path).train()
    step = make_step()
    trainer, begun = make_trainer(step, folder=tmp_path), weight(step)
    assert trainer.resume() is trainer
    assert trainer.updates == 10
    loaded = weight(step)
    trainer.train()
    assert trainer.updates == 20
    assert len({begun, loaded, weight(step)}) == 3
    trainer.total_frames = 25
    trainer.train()  # its own folder by now


@pytest.mark.parametrize("load", ["resume", "load_from_file", "load_state_dict"])
def test_a_total_below_the_updates_made_is_refused_before_anything_is_loaded(tmp_path, load):
    longer = make_trainer(make_step(), 10, folder=tmp_path)
    longer.train()
    step = make_step()
    shorter, before = make_trainer(step, 9, folder=tmp_path), weight(step)
    saved = newest(tmp_path / "checkpoints")
    given = {"load_from_file": [saved], "load_state_dict": [longer.state_dict()]}.get(load, [])
    with pytest.raises(ValueError, match="total_updates is 9 and the run has made 10 updates"):
        getattr(shorter, load)(*given)
    assert shorter.updates == 0
    assert weight(step) == before
    longer.total_frames = 9
    with pytest.raises(ValueError, match="total_updates is 9 and the run has made 10 updates"):
        longer.train()


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (3.0, "returned 3.0; expected an Evaluation, or a dict"),
        (None, "returned None"),
        ({"return_mean": None}, "returned {'return_mean': None}; expected .* a dict of numbers"),
        ({"return_mean": "good"}, "returned {'return_mean': 'good'}"),
        ({"return_mean": 1.0, "update": 7}, "gives 'update', which is the number of updates"),
        ({"score": 1.0}, "monitor is 'return_mean', which the evaluation does not"),
    ],
)
def test_a_wrong_result_of_an_evaluation_is_an_error(result, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make_trainer(evaluation=lambda: result).train()


@pytest.mark.parametrize("number", [np.float64(3), np.int64(3), np.float32(3), torch.tensor([3.0])])
def test_any_kind_of_number_from_an_evaluation_survives_a_checkpoint(tmp_path, number):
    make_trainer(total=4, evaluation=lambda: {"return_mean": number}, folder=tmp_path).train()
    again = make_trainer(total=4, folder=tmp_path).resume()
    assert again.progress.best == 3.0
    assert {row["return_mean"] for row in again.progress.rows if "return_mean" in row} == {3.0}


def test_an_evaluation_that_fails_loses_no_update_and_is_made_up_after_a_resume(tmp_path):
    played, failing = [], {20}

    def evaluation():
        played.append(trainer.updates)
        if trainer.updates in failing:
            raise OSError("the simulator is gone")
        return {"return_mean": float(trainer.updates)}

    options = {"eval_interval": 10, "folder": tmp_path, "evaluation": evaluation}
    trainer = make_trainer(**options)
    with pytest.raises(OSError, match="simulator"):
        trainer.train()
    assert newest(tmp_path / "checkpoints").name == "checkpoint-000000000020.torchrl"
    failing.clear()
    trainer = make_trainer(**options).resume()
    trainer.train()
    assert played == [0, 10, 20, 20]
    assert trainer.progress.best_update == 20
    assert make_trainer().load_from_file(tmp_path / "best.torchrl").updates == 20


def test_a_long_table_is_written_more_rarely(tmp_path, monkeypatch):
    written = []

    def slow(path, rows):
        written.append(len(rows))
        time.sleep(0.05)

    monkeypatch.setattr(run_folder, "write_csv", slow)
    make_trainer(make_step(), 60, log_interval=2, folder=tmp_path).train()
    assert len(written) < 10
    assert written[-1] == 30, "the last is written in any case"


def test_what_a_killed_process_left_is_deleted(tmp_path):
    make_trainer(total=10, folder=tmp_path).train()
    names = (".aside-000000000005.torchrl", ".checkpoint-000000000015.torchrl.stage-0a/part")
    left = [tmp_path / "checkpoints" / name for name in names]
    left += [tmp_path / ".best.torchrl.123"]
    left[1].parent.mkdir()
    for path in left:
        path.write_bytes(b"")
    make_trainer(total=12, folder=tmp_path).resume().train()
    assert not any(path.exists() for path in (*left, left[1].parent))


def test_config_json_tells_data_apart(tmp_path):
    """The same rows have the same digest; another reward scaling and other ends have others."""
    rows = counted(4, 4, terminated=[0, 1])
    lost = rows | {"terminated": rows["truncated"], "truncated": rows["terminated"]}
    config = IQLConfig(updates=1, hidden=(4,), batch_size=4, reward="raw")
    logs = {"a": (rows, 1.0), "b": (rows, 1.0), "scale": (rows, 2.0), "ends": (lost, 1.0)}
    digests = {}
    for name, (columns, scale) in logs.items():
        dataset = load_dataset(columns, reward=(scale, 0.0), max_episode_steps=9)
        trainer = OfflineTrainer(
            agent=make_agent(config, dataset), dataset=dataset, folder=tmp_path / name,
            progress_bar=False,
        )  # fmt: skip
        trainer.train()
        digests[name] = json.loads((tmp_path / name / "config.json").read_text())["data"]
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 3
