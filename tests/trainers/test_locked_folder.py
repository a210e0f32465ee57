"""One training at a time in a folder; folders that cannot be made; slow updates; whole numbers."""

from __future__ import annotations

import json
import subprocess
import sys

import filelock
import pytest
from test_torchrl_trainers import make_step, make_trainer

from iql_torchrl import IQLConfig
from iql_torchrl.agent.build import ends_before
from iql_torchrl.trainers import trainer as trainer_module
from iql_torchrl.trainers.progress import Interruption
from iql_torchrl.trainers.resume import ProgressState
from iql_torchrl.trainers.run_folder import RunFolder

HOLD = """
import sys
from iql_torchrl.trainers.run_folder import RunFolder
folder = RunFolder(sys.argv[1], 2)
with folder.locked():
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
    assert not (tmp_path / "training.json").exists()


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
        RunFolder(link, 2).make()


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


def test_a_schedule_that_ends_before_the_run():
    config = IQLConfig(updates=100, schedule="cosine")
    assert ends_before(config, 100) is None
    assert "learning rates are 0 after update 100" in ends_before(config, 101)
    assert ends_before(IQLConfig(updates=100, schedule="constant"), 101) is None


def test_whole_floats_count_updates():
    trainer = make_trainer(total=2e1, log_interval=1e1)
    trainer.train()
    assert trainer.updates == 20
    with pytest.raises(ValueError, match=r"log_interval is 2\.5; it counts updates"):
        make_trainer(log_interval=2.5)
    with pytest.raises(ValueError, match="total_updates is True"):
        make_trainer(total=True)


def test_pending_evaluations_are_submitted_again(monkeypatch):
    trainer = make_trainer()
    state = ProgressState(trainer).state_dict() | {"pending": [5, 10]}
    again, submitted = make_trainer(step=make_step()), []
    monkeypatch.setattr(again.scores, "resubmit", submitted.append)
    ProgressState(again).load_state_dict(state)
    assert submitted == [[5, 10]]


def test_a_handler_that_was_not_set_from_python_stays():
    interruption = Interruption()
    with interruption:
        interruption._previous = dict.fromkeys(interruption._previous)
    assert json.dumps(interruption._previous) == "{}"
    # the handlers of this test process
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
