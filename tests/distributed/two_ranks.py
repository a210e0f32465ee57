"""Two ranks of a gloo group, whose store is a file: starting a script, and forking in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from iql_torchrl.distributed import Ranks


def run_ranks(script: str, folder: Path, *arguments: str) -> list[dict]:
    """What each rank of ``script`` in this folder saved, by rank."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    path = Path(__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, path, folder, *arguments],
        env=settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def as_two_ranks(main: Callable[..., dict[str, Any]]) -> None:
    """Call ``main(ranks, folder, *arguments)`` as two ranks and save what each returns.

    Folder and arguments are those of the command line. The second rank is a fork, before any thread
    was started, so that one process imports what both need.
    """
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    child = os.fork()
    try:
        rank = 0 if child else 1
        store = distributed.FileStore(str(folder / "store"), 2)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        ranks = Ranks.from_environment()
        torch.save(main(ranks, folder, *sys.argv[2:]), folder / f"rank{rank}.pt")
        ranks.close()
    except BaseException:
        if child:  # it would wait for this rank
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
