"""A worker process without torch, which starts at once: it does what its orders say."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
from pathlib import Path


def serve(requests, replies) -> None:
    """Each order: a file that gets this process's number; how many processes it kills; a reply."""
    while True:
        path, kills, reply = pickle.loads(pickle.load(requests))
        with Path(path).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(Path(path).read_text().splitlines()) <= kills:
            child = subprocess.Popen(["sleep", "60"])  # as a simulator
            Path(f"{path}.child").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
        replies.write(reply)
        replies.flush()
