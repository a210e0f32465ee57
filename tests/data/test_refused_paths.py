"""Paths that cannot be written, what a killed build leaves, and integers in text files."""

import fcntl
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_logs import numbered, save

from iql_torchrl import IQLConfig, OfflineTrainer, load_dataset, make_agent
from iql_torchrl.data import DatasetError, build_shards

WHOLE = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
PUSH = gym.spaces.Box(-1, 1, (1,), np.float32)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "folder.pt2").mkdir()
    return save(tmp_path / "log.npz", numbered([10] * 6))


def refused(argument: str, path: Path, what: str) -> str:
    return rf"^{argument} is {path}, which cannot be created or written to \({what}.*choose a path"


LONG = "x" * 250  # with what is added for the temporary file it is longer than a name may be
PLACES = [
    ("log.npz/x", r".*log\.npz is a file\)"), ("log.npz/x/y", r".*log\.npz is a file\)"),
    ("link", r".*link is a link that leads nowhere\)"), ("link/x", r".*link is a link that"),
    (LONG, "File name too long"), ("/dev/null/x", "/dev/null is a file"),
    ("nul\0", r"(\w+: )?embedded null"),  # Python's text: "byte", from 3.13 on "character in path"
]  # fmt: skip


@pytest.mark.parametrize(("place", "what"), PLACES)
def test_a_table_that_cannot_be_written_there(log, tmp_path, place, what):
    path = tmp_path / place
    for options in ({}, {"reward": "minus_one"}):
        with pytest.raises(DatasetError, match=refused("memmap", path, what)):
            load_dataset(log, memmap=path, **options)
    with pytest.raises(DatasetError, match=refused("folder", path, what)):
        build_shards(log, path, 2)


@pytest.mark.parametrize(("place", "what"), PLACES)
def test_runs_and_programs_that_cannot_be_written_there(log, tmp_path, place, what):
    agent = make_agent(IQLConfig(hidden=(4,), updates=1), load_dataset(log))
    path = tmp_path / place
    if place != LONG:  # the name of a folder may be that long
        with pytest.raises(ValueError, match=refused("folder", path, what)):
            OfflineTrainer(agent=agent, dataset=load_dataset(log), folder=path).train()
    path = path.with_name(f"{path.name}.pt2") if place == LONG else path / "policy.pt2"
    with pytest.raises(ValueError, match=refused("path", path, what)):
        agent.export(path)


def test_a_program_never_replaces_a_folder(log, tmp_path):
    agent = make_agent(IQLConfig(hidden=(4,)), load_dataset(log))
    with pytest.raises(
        ValueError, match=r"path is .*folder\.pt2, which is a folder; choose the name"
    ):
        agent.export(tmp_path / "folder.pt2")


def test_a_folder_without_the_right_to_write(log, tmp_path, monkeypatch):
    """The tests may run as a user who may write everywhere."""
    load_dataset(log, memmap=tmp_path / "built")

    def refuse(*_: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(options["dir"]))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(
        DatasetError, match=refused("memmap", tmp_path / "new", "Permission denied")
    ):
        load_dataset(log, memmap=tmp_path / "new")
    assert len(load_dataset(log, memmap=tmp_path / "built")) == 60  # nothing is written
    with pytest.raises(DatasetError, match=refused("memmap", tmp_path / "built", "Permission")):
        load_dataset(log, memmap=tmp_path / "built", reward="minus_one")


# -- what a killed build leaves


def test_what_a_killed_build_left_is_removed_by_the_next_one(log, tmp_path):
    names = (".table-abcd_123", ".table-two-abcd_123", ".table-abcd", ".other-abcd_123")
    for name in names:
        (tmp_path / name / "new").mkdir(parents=True)
    load_dataset(log, memmap=tmp_path / "table")
    assert [name for name in names if (tmp_path / name).exists()] == list(names[1:])


def test_nothing_is_removed_without_the_lock(log, tmp_path, monkeypatch):
    (tmp_path / ".table-abcd_123" / "new").mkdir(parents=True)
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(95, "Operation not supported")))
    load_dataset(log, memmap=tmp_path / "table")
    assert (tmp_path / ".table-abcd_123").exists()


# -- integers in text files


def table(path: Path, *, first: int = 3, following: bool = False) -> Path:
    head = "observations.0,observations.1,actions.0,rewards,terminals"
    lines = [f"{row * first},-{row},1,1,{int(row == 4)}" for row in range(5)]
    if following:
        head += ",next_observations.0,next_observations.1,action_log_prob"
        lines = [f"{line},{3 * row + 3},-{row + 1},0" for row, line in enumerate(lines)]
    path.write_text("\n".join([head, *lines]))
    return path


OPTIONS = {"columns": {"truncated": None}, "observation_space": WHOLE, "action_space": PUSH}


@pytest.mark.parametrize("following", [False, True])
def test_whole_numbers_of_a_text_file_are_numbers(tmp_path, following):
    dataset = load_dataset(table(tmp_path / "log.csv", following=following), **OPTIONS)
    assert dataset.transitions["observation"].dtype == torch.float32
    assert dataset.transitions["observation"].tolist() == [[3.0 * n, -1.0 * n] for n in range(5)]
    assert dataset.transitions["action"].tolist() == [[1.0]] * 5
    assert ("action_log_prob" in dataset.transitions) == following


def test_a_whole_number_that_would_be_rounded_is_refused(tmp_path):
    path = table(tmp_path / "log.csv", first=2**24 + 1)
    with pytest.raises(DatasetError, match=r"observation has the integer 16777217, which torch"):
        load_dataset(path, **OPTIONS)
    dataset = load_dataset(path, **OPTIONS, dtype=torch.float64)
    assert dataset.transitions["observation"][1, 0] == 2**24 + 1


def test_whole_numbers_of_other_sources_are_still_refused():
    arrays = {
        "observations": np.arange(10).reshape(5, 2), "actions": np.zeros((5, 1), np.float32),
        "rewards": np.ones(5), "terminals": np.arange(5) == 4,
    }  # fmt: skip
    with pytest.raises(DatasetError, match="integers and floats are never cast"):
        load_dataset(arrays, **OPTIONS)
    # Without declared spaces integers in vectors are numbers, on both sides.
    arrays["next_observations"] = arrays["observations"] + [2, 2]
    rows = load_dataset(arrays, columns=OPTIONS["columns"]).transitions
    assert rows["next", "observation"].tolist() == [[2.0 * n + 2, 2.0 * n + 3] for n in range(5)]
