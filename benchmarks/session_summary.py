"""The summary of gpu_session.sh: hardware and versions, and what became of each stage.

    session_summary.py begin FOLDER DEVICE                           # prints the card's name for files
    session_summary.py add FOLDER CARD STAGE STATUS SECONDS LIMIT    # of one stage
    session_summary.py show FOLDER CARD                              # a table

The file FOLDER/session_CARD.json is written again after each stage, so that a session that is cut off
leaves what it has. Only ``begin`` imports torch, and without torch it says so in the file.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from record import machine, write

TIMED_OUT = (124, 137)


def hardware(device: str) -> dict[str, Any]:
    """Machine and versions; what could not be asked is under ``failed``."""
    try:
        return machine(device, packages=("jax", "optax"))
    except Exception as error:
        return {"device": device, "name": "unknown", "failed": f"{type(error).__name__}: {error}"}


def summary(folder: str, card: str) -> Path:
    return Path(folder) / f"session_{card}.json"


def begin(folder: str, device: str) -> None:
    used = hardware(device)
    card = re.sub(r"[^a-z0-9]+", "_", str(used["name"]).lower()).strip("_")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write(summary(folder, card), {"began": now, "machine": used, "stages": {}})
    print(card)


def add(folder: str, card: str, stage: str, status: str, seconds: str, limit: str) -> None:
    path, code = summary(folder, card), int(status)
    record = json.loads(path.read_text())
    result = "passed" if code == 0 else "ended at its limit" if code in TIMED_OUT else "failed"
    record["stages"][stage] = {
        "result": result,
        "status": code,
        "seconds": int(seconds),
        "limit": int(limit),
        "log": f"logs_{card}/{stage}.log",
    }
    record["seconds"] = sum(entry["seconds"] for entry in record["stages"].values())
    write(path, record)
    print(f"{stage:20} {result} ({seconds} of at most {limit} s)", flush=True)


def show(folder: str, card: str) -> None:
    path = summary(folder, card)
    record = json.loads(path.read_text())
    stages = record["stages"].values()
    passed = sum(entry["result"] == "passed" for entry in stages)
    print(f"{record['machine']['name']}: {passed} of {len(stages)} stages passed in "
          f"{record.get('seconds', 0)} s; {path}")  # fmt: skip


if __name__ == "__main__":
    {"begin": begin, "add": add, "show": show}[sys.argv[1]](*sys.argv[2:])
