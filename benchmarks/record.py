"""What all benchmarks share: files of results with command, machine and versions; own processes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor with its family and model: one name covers several generations."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in information.read_text().splitlines())
    entries = {name.strip(): value.strip() for name, _, value in lines}
    family, model = (entries.get(name, "unknown") for name in ("cpu family", "model"))
    return f"{entries.get('model name', platform.machine())}, family {family}, model {model}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(
    device: str = "", *, checkout: Path | None = None, packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Processor, versions, and the commit of ``checkout``, by default that of the current folder.

    With ``device`` also its name and threads, and of a GPU memory and capability.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
    )
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchrl", "tensordict", *packages)},
        "commit": commit.stdout.strip(),
        **(_hardware(device) if device else {}),
    }


def _hardware(device: str) -> dict[str, Any]:
    import torch

    entries = {"device": device, "name": processor(), "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        entries |= {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "devices": torch.cuda.device_count(),
        }
    return entries


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` as JSON, to a temporary file that is then renamed; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    text = json.dumps(record, indent=1, default=str).replace(": NaN", ": null")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def save(
    path: Path, content: Mapping[str, Any], packages: Sequence[str] = (), *, device: str = ""
) -> None:
    """Write ``content`` with the command, the machine and the versions, unless it has its own."""
    command = " ".join(["python", *sys.argv])
    write(path, {"command": command, "machine": machine(device, packages=packages), **content})


def place(*words: str, folder: Path = RESULTS) -> Path:
    """The result file of ``words``, such as ``step_cpu_NAME.json``; an empty word is left out."""
    return folder / ("_".join(word.split(":")[0] for word in words if word) + ".json")


def random_columns(rows: int, observation: int, action: int, episode: int) -> dict[str, Any]:
    """Columns of random steps in D4RL's layout: episodes of ``episode`` steps end by a time limit."""
    import numpy as np

    draw, last = np.random.default_rng(0), np.arange(1, rows + 1) % episode == 0
    last[-1] = True
    here = np.arange(rows) + np.arange(rows) // episode  # one more state per episode
    state = draw.standard_normal((here[-1] + 2, observation), np.float32)
    return {
        "observations": state[here],
        "next_observations": state[here + 1],
        "actions": draw.uniform(-1, 1, (rows, action)).astype(np.float32),
        "rewards": draw.standard_normal(rows, np.float32),
        "terminals": np.zeros(rows, np.bool_),
        "timeouts": last,
    }


def in_processes(
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    workers: int,
    environment: Mapping[str, str] = {"OMP_NUM_THREADS": "1"},
) -> list[Any]:
    """``function(*job)`` of all jobs in new processes, ``workers`` at a time."""
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        results = [pool.submit(function, *job) for job in jobs]
        return [result.result() for result in results]


def apart(
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """``function(*arguments, **options)`` in a new process, whose memory and imports are its own."""
    return in_processes(partial(function, **options), [arguments], 1, environment or {})[0]
