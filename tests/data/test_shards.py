"""Logs in shards: equal to the whole log, whole episodes, verified, and refused where damaged."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from shard_logs import LENGTHS, SPACES, arrays, flip, rows_of_all, written
from small_agents import config

from iql_torchrl import IQLPopulation, load_dataset, make_agent
from iql_torchrl.agent.hub import data_of
from iql_torchrl.data import DatasetError, ShardedDataset, build_shards, load_shards
from iql_torchrl.data.__main__ import main
from iql_torchrl.data.digests import fingerprint
from iql_torchrl.data.saved import verify
from iql_torchrl.data.shards import episodes_of_shards
from iql_torchrl.sweep import Sweep


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> ShardedDataset:
    """In three shards; no test changes its files."""
    return written(tmp_path_factory.mktemp("three"), LENGTHS, 3)


@pytest.fixture
def copied(three, tmp_path) -> Path:
    """A copy of its folder, to be damaged."""
    return Path(shutil.copytree(three.log.location.name, tmp_path / "shards"))


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Blocks of 10 rows of 47 bytes, so that blocks cross the borders of shards."""
    monkeypatch.setattr("iql_torchrl.data.build.BLOCK_BYTES", 470)


@pytest.mark.parametrize("shards", [1, 3, 10])
def test_the_shards_hold_the_rows_and_numbers_of_the_whole_log(tmp_path, small_blocks, shards):
    log, source = written(tmp_path, LENGTHS, shards), arrays(LENGTHS)
    whole = load_dataset(source, **SPACES)
    assert fingerprint(rows_of_all(log)) == fingerprint(whole.transitions)
    assert (len(log), log.name, log.dtype) == (sum(LENGTHS), "log.npz", torch.float32)
    np.testing.assert_array_equal(log.episode_lengths, LENGTHS)
    np.testing.assert_array_equal(log.episode_returns, whole.episode_returns)
    np.testing.assert_array_equal(log.sketch(), whole.sketch())
    statistics = log.statistics["observation"]
    # NumPy's own, over all rows at once
    rows = source["observation"].astype(np.float64)
    np.testing.assert_allclose(statistics.mean.numpy(), rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.std.numpy(), rows.std(0), rtol=1e-6)
    assert (statistics.count, statistics.constant) == (sum(LENGTHS), ())
    assert log.range_of(("action",)) == (source["action"].min(), source["action"].max())
    assert log.range_of(("next", "truncated")) == (0, 1)
    assert (log.masked, whole.masked) == (False, False)


def test_statistics_stay_exact_for_numbers_far_from_zero(tmp_path, small_blocks):
    """A sum of squares in float64 would lose all digits of the deviation."""
    log_arrays = arrays(LENGTHS)
    for name in ("observation", "next_observation"):
        log_arrays[name] = log_arrays[name].astype(np.float64) + 1e9
    columns = log_arrays["observation"]
    space = {"observation_space": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)}
    np.savez(tmp_path / "log.npz", **log_arrays)
    log = build_shards(
        tmp_path / "log.npz", tmp_path / "shards", 3, **{**SPACES, **space}, dtype=torch.float64
    )
    np.testing.assert_allclose(log.statistics["observation"].std.numpy(), columns.std(0), rtol=1e-6)


@pytest.mark.parametrize("reward", ["return_range", "minus_one", (0.5, 2.0)])
@pytest.mark.parametrize("when", ["build", "load"])
def test_rewards_have_the_map_of_the_whole_log(tmp_path, reward, when):
    log = written(tmp_path, LENGTHS, 4, **({"reward": reward} if when == "build" else {}))
    if when == "load":
        log = load_shards(tmp_path / "shards", reward=reward)
    raw = arrays(LENGTHS)["reward"].astype(np.float64)
    returns = [part.sum() for part in np.split(raw, np.cumsum(LENGTHS)[:-1])]
    scale, shift = {
        "return_range": (1000 / (max(returns) - min(returns)), 0), "minus_one": (1, -1),
    }.get(reward, reward)  # fmt: skip
    assert log.reward_map.scale == pytest.approx(scale, rel=1e-12)
    assert log.reward_map.shift == shift
    rewards = rows_of_all(log)["next", "reward"].squeeze(-1)
    np.testing.assert_allclose(rewards.numpy(), scale * raw + shift, rtol=1e-6)
    if when == "build":
        with pytest.raises(DatasetError, match="reward='raw' is another map; pass the first"):
            load_shards(tmp_path / "shards")


