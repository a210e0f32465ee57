"""The main example under torchrun: one run, also where a process is killed or the run is stopped."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_losses import assert_same_leaves

from iql_torchrl.data.builtin import make_dataset
from iql_torchrl.files import newest, read_components

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "iql_offline.py"
SMALL = "--updates 600 --hidden 8 --batch-size 16 --episodes 2 --final-episodes 3 --eval-every 100"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where runs are written; the dataset is beside them."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "minari").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        patch.setenv("OMP_NUM_THREADS", "1")
        make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
        yield folder


@contextlib.contextmanager
def started(folder, command):
    """The command in a session of its own, which is ended with the test."""
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def torchrun(name, *options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(EXAMPLE)]
    return [*launch, *SMALL.split(), "--name", name]


def output(folder):
    return (folder / "output.txt").read_text()


def until(condition, process, folder, seconds=200):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, output(folder)[-3000:]
        assert time.monotonic() < ends, output(folder)[-3000:]
        time.sleep(0.02)
    return found


def finish(process, folder):
    process.wait(timeout=300)
    return process.returncode, output(folder)


def rank_1(launcher):
    """The process id of the second rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
    return None


def outcome(folder, name):
    """What the last checkpoint of IQL holds of training, and the losses of all rows."""
    parts = read_components(newest(folder / "runs" / name / "IQL" / "checkpoints"))
    rows = parts["trainer_state"]["progress"]["rows"]
    timed = ("updates_per_second",)
    parts["rows"] = [{k: v for k, v in row.items() if k not in timed} for row in rows]
    return {k: parts[k] for k in ("loss_module", "step", "replay_buffer", "rows")}


@pytest.fixture(scope="module")
def whole(folder):
    """What a run of two ranks without interruption ended with, and what it printed."""
    with started(folder, torchrun("whole")) as process:
        code, printed = finish(process, folder)
    assert code == 0, printed[-3000:]
    return outcome(folder, "whole"), printed


def test_two_processes_write_one_run_and_rank_0_alone_prints(whole, folder):
    assert whole[1].count("behaviour cloning: updates 0 to 600") == 1
    assert whole[1].count("Picture: ") == 1
    run = folder / "runs" / "whole" / "IQL"
    assert {"metrics.csv", "best.torchrl", "policy.pt2"} <= {path.name for path in run.iterdir()}
    assert not (folder / "runs" / "whole-2").exists()


def test_a_killed_rank_ends_with_the_bits_of_a_run_without_interruption(whole, folder):
    checkpoints = folder / "runs" / "killed" / "IQL" / "checkpoints"
    with started(folder, torchrun("killed", "--max-restarts", "3")) as process:
        until(lambda: list(checkpoints.glob("*200.torchrl")), process, folder)
        os.kill(rank_1(process.pid), signal.SIGKILL)
        code, printed = finish(process, folder)
    assert code == 0, printed[-3000:]
    again = re.findall(r"IQL: updates ([0-9,]+) to 600", printed)
    assert len(again) == 2
    assert again[0] == "0"
    assert 200 <= int(again[1]) < 600
    assert not (folder / "runs" / "killed-2").exists()
    assert_same_leaves(outcome(folder, "killed"), whole[0])


def test_ctrl_c_stops_all_ranks_and_the_printed_command_continues_them(whole, folder):
    checkpoints = folder / "runs" / "stopped" / "IQL" / "checkpoints"
    with started(folder, torchrun("stopped")) as process:
        until(lambda: list(checkpoints.glob("*100.torchrl")), process, folder)
        # as a terminal does: to torchrun and to its processes
        os.killpg(process.pid, signal.SIGINT)
        code, printed = finish(process, folder)
    assert code != 0
    assert printed.count("Stopping within 16 updates") == 1
    saved = re.search(r"Stopped after update ([0-9]+) of 600", printed)
    assert saved, printed[-3000:]
    assert 100 <= int(saved[1]) < 600
    last = read_components(newest(checkpoints))["trainer_state"]["progress"]
    assert last["updates"] == int(saved[1])
    command = re.search(r"Stopped\. Continue with: (.*)", printed)[1]
    assert "--nproc-per-node 2" in command
    with started(folder, shlex.split(command)) as process:
        code, printed = finish(process, folder)
    assert code == 0, printed[-3000:]
    assert f"IQL: updates {saved[1]} to 600" in printed
    assert_same_leaves(outcome(folder, "stopped"), whole[0])
