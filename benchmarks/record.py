"""What every result file says of the machine and the versions, and how such a file is written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor with its family and model: one name covers several generations."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in information.read_text().splitlines())
    entries = {name.strip(): value.strip() for name, _, value in lines}
    family, model = (entries.get(name, "unknown") for name in ("cpu family", "model"))
    return f"{entries.get('model name', platform.machine())}, family {family}, model {model}"


def machine(checkout: Path | None = None) -> dict[str, object]:
    """Processor, versions and the commit of ``checkout``, by default that of the current folder."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
    )
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "torchrl", "tensordict")
    }
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
        "commit": commit.stdout.strip(),
    }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` as JSON, to a temporary file that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
