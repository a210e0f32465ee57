"""Time and memory of loading and sampling transitions of HalfCheetah's shapes.

    python benchmarks/bench_data.py                 # about 5 GB of disk twice, minutes
    python benchmarks/bench_data.py --size-gb 0.5   # the same, with a smaller table on disk
    python benchmarks/bench_data.py --size-gb 0.5 --against 2499ab0 --repeats 9

Each measurement runs in its own process, which imports what it needs. Writes
benchmarks/results/data.json and deletes the data that it made. ``--against`` measures another
revision in turn with this one and writes the ratios of neighbouring times to data_revisions.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from bench_revisions import unpack
from record import apart, place, save

OBSERVATION, ACTION, EPISODE = 17, 6, 1000
MINARI_ID = "bench/halfcheetah-v0"
BATCH = 256


def memory(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most, ``RssAnon`` without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def size(transitions: Any) -> int:
    return sum(v.numel() * v.element_size() for v in transitions.values(True, True))


def row_bytes(observation: int, action: int) -> int:
    """Of a table: two observations, action, reward, three flags, the episode's number."""
    return 4 * (2 * observation + action + 1) + 3 + 8


def write_minari(rows: int) -> None:
    """A Minari dataset of float64 observations, as HalfCheetah gives them."""
    import warnings

    import gymnasium as gym
    import minari
    import numpy as np
    from minari.data_collector import EpisodeBuffer

    generator = np.random.default_rng(0)
    flags = np.zeros(EPISODE, bool)
    ends = flags.copy()
    ends[-1] = True
    episodes = [
        EpisodeBuffer(
            observations=generator.standard_normal((EPISODE + 1, OBSERVATION)),
            actions=generator.uniform(-1, 1, (EPISODE, ACTION)).astype(np.float32),
            rewards=generator.standard_normal(EPISODE),
            terminations=flags,
            truncations=ends,
            infos={},
        )
        for _ in range(rows // EPISODE)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari warns about missing authors and permalinks.
        minari.create_dataset_from_buffers(
            MINARI_ID,
            episodes,
            observation_space=gym.spaces.Box(-np.inf, np.inf, (OBSERVATION,), np.float64),
            action_space=gym.spaces.Box(-1, 1, (ACTION,), np.float32),
            description="random numbers",
        )


def read_raw() -> dict[str, float]:
    """Only reads every array of the Minari file into memory."""
    import h5py

    path = Path(os.environ["MINARI_DATASETS_PATH"]) / MINARI_ID / "data" / "main_data.hdf5"
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    began = time.perf_counter()
    with h5py.File(path, "r") as file:
        arrays = [file[episode][name][()] for episode in file for name in names]
    return {"seconds": time.perf_counter() - began, "bytes": sum(a.nbytes for a in arrays)}


def load() -> dict[str, float]:
    from iql_torchrl import load_dataset

    before, began = memory("VmRSS"), time.perf_counter()
    dataset = load_dataset(MINARI_ID, download=False, progress=False)
    seconds, peak = time.perf_counter() - began, memory("VmHWM") - before
    rows = dataset.transitions
    return {"seconds": seconds, "bytes": size(rows), "peak": peak, "rows": len(dataset)}


def write_d4rl(
    path: Path, rows: int, observation: int, action: int, *, episodes: int = 100, rise: float = 0.0
) -> None:
    """A file in D4RL's layout: ``episodes`` random ones, repeated; rewards rise by ``rise`` in all."""
    import h5py
    import numpy as np

    chunk = np.random.default_rng(0).standard_normal((episodes * EPISODE, observation), np.float32)
    columns = {
        "observations": (observation,), "actions": (action,), "rewards": (), "terminals": (),
        "timeouts": (),
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, shape in columns.items():
            kind = "?" if shape == () and name != "rewards" else "f4"
            file.create_dataset(name, (rows, *shape), kind)
        for start in range(0, rows, len(chunk)):
            part = slice(start, min(start + len(chunk), rows))
            count = part.stop - start
            file["observations"][part] = chunk[:count]
            file["actions"][part] = np.tanh(chunk[:count, :action])
            file["rewards"][part] = chunk[:count, 0] + rise * start / rows
            file["timeouts"][part] = np.arange(start, part.stop) % EPISODE == EPISODE - 1


def build(folder: Path) -> dict[str, float]:
    """Builds the memory-mapped table; the second time, in a fresh process, reopens it."""
    from iql_torchrl import load_dataset

    began = time.perf_counter()
    dataset = load_dataset(folder / "table.hdf5", memmap=folder / "table", progress=False)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": size(dataset.transitions), "peak": memory("VmHWM")}


def table(rows: int) -> Any:
    from step_rivals import Sizes, transitions

    import torch

    table = transitions(Sizes(rows=rows, observation=OBSERVATION, action=ACTION))
    table["next", "truncated"] = torch.zeros(rows, 1, dtype=torch.bool)
    table["collector", "traj_ids"] = torch.arange(rows) // EPISODE
    return table


def microseconds(
    calls: dict[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, float]:
    """The median of each call; the calls alternate."""
    from measuring import alternated

    times = alternated(calls, rounds=rounds, device=device)
    return {name: 1e6 * median(seconds) for name, seconds in times.items()}


def sample_buffers(rows: int, rounds: int) -> dict[str, float]:
    from iql_torchrl.data import replay_buffer

    import torch
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    torch.set_num_threads(1)
    data = table(rows)
    theirs = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), batch_size=BATCH)
    theirs.extend(data)
    ours = replay_buffer(data, BATCH)
    return microseconds({"ours": ours.sample, "torchrl": theirs.sample}, rounds)


def sample_device(rounds: int, device: str) -> dict[str, float]:
    from iql_torchrl.data import DeviceSampler

    import torch

    torch.set_num_threads(1)
    samplers = {
        f"{rows:.0e}": DeviceSampler(table(rows), BATCH, device=device, seed=0).sample
        for rows in (10**5, 10**6, 10**7)
    }
    return microseconds(samplers, rounds, device)


def sample_windows(rows: int, rounds: int) -> dict[str, float]:
    """Plain rows, windows of the last observations and stacks of frames."""
    from step_rivals import Sizes, dataset_of

    import torch

    torch.set_num_threads(1)
    data = dataset_of(Sizes(rows=rows))
    datasets = {"rows": data, "stack of 4": data.frame_stack(4)}
    datasets |= {f"windows of {length}": data.windows(length) for length in (1, 4, 16)}
    calls = {
        name: dataset.device_sampler(BATCH, seed=0).sample for name, dataset in datasets.items()
    }
    return microseconds(calls, rounds)


def make_files(options: argparse.Namespace, folder: Path) -> None:
    """A Minari dataset, and a table in D4RL's layout."""
    apart(write_minari, options.rows, environment={"MINARI_DATASETS_PATH": str(folder)})
    rows = int(options.size_gb * 1e9 / row_bytes(OBSERVATION, ACTION)) // EPISODE * EPISODE
    apart(write_d4rl, folder / "table.hdf5", rows, OBSERVATION, ACTION)


def everything(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    environment = {"MINARI_DATASETS_PATH": str(folder)}
    make_files(options, folder)
    # Alternating, so that another load on the machine affects both.
    pairs = [
        (apart(read_raw, environment=environment), apart(load, environment=environment))
        for _ in range(3)
    ]
    raw, loaded = (min(each, key=lambda r: r["seconds"]) for each in zip(*pairs, strict=True))
    return {
        "raw": raw,
        "load": loaded,
        "build": apart(build, folder),
        "reopen": apart(build, folder),
        "sample": apart(sample_buffers, options.rows, options.rounds),
        "device": apart(sample_device, options.rounds, options.device),
        "windows": apart(sample_windows, options.rows, options.rounds),
    }


def times(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Of one revision: seconds of loading, building and reopening, microseconds of samples."""
    shutil.rmtree(folder / "table", ignore_errors=True)
    return {
        "load": apart(load)["seconds"],
        "build": apart(build, folder)["seconds"],
        "reopen": apart(build, folder)["seconds"],
        "buffer": apart(sample_buffers, options.rows, options.rounds)["ours"],
        **apart(sample_device, options.rounds, options.device),
        **apart(sample_windows, options.rows, options.rounds),
    }


def against(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same of this revision and ``options.against``, whose order is reversed in each repeat."""
    make_files(options, folder)
    trees = {"new": unpack(".", folder), "old": unpack(options.against, folder)}
    measured: list[dict[str, dict[str, float]]] = []
    for repeat in range(options.repeats):
        found = {}
        for name in sorted(trees, reverse=bool(repeat % 2)):
            paths = {"PYTHONPATH": str(trees[name]), "MINARI_DATASETS_PATH": str(folder)}
            with mock.patch.dict(os.environ, paths):
                found[name] = times(options, folder)
        measured.append(found)
    ratios = {
        key: [found["new"][key] / found["old"][key] for found in measured]
        for key in measured[0]["new"]
    }
    for key, each in ratios.items():
        print(f"{key:12} {median(each):.2f} ({min(each):.2f} to {max(each):.2f})", flush=True)
    return {"against": options.against, "ratios": ratios, "measured": measured}


def report(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    raw, load_, built, device = (result[name] for name in ("raw", "load", "build", "device"))
    ours, theirs = result["sample"]["ours"], result["sample"]["torchrl"]
    costs, windows = (
        ", ".join(f"{name} {cost:.0f} us" for name, cost in each.items())
        for each in (device, result["windows"])
    )
    first, *_, last = device.values()
    return [
        (f"load {load_['rows']:,} rows from Minari HDF5",
         f"{load_['seconds']:.2f} s; raw arrays {raw['seconds']:.2f} s; "
         f"ratio {load_['seconds'] / raw['seconds']:.2f}", "<= 2"),
        ("peak memory of that load", f"{load_['peak'] / load_['bytes']:.2f} x data "
         f"({load_['bytes'] / 1e6:.0f} MB)", "<= 2.2"),
        (f"memmap build of {built['bytes'] / 1e9:.2f} GB",
         f"{built['seconds']:.0f} s, peak resident {built['peak'] / 1e9:.2f} GB", "< 1 GB"),
        ("reopen it", f"{result['reopen']['seconds']:.3f} s", "< 1 s"),
        (f"replay_buffer.sample({BATCH})", f"{ours:.0f} us; TorchRL's {theirs:.0f} us; "
         f"ratio {ours / theirs:.2f}", "<= 1"),
        (f"DeviceSampler.sample({BATCH})", f"{costs}; ratio {last / first:.2f}", "flat"),
        ("the same of windows and stacks", windows, ""),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="of the load and of the sampled buffer")
    add("--size-gb", type=float, default=5.0, help="of the memory-mapped table")
    add("--rounds", type=int, default=2_000, help="timed samples each")
    add("--device", default="cpu", help="of DeviceSampler")
    add("--against", metavar="REVISION", help="compare with another revision instead")
    add("--repeats", type=int, default=5, help="of the comparison")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.against:
            save(place("data", "revisions"), against(options, Path(folder)))
            return
        result = everything(options, Path(folder))
    for quantity, value, limit in report(result):
        print(f"{quantity:38} {value:58} {limit}")
    save(place("data"), result)


if __name__ == "__main__":
    main()
