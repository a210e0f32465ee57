"""Datasets on disk: equal to those in memory, copied, verified, refused, built again, and reused."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from small_logs import SPACES, flip, in_shards, numbered, refused, save

from iql_torchrl.data import DatasetWarning, build_shards, load_dataset, load_shards
from iql_torchrl.data.__main__ import main
from iql_torchrl.data.saved import verify
from iql_torchrl.files import folder_lock

LENGTHS = [10] * 20
#: Of ``numbered``: 2 x 3 observations, 2 actions and a reward of 4 bytes, 3 flags, the episode's 8.
ROW_BYTES = 2 * 3 * 4 + 2 * 4 + 4 + 3 + 8


@pytest.fixture
def archive(tmp_path):
    return save(tmp_path / "data.npz", numbered(LENGTHS))


@pytest.fixture
def built(archive, tmp_path):
    """A dataset, at another place than where it was built and without its source."""
    assert main(["build", str(archive), str(tmp_path / "first")]) == 0
    archive.unlink()
    (tmp_path / "other").mkdir()
    return Path(shutil.move(tmp_path / "first", tmp_path / "other" / "copy"))


def assert_same(first, second):
    assert first.fingerprint() == second.fingerprint()
    for name in ("reward_map", "action_space", "observation_space", "action_spec", "notes", "name"):
        assert getattr(first, name) == getattr(second, name), name
    for name in ("episode_returns", "episode_lengths"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for key, value in first.statistics.items():
        assert torch.equal(second.statistics[key].mean, value.mean)
        assert torch.equal(second.statistics[key].std, value.std)


def test_a_folder_that_is_a_link_is_built_where_it_leads(archive, tmp_path):
    """As to a larger disk: the link was replaced by a folder beside it."""
    large, home = tmp_path / "large", tmp_path / "home"
    home.mkdir()
    for name in ("table", "shards"):
        (large / name).mkdir(parents=True)
        (home / name).symlink_to(large / name)
    for limit in (50, 100):  # built, and built again
        dataset = load_dataset(archive, memmap=home / "table", limit=limit)
        assert len(load_dataset(large / "table")) == len(dataset) == limit
    build_shards(archive, home / "shards", 2)
    assert len(load_shards(large / "shards")) == sum(LENGTHS)
    assert all((home / name).is_symlink() for name in ("table", "shards"))
    assert sorted(path.name for path in large.iterdir()) == ["shards", "table"]


# -- a dataset that is opened


@pytest.mark.parametrize("reward", ["raw", "return_range", "minus_one", (0.5, 2.0)])
def test_memory_memmap_and_copies_are_equal_bit_for_bit(built, tmp_path, monkeypatch, reward):
    monkeypatch.setattr("iql_torchrl.data.saved.PART_BYTES", 2000)  # many small parts
    archive, table = save(tmp_path / "data.npz", numbered(LENGTHS)), tmp_path / "table"
    memory = load_dataset(archive, reward=reward)
    assert_same(memory, load_dataset(str(built), reward=reward))  # without its source
    assert_same(memory, load_dataset(archive, reward=reward, memmap=table))
    monkeypatch.setattr("iql_torchrl.data.load.open_source", None)  # it is not read again
    start = time.perf_counter()
    reopened = load_dataset(archive, reward=reward, memmap=table)
    assert time.perf_counter() - start < 1
    assert_same(memory, reopened)
    assert reopened.replay_buffer(4, seed=0).sample().shape == (4,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "other", "table"]
    # the files keep the raw rewards
    raw = load_dataset(built).transitions["next", "reward"]
    np.testing.assert_array_equal(raw.squeeze(-1).numpy(), numbered(LENGTHS)["reward"])


def test_the_digest_depends_neither_on_the_path_nor_on_the_time(tmp_path):
    records, tables = [], [tmp_path / name / "table" for name in ("a", "b")]
    for table in tables:
        archive = save(table.parent / "log.npz", numbered(LENGTHS))
        load_dataset(archive, memmap=table)
        records.append(json.loads((table / "built.json").read_text()))
    assert records[0]["source"] != records[1]["source"]  # their paths
    assert records[0]["files"] == records[1]["files"]
    assert load_dataset(tables[0]).fingerprint() == load_dataset(tables[1]).fingerprint()


@pytest.mark.parametrize("shards", [1, 4])
def test_the_command_builds_and_verifies(tmp_path, capsys, shards):
    archive, folder = save(tmp_path / "log.npz", numbered(LENGTHS)), tmp_path / "folder"
    command = ["build", str(archive), str(folder), *(["--shards", "4"] if shards > 1 else [])]
    assert main(command) == 0
    expected = "200 transitions in 4 shards; open it with load_shards(FOLDER)."
    assert (expected in capsys.readouterr().out) == (shards > 1)
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "built.json"]
    total = sum(path.stat().st_size for path in files)
    assert verify(folder) == total > 200 * ROW_BYTES
    assert main(["verify", str(folder)]) == 0
    assert f"{total:,} bytes have the content that was built" in capsys.readouterr().out
    if shards > 1:
        assert main(command) == 1
        assert "exists already; choose another path" in capsys.readouterr().err
    # a flipped bit that the sizes do not show
    flip(folder / f"shard-0000{shards - 1}" / "action.memmap")
    (load_dataset if shards == 1 else load_shards)(folder)  # opening reads no transitions
    refused(f"shard-0000{shards - 1}/action.memmap has another content", folder, verify)
    assert main(["verify", str(folder)]) == 1
    assert "another content" in capsys.readouterr().err


# -- damage


def drop(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path):
    os.truncate(path, 11)


def rewrite(**changes):
    """Change entries of a record; None drops one."""

    def change(path):
        saved = json.loads(path.read_text()) | changes
        dropped = {name for name, value in changes.items() if value is None}
        path.write_text(json.dumps({k: v for k, v in saved.items() if k not in dropped}))

    return change


def text(content):
    return lambda path: path.write_text(content)


def older_shards(path):
    (path.parent / "shards.json").write_text('{"format": 1}')
    path.unlink()


DAMAGE = [
    (cut, "built.json", "built.json | cannot be read"),
    (text('["?"]'), "built.json", "built.json | cannot be read"),
    (rewrite(observation_space=None), "built.json", "built.json | cannot be read"),
    (rewrite(format=2), "built.json", "built by another version of this package; build it again"),
    (rewrite(reference_scores=[1.0, 1.0]), "built.json", "the second greater"),
    (rewrite(shards=[]), "built.json", "0 transitions in place of 200"),
    (text('{"fingerprint": {"format": 2}}'), "built.json", "built by another version of this pack"),
    (drop, "episodes.npz", "episodes.npz is missing"),
    (cut, "episodes.npz", "incomplete or damaged"),
    (drop, "shard-00000", "shard-00000/observation.memmap is missing"),
    (drop, "shard-00000/action.memmap", "shard-00000/action.memmap is missing"),
    (cut, "shard-00000/next/reward.memmap", "reward.memmap has 11 bytes, built with 800"),
]


OLD = "or one of an older version; copy it again, or build it"
NO_RECORD = [
    (drop, "built.json", "built.json is missing: not a folder of a built dataset or of shards"),
    (older_shards, "built.json", OLD),
]


@pytest.mark.parametrize(("damage", "name", "words"), [*DAMAGE, *NO_RECORD])
def test_incomplete_and_damaged_folders_get_one_sentence(built, damage, name, words):
    damage(built / name)
    for read in (load_dataset, load_shards)[: 1 if "shard-" in name else 2]:  # reads no transitions
        message = refused(words, built, read)
        assert str(built) in message or message.startswith("reference_scores")


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGE)
def test_damaged_datasets_are_built_again_from_their_source(archive, tmp_path, damage, name, words):
    table = tmp_path / "table"
    whole = load_dataset(archive, memmap=table).transitions.clone()  # Not a view of the files.
    damage(table / name)
    assert (load_dataset(archive, memmap=table).transitions == whole).all()
    verify(table)


# -- what a record may name


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "C:\\x", "a\\b", ""])
def test_names_in_a_record_lead_below_the_folder(tmp_path, name):
    in_shards(tmp_path, [3, 3], 2)
    record = tmp_path / "shards" / "built.json"
    saved = json.loads(record.read_text())
    for files in ({**saved["files"], name: [1, "0"]}, {**saved["files"], "x": [1, name]}):
        rewrite(files=files)(record)
        for opened in (load_shards, verify, load_dataset):
            refused("expected a path below the dataset's folder", tmp_path / "shards", opened)


def test_only_files_of_the_record_are_read(tmp_path):
    in_shards(tmp_path, [3, 3], 1)
    folder = tmp_path / "shards"
    (folder / "shard-00000" / "other.pickle").write_bytes(b"\x80 not a pickle")
    (folder / "shard-00000" / "meta.json").write_text("{")
    assert len(load_dataset(folder)) == 6
    entries = json.loads((folder / "built.json").read_text())["entries"]
    entries[0][0] = ["..", "..", "outside"]
    rewrite(entries=entries)(folder / "built.json")
    (tmp_path / "outside.memmap").write_bytes(bytes(6 * 3 * 4))
    refused("outside.memmap is missing", folder)


# -- options and folders


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 5}, "limit=5 cannot be applied"),
        ({"memmap": "x"}, "memmap='x' cannot be applied"),
        ({"clip_actions": True}, "clip_actions=True cannot be applied"),
        ({"dtype": torch.float64}, "pass dtype=torch.float32"),
    ],
)
def test_options_that_only_a_build_can_follow_are_refused(built, options, words):
    refused(words, built, **options)
    refused("loaded alone", [built, built])


def test_rewards_that_the_build_scaled_are_not_scaled_again(archive, tmp_path):
    load_dataset(archive, reward="minus_one", memmap=tmp_path / "table")
    rewards = load_dataset(tmp_path / "table", reward="minus_one").transitions["next", "reward"]
    np.testing.assert_array_equal(rewards.squeeze(-1).numpy(), numbered(LENGTHS)["reward"] - 1)
    refused("scaled by reward=(1.0, -1.0)", tmp_path / "table")
    equal = save(tmp_path / "equal.npz", numbered(LENGTHS) | {"reward": np.ones(200, np.float32)})
    load_dataset(equal, memmap=tmp_path / "equal")
    refused("equal: |return_range", tmp_path / "equal", reward="return_range")


def test_other_folders_are_never_overwritten(archive, tmp_path):
    (tmp_path / "mine").mkdir()
    refused("built.json is missing: not a folder of a built dataset or", tmp_path / "mine", verify)
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    build_shards(archive, tmp_path / "shards", 1)
    build_shards(archive, tmp_path / "two", 2)
    (tmp_path / "two" / "built.json").write_text("{")  # damaged, and yet not overwritten
    for name in ("mine", "shards", "two"):
        refused("not made by load_dataset", archive, memmap=tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert len(load_dataset(tmp_path / "shards")) == 200  # one shard is loaded at once


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_gets_full_is_named_with_its_space(archive, tmp_path, monkeypatch, number):
    full = Mock(side_effect=OSError(number, os.strerror(number)))
    monkeypatch.setattr("iql_torchrl.data.build.DiskTables.append", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=123_456))
    space = f"{200 * ROW_BYTES:,} bytes|123,456 are free"
    refused(f"{tmp_path / 'table'}|{space}", archive, memmap=tmp_path / "table")
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_a_dataset_that_cannot_be_built_leaves_the_old_one(archive, tmp_path, monkeypatch):
    table, bad = tmp_path / "table", numbered(LENGTHS)
    bad["reward"][150] = np.nan
    refused("row 150", save(archive, bad), memmap=table)
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]
    save(archive, numbered(LENGTHS))
    load_dataset(archive, memmap=table)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000))
    words = "needs 9,400 bytes and 5,000 are free|nothing"
    refused(words, archive, memmap=table, reward="minus_one")
    assert len(load_dataset(archive, memmap=table)) == 200


# -- when a dataset is built again


def test_memmap_is_rebuilt_when_anything_changed(archive, tmp_path):
    table = tmp_path / "table"
    first = load_dataset(archive, memmap=table).transitions["next", "reward"].clone()
    other = load_dataset(archive, memmap=table, reward="minus_one")
    assert torch.equal(other.transitions["next", "reward"], first - 1)
    save(archive, numbered(LENGTHS[:5]))
    os.utime(archive, (1, 1))
    assert len(load_dataset(archive, memmap=table)) == 50
    assert len(load_dataset(numbered(LENGTHS[:3]), memmap=table)) == 30
    assert len(load_dataset(numbered(LENGTHS[:4]), memmap=table)) == 40
    data = {**numbered(LENGTHS), "action": np.zeros((200, 2000), np.float32)}
    save(archive, data)
    for middle in (2.0, 3.0):  # the text of wide bounds is shortened
        high = np.ones(2000, np.float32)
        high[1000] = middle
        space = gym.spaces.Box(-high, high)
        assert load_dataset(archive, action_space=space, memmap=table).action_space == space


@pytest.mark.parametrize("large", [False, True])
def test_a_source_of_equal_size_and_time_but_other_content_is_read_again(
    archive, tmp_path, monkeypatch, large
):
    if large:  # Sampled, not read whole.
        monkeypatch.setattr("iql_torchrl.data.load.WHOLE", 1000)
        monkeypatch.setattr("iql_torchrl.data.load.CHUNK", 500)
    data, before = numbered(LENGTHS), archive.stat()
    first = load_dataset(archive, memmap=tmp_path / "table")
    save(archive, {**data, "reward": data["reward"] + 1})
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = archive.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = load_dataset(archive, memmap=tmp_path / "table")
    assert np.allclose(second.episode_returns, first.episode_returns + first.episode_lengths)


def test_a_large_source_is_digested_fast(tmp_path):
    from iql_torchrl.data.load import identity
    from iql_torchrl.data.readers.options import ReadOptions

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


class Again(gym.Env):
    observation_space, action_space = SPACES["observation_space"], SPACES["action_space"]


@pytest.mark.parametrize("as_id", [True, False])
def test_an_environment_registered_again_rebuilds_its_dataset(tmp_path, as_id):
    data = numbered(LENGTHS)
    del data["truncated"], data["next_observation"]
    data["observation"] = data["observation"][:, [0, 0, 0]]  # Without jumps.
    archive, lengths = save(tmp_path / "data.npz", data), []
    for steps in (10, 20):
        gym.register("Again-v0", entry_point=Again, max_episode_steps=steps)
        env = "Again-v0" if as_id else gym.spec("Again-v0")
        with pytest.warns(DatasetWarning, match="continues the same episode"):  # one long walk
            dataset = load_dataset(archive, env=env, memmap=tmp_path / "table")
        lengths.append(dataset.episode_lengths.tolist())
        del gym.registry["Again-v0"]
    assert lengths == [[9] * 20, [19] * 10]


def test_a_reused_dataset_repeats_its_warnings(tmp_path):
    data = numbered(LENGTHS)
    archive = save(tmp_path / "data.npz", data | {"terminated": data["truncated"]})
    texts = []
    for _ in range(2):
        with pytest.warns(DatasetWarning) as caught:
            dataset = load_dataset(archive, memmap=tmp_path / "table")
        texts.append([str(warning.message) for warning in caught])
        assert caught[0].filename == __file__
        assert set(texts[-1]) <= set(dataset.notes)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1  # 10 rows have both flags


# -- other processes


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


def test_a_folder_that_is_written_is_locked_for_all_others(tmp_path):
    other = FileLock(tmp_path / ".table.lock", timeout=0, thread_local=False)
    with ThreadPoolExecutor(1) as thread:
        with folder_lock(tmp_path / "table"), pytest.raises(Timeout):
            thread.submit(other.acquire).result()
        assert not any(tmp_path.iterdir())
        with folder_lock(tmp_path / "table"):
            other.timeout = -1
            waiting = thread.submit(other.acquire)
            time.sleep(0.2)
            assert not waiting.done()
        with waiting.result(timeout=10):  # of a file that has a name again
            assert [path.name for path in tmp_path.iterdir()] == [".table.lock"]


@pytest.mark.slow
def test_processes_with_other_options_share_a_folder(archive, tmp_path):
    command = [sys.executable, "-c", LOADER, str(archive), str(tmp_path / "table")]
    start = str(tmp_path / "start")
    workers = [
        subprocess.Popen([*command, start, shift], stderr=subprocess.PIPE, text=True)
        for shift in ("0", "5")
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
