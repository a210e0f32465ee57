"""Kill training at random moments, resume, and compare with a run that was not interrupted.

    python benchmarks/bench_resume.py --kills 20

Each trial starts a process that trains, kills it (SIGKILL) at a moment drawn uniformly between its
start and the last checkpoint of an undisturbed run, resumes in a second process and trains to the
end. Networks, targets, optimizer and metrics.csv must equal the undisturbed run's, bit for bit.
Writes benchmarks/results/resume.json, or PATH with --output PATH.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import time
from multiprocessing import get_context, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

from iql_torchrl import IQLConfig, OfflineDataset, OfflineTrainer, load_dataset, make_agent
from iql_torchrl.files import newest
from record import RESULTS, random_columns, save

import gymnasium as gym
import torch


def dataset() -> OfflineDataset:
    """400 transitions in episodes of 20, drawn at random."""
    columns = random_columns(400, observation=3, action=1, episode=20)
    return load_dataset(columns, env=lambda: gym.make("Pendulum-v1"), progress=False)


def train(folder: Path, updates: int) -> None:
    """Start or resume the run in ``folder``, train it to the end, leave a digest of its state."""
    torch.manual_seed(7)  # dropout draws from the global generator
    config = IQLConfig(updates=updates, hidden=(16, 16), batch_size=32, dropout=0.1)
    data = dataset()
    agent = make_agent(config, data)
    trainer = OfflineTrainer(
        agent=agent,
        dataset=data,
        replay_buffer=data.replay_buffer(config.batch_size, seed=0),
        evaluation=lambda: {"score": float(next(agent.actor.parameters()).detach().sum())},
        monitor="score",
        eval_interval=20,
        log_interval=10,
        save_trainer_interval=10,
        folder=folder,
        progress_bar=False,
    )
    if list(folder.glob("checkpoints/checkpoint-*")):
        trainer.resume()
    trainer.train()
    digest = hashlib.sha256((folder / "metrics.csv").read_bytes())
    for part in (agent.loss.state_dict(), agent.step.state_dict()):
        for tensor in tensors(part):
            digest.update(tensor.numpy().tobytes())
    (folder / "digest.txt").write_text(digest.hexdigest())


def tensors(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state.detach().contiguous()]
    parts = state.values() if isinstance(state, dict) else state
    return [t for part in parts for t in tensors(part)] if isinstance(state, (dict, list)) else []


def start(folder: Path, updates: int) -> BaseProcess:
    """A process that trains in ``folder``; a fork, so that it starts at once."""
    process = get_context("fork").Process(target=train, args=(folder, updates))
    process.start()
    return process


def finish(folder: Path, updates: int) -> str:
    process = start(folder, updates)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"training in {folder} failed with status {process.exitcode}")
    return (folder / "digest.txt").read_text()


def trial(folder: Path, updates: int, delay: float) -> str:
    """The digest of a run that is killed after ``delay`` seconds and resumed."""
    process = start(folder, updates)
    time.sleep(delay)
    process.kill()
    process.join()
    return finish(folder, updates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "resume.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    resource_tracker.ensure_running()  # one for all forks, so that killed ones print no warnings
    with tempfile.TemporaryDirectory() as root:
        finish(Path(root) / "warm-up", options.updates)
        began = time.time()
        reference = finish(Path(root) / "left-alone", options.updates)
        last = newest(Path(root) / "left-alone" / "checkpoints")
        duration = last.stat().st_mtime - began  # what follows is the picture
        trials = []
        for number in range(options.kills):
            delay = draw.uniform(0, duration)
            equal = trial(Path(root) / str(number), options.updates, delay) == reference
            trials.append({"killed_after_s": delay, "equal": equal})
            print(f"{number + 1:3d}: killed after {delay:.3f} s of {duration:.2f}, equal: {equal}")
    content = {"updates": options.updates, "seconds_to_last_checkpoint": duration, "trials": trials}
    save(options.output, content)
    equal = sum(bool(row["equal"]) for row in trials)
    print(f"{equal} of {len(trials)} equal bit for bit")
    return 0 if equal == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