@pytest.mark.parametrize(
    ("lengths", "shards", "rows"),
    [
        ([3, 3, 3, 3, 3, 3], 3, [6, 6, 6]),
        ([5, 1, 1, 1, 8], 2, [8, 8]),  # the third episode ends at 7, the fourth at 8 of 16
        ([10, 2, 2], 2, [10, 4]),  # 7 is nearer to 10 than to 0
        ([1, 1, 1, 97], 4, [1, 1, 1, 97]),  # every shard has an episode
        ([97, 1, 1, 1], 4, [97, 1, 1, 1]),
        ([4], 1, [4]),
    ],
)
def test_shards_are_cut_at_the_ends_of_episodes_nearest_to_equal_parts(lengths, shards, rows):
    edges = episodes_of_shards(np.array(lengths), shards, "log")
    assert [sum(lengths[a:b]) for a, b in itertools.pairwise(edges)] == rows


def test_shards_differ_from_equal_parts_by_at_most_the_longest_episode():
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, rng.integers(2, 60), rng.integers(1, 80))
        shards = int(rng.integers(1, len(lengths) + 1))
        edges = episodes_of_shards(lengths, shards, "log")
        rows = [lengths[a:b].sum() for a, b in itertools.pairwise(edges)]
        assert (np.diff(edges) > 0).all()
        assert np.abs(np.array(rows) - lengths.sum() / shards).max() <= lengths.max()


def test_episodes_are_whole_and_keep_their_numbers(three):
    seen = []
    for number in range(3):
        with three.shard(number) as rows:
            ids, ends = rows["collector", "traj_ids"], rows["next", "done"].squeeze(-1)
            assert bool(ends[-1])
            seen += ids[ends].tolist()
            own = ids.unique()
            assert ids.bincount()[own].tolist() == [LENGTHS[episode] for episode in own]
    assert seen == list(range(10))


def test_an_agent_is_made_from_the_record_alone(copied):
    for shard in copied.glob("shard-*"):
        shutil.rmtree(shard)
    agent = make_agent(config(), load_shards(copied))
    other = make_agent(config(), load_dataset(arrays(LENGTHS), **SPACES))
    mine, theirs = agent.loss.state_dict(), other.loss.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    np.testing.assert_array_equal(agent.task.episodes, other.task.episodes)
    data_of(agent.task, load_shards(copied))  # as sharing an agent does
    with pytest.raises(ValueError, match="whose episodes are not those"):
        data_of(agent.task, load_dataset(arrays(LENGTHS, seed=1), **SPACES))


def test_the_command_builds_and_verifies(tmp_path, capsys):
    folder = tmp_path / "shards"
    np.savez(tmp_path / "log.npz", **arrays(LENGTHS))
    command = ["build", str(tmp_path / "log.npz"), str(folder), "--shards", "4"]
    assert main(command) == 0
    expected = "68 transitions in 4 shards; open it with load_shards(FOLDER)."
    assert expected in capsys.readouterr().out
    assert main(["verify", str(folder)]) == 0
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "built.json"]
    total = sum(path.stat().st_size for path in files)
    assert f"{total:,} bytes have the content that was built" in capsys.readouterr().out
    assert main(command) == 1
    assert "exists already; choose another path" in capsys.readouterr().err
    flip(folder / "shard-00002" / "action.memmap")
    with pytest.raises(DatasetError, match=r"shard-00002/action.memmap has another content"):
        verify(folder)
    assert main(["verify", str(folder)]) == 1
    assert "another content" in capsys.readouterr().err


def missing(folder: Path) -> None:
    shutil.rmtree(folder / "shard-00001")


