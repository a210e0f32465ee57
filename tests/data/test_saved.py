"""Tables on disk: equal to those in memory, copied to another folder, verified, refused, used again."""

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
import torch
from shard_logs import SPACES, arrays, flip

from iql_torchrl.data import DatasetError, DatasetWarning, build_shards, load_dataset
from iql_torchrl.data.__main__ import main
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.data.readers.source import ReadOptions
from iql_torchrl.data.reuse import identity
from iql_torchrl.data.saved import folder_lock, verify

LENGTHS = [10] * 20
#: Of ``arrays``: 2 x 3 observations, 2 actions and a reward of 4 bytes, 3 marks, the episode's 8.
ROW_BYTES = 2 * 3 * 4 + 2 * 4 + 4 + 3 + 8


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", **arrays(LENGTHS))
    return tmp_path / "data.npz"


@pytest.fixture
def built(archive: Path, tmp_path: Path) -> Path:
    """A table, at another place than where it was built and without its source."""
    assert main(["build", str(archive), str(tmp_path / "first")]) == 0
    archive.unlink()
    (tmp_path / "other").mkdir()
    return Path(shutil.move(tmp_path / "first", tmp_path / "other" / "copy"))


def assert_same(first: Any, second: Any) -> None:
    assert fingerprint(first.transitions) == fingerprint(second.transitions)
    for name in ("reward_map", "action_space", "observation_space", "action_spec", "notes", "name"):
        assert getattr(first, name) == getattr(second, name), name
    for name in ("episode_returns", "episode_lengths"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for key, value in first.statistics.items():
        assert torch.equal(second.statistics[key].mean, value.mean)
        assert torch.equal(second.statistics[key].std, value.std)


# -- a table that is opened


@pytest.mark.parametrize("reward", ["raw", "return_range", "minus_one", (0.5, 2.0)])
def test_a_copy_without_its_source_equals_the_source_bit_for_bit(built, tmp_path, reward) -> None:
    np.savez(tmp_path / "data.npz", **arrays(LENGTHS))
    assert_same(
        load_dataset(tmp_path / "data.npz", reward=reward), load_dataset(str(built), reward=reward)
    )
    # the files keep the raw rewards
    raw = load_dataset(built).transitions["next", "reward"]
    np.testing.assert_array_equal(raw.squeeze(-1).numpy(), arrays(LENGTHS)["reward"])


@pytest.mark.parametrize("reward", ["raw", "return_range"])
def test_memmap_equals_memory_and_reopens(archive, tmp_path, monkeypatch, reward) -> None:
    monkeypatch.setattr("iql_torchrl.data.build.BLOCK_BYTES", 2000)  # Many small blocks.
    memory = load_dataset(archive, reward=reward)
    table = load_dataset(archive, reward=reward, memmap=tmp_path / "table")
    monkeypatch.setattr("iql_torchrl.data.readers.opening.open_npz", None)  # it is not read again
    start = time.perf_counter()
    reopened = load_dataset(archive, reward=reward, memmap=tmp_path / "table")
    assert time.perf_counter() - start < 1
    for other in (table, reopened):
        assert_same(memory, other)
        assert other.replay_buffer(4, seed=0).sample().shape == (4,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "table"]


def test_the_digest_depends_neither_on_the_path_nor_on_the_time(tmp_path: Path) -> None:
    records = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "log.npz", **arrays(LENGTHS))
        load_dataset(tmp_path / name / "log.npz", memmap=tmp_path / name / "table")
        records.append(json.loads((tmp_path / name / "table" / "built.json").read_text()))
    assert records[0]["source"] != records[1]["source"]  # their paths
    assert records[0]["files"] == records[1]["files"]
    tables = [load_dataset(tmp_path / name / "table") for name in ("a", "b")]
    assert fingerprint(tables[0].transitions) == fingerprint(tables[1].transitions)


def test_checksums_find_a_flipped_bit_that_the_sizes_do_not_show(built: Path, capsys) -> None:
    assert verify(built) > 200 * ROW_BYTES
    assert main(["verify", str(built)]) == 0
    flip(built / "shard-00000" / "action.memmap")
    load_dataset(built)  # opening reads no rows
    with pytest.raises(DatasetError, match=r"action\.memmap has another content"):
        verify(built)
    assert main(["verify", str(built)]) == 1
    assert "another content" in capsys.readouterr().err


# -- damage


def drop(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, 11)


def older(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))


def without_spaces(path: Path) -> None:
    saved = json.loads(path.read_text())
    del saved["observation_space"]
    path.write_text(json.dumps(saved))


