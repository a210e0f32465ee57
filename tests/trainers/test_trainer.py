"""OfflineTrainer: the same updates as a loop by hand, events on time, stopping, and its checks."""

from __future__ import annotations

import csv
import math
import os
import signal
import time

import numpy as np
import pytest
import torch
from small_trainers import Numbers, make_step, make_trainer, same_weights, table, weight
from tensordict import TensorDict
from torch import optim
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLStep, OfflineTrainer
from iql_torchrl.data import DeviceSampler, replay_buffer
from iql_torchrl.files import CheckpointError, newest
from iql_torchrl.trainers import run_folder


def by_hand(step, updates, seed=0):
    """The loop that a user would write; returns the metrics of every update."""
    buffer = replay_buffer(table(), 16, seed=seed)
    return [step(buffer.sample()).to_dict() for _ in range(updates)]


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_trains_as_the_loop_by_hand_and_rows_are_means(order):
    step, alone = make_step(order=order), make_step(order=order)
    trainer = make_trainer(step, 25, log_interval=10)
    trainer.train()
    metrics = by_hand(alone, 25)
    assert same_weights(step, alone)
    assert [row["update"] for row in trainer.progress.rows] == [10, 20, 25]
    for row, (start, end) in zip(trainer.progress.rows, [(0, 10), (10, 20), (20, 25)], strict=True):
        for name in ("loss_actor", "loss_qvalue", "loss_value"):
            mean = np.mean([float(m[name]) for m in metrics[start:end]])
            assert row[name] == pytest.approx(mean, rel=1e-5)


def test_a_device_sampler_continues_from_its_state(tmp_path):
    def make(total):
        sampler = DeviceSampler(table(), 16, seed=0)
        return make_trainer(make_step(), total, replay_buffer=sampler, folder=tmp_path)

    alone = make_step()
    make_trainer(alone, 12, replay_buffer=DeviceSampler(table(), 16, seed=0)).train()
    make(6).train()
    again = make(12).resume()
    again.train()
    assert same_weights(again.step, alone)


def test_parts_in_place_of_a_step():
    step, alone = make_step(), make_step()
    OfflineTrainer(
        loss_module=step.loss,
        optimizer=optim.Adam(step.loss.parameters(), lr=1e-3),
        target_net_updater=SoftUpdate(step.loss, tau=0.1),
        replay_buffer=replay_buffer(table(), 16, seed=0),
        total_updates=4,
        progress_bar=False,
    ).train()
    by_hand(alone, 4)
    assert same_weights(step, alone)


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
    calls = {"sample": 0, "step": 0}
    buffer = replay_buffer(table(), 16, seed=0)

    class Counting:
        def sample(self):
            calls["sample"] += 1
            return buffer.sample()

    def step(batch):
        calls["step"] += 1
        return TensorDict({"loss_value": Unreadable(torch.ones(()))})

    class Unreadable(torch.Tensor):
        def item(self):
            raise AssertionError("read on the host")

        __float__ = __bool__ = tolist = item

    trainer = OfflineTrainer(
        step=step, replay_buffer=Counting(), total_updates=50, log_interval=50, progress_bar=False
    )
    trainer.progress.new_row = lambda update: {}  # the one place that may read
    trainer.train()
    assert calls == {"sample": 50, "step": 50}


class Captured:
    """As ``captured`` returns: no arguments, several updates a call, samples for itself."""

    updates = 5

    def __init__(self):
        self.plain, self.calls = make_step(), 0
        self.buffer = replay_buffer(table(), 16, seed=0)

    def __call__(self):
        self.calls += 1
        metrics = [self.plain(self.buffer.sample()) for _ in range(self.updates)]
        return torch.stack(metrics).mean(0)


def test_a_step_that_makes_several_updates_a_call():
    captured, alone = Captured(), make_step()
    trainer = make_trainer(captured, 20, log_interval=10)
    trainer.train()
    metrics = by_hand(alone, 20)
    assert captured.calls == 4
    assert same_weights(captured.plain, alone)
    assert trainer.loss_module is captured.plain.loss
    first = np.mean([float(m["loss_value"]) for m in metrics[:10]])
    assert trainer.progress.rows[0]["loss_value"] == pytest.approx(first, rel=1e-5)
    with pytest.raises(ValueError, match="log_interval is 7, and the step makes 5 updates a call"):
        make_trainer(Captured(), 20, log_interval=7)