def truncated(folder: Path) -> None:
    path = folder / "shard-00001" / "action.memmap"
    path.write_bytes(path.read_bytes()[:-8])


def flipped(folder: Path) -> None:
    flip(folder / "shard-00001" / "action.memmap")


def exchanged(folder: Path) -> None:
    """With a shard of another log, that is complete in itself."""
    (folder.parent / "other").mkdir()
    written(folder.parent / "other", LENGTHS, 3, seed=1)
    shutil.rmtree(folder / "shard-00001")
    shutil.move(folder.parent / "other" / "shards" / "shard-00001", folder)


FAULTS = {
    missing: "(shard-00001/observation.memmap is missing); copy the folder again",
    truncated: "action.memmap has 160 bytes, built with 168",
    flipped: "action.memmap has another content than when it was built",
    exchanged: "shard-00001/observation.memmap has another content than when it was built",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_damaged_shard_is_refused_with_one_sentence(copied, fault):
    fault(copied)
    log = load_shards(copied)
    with pytest.raises(DatasetError) as caught, log.shard(1):
        pass
    assert FAULTS[fault] in str(caught.value)
    assert "\n" not in str(caught.value)
    with log.shard(0) as rows:  # the others stay usable
        assert len(rows) == log.shards[0].rows
    with pytest.raises(DatasetError) as caught:
        log.replay_buffer(8, loaded=3)
    assert FAULTS[fault] in str(caught.value)


def test_a_damaged_record_is_refused(copied):
    record = copied / "built.json"
    text = record.read_text()
    saved = json.loads(text)
    for content, words in (
        (text[:-100], r"incomplete or damaged \(built.json .* cannot be read"),
        (json.dumps(saved | {"format": 9}), "was built by another version of this package"),
        (json.dumps(saved | {"shards": saved["shards"][:2]}), "43 rows in place of 68"),
    ):
        record.write_text(content)
        with pytest.raises(DatasetError, match=words):
            load_shards(copied)
    record.write_text(text)
    (copied / "episodes.npz").unlink()
    with pytest.raises(DatasetError, match=r"episodes.npz is missing"):
        load_shards(copied)


@pytest.mark.parametrize(
    ("shards", "change", "text"),
    [
        (0, {}, "expected a whole number, at least 1, got 0"),
        (True, {}, "got True"),
        (11, {}, "10 episodes do not fill 11 shards of whole episodes; choose at most 10"),
        (3, {"reward": np.full(68, np.nan, np.float32)}, "next.reward is NaN or infinite"),
    ],
)
def test_a_build_that_fails_leaves_nothing(tmp_path, shards, change, text):
    with pytest.raises(DatasetError, match=text):
        build_shards(arrays(LENGTHS) | change, tmp_path / "shards", shards, **SPACES)
    assert list(tmp_path.iterdir()) == []


def test_what_needs_all_rows_refuses_shards(three, tmp_path):
    log, folder = three, Path(three.log.location.name)
    with pytest.raises(DatasetError, match=r"a folder of shards, .*data.load_shards\("):
        load_dataset(folder)
    with pytest.raises(DatasetError, match="a log in 3 shards, and this needs all rows in one"):
        _ = log.transitions
    for name in ("windows", "split", "device_sampler"):
        with pytest.raises(AttributeError, match=f"and {name} needs all rows in one table"):
            getattr(log, name)
    with pytest.raises(AttributeError, match="no attribute 'window'"):
        _ = log.window
    with pytest.raises(TypeError, match=r"dataset is ShardedDataset.*shards are not possible"):
        IQLPopulation([config()], log)
    with pytest.raises(ValueError, match=r"a folder of shards, and a sweep needs all rows"):
        Sweep([config()], folder, tmp_path / "sweep")
    with pytest.raises(DatasetError, match="is a built table already; build shards from the"):
        build_shards(folder, tmp_path / "again", 2)
    with pytest.raises(DatasetError, match=r"built.json is missing: no folder of a built table or"):
        load_shards(tmp_path)
