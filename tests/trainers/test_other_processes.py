"""Training beside other processes: one at a time in a folder, killed ones, late evaluations."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import filelock
import gymnasium as gym
import pytest
import torch
from small_trainers import make_step, make_trainer

from iql_torchrl import IQLConfig, evaluate
from iql_torchrl.agent.build import ends_before
from iql_torchrl.distributed import Ranks
from iql_torchrl.evaluation.background import BackgroundEvaluation
from iql_torchrl.files import read_components
from iql_torchrl.trainers.command_line import (
    default_name,
    new_folder,
    resume_command,
    resumed_arguments,
    started_folder,
)
from iql_torchrl.trainers.events import Interruption

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_resume.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_and_resumed_runs_equal_an_undisturbed_run(tmp_path):
    path = tmp_path / "table.json"
    arguments = ["--kills", "20", "--updates", "200", "--seed", "1", "--output", str(path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(path.read_text())["trials"]
    assert len(trials) == 20
    assert all(trial["equal"] for trial in trials)


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


def test_a_second_training_is_refused_until_the_first_is_killed_or_failed(
    tmp_path, holder, monkeypatch
):
    trainer = make_trainer(folder=tmp_path)
    with pytest.raises(ValueError, match=rf"process {holder.pid} on .* trains in this folder now"):
        trainer.train()
    assert trainer.updates == 0
    holder.kill()
    holder.communicate()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_train_to_next_event", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    trainer.train()
    assert trainer.updates == 20
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "training.txt").exists()


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch):
    acquire = Mock(side_effect=NotImplementedError("no flock here"))
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.warns(RuntimeWarning, match="cannot be locked .no flock here"):
        make_trainer(folder=tmp_path).train()


def test_a_schedule_that_ends_before_the_run():
    config = IQLConfig(updates=100, schedule="cosine")
    assert ends_before(config, 100) is None
    assert "learning rates are 0 after update 100" in ends_before(config, 101)
    assert ends_before(IQLConfig(updates=100, schedule="constant"), 101) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    for place in ("file/run", "link"):
        with pytest.raises(ValueError, match=rf"folder is .*{place}'?, which cannot be created"):
            make_trainer(folder=tmp_path / place).train()


def test_a_handler_that_was_not_set_from_python_stays():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with Interruption(Ranks()) as interruption:
        own = signal.getsignal(signal.SIGINT)
        interruption._previous = dict.fromkeys(interruption._previous)
    assert signal.getsignal(signal.SIGINT) == own
    for number, handler in handlers.items():
        signal.signal(number, handler)


# -- evaluation beside training: rows, scores and best checkpoint of evaluation in between


def trainer_of(folder, background=True):
    step, settings = make_step(3, 1), {"episodes": 3, "num_envs": 2, "seed": 5, "max_steps": 12}
    make_env = partial(gym.make, "Pendulum-v1")
    evaluation = (BackgroundEvaluation if background else partial(partial, evaluate))(
        step.loss.actor_network, make_env, **settings
    )
    torch.manual_seed(3)
    return make_trainer(step, obs=3, act=1, eval_interval=10, evaluation=evaluation, folder=folder)


@pytest.fixture(scope="module")
def in_between(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "foreground"
    trainer_of(folder, background=False).train()
    return folder


def test_rows_and_best_are_those_of_evaluation_in_between(tmp_path, in_between):
    trainer = trainer_of(tmp_path)
    with trainer.evaluation:
        trainer.train()
    assert (tmp_path / "metrics.csv").read_text() == (in_between / "metrics.csv").read_text()
    for folder in (tmp_path, in_between):
        best = read_components(folder / "best.torchrl")["trainer_state"]["progress"]["updates"]
        assert best == trainer.progress.best_update
    assert not list(tmp_path.glob("**/.*"))


def test_pending_evaluations_are_submitted_again(monkeypatch):
    trainer, again, submitted = trainer_of(None), trainer_of(None), []
    state = trainer.state_dict()
    state["trainer_state"]["pending"] = {5: {}, 10: {}}
    monkeypatch.setattr(again.evaluation, "resubmit", submitted.append)
    again.load_state_dict(state)
    assert [list(pending) for pending in submitted] == [[5, 10]]


@pytest.mark.slow
def test_an_evaluation_under_way_is_made_again_after_a_resume(tmp_path, in_between):
    """Stopped with an evaluation under way: its policy is in the checkpoint."""
    trainer = trainer_of(tmp_path)
    submitted = trainer.evaluation.submit

    def submit_and_stop(number):
        submitted(number)
        if number == 10:
            raise RuntimeError("as if killed")

    trainer.evaluation.submit = submit_and_stop
    with pytest.raises(RuntimeError, match="as if killed"), trainer.evaluation:
        trainer.train()
    again = trainer_of(tmp_path)
    with again.evaluation:
        assert 10 in again.resume().evaluation.pending
        again.train()
    assert (tmp_path / "metrics.csv").read_text() == (in_between / "metrics.csv").read_text()


# -- ``--resume RUN``: the saved arguments come back, and misuse is one sentence


SAVED = ["--updates", "20", "--name", "a b"]


@pytest.fixture
def folder(tmp_path):
    return new_folder(tmp_path, "run", SAVED)


def test_the_saved_arguments_come_back(folder):
    for arguments in (["--resume", str(folder)], [f"--resume={folder}"]):
        assert resumed_arguments(arguments) == (SAVED, folder)
    for arguments in (SAVED, []):
        assert resumed_arguments(arguments) == (arguments, None)


ALONE = "--resume continues a run with the settings"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume"], ALONE),
        (["--resume="], ALONE),
        (["--resume", "run", "--updates", "3"], ALONE),
        (["--seed=1", "--resume=run"], ALONE),
        (["--resume", "run", "--resume", "other"], ALONE),
        (["--resume", "."], ". has no readable arguments.json"),
        (["--resume", "gone"], "gone is not a folder, so there is no run to continue"),
    ],
)
def test_other_arguments_and_folders_without_a_run_exit_with_a_sentence(
    arguments, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        resumed_arguments(arguments)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1


def test_a_script_that_was_started_again_finds_its_newest_folder(tmp_path):
    assert started_folder(tmp_path, "run", SAVED) is None
    first = new_folder(tmp_path, "run", SAVED)
    other = new_folder(tmp_path, "run", [*SAVED, "--other"])
    assert started_folder(tmp_path, "run", SAVED) == first
    second = new_folder(tmp_path, "run", SAVED)
    (tmp_path / "run-4").mkdir()  # of something else
    assert started_folder(tmp_path, "run", SAVED) == second
    assert started_folder(tmp_path, "run", [*SAVED, "--other"]) == other
    assert started_folder(tmp_path, "runs", SAVED) is None


def test_the_command_also_under_torchrun_on_one_machine_and_the_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my script.py", "--updates", "3"])
    plain = f"{sys.executable} 'my script.py' --resume 'runs/a b'"
    assert resume_command(Path("runs/a b")) == plain
    monkeypatch.setenv("WORLD_SIZE", "4")
    launch = f"{sys.executable} -m torch.distributed.run --nproc-per-node 4"
    for here, command in (("4", plain.replace(sys.executable, launch)), ("2", plain)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert resume_command(Path("runs/a b")) == command
    assert default_name("pendulum/mixed-v0", 3) == "pendulum-mixed-v0-seed3"
    assert default_name("/data/my log.npz", 0) == "data-my-log.npz-seed0"
