"""Memory and speed of training from a log in shards that is larger than the memory in use.

    python benchmarks/bench_shards.py                # 20 GB of shards: 30 GB of disk, about 20 minutes
    python benchmarks/bench_shards.py --size-gb 1    # the same with a smaller log

Makes a log of random numbers in D4RL's layout with Ant's shapes, writes it as shards, deletes the
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
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench_data import EPISODE, write_d4rl
from record import RESULTS, in_process, print_step, save

OBSERVATION, ACTION, BATCH = 111, 8, 256
#: Two observations, action, reward, three flags, the episode's number.
ROW = 4 * (2 * OBSERVATION + ACTION + 1) + 3 + 8


def resident(name: str) -> int:
    """Bytes of ``VmHWM`` or ``RssAnon`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The largest memory, in the dict after the block."""
    found, ended = {"anonymous": resident("RssAnon")}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            found["anonymous"] = max(found["anonymous"], resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found["peak"] = resident("VmHWM")


def write_log(options: argparse.Namespace) -> dict[str, Any]:
    """A file in D4RL's layout whose shards will have ``--size-gb``."""
    rows = int(options.size_gb * 1e9 / ROW) // EPISODE * EPISODE
    write_d4rl(options.folder / "log.hdf5", rows, OBSERVATION, ACTION, episodes=50, rise=1.0)
    return {"rows": rows}


def build(options: argparse.Namespace) -> dict[str, Any]:
    from iql_torchrl.data import DatasetWarning, build_shards

    warnings.simplefilter("ignore", DatasetWarning)  # random numbers look like wrong marks
    began = time.perf_counter()
    with watched() as memory:
        log = build_shards(
            options.folder / "log.hdf5", options.folder / "shards", options.shards, progress=False
        )
    (options.folder / "log.hdf5").unlink()
    seconds = time.perf_counter() - began
    size = sum(p.stat().st_size for p in (options.folder / "shards").rglob("*") if p.is_file())
    return {"seconds": seconds, "rows": len(log), "bytes": size, **memory}


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the pages of the files, so that reading them reads the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def opened(options: argparse.Namespace) -> Any:
    from iql_torchrl.data import DatasetWarning, load_shards

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DatasetWarning)
    drop_cache(options.folder / "shards")
    return load_shards(options.folder / "shards", reward="return_range")


def agent_for(log: Any, options: argparse.Namespace) -> Any:
    from iql_torchrl import IQLConfig, make_agent

    return make_agent(IQLConfig(updates=options.updates, batch_size=BATCH), log)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Training from the first import to the last checkpoint."""
    from iql_torchrl import OfflineTrainer

    with watched() as memory:
        log = opened(options)
        agent = agent_for(log, options)
        began = time.perf_counter()
        replay = log.replay_buffer(
            BATCH, seed=0, loaded=options.loaded, replace_every=options.replace_every
        )
        filled = time.perf_counter() - began
        trainer = OfflineTrainer(
            agent=agent, dataset=log, replay_buffer=replay, folder=options.folder / "run",
            progress_bar=False,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    replaced = (trainer.updates - 1) // options.replace_every
    return {
        "updates": trainer.updates, "seconds": seconds, "first_shards_seconds": filled,
        "replaced": replaced, "shard_bytes": max(s.rows for s in log.shards) * ROW, **memory,
    }  # fmt: skip


def interleaved(
    calls: dict[str, Callable[[], object]], block: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of blocks of ``block`` calls of each; the blocks alternate, in changing order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):  # the first round warms up
        order = list(calls)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            began = time.perf_counter()
            for _ in range(block):
                calls[name]()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def buffers(log: Any, options: argparse.Namespace, every: int) -> dict[str, Any]:
    """The replay over shards, and buffers in memory of as many rows as it has loaded."""
    from iql_torchrl.data import DeviceSampler, replay_buffer

    import torch

    parts = []
    for number in range(options.loaded):
        with log.shard(number) as rows:
            parts.append(rows.clone())
    table = torch.cat(parts)
    sampler = DeviceSampler(table, BATCH, seed=0)
    shards = log.replay_buffer(BATCH, seed=0, loaded=options.loaded, replace_every=every)
    return {"shards": shards, "sampler": sampler, "buffer": replay_buffer(table, BATCH, seed=0)}


def sample(options: argparse.Namespace) -> dict[str, Any]:
    """Batches alone. Each block of the shards contains one replacement and the reading for the next."""
    sampled = buffers(opened(options), options, options.sample_block)
    calls = {name: buffer.sample for name, buffer in sampled.items()}
    return {"seconds": interleaved(calls, options.sample_block, options.rounds)}


def update(options: argparse.Namespace) -> dict[str, Any]:
    """Batches and updates of one agent, likewise."""
    log = opened(options)
    step = agent_for(log, options).step
    calls = {
        name: (lambda each=each: step(each.sample()))
        for name, each in buffers(log, options, options.replace_every).items()
    }
    return {"seconds": interleaved(calls, options.replace_every, options.rounds)}


STEPS = {f.__name__: f for f in (write_log, build, train, sample, update)}
PASSED = ("size_gb", "shards", "loaded", "replace_every", "sample_block", "updates", "rounds")


def compared(seconds: dict[str, list[float]], block: int) -> dict[str, Any]:
    """Median batches a second of each, and of the shards' over the others' within a round."""
    speeds = {name: [block / taken for taken in values] for name, values in seconds.items()}
    ratios = {
        name: median(ours / theirs for ours, theirs in zip(speeds["shards"], values, strict=True))
        for name, values in speeds.items()
        if name != "shards"
    }
    medians = {name: median(values) for name, values in speeds.items()}
    return {"per_second": medians, "ratio_of_shards_to": ratios}


def report(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    built, trained = result["build"], result["train"]
    rows = [
        (f"build {built['bytes'] / 1e9:.1f} GB of shards",
         f"{built['seconds']:.0f} s, VmHWM {built['peak'] / 1e9:.2f} GB, RssAnon "
         f"{built['anonymous'] / 1e9:.2f} GB", "< 2 GB"),
        (f"{trained['updates']} updates, {trained['replaced']} shards replaced",
         f"VmHWM {trained['peak'] / 1e9:.2f} GB, RssAnon {trained['anonymous'] / 1e9:.2f} GB, "
         f"{trained['seconds']:.0f} s", "< 2 GB"),
    ]  # fmt: skip
    for name in ("sample", "update"):
        speeds, ratios = result[name]["per_second"], result[name]["ratio_of_shards_to"]
        text = ", ".join(f"{each} {speed:,.0f}/s" for each, speed in speeds.items())
        rows.append((f"{name}, batches of {BATCH}", text, ""))
        rows.append(
            ("  of the shards to", ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()), "")
        )
    return rows


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
    add("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if print_step(STEPS, options):
        return
    place = str(options.folder)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        result: dict[str, Any] = {}
        for name in STEPS:
            result[name] = in_process(__file__, name, options, PASSED)
            print(name, {k: v for k, v in result[name].items() if k != "seconds"}, flush=True)
    for name, block in (("sample", options.sample_block), ("update", options.replace_every)):
        result[name] |= compared(result[name]["seconds"], block)
    for quantity, value, limit in report(result):
        print(f"{quantity:42} {value:64} {limit}")
    words = [word for word in sys.argv if word not in ("--folder", place)]
    settings = {name: getattr(options, name) for name in PASSED}
    content = {"command": " ".join(["python", *words]), **settings, **result}
    save(RESULTS / f"{options.name}.json", content)


if __name__ == "__main__":
    main()