def a_list(path: Path) -> None:
    path.write_text('["?"]')


DAMAGE = [
    (cut, "built.json", "built.json .* cannot be read"),
    (a_list, "built.json", "built.json .* cannot be read"),
    (without_spaces, "built.json", "built.json .* cannot be read"),
    (older, "built.json", "built by another version of this package; build it again"),
    (drop, "episodes.npz", "episodes.npz is missing"),
    (cut, "episodes.npz", "incomplete or damaged"),
    (drop, "shard-00000", "shard-00000/observation.memmap is missing"),
    (drop, "shard-00000/action.memmap", "shard-00000/action.memmap is missing"),
    (cut, "shard-00000/next/reward.memmap", "reward.memmap has 11 bytes, built with 800"),
]


@pytest.mark.parametrize(
    ("damage", "name", "words"), [*DAMAGE, (drop, "built.json", "built.json is missing")]
)
def test_incomplete_and_damaged_folders_get_one_sentence(built, damage, name, words) -> None:
    damage(built / name)
    with pytest.raises(DatasetError, match=words) as raised:
        load_dataset(built)
    assert str(built) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGE)
def test_damaged_tables_are_built_again_from_their_source(archive, tmp_path, damage, name, words):
    table = tmp_path / "table"
    whole = load_dataset(archive, memmap=table).transitions.clone()  # Not a view of the files.
    damage(table / name)
    assert (load_dataset(archive, memmap=table).transitions == whole).all()
    verify(table)


def test_folders_of_older_versions_are_named(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "built.json").write_text('{"fingerprint": {"format": 2}}')
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards.json").write_text('{"format": 1}')
    with pytest.raises(DatasetError, match="built by another version of this package; build it"):
        load_dataset(tmp_path / "table")
    with pytest.raises(
        DatasetError, match="or one of an older version; copy it again, or build it"
    ):
        load_dataset(tmp_path / "shards")


# -- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 5}, "limit=5 cannot be applied"),
        ({"memmap": "x"}, "memmap='x' cannot be applied"),
        ({"clip_actions": True}, "clip_actions=True cannot be applied"),
        ({"dtype": torch.float64}, "pass dtype=torch.float32"),
    ],
)
def test_options_that_only_a_build_can_follow_are_refused(built, options, words) -> None:
    with pytest.raises(DatasetError, match=words):
        load_dataset(built, **options)


def test_rewards_that_the_build_mapped_are_not_mapped_again(archive, tmp_path: Path) -> None:
    load_dataset(archive, reward="minus_one", memmap=tmp_path / "table")
    opened = load_dataset(tmp_path / "table", reward="minus_one")
    np.testing.assert_array_equal(
        opened.transitions["next", "reward"].squeeze(-1).numpy(), arrays(LENGTHS)["reward"] - 1
    )
    with pytest.raises(DatasetError, match=r"mapped with reward=\(1.0, -1.0\)"):
        load_dataset(tmp_path / "table")


def test_other_folders_are_no_tables_and_never_overwritten(built, archive, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"built.json is missing: no folder of a built table"):
        verify(tmp_path / "empty")
    with pytest.raises(DatasetError, match="loaded alone"):
        load_dataset([built, built])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    np.savez(archive, **arrays(LENGTHS))
    with pytest.raises(DatasetError, match="not made by load_dataset"):
        load_dataset(archive, memmap=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    build_shards(archive, tmp_path / "shards", 1)
    build_shards(archive, tmp_path / "two", 2)
    (tmp_path / "two" / "built.json").write_text("{")  # damaged, and yet not overwritten
    for name in ("shards", "two"):
        with pytest.raises(DatasetError, match="not made by load_dataset"):
            load_dataset(archive, memmap=tmp_path / name)
    assert len(load_dataset(tmp_path / "shards")) == 200  # one shard is a table


# -- a full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_gets_full_is_named_with_its_space(archive, tmp_path, monkeypatch, number):
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("iql_torchrl.data.build.DiskTables.commit", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=123_456))
    with pytest.raises(DatasetError) as caught:
        load_dataset(archive, memmap=tmp_path / "table")
    for words in (str(tmp_path / "table"), f"{200 * ROW_BYTES:,} bytes", "123,456 are free"):
        assert words in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_a_table_that_will_not_fit_is_refused_before_it_is_written(archive, tmp_path, monkeypatch):
    load_dataset(archive, memmap=tmp_path / "table")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(DatasetError, match=r"needs 9,400 bytes and 5,000 are free.*nothing"):
        load_dataset(archive, memmap=tmp_path / "table", reward="minus_one")
    assert len(load_dataset(archive, memmap=tmp_path / "table")) == 200  # The old one is there.


