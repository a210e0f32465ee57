"""Time and memory of windows of observations and of stacks of frames.

    python benchmarks/bench_windows.py                    # 5 GB of disk, minutes
    python benchmarks/bench_windows.py --images 10000     # the same with a tenth of the images

Each measurement runs in its own process, as in bench_data.py. Writes benchmarks/results/windows.json
and deletes the data that it made.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_data import ACTION, BATCH, EPISODE, OBSERVATION, interleaved
from record import RESULTS, in_process, print_step, save

IMAGE = (84, 84, 3)
LENGTHS = (1, 4, 16)


def trajectories(rows: int) -> Any:
    """A dataset of HalfCheetah's shapes in episodes of 1000 steps, each frame the next one's past."""
    from iql_torchrl import load_dataset

    import numpy as np

    generator = np.random.default_rng(0)
    frames = generator.standard_normal((rows // EPISODE, EPISODE + 1, OBSERVATION), np.float32)
    ends = np.arange(rows) % EPISODE == EPISODE - 1
    return load_dataset(
        {
            "observation": frames[:, :-1].reshape(rows, -1),
            "next_observation": frames[:, 1:].reshape(rows, -1),
            "action": generator.uniform(-1, 1, (rows, ACTION)).astype(np.float32),
            "reward": generator.standard_normal(rows, np.float32),
            "terminated": np.zeros(rows, bool),
            "truncated": ends,
        },
        progress=False,
    )


def sample_vectors(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a batch: plain rows, windows and stacks, from both kinds of sampler."""
    import torch

    torch.set_num_threads(1)
    data = trajectories(options.rows)
    calls: dict[str, Callable[[], object]] = {
        "rows": data.device_sampler(BATCH, seed=0).sample,
        "rows, replay buffer": data.replay_buffer(BATCH, seed=0).sample,
        "stack of 4": data.frame_stack(4).device_sampler(BATCH, seed=0).sample,
        "windows of 4, replay buffer": data.windows(4).replay_buffer(BATCH, seed=0).sample,
    }
    for length in LENGTHS:
        sampler = data.windows(length).device_sampler(BATCH, seed=0)
        calls[f"windows of {length}"] = sampler.sample
    return interleaved(calls, options.rounds, "cpu")


def write_images(options: argparse.Namespace) -> dict[str, float]:
    """A file of images in D4RL's layout; successors are the following rows."""
    import h5py
    import numpy as np

    rows = options.images + options.images // EPISODE  # the last row of an episode has no successor
    number = np.arange(rows)
    generator = np.random.default_rng(0)
    with h5py.File(options.folder / "images.hdf5", "w") as file:
        images = file.create_dataset("observations", (rows, *IMAGE), "u1", chunks=(1, *IMAGE))
        for start in range(0, rows, EPISODE):
            part = generator.integers(0, 256, (min(EPISODE, rows - start), *IMAGE), np.uint8)
            images[start : start + len(part)] = part
        actions = generator.uniform(-1, 1, (rows, ACTION)).astype(np.float32)
        file.create_dataset("actions", data=actions)
        file.create_dataset("rewards", data=generator.standard_normal(rows, np.float32))
        file.create_dataset("terminals", data=np.zeros(rows, bool))
        file.create_dataset("timeouts", data=number % (EPISODE + 1) == EPISODE)
    return {}


def memory() -> dict[str, float]:
    """Gigabytes of this process: its own memory, and pages of mapped files, which can be dropped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":\t") for line in lines if ":\t" in line)
    names = {"own_gb": "RssAnon", "mapped_gb": "RssFile"}
    return {name: int(fields[field].split()[0]) * 1024 / 1e9 for name, field in names.items()}


def images_dataset(options: argparse.Namespace, **more: Any) -> Any:
    from iql_torchrl import load_dataset

    import gymnasium as gym
    import numpy as np

    return load_dataset(
        options.folder / "images.hdf5",
        observation_space=gym.spaces.Box(0, 255, IMAGE, np.uint8),
        action_space=gym.spaces.Box(-1, 1, (ACTION,)),
        progress=False,
        **more,
    )


def hold(options: argparse.Namespace) -> dict[str, float]:
    """Memory with all images, held as ``options.form`` says, after 200 sampled batches.

    The table is memory-mapped; for the forms "in memory" it is copied from there, so that the
    reader's own memory does not count.
    """
    import gc
    from dataclasses import replace

    import torch

    torch.set_num_threads(1)
    data = images_dataset(options, memmap=options.folder / "table")
    where, form = options.form.split(", ")
    if where == "in memory":
        data = replace(data, transitions=data.transitions.clone())
    rows = len(data)
    if form == "rows":
        sampler = (data.replay_buffer if where == "in memory" else data.device_sampler)(32, seed=0)
    else:
        sampler = data.frame_stack(int(form[-1])).device_sampler(32, seed=0)
    del data
    gc.collect()
    for _ in range(200):
        sampler.sample()
    return {"rows": rows, **memory()}


def sample_images(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a batch of 256 images, from a table in memory."""
    import torch

    torch.set_num_threads(1)
    data = images_dataset(options, limit=min(options.images, 10 * EPISODE))
    calls = {
        "rows": data.device_sampler(BATCH, seed=0).sample,
        "stack of 1": data.frame_stack(1).device_sampler(BATCH, seed=0).sample,
        "windows of 4": data.windows(4).device_sampler(BATCH, seed=0).sample,
        "stack of 4": data.frame_stack(4).device_sampler(BATCH, seed=0).sample,
    }
    return interleaved(calls, max(20, options.rounds // 20), "cpu")


FORMS = (
    "mapped, rows", "mapped, stack of 1", "mapped, stack of 4",
    "in memory, rows", "in memory, stack of 1", "in memory, stack of 4",
)  # fmt: skip
STEPS = {f.__name__: f for f in (sample_vectors, write_images, hold, sample_images)}


PASSED = ("rows", "images", "rounds", "form")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="of vectors")
    add("--images", type=int, default=100_000)
    add("--rounds", type=int, default=1_000, help="timed samples each")
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--form", default="", help=argparse.SUPPRESS)
    add("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if print_step(STEPS, options):
        return

    def measured(step: str, form: str = "") -> dict[str, Any]:
        options.form = form
        return in_process(__file__, step, options, PASSED)

    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        result = {"vectors_us": measured("sample_vectors")}
        measured("write_images")
        result["memory"] = {form: measured("hold", form) for form in FORMS}
        result["images_us"] = measured("sample_images")
    for name, values in result.items():
        print(name)
        for row, value in values.items():
            print(f"  {row:36} {value if isinstance(value, dict) else f'{value:.0f}'}")
    save(RESULTS / "windows.json", result)


if __name__ == "__main__":
    main()
