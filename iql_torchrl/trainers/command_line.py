"""The option ``--resume RUN`` of scripts that write runs, and the names that they give to runs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from iql_torchrl.config.cli import refuse
from iql_torchrl.trainers.run_folder import saved_arguments

__all__ = ["default_name", "resume_command", "resumed_arguments"]

OPTION = "--resume"


def resumed_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments to parse, and the folder of the run to continue (None for a new run).

    ``["--resume", "runs/a"]`` or ``["--resume=runs/a"]`` gives the arguments that started the run
    in ``runs/a``, which :func:`~iql_torchrl.trainers.run_folder.new_folder` saved there. Arguments
    without ``--resume`` are returned as they are.

    Exits with status 2 and a sentence on standard error if ``--resume`` lacks its
    folder or is given with other arguments, or if the folder has no saved arguments.
    """
    if not any(word.partition("=")[0] == OPTION for word in arguments):
        return list(arguments), None
    alone = len(arguments) == 1 and arguments[0].startswith(f"{OPTION}=")
    words = arguments[0].split("=", 1) if alone else list(arguments)
    if len(words) != 2 or words[0] != OPTION or not words[1]:
        refuse(
            f"{OPTION} continues a run with the settings that it was started with: give the run's "
            f"folder and no other argument, as in {OPTION} runs/a."
        )
    try:
        return saved_arguments(Path(words[1])), Path(words[1])
    except ValueError as error:
        refuse(error)


def resume_command(folder: Path) -> str:
    """The shell command that continues the run in ``folder`` with the script that runs now.

    Under torchrun on one machine it starts as many processes; on several machines, one process.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    several = size != "1" and os.environ.get("LOCAL_WORLD_SIZE") == size
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", size] if several else []
    return shlex.join([sys.executable, *torchrun, sys.argv[0], OPTION, str(folder)])


def default_name(dataset: str, seed: int) -> str:
    """A folder name from a dataset's id or path and a seed: ``pendulum-mixed-v0-seed0``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"{dataset}-seed{seed}").strip("-")
