"""Tables kept on disk: when they are built again, and what a full disk says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest

from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.reuse import identity

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
        monkeypatch.setattr("iql_torchrl.data.reuse.BLOCKS", 8)
        monkeypatch.setattr("iql_torchrl.data.reuse.BLOCK", 200)
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
    first = identity(path, ReadOptions(), None)
    assert time.perf_counter() - start < 1
    stamp = path.stat().st_mtime_ns
    for place in (0, 5 * 2**30 - 1):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"1")
        os.utime(path, ns=(stamp, stamp))
        assert identity(path, ReadOptions(), None) != first


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
    whole = load_dataset(archive, memmap=table).transitions.clone()  # Not a view of the files.
    record = table / "built.json"
    saved = json.loads(record.read_text())
    if spoil == "old format":
        saved["format"] = 1
    if spoil == "another version":
        del saved["observation_space"], saved["statistics"]
    record.write_text(json.dumps(["?"] if spoil == "a list" else saved))
    if spoil == "no json":
        record.write_text("{")
    if spoil == "no episodes":
        (table / "episodes.npz").unlink()
    if spoil == "no table":
        shutil.rmtree(table / "shard-00000")
    if spoil == "short table":
        (path,) = table.rglob("reward.memmap")
        path.write_bytes(path.read_bytes()[:100])
    again = load_dataset(archive, memmap=table)
    assert (again.transitions == whole).all()
    assert json.loads(record.read_text())["format"] == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_gets_full_is_named_with_its_space(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("iql_torchrl.data.build.DiskTables.commit", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=123_456))
    with pytest.raises(DatasetError) as caught:
        load_dataset(archive, memmap=tmp_path / "table")
    for words in (str(tmp_path / "table"), f"{200 * ROW_BYTES:,} bytes", "123,456 are free"):
        assert words in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_a_table_that_will_not_fit_is_refused_before_it_is_written(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_dataset(archive, memmap=tmp_path / "table")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(DatasetError, match=r"needs 7,800 bytes and 5,000 are free.*nothing"):
        load_dataset(archive, memmap=tmp_path / "table", reward="minus_one")
    assert len(load_dataset(archive, memmap=tmp_path / "table")) == 200  # The old one is there.


LOADER = """
import sys, warnings
import numpy as np
from pathlib import Path
from iql_torchrl.data import load_dataset
warnings.simplefilter("ignore")
path, table, start, shift = sys.argv[1:5]
Path(start + shift).touch()
while len(list(Path(start).parent.glob(Path(start).name + "*"))) < 2:
    pass
for _ in range(40):
    rows = load_dataset(path, memmap=table, reward=(1.0, float(shift)), progress=False).transitions
    expected = 200 * float(shift) + np.load(path)["reward"].sum()
    assert abs(float(rows["next", "reward"].double().sum()) - expected) < 1, "another table"
"""


@pytest.mark.slow
def test_processes_with_other_options_share_a_folder(archive: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADER, str(archive), str(tmp_path / "table")]
    workers = [
        subprocess.Popen(
            [*command, str(tmp_path / "start"), shift], stderr=subprocess.PIPE, text=True
        )
        for shift in ("0", "5")
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_table_with_a_cut_file_is_built_again(archive: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    whole = load_dataset(archive, memmap=table).transitions.clone()
    (path,) = table.rglob("reward.memmap")
    os.truncate(path, path.stat().st_size // 2)
    assert (load_dataset(archive, memmap=table).transitions == whole).all()


def test_a_reused_table_repeats_its_warnings(tmp_path: Path) -> None:
    data = arrays()
    data["terminated"] = data["truncated"].copy()
    np.savez(tmp_path / "data.npz", **data)
    texts = []
    for _ in range(2):
        with pytest.warns(DatasetWarning) as caught:
            dataset = load_dataset(tmp_path / "data.npz", memmap=tmp_path / "table")
        texts.append([str(warning.message) for warning in caught])
        assert caught[0].filename == __file__
        assert set(texts[-1]) <= set(dataset.notes)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2  # 20 rows are marked twice, and all terminations come at step 10.


@pytest.mark.parametrize("as_id", [True, False])
def test_an_environment_registered_again_rebuilds_its_table(tmp_path: Path, as_id: bool) -> None:
    data = arrays()
    del data["truncated"], data["next_observation"]
    data["observation"] = data["observation"][:, [0, 0]]  # Without jumps.
    np.savez(tmp_path / "data.npz", **data)
    lengths = []
    for steps in (10, 20):
        gym.register("Again-v0", entry_point=Again, max_episode_steps=steps)
        env = "Again-v0" if as_id else gym.spec("Again-v0")
        dataset = load_dataset(tmp_path / "data.npz", env=env, memmap=tmp_path / "table")
        lengths.append(dataset.episode_lengths.tolist())
        del gym.registry["Again-v0"]
    assert lengths == [[9] * 20, [19] * 10]


class Again(gym.Env[Any, Any]):
    observation_space = gym.spaces.Box(-1000, 1000, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))


def test_wide_bounds_are_told_apart(tmp_path: Path) -> None:
    data = {**arrays(), "action": np.zeros((200, 2000), np.float32)}
    np.savez(tmp_path / "data.npz", **data)
    for middle in (2.0, 3.0):
        high = np.ones(2000, np.float32)
        high[1000] = middle
        space = gym.spaces.Box(-high, high)
        dataset = load_dataset(tmp_path / "data.npz", action_space=space, memmap=tmp_path / "table")
        assert dataset.action_space == space


def test_parts_of_virtual_hdf5_datasets_are_required_and_digested(tmp_path: Path) -> None:
    data, part, whole = arrays(), tmp_path / "part.h5", tmp_path / "whole.h5"
    reward = data.pop("reward")
    layout = h5py.VirtualLayout((200,), np.float32)
    layout[:] = h5py.VirtualSource("part.h5", "reward", (200,), np.float32)
    with h5py.File(whole, "w") as file:
        file.create_virtual_dataset("reward", layout)
        for key, values in data.items():
            file[key] = values
    with pytest.raises(DatasetError, match=r"whole\.h5: takes .*part\.h5, which does not exist"):
        load_dataset(whole)
    for factor in (1, 3):
        with h5py.File(part, "w") as file:
            file["reward"] = factor * reward
        returns = load_dataset(whole, memmap=tmp_path / "table").episode_returns
        assert np.allclose(returns.sum(), factor * reward.sum())
