"""Files on a full disk: an ``OSError`` that names the file, and what was saved before stays."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_trainers import make_step, make_trainer, weight
from test_background import pendulum_log

from iql_torchrl import IQLConfig, make_agent
from iql_torchrl.files import newest, read_components, replace_by_link, whole_file, write_components
from iql_torchrl.report.figures import draw
from iql_torchrl.report.tables import write_csv

FULL = Path("/dev/full")  # every write to it fails as on a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
ROWS = [{"update": 1, "loss_value": 0.5}]


def fill(path: Path) -> None:
    """Writing to ``path`` fails because the disk is full."""
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to(FULL)


@contextmanager
def names(path: Path):
    """The block fails because the disk is full, with the name of the file."""
    with pytest.raises(OSError, match="No space left") as caught:
        yield
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value) == f"[Errno 28] No space left on device: '{path}'"


@needs_full
@pytest.mark.parametrize("suffix", [".pt2", ".json"])
def test_an_export_names_the_file_and_leaves_the_earlier_one(tmp_path, suffix):
    agent = make_agent(IQLConfig(hidden=(8,)), pendulum_log())
    path = agent.export(tmp_path / "policy.pt2")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        next(agent.actor.parameters()).add_(1.0)
    fill(path.with_suffix(suffix))
    with names(path.with_suffix(suffix)):
        agent.export(path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    agent.export(path)
    assert path.read_bytes() != before[path]
    assert torch.export.load(path).module()(torch.zeros(2, 3)).shape == (2, 1)


@needs_full
@pytest.mark.parametrize(
    ("name", "write"),
    [("metrics.csv", lambda path: write_csv(path, ROWS)), ("curves.png", lambda p: draw(p, ROWS))],
)
def test_tables_and_pictures_too(tmp_path, name, write):
    path = tmp_path / name
    path.write_bytes(b"before")
    fill(path)
    with names(path):
        write(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def full_disk(monkeypatch):
    """After a call the disk has space for only half of the next write."""
    write = Path.write_bytes

    def half(path, content):
        write(path, bytes(content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")  # names no file, as write() does

    return lambda: monkeypatch.setattr(Path, "write_bytes", half)


def test_training_names_the_checkpoint_and_the_last_one_survives(tmp_path, full_disk, monkeypatch):
    step, weights = make_step(), {}

    def evaluation():
        weights[trainer.updates] = weight(step)
        if trainer.updates == 10:
            full_disk()
        return {"return_mean": float(trainer.updates)}

    settings = {"eval_interval": 5, "folder": tmp_path}
    trainer = make_trainer(step, evaluation=evaluation, **settings)
    folder = tmp_path / "checkpoints"
    with names(folder / "checkpoint-000000000010.torchrl"):
        trainer.train()
    assert newest(folder).name == "checkpoint-000000000005.torchrl"
    assert not list(tmp_path.glob("**/.*")), "nothing half written stays"
    with names(tmp_path / "run.torchrl"):
        make_trainer(total=4, save_trainer_file=tmp_path / "run.torchrl").train()
    monkeypatch.undo()
    again = make_step()
    assert make_trainer(again, **settings).resume().updates == 5
    assert weight(again) == weights[5]


def test_components_and_copies_name_their_file(tmp_path, full_disk, monkeypatch):
    path = write_components(tmp_path / "a.torchrl", {"part": {"x": 1}})

    def unwritable(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", unwritable)
    monkeypatch.setattr("shutil.copyfile", unwritable)
    with names(tmp_path / "best.torchrl"):
        replace_by_link(path, tmp_path / "best.torchrl")
    full_disk()
    with names(path):
        write_components(path, {"part": {"x": 2}})
    assert read_components(path) == {"part": {"x": 1}}
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_that_names_another_file_keeps_its_name(tmp_path):
    missing, nowhere = tmp_path / "missing", tmp_path / "no folder" / "table"
    for path, text, name in (
        (tmp_path / "table", missing.read_text, missing),
        (nowhere, lambda: "x", nowhere),  # not the temporary one
    ):
        with pytest.raises(FileNotFoundError) as caught, whole_file(path) as temporary:
            temporary.write_text(text())
        assert caught.value.filename == str(name)
    with pytest.raises(OSError, match="without a number"), whole_file(tmp_path / "table"):
        raise OSError("without a number")


def test_what_a_killed_process_left_of_a_copy_is_not_written_to(tmp_path):
    """It can be a link to a checkpoint, and a later process can have the same number."""
    old, new, best = (tmp_path / name for name in ("old", "new", "best"))
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    os.link(old, best.with_name(f".{best.name}.{os.getpid()}"))
    replace_by_link(new, best)
    assert [path.read_bytes() for path in (old, new, best)] == [b"old", b"new", b"new"]
    assert len(list(tmp_path.iterdir())) == 3