def interrupted_step(update, number=signal.SIGINT):
    """A step that gets the signal in the middle of one of its updates; and its number of updates."""
    step, calls = make_step(), []

    class Interrupted(IQLStep):
        def __call__(self, batch):
            calls.append(1)
            if len(calls) == update:
                os.kill(os.getpid(), number)
            return super().__call__(batch)

    step.__class__ = Interrupted
    return step, calls


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_interruption_finishes_the_update_saves_and_prints_how_to_continue(
    tmp_path, capfd, number, error
):
    step, _ = interrupted_step(7, number)
    before = signal.getsignal(number)
    trainer = make_trainer(step, 20, log_interval=5, folder=tmp_path / "run")
    with pytest.raises(error):
        trainer.train()
    assert signal.getsignal(number) is before
    assert trainer.updates == 7
    err = capfd.readouterr().err
    assert "Stopped after update 7 of 20" in err
    assert "Continue with: trainer.resume().train()" in err
    assert newest(tmp_path / "run" / "checkpoints").name == "checkpoint-000000000007.torchrl"
    resumed, alone = make_step(), make_step()
    make_trainer(resumed, 20, log_interval=5, folder=tmp_path / "run").resume().train()
    by_hand(alone, 20)
    assert same_weights(resumed, alone)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [row["update"] for row in rows] == ["5", "10", "15", "20"]


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ({}, "Nothing was saved, because the trainer has no folder=. In this process, continue with: "
             "trainer.train()"),
        ({"save_trainer_file": "a.torchrl"}, "with: trainer.load_from_file('a.torchrl').train()"),
        ({"folder": "run", "resume_command": "make again"}, "and saved run. Continue with: make again"),
    ],
)  # fmt: skip
def test_the_command_printed_after_an_interruption_continues_the_run(
    tmp_path, capfd, monkeypatch, destination, words
):
    monkeypatch.chdir(tmp_path)
    step, calls = interrupted_step(3)
    trainer = make_trainer(step, 6, **destination)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert words in capfd.readouterr().err
    if "save_trainer_file" in destination:
        trainer.load_from_file("a.torchrl")
    trainer.train()
    assert trainer.updates == len(calls) == 6


