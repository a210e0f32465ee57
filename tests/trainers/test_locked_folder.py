"""One training at a time in a folder; folders that cannot be made; whole numbers; late evaluations."""

from __future__ import annotations

import signal
import subprocess
import sys

import filelock
import pytest
from small_trainers import make_step, make_trainer
from test_trainer_background import background

from iql_torchrl import IQLConfig
from iql_torchrl.agent.build import ends_before
from iql_torchrl.distributed import Ranks
from iql_torchrl.trainers import trainer as trainer_module
from iql_torchrl.trainers.events import Interruption

HOLD = """
import sys
from iql_torchrl.trainers.run_folder import RunFolder
with RunFolder(sys.argv[1], 2).in_use(None, (), continues=False):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path, holder):
    trainer = make_trainer(folder=tmp_path)
    with pytest.raises(ValueError, match=rf"process {holder.pid} on .* trains in this folder now"):
        trainer.train()
    assert trainer.updates == 0
    holder.kill()
    holder.communicate()
    trainer.train()
    assert trainer.updates == 20
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "training.txt").exists()


def test_the_lock_ends_with_an_error(tmp_path, monkeypatch):
    trainer = make_trainer(folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_train_to_next_event", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    trainer.train()
    assert trainer.updates == 20


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch):
    def acquire(self, *args, **kwargs):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.warns(RuntimeWarning, match="cannot be locked .no flock here"):
        make_trainer(folder=tmp_path).train()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder is .*file/run, which cannot be created"):
        make_trainer(folder=tmp_path / "file" / "run").train()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere" / "deep")
    with pytest.raises(ValueError, match="which cannot be created"):
        make_trainer(folder=link).train()


def test_a_schedule_that_ends_before_the_run():
    config = IQLConfig(updates=100, schedule="cosine")
    assert ends_before(config, 100) is None
    assert "learning rates are 0 after update 100" in ends_before(config, 101)
    assert ends_before(IQLConfig(updates=100, schedule="constant"), 101) is None


def test_whole_floats_count_updates():
    trainer = make_trainer(total=2e1, log_interval=1e1)
    trainer.train()
    assert trainer.updates == 20


def test_pending_evaluations_are_submitted_again(monkeypatch):
    def make():
        step = make_step(3, 1)
        return make_trainer(step, evaluation=background(step.loss.actor_network), obs=3, act=1)

    trainer, again, submitted = make(), make(), []
    state = trainer.state_dict()
    state["trainer_state"]["pending"] = {5: {}, 10: {}}
    monkeypatch.setattr(again.evaluation, "resubmit", submitted.append)
    again.load_state_dict(state)
    assert [list(pending) for pending in submitted] == [[5, 10]]


def test_a_handler_that_was_not_set_from_python_stays():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with Interruption(Ranks()) as interruption:
        own = signal.getsignal(signal.SIGINT)
        interruption._previous = dict.fromkeys(interruption._previous)
    assert signal.getsignal(signal.SIGINT) == own
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_slow_updates_are_noticed_once(monkeypatch):
    said = []
    monkeypatch.setattr(trainer_module.torchrl_logger, "warning", said.append)
    trainer = make_trainer()
    for speed in (20.0, 1000.0, 150.0):
        trainer.updates_per_second = speed
        trainer._notice_slowness()
    assert said == []
    for _ in range(2):
        trainer.updates_per_second = 90.0
        trainer._notice_slowness()
    assert len(said) == 1
    assert "OMP_NUM_THREADS=1" in said[0]