def test_nothing_half_built_stays(archive: Path, tmp_path: Path) -> None:
    bad = arrays(LENGTHS)
    bad["reward"][150] = np.nan
    np.savez(archive, **bad)
    with pytest.raises(DatasetError, match="row 150"):
        load_dataset(archive, memmap=tmp_path / "table")
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


# -- when a table is built again


def test_memmap_is_rebuilt_when_anything_changed(archive: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    first = load_dataset(archive, memmap=table).transitions["next", "reward"].clone()
    other = load_dataset(archive, memmap=table, reward="minus_one")
    assert torch.equal(other.transitions["next", "reward"], first - 1)
    np.savez(archive, **arrays(LENGTHS[:5]))
    os.utime(archive, (1, 1))
    assert len(load_dataset(archive, memmap=table)) == 50
    assert len(load_dataset(arrays(LENGTHS[:3]), memmap=table)) == 30
    assert len(load_dataset(arrays(LENGTHS[:4]), memmap=table)) == 40


@pytest.mark.parametrize("large", [False, True])
def test_a_source_of_equal_size_and_time_but_other_content_is_read_again(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:  # Sampled, not read whole.
        monkeypatch.setattr("iql_torchrl.data.reuse.WHOLE", 1000)
        monkeypatch.setattr("iql_torchrl.data.reuse.BLOCK", 500)
    data, before = arrays(LENGTHS), archive.stat()
    first = load_dataset(archive, memmap=tmp_path / "table")
    np.savez(archive, **{**data, "reward": data["reward"] + 1})
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = archive.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = load_dataset(archive, memmap=tmp_path / "table")
    assert np.allclose(second.episode_returns, first.episode_returns + first.episode_lengths)


def test_a_large_source_is_digested_fast(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    with open(path, "wb") as file:
        file.truncate(5 * 2**30)
    start = time.perf_counter()
    first = identity(path, ReadOptions())
    assert time.perf_counter() - start < 1
    stamp = path.stat().st_mtime_ns
    for place in (0, 5 * 2**30 - 1):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"1")
        os.utime(path, ns=(stamp, stamp))
        assert identity(path, ReadOptions()) != first


class Again(gym.Env[Any, Any]):
    observation_space, action_space = SPACES["observation_space"], SPACES["action_space"]


@pytest.mark.parametrize("as_id", [True, False])
def test_an_environment_registered_again_rebuilds_its_table(tmp_path: Path, as_id: bool) -> None:
    data = arrays(LENGTHS)
    del data["truncated"], data["next_observation"]
    data["observation"] = data["observation"][:, [0, 0, 0]]  # Without jumps.
    np.savez(tmp_path / "data.npz", **data)
    lengths = []
    for steps in (10, 20):
        gym.register("Again-v0", entry_point=Again, max_episode_steps=steps)
        env = "Again-v0" if as_id else gym.spec("Again-v0")
        dataset = load_dataset(tmp_path / "data.npz", env=env, memmap=tmp_path / "table")
        lengths.append(dataset.episode_lengths.tolist())
        del gym.registry["Again-v0"]
    assert lengths == [[9] * 20, [19] * 10]


def test_wide_bounds_are_told_apart(tmp_path: Path) -> None:
    data = {**arrays(LENGTHS), "action": np.zeros((200, 2000), np.float32)}
    np.savez(tmp_path / "data.npz", **data)
    for middle in (2.0, 3.0):
        high = np.ones(2000, np.float32)
        high[1000] = middle
        space = gym.spaces.Box(-high, high)
        dataset = load_dataset(tmp_path / "data.npz", action_space=space, memmap=tmp_path / "table")
        assert dataset.action_space == space


def test_parts_of_virtual_hdf5_datasets_are_required_and_digested(tmp_path: Path) -> None:
    data, part, whole = arrays(LENGTHS), tmp_path / "part.h5", tmp_path / "whole.h5"
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


def test_a_reused_table_repeats_its_warnings(tmp_path: Path) -> None:
    data = arrays(LENGTHS)
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


def test_a_folder_that_is_written_is_locked_for_all_others(tmp_path: Path) -> None:
    import fcntl

    with (
        folder_lock(tmp_path / "table"),
        (tmp_path / ".table.lock").open() as file,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert not any(tmp_path.iterdir())


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
