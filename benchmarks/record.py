"""What all benchmarks share: files of results with machine and versions, and steps in own processes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def machine(checkout: Path | None = None, packages: Sequence[str] = ()) -> dict[str, object]:
    """Processor, versions and the commit of ``checkout``, by default that of the current folder."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
    )
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "torchrl", "tensordict", *packages)
    }
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
        "commit": commit.stdout.strip(),
    }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` as JSON, to a temporary file that is then renamed; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    text = json.dumps(record, indent=1, default=str).replace(": NaN", ": null")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def save(path: Path, content: Mapping[str, Any], packages: Sequence[str] = ()) -> None:
    """Write ``content`` with the command, the machine and the versions, unless it has its own."""
    command = " ".join(["python", *sys.argv])
    write(path, {"command": command, "machine": machine(packages=packages), **content})


def in_process(
    script: str,
    step: str,
    options: argparse.Namespace,
    passed: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What the function ``step`` of ``script`` returns in a process of its own.

    ``script --step STEP`` prints it as the last line, as :func:`print_step` does. ``passed``: names of
    the options that it gets too.
    """
    command = [sys.executable, script, "--step", step]
    for name in ("folder", *passed):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    out = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def print_step(steps: Mapping[str, Callable[..., Any]], options: argparse.Namespace) -> bool:
    """Whether ``--step`` was given; its function is then called, and the result printed."""
    if options.step:
        print(json.dumps(steps[options.step](options)))
    return bool(options.step)
