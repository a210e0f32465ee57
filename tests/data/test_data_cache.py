"""Tables kept on disk: when they are built again, and what a full disk says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from iql_torchrl.data import DatasetError, load_dataset
from iql_torchrl.data.cache import fingerprint

#: Of ``arrays``: 2 x 2 observations, 2 actions and a reward of 4 bytes, 3 marks, the episode's 8.
ROW_BYTES = 2 * 2 * 4 + 2 * 4 + 4 + 3 + 8


def arrays() -> dict[str, Any]:
    """200 rows in 20 episodes of 10."""
    rng = np.random.default_rng(1)
    time_step = np.arange(200, dtype=np.float32)
    return {
        "observation": np.stack([time_step, time_step % 10], 1),
        "next_observation": np.stack([time_step + 1, time_step % 10 + 1], 1),
        "action": rng.uniform(-1, 1, (200, 2)).astype(np.float32),
        "reward": time_step % 7,
        "terminated": np.zeros(200, bool),
        "truncated": time_step % 10 == 9,
    }


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", **arrays())
    return tmp_path / "data.npz"


@pytest.mark.parametrize("large", [False, True])
def test_a_source_of_equal_size_and_time_but_other_content_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:  # Sampled, not read whole.
        monkeypatch.setattr("iql_torchrl.data.cache.WHOLE", 1000)
        monkeypatch.setattr("iql_torchrl.data.cache.BLOCK", 500)
    path, table, data = tmp_path / "data.npz", tmp_path / "table", arrays()
    np.savez(path, **data)
    before = path.stat()
    first = load_dataset(path, memmap=table)
    np.savez(path, **{**data, "reward": data["reward"] + 1})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = load_dataset(path, memmap=table)
    assert np.allclose(second.episode_returns, first.episode_returns + first.episode_lengths)


def test_a_large_source_is_digested_fast(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    with open(path, "wb") as file:
        file.truncate(5 * 2**30)
    start = time.perf_counter()
    first = fingerprint([path], {})
    assert time.perf_counter() - start < 1
    stamp = path.stat().st_mtime_ns
    for place in (0, 5 * 2**30 - 1):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"1")
        os.utime(path, ns=(stamp, stamp))
        assert fingerprint([path], {}) != first


@pytest.mark.parametrize(
    "spoil",
    [
        "old format",
        "another version",
        "no json",
        "a list",
        "no episodes",
        "no table",
        "short table",
    ],
)
def test_caches_that_cannot_be_read_are_built_again(
    archive: Path, tmp_path: Path, spoil: str
) -> None:
    table = tmp_path / "table"
    whole = load_dataset(archive, memmap=table)
    record = table / "built.json"
    saved = json.loads(record.read_text())
    if spoil == "old format":
        saved["fingerprint"]["format"] = 1
        saved["fingerprint"]["files"] = [part[:3] for part in saved["fingerprint"]["files"]]
    if spoil == "another version":
        del saved["description"], saved["statistics"]
    record.write_text(json.dumps(["?"] if spoil == "a list" else saved))
    if spoil == "no json":
        record.write_text("{")
    if spoil == "no episodes":
        (table / "episodes.npz").unlink()
    if spoil == "no table":
        shutil.rmtree(table / "transitions")
    if spoil == "short table":
        (path,) = table.rglob("reward.memmap")
        path.write_bytes(path.read_bytes()[:100])
    again = load_dataset(archive, memmap=table)
    assert (again.transitions == whole.transitions).all()
    assert json.loads(record.read_text())["fingerprint"]["format"] == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_gets_full_is_named_with_its_space(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("iql_torchrl.data.build._Disk.commit", full)
    monkeypatch.setattr(
        "iql_torchrl.data.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=123_456)
    )
    with pytest.raises(DatasetError) as caught:
        load_dataset(archive, memmap=tmp_path / "table")
    for words in (str(tmp_path / "table"), f"{200 * ROW_BYTES:,} bytes", "123,456 are free"):
        assert words in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_a_table_that_will_not_fit_is_refused_before_it_is_written(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_dataset(archive, memmap=tmp_path / "table")
    monkeypatch.setattr(
        "iql_torchrl.data.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=5000)
    )
    with pytest.raises(DatasetError, match=r"needs 7,800 bytes and 5,000 are free.*nothing"):
        load_dataset(archive, memmap=tmp_path / "table", reward="minus_one")
    assert len(load_dataset(archive, memmap=tmp_path / "table")) == 200  # The old one is there.