def test_a_second_interruption_stops_at_once():
    step = make_step()

    def impatient(batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    impatient.loss = step.loss
    with pytest.raises(KeyboardInterrupt):
        make_trainer(impatient, 20).train()


def test_the_best_checkpoint_is_kept_by_score(tmp_path):
    scores, weights = iter([1.0, 5.0, math.nan, 2.0, 4.0]), {}

    def evaluation():
        score = next(scores)
        weights[score] = weight(step)
        return {"return_mean": score}

    step = make_step()
    trainer = make_trainer(
        step, 20, eval_interval=5, evaluation=evaluation, folder=tmp_path, keep_last=1
    )
    trainer.train()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-000000000020.torchrl"]
    best = make_step()
    make_trainer(best, 20, folder=tmp_path / "other").load_from_file(tmp_path / "best.torchrl")
    assert weight(best) == weights[5.0]
    assert not list(tmp_path.glob("**/.*")), "no temporary file may stay"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(tmp_path):
    data = table()
    data["next", "reward"][:] = 1.0
    step = make_step()

    def spoiling(batch):
        if trainer.updates == 12:
            batch["next", "reward"][:] = math.nan
        return step(batch)

    spoiling.loss = step.loss
    trainer = make_trainer(
        spoiling,
        30,
        log_interval=5,
        save_trainer_interval=5,
        folder=tmp_path,
        replay_buffer=replay_buffer(data, 16, seed=0),
    )
    with pytest.raises(FloatingPointError, match=r"loss_qvalue.* became nan before update 15"):
        trainer.train()
    assert newest(tmp_path / "checkpoints").name == "checkpoint-000000000010.torchrl"


class Sampled:
    def sample(self):
        raise AssertionError("never sampled")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replay_buffer": None}, "replay_buffer and total_updates are needed"),
        ({"step": None}, "nothing to train"),
        ({"optimizer": 1}, "optimizer is not the step's own"),
        ({"step": "loss"}, "step is a loss, which updates nothing"),
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
    step = make_step()
    options = {"step": step, "replay_buffer": Sampled(), "total_updates": 3} | options
    options["step"] = step.loss if options["step"] == "loss" else options["step"]
    with pytest.raises(ValueError, match=words):
        OfflineTrainer(**options)


def test_a_monitor_that_the_evaluation_lacks_and_folders_without_a_checkpoint(tmp_path):
    trainer = make_trainer(make_step(), 3, evaluation=lambda: {"score": 1.0})
    with pytest.raises(ValueError, match="monitor is 'return_mean', which the evaluation does not"):
        trainer.train()
    with pytest.raises(ValueError, match="there is none; use load_from_file"):
        trainer.resume()
    with pytest.raises(CheckpointError, match="there is no such folder of checkpoints"):
        make_trainer(make_step(), 3, folder=tmp_path).resume()


def test_a_folder_that_holds_another_run_is_refused_and_resume_continues_it(tmp_path):
    make_trainer(make_step(), 10, folder=tmp_path).train()
    other = make_trainer(make_step(), 5, folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"contains a run \(\d checkpoints\): call trainer\.resume\(\)\.train\(\)"
    ):
        other.train()
    step = make_step()
    trainer, begun = make_trainer(step, 20, folder=tmp_path), weight(step)
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


@pytest.mark.parametrize("number", [np.float64(3), np.int64(3), np.float32(3), torch.tensor([3.0])])
def test_any_kind_of_number_from_an_evaluation_survives_a_checkpoint(tmp_path, number):
    step = make_step()
    make_trainer(step, 4, evaluation=lambda: {"return_mean": number}, folder=tmp_path).train()
    again = make_trainer(make_step(), 4, folder=tmp_path).resume()
    assert again.progress.best == 3.0
    assert {row["return_mean"] for row in again.progress.rows if "return_mean" in row} == {3.0}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (3.0, "returned 3.0; expected an Evaluation, or a dict"),
        (None, "returned None"),
        ({"return_mean": None}, "returned {'return_mean': None}; expected .* a dict of numbers"),
        ({"return_mean": "good"}, "returned {'return_mean': 'good'}"),
        ({"return_mean": 1.0, "update": 7}, "gives 'update', which is the number of updates"),
    ],
)
def test_a_wrong_result_of_an_evaluation_is_an_error(result, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make_trainer(make_step(), 4, evaluation=lambda: result).train()


def test_an_evaluation_that_fails_loses_no_update_and_is_made_up_after_a_resume(tmp_path):
    played = []

    def run(*failing):
        def evaluation():
            played.append(trainer.updates)
            if trainer.updates in failing:
                raise OSError("the simulator is gone")
            return {"return_mean": float(trainer.updates)}

        trainer = make_trainer(eval_interval=10, folder=tmp_path, evaluation=evaluation)
        return trainer

    with pytest.raises(OSError, match="simulator"):
        run(20).train()
    assert newest(tmp_path / "checkpoints").name == "checkpoint-000000000020.torchrl"
    trainer = run().resume()
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


def test_a_part_that_could_not_be_read_again_is_refused_when_first_saved(tmp_path):
    class Odd:
        def state_dict(self):
            return {"object": np.float64(1.0)}

        def load_state_dict(self, state):
            raise AssertionError("never read")

    trainer = make_trainer(make_step(), 4, folder=tmp_path)
    trainer.register_module("odd", Odd())
    with pytest.raises(CheckpointError, match="Odd holds something other than plain data"):
        trainer.train()


def test_a_buffer_that_draws_ahead_can_be_saved(tmp_path):
    def make():
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=16, prefetch=2)
        buffer.extend(table())
        return make_trainer(make_step(), 6, replay_buffer=buffer, folder=tmp_path)

    make().train()
    again = make().resume()
    assert again.updates == 6
    assert len(again.replay_buffer) == 100
