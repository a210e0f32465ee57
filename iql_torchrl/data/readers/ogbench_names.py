"""The names of OGBench's datasets, tasks and files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from iql_torchrl.data.schema import DatasetError

__all__ = [
    "FOLDER_VARIABLE",
    "PREFIX",
    "OGBenchName",
    "advice_for_raw_rows",
    "ogbench_folder",
    "parse_name",
]

PREFIX = "ogbench/"
FOLDER_VARIABLE = "OGBENCH_DATASETS_PATH"
DEFAULT_FOLDER = "~/.ogbench/data"  # the default of the package ogbench
#: Tasks of each environment are numbered from 1 (OGBench, ``task_infos``).
TASKS = 5
_NAME = re.compile(
    r"(?P<environment>\w+(-\w+)*)-(?P<kind>[a-z]+)-singletask(?P<task>-task[1-9])?-(?P<draw>v\d+|local)"
)
_FILE = re.compile(r"(?P<before>\w+(-\w+)*-[a-z]+)-(?P<draw>v\d+|local)")


@dataclass(frozen=True)
class OGBenchName:
    """A dataset of OGBench for one task.

    Attributes:
        environment: the id of the single-task environment, ``cube-single-singletask-task2-v0``.
        data: the name of the rows, without a task, ``cube-single-play-v0``; a name that ends in
            ``-local`` is of rows that were made on this machine.
    """

    environment: str
    data: str

    @property
    def path(self) -> Path:
        """Where the rows are looked for."""
        return ogbench_folder() / f"{self.data}.npz"


def ogbench_folder() -> Path:
    """The folder of the npz files: ``OGBENCH_DATASETS_PATH``, or OGBench's own default."""
    return Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()


def parse_name(source: str) -> OGBenchName:
    """The environment and the rows that ``ogbench/...`` names, by OGBench's rules.

    Raises ``DatasetError`` for a name without a task, giving the names with one.
    """
    name = source.removeprefix(PREFIX)
    if (match := _NAME.fullmatch(name)) is None:
        raise DatasetError(
            f"{source}: expected {PREFIX}ENVIRONMENT-KIND-singletask-taskN-v0, such as "
            f"'{PREFIX}cube-single-play-singletask-task2-v0', or -local in place of -v0 for rows made "
            f"on this machine. {_with_task(name)}".rstrip()
        )
    task, draw = match["task"] or "", match["draw"]
    version = "v0" if draw == "local" else draw
    return OGBenchName(
        environment=f"{match['environment']}-singletask{task}-{version}",
        data=f"{match['environment']}-{match['kind']}-{draw}",
    )


def advice_for_raw_rows(file_name: str) -> str:
    """How to load an OGBench file that has no rewards."""
    advice = _with_task(file_name.removesuffix(".npz")) or (
        f"Name the task, as in load_dataset('{PREFIX}cube-single-play-singletask-task2-v0')."
    )
    return (
        "OGBench's rows have no rewards, because these belong to a single task. "
        f"{advice} The environment variable {FOLDER_VARIABLE} names the folder of the file."
    )


def _with_task(name: str) -> str:
    """The ids with a task for the rows ``name``; empty where it is not a name of rows."""
    if (match := _FILE.fullmatch(name)) is None or "singletask" in name:
        return ""
    first = f"{PREFIX}{match['before']}-singletask-task1-{match['draw']}"
    return f"Name the task: load_dataset({first!r}), or another of task1 to task{TASKS}."
