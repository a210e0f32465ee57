"""Memory and speed of training from a dataset in shards that is larger than the memory in use.

    python benchmarks/bench_shards.py                # 20 GB of shards: 30 GB of disk, about 20 minutes
    python benchmarks/bench_shards.py --size-gb 1    # the same with a smaller dataset

Makes a dataset of random numbers in D4RL's layout with Ant's shapes, writes it as shards, deletes the
source, trains from the shards with ``OfflineTrainer``, and compares sampling and updates with buffers
in memory. Every measurement runs in a process of its own. Before those that read shards, the pages of
their files are dropped from the system's cache. Writes benchmarks/results/shards.json and deletes the
data that it made.

Two numbers of memory: ``VmHWM``, the largest resident memory, includes the pages of memory-mapped
files, which the system may drop at any time; ``RssAnon``, without them, is read every 10 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench_data import EPISODE, memory, row_bytes, write_d4rl
from record import apart, place, save

OBSERVATION, ACTION, BATCH = 111, 8, 256


@contextlib.contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The largest memory, in the dict after the block."""
    largest, ended = {"anonymous": memory("RssAnon")}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            largest["anonymous"] = max(largest["anonymous"], memory("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        ended.set()
        thread.join()
        largest["peak"] = memory("VmHWM")


def build(options: argparse.Namespace) -> dict[str, Any]:
    from iql_torchrl.data import DatasetWarning, build_shards

    warnings.simplefilter("ignore", DatasetWarning)  # random numbers look like wrong flags
    source, target = options.folder / "d4rl.hdf5", options.folder / "shards"
    began = time.perf_counter()
    with watched() as largest:
        dataset = build_shards(source, target, options.shards, progress=False)
    source.unlink()
    seconds = time.perf_counter() - began
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    return {"seconds": seconds, "rows": len(dataset), "bytes": size, **largest}


def opened(options: argparse.Namespace) -> Any:
    """The dataset, and the system is asked to forget its files, so that reading them reads the disk."""
    from iql_torchrl.data import DatasetWarning, load_shards

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DatasetWarning)
    os.sync()
    for path in (options.folder / "shards").rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return load_shards(options.folder / "shards", reward="return_range")


def agent_for(dataset: Any, options: argparse.Namespace) -> Any:
    from iql_torchrl import IQLConfig, make_agent

    return make_agent(IQLConfig(updates=options.updates, batch_size=BATCH), dataset)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Training from the first import to the last checkpoint."""
    from iql_torchrl import OfflineTrainer

    with watched() as largest:
        dataset = opened(options)
        agent = agent_for(dataset, options)
        how = {"loaded": options.loaded, "replace_every": options.replace_every}
        trainer = OfflineTrainer(
            agent=agent, dataset=dataset, replay_buffer=dataset.replay_buffer(BATCH, seed=0, **how),
            folder=options.folder / "run", progress_bar=False,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    replaced = (trainer.updates - 1) // options.replace_every
    return {"updates": trainer.updates, "seconds": seconds, "replaced": replaced, **largest}


def compared(options: argparse.Namespace, updates: bool) -> dict[str, Any]:
    """Batches a second, alone or with an update each, from the shards and from buffers in memory of as
    many rows as the shards have loaded. A block contains one replacement and the reading for the next.
    """
    from iql_torchrl.data import DeviceSampler, replay_buffer
    from measuring import alternated

    import torch

    dataset, parts = opened(options), []
    for number in range(options.loaded):
        with dataset.shard(number) as rows:
            parts.append(rows.clone())
    table = torch.cat(parts)
    block = options.replace_every if updates else options.sample_block
    buffers = {
        "shards": dataset.replay_buffer(BATCH, seed=0, loaded=options.loaded, replace_every=block),
        "sampler": DeviceSampler(table, BATCH, seed=0),
        "buffer": replay_buffer(table, BATCH, seed=0),
    }
    calls: dict[str, Callable[[], object]] = {name: each.sample for name, each in buffers.items()}
    if updates:
        step = agent_for(dataset, options).step
        calls = {n: (lambda each=each: step(each.sample())) for n, each in buffers.items()}
    seconds = alternated(calls, block=block, rounds=options.rounds)
    return {
        "seconds": seconds,
        "per_second": {n: median(block / t for t in taken) for n, taken in seconds.items()},
        "ratio_of_shards_to": {
            name: median(t / ours for t, ours in zip(taken, seconds["shards"], strict=True))
            for name, taken in seconds.items()
            if name != "shards"
        },
    }


def report(result: dict[str, Any]) -> None:
    for name in ("build", "train"):
        entry = result[name]
        peak, anonymous = (entry[key] / 1e9 for key in ("peak", "anonymous"))
        numbers = f"VmHWM {peak:.2f} GB (at most 2), RssAnon {anonymous:.2f} GB"
        print(f"{name}: {entry['seconds']:.0f} s, {numbers}")
    for name in ("sample", "update"):
        speeds, ratios = result[name]["per_second"], result[name]["ratio_of_shards_to"]
        text = ", ".join(f"{each} {speed:,.0f}/s" for each, speed in speeds.items())
        shares = ", ".join(f"{each} {ratio:.2f}" for each, ratio in ratios.items())
        print(f"{name}, batches of {BATCH}: {text}; of the shards to {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--size-gb", type=float, default=20.0, help="of all shards")
    add("--shards", type=int, default=128)
    add("--loaded", type=int, default=4, help="shards at a time")
    add("--replace-every", type=int, default=100, help="updates between two replacements")
    add("--sample-block", type=int, default=10_000, help="batches of a block, and between two too")
    add("--updates", type=int, default=600, help="of the training")
    add("--rounds", type=int, default=7)
    add("--name", default="shards", help="of the file in benchmarks/results")
    add("--folder", type=Path, help="where the data is made; by default the system's")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "folder"}
    rows = int(options.size_gb * 1e9 / row_bytes(OBSERVATION, ACTION)) // EPISODE * EPISODE
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        layout = (options.folder / "d4rl.hdf5", rows, OBSERVATION, ACTION)
        apart(write_d4rl, *layout, episodes=50, rise=1.0)
        result = {"build": apart(build, options), "train": apart(train, options)}
        for name, updates in (("sample", False), ("update", True)):
            result[name] = apart(compared, options, updates)
    report(result)
    save(place(options.name), settings | result)


if __name__ == "__main__":
    main()
