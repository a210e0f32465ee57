"""Time of OfflineTrainer compared with the plain loop over the same step.

    python benchmarks/bench_trainer.py

Blocks of updates alternate between the loop ``step(buffer.sample())`` and the trainer, and the
median over rounds of the ratio within a round is reported: with nothing written (``loop``), and with
a run folder, where each block ends with a row of metrics.csv and a checkpoint (``folder``; ten times
as many checkpoints as a run of 10,000 updates has by default). The picture, drawn at most once a
minute, is not part of a block; its own time is given. Writes benchmarks/results/trainer.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from iql_torchrl import IQLStep, OfflineTrainer, compiled
from iql_torchrl.data import replay_buffer
from iql_torchrl.trainers import run_folder
from record import RESULTS, save
from step_rivals import Sizes, make_step, transitions


def measure(step: IQLStep, block: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each block of ``block`` updates, by kind."""
    buffer = replay_buffer(transitions(Sizes()), 256, seed=0)
    shared = {"replay_buffer": buffer, "total_updates": block, "progress_bar": False}
    plain = OfflineTrainer(step=step, log_interval=block, **shared)
    writing = OfflineTrainer(
        step=step, folder=folder, log_interval=block, save_trainer_interval=block, **shared
    )
    _ = writing.data_state  # the digest of the data is made once a run
    seconds: dict[str, list[float]] = {"bare": [], "loop": [], "folder": [], "picture": []}
    draw = run_folder.draw

    def timed(*args: object, **kwargs: object) -> None:
        began = time.perf_counter()
        draw(*args, **kwargs)
        seconds["picture"].append(time.perf_counter() - began)

    with mock.patch.object(run_folder, "draw", timed):
        for number in range(rounds + 1):  # the first round warms up
            kinds = [("bare", None), ("loop", plain), ("folder", writing)]
            for kind, trainer in kinds[number % 3 :] + kinds[: number % 3]:  # each after each other
                drawn = len(seconds["picture"])
                if trainer is not None:
                    trainer.total_frames = trainer.updates + block
                began = time.perf_counter()
                if trainer is None:
                    for _ in range(block):
                        step(buffer.sample())
                else:
                    trainer.train()
                taken = time.perf_counter() - began - sum(seconds["picture"][drawn:])
                if number:
                    seconds[kind].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--block", type=int, default=100, help="updates per block")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    step = make_step(Sizes(width=options.width), "cpu", "sequential")
    step = compiled(step) if options.compile else step
    with tempfile.TemporaryDirectory() as root:
        seconds = measure(step, options.block, options.rounds, Path(root) / "run")
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = {
        kind: statistics.median(a / b for a, b in zip(seconds[kind], seconds["bare"], strict=True))
        for kind in ("loop", "folder")
    }
    for kind in ("bare", "loop", "folder"):
        ratio = f"{ratios.get(kind, 1):.3f} of the bare loop"
        print(f"{kind:7} {1e3 * medians[kind] / options.block:7.3f} ms per update  {ratio}")
    print(f"picture {medians['picture']:7.3f} s, at most once a minute and at the end")
    content = {"updates_per_block": options.block, "median_seconds": medians}
    content |= {"median_ratio_to_bare": ratios, "seconds": seconds}
    save(RESULTS / ("trainer_compiled.json" if options.compile else "trainer.json"), content)


if __name__ == "__main__":
    main()
