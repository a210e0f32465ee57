"""Time and memory of loading and sampling transitions of HalfCheetah's shapes.

    python benchmarks/bench_data.py                 # about 5 GB of disk twice, minutes
    python benchmarks/bench_data.py --size-gb 0.5   # the same, with a smaller table on disk

Each measurement runs in its own process. This process, which starts them, imports no large packages:
otherwise the peak memory of a child would begin at that of its parent. Writes
benchmarks/results/data.json and deletes the data that it made.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from record import RESULTS, in_process, print_step, save

OBSERVATION, ACTION, EPISODE = 17, 6, 1000
MINARI_ID = "bench/halfcheetah-v0"
BATCH = 256


def resident() -> int:
    """Bytes of memory that this process uses now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size(transitions: Any) -> int:
    return sum(v.numel() * v.element_size() for v in transitions.values(True, True))


def write_minari(options: argparse.Namespace) -> dict[str, float]:
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
        for _ in range(options.rows // EPISODE)
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
    return {}


def minari_file() -> Path:
    return Path(os.environ["MINARI_DATASETS_PATH"]) / MINARI_ID / "data" / "main_data.hdf5"


def read_raw(_: argparse.Namespace) -> dict[str, float]:
    """Only reads every array of the Minari file into memory."""
    import h5py

    began = time.perf_counter()
    with h5py.File(minari_file(), "r") as file:
        arrays = [
            file[episode][name][()]
            for episode in file
            for name in ("observations", "actions", "rewards", "terminations", "truncations")
        ]
    return {"seconds": time.perf_counter() - began, "bytes": sum(a.nbytes for a in arrays)}


def load(_: argparse.Namespace) -> dict[str, float]:
    from iql_torchrl import load_dataset

    before, began = resident(), time.perf_counter()
    dataset = load_dataset(MINARI_ID, download=False, progress=False)
    seconds = time.perf_counter() - began
    bytes_ = size(dataset.transitions)
    return {"seconds": seconds, "bytes": bytes_, "peak": peak() - before, "rows": len(dataset)}


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


def write_table(options: argparse.Namespace) -> dict[str, float]:
    """A file in D4RL's layout whose table, once built, has ``--size-gb``."""
    # Two observations, action, reward, three flags, the episode's number.
    row = 4 * (2 * OBSERVATION + ACTION + 1) + 3 + 8
    rows = int(options.size_gb * 1e9 / row) // EPISODE * EPISODE
    write_d4rl(options.folder / "table.hdf5", rows, OBSERVATION, ACTION)
    return {}


def build(options: argparse.Namespace) -> dict[str, float]:
    """Builds the memory-mapped table; the second time, in a fresh process, reopens it."""
    from iql_torchrl import load_dataset

    began = time.perf_counter()
    dataset = load_dataset(
        options.folder / "table.hdf5", memmap=options.folder / "table", progress=False
    )
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": size(dataset.transitions), "peak": peak()}


def table(rows: int) -> Any:
    import torch
    from tensordict import TensorDict

    flags = {name: torch.zeros(rows, 1, dtype=torch.bool) for name in ("terminated", "truncated")}
    return TensorDict(
        {
            "observation": torch.randn(rows, OBSERVATION),
            "action": torch.rand(rows, ACTION) * 2 - 1,
            "next": {
                "observation": torch.randn(rows, OBSERVATION),
                "reward": torch.randn(rows, 1),
                "done": torch.zeros(rows, 1, dtype=torch.bool),
                **flags,
            },
            "collector": {"traj_ids": torch.arange(rows) // EPISODE},
        },
        batch_size=[rows],
    )


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, Any]:
    """Median microseconds of each call; the calls alternate."""
    import torch

    def waited(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - began)

    for call in calls.values():
        for _ in range(50):
            waited(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(waited(call))
    return {name: median(values) for name, values in times.items()}


def sample_buffers(options: argparse.Namespace) -> dict[str, float]:
    from iql_torchrl.data import replay_buffer

    import torch
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    torch.set_num_threads(1)
    rows = table(options.rows)
    theirs = TensorDictReplayBuffer(storage=LazyTensorStorage(options.rows), batch_size=BATCH)
    theirs.extend(rows)
    ours = replay_buffer(rows, BATCH)
    return interleaved({"ours": ours.sample, "torchrl": theirs.sample}, options.rounds, "cpu")


def sample_device(options: argparse.Namespace) -> dict[str, float]:
    from iql_torchrl.data import DeviceSampler

    import torch

    torch.set_num_threads(1)
    samplers = {
        f"{rows:.0e}": DeviceSampler(table(rows), BATCH, device=options.device, seed=0).sample
        for rows in (10**5, 10**6, 10**7)
    }
    return interleaved(samplers, options.rounds, options.device)


STEPS = {
    f.__name__: f
    for f in (write_minari, read_raw, load, write_table, build, sample_buffers, sample_device)
}


def everything(options: argparse.Namespace) -> dict[str, Any]:
    environment = {"MINARI_DATASETS_PATH": str(options.folder)}
    passed = ("rows", "size_gb", "rounds", "device")

    def measured(step: str) -> dict[str, Any]:
        return in_process(__file__, step, options, passed, environment)

    measured("write_minari")
    # Alternating, so that another load on the machine affects both.
    pairs = [(measured("read_raw"), measured("load")) for _ in range(3)]
    result: dict[str, Any] = {
        "raw": min((raw for raw, _ in pairs), key=lambda r: r["seconds"]),
        "load": min((loaded for _, loaded in pairs), key=lambda r: r["seconds"]),
        "pairs": pairs,
    }
    measured("write_table")
    result["build"] = measured("build")
    result["reopen"] = measured("build")
    result["sample"] = measured("sample_buffers")
    result["device"] = measured("sample_device")
    return result


def report(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    raw, load_, built, device = (result[name] for name in ("raw", "load", "build", "device"))
    ours, theirs = result["sample"]["ours"], result["sample"]["torchrl"]
    costs = ", ".join(f"{rows} rows {cost:.0f} us" for rows, cost in device.items())
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
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="of the load and of the sampled buffer")
    add("--size-gb", type=float, default=5.0, help="of the memory-mapped table")
    add("--rounds", type=int, default=2_000, help="timed samples each")
    add("--device", default="cpu", help="of DeviceSampler")
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if print_step(STEPS, options):
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        result = everything(options)
    rows = report(result)
    for quantity, value, limit in rows:
        print(f"{quantity:38} {value:58} {limit}")
    save(RESULTS / "data.json", result)


if __name__ == "__main__":
    main()
