"""``--resume RUN``: the saved arguments come back, and misuse is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from iql_torchrl.trainers.command_line import (
    default_name,
    new_folder,
    resume_command,
    resumed_arguments,
    started_folder,
)

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
        (["--resume", "."], ". has no readable arguments.json"),
        (["--resume", "gone"], "gone is no folder, so there is no run to continue"),
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
