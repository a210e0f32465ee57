"""Datasets in shards: equal to the whole dataset, whole episodes, at addresses, refused if damaged."""

import itertools
import shutil
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from extras import needs
from small_agents import config
from small_logs import LENGTHS, SPACES, flip, in_shards, numbered, refused, rows_of_all, save

from iql_torchrl import IQLPopulation, load_dataset, make_agent
from iql_torchrl.agent.hub import data_of
from iql_torchrl.data import DatasetError, build_shards, load_shards
from iql_torchrl.data.digests import fingerprint


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """In three shards; no test changes its files."""
    return in_shards(tmp_path_factory.mktemp("three"), LENGTHS, 3)


@pytest.fixture
def copied(three, tmp_path):
    """A copy of its folder, to be damaged."""
    return Path(shutil.copytree(three.saved.location.name, tmp_path / "shards"))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 10 rows of 47 bytes, so that blocks cross the borders of shards."""
    monkeypatch.setattr("iql_torchrl.data.saved.PART_BYTES", 470)


@pytest.mark.parametrize("shards", [1, 3, 10])
def test_the_shards_have_the_transitions_and_statistics_of_the_whole_dataset(
    tmp_path, small_blocks, shards
):
    dataset, source = in_shards(tmp_path, LENGTHS, shards), numbered(LENGTHS)
    whole = load_dataset(source, **SPACES)
    assert fingerprint(rows_of_all(dataset)) == whole.fingerprint()
    assert (len(dataset), dataset.name, dataset.dtype) == (sum(LENGTHS), "log.npz", torch.float32)
    np.testing.assert_array_equal(dataset.episode_lengths, LENGTHS)
    np.testing.assert_array_equal(dataset.episode_returns, whole.episode_returns)
    np.testing.assert_array_equal(dataset.sketch(), whole.sketch())
    statistics = dataset.statistics["observation"]
    # NumPy's, over all rows at once
    rows = source["observation"].astype(np.float64)
    np.testing.assert_allclose(statistics.mean.numpy(), rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.std.numpy(), rows.std(0), rtol=1e-6)
    assert (statistics.count, statistics.constant) == (sum(LENGTHS), ())
    for data in (dataset, whole):
        for key, rows in ((("action",), source["action"]), (("next", "reward"), source["reward"])):
            assert data.range_of(key) == (rows.min(), rows.max())
        assert data.range_of(("next", "truncated")) == (0, 1)
        assert data.masked is False


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_depth_in_wide_unsigned_integers_is_built_on_disk(tmp_path, kind):
    """Of which torch has no minimum on a CPU."""
    rows = numbered(LENGTHS)
    rows |= {n: (50 * rows[n] + 60_000).astype(kind) for n in ("observation", "next_observation")}
    spaces = {**SPACES, "observation_space": gym.spaces.Box(0, 65_535, (3,), kind)}
    source = save(tmp_path / "log.npz", rows)
    dataset = build_shards(source, tmp_path / "shards", 3, **spaces)
    ends = (rows["observation"].min(), rows["observation"].max())
    assert dataset.range_of(("observation",)) == ends
    assert (
        load_dataset(source, memmap=tmp_path / "table", **spaces).range_of(("observation",)) == ends
    )


def test_statistics_stay_exact_for_numbers_far_from_zero(tmp_path, small_blocks):
    """A sum of squares in float64 would lose all digits of the deviation."""
    rows = numbered(LENGTHS)
    for name in ("observation", "next_observation"):
        rows[name] = rows[name].astype(np.float64) + 1e9
    spaces = {**SPACES, "observation_space": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)}
    source = save(tmp_path / "log.npz", rows)
    dataset = build_shards(source, tmp_path / "shards", 3, **spaces, dtype=torch.float64)
    std = dataset.statistics["observation"].std.numpy()
    np.testing.assert_allclose(std, rows["observation"].std(0), rtol=1e-6)


@pytest.mark.parametrize("reward", ["return_range", "minus_one", (-2.0, 1.0)])
@pytest.mark.parametrize("when", ["build", "load"])
def test_rewards_have_the_scaling_of_the_whole_dataset(tmp_path, reward, when):
    dataset = in_shards(tmp_path, LENGTHS, 4, **({"reward": reward} if when == "build" else {}))
    if when == "load":
        dataset = load_shards(tmp_path / "shards", reward=reward)
    raw = numbered(LENGTHS)["reward"].astype(np.float64)
    returns = [part.sum() for part in np.split(raw, np.cumsum(LENGTHS)[:-1])]
    scale, shift = {
        "return_range": (1000 / (max(returns) - min(returns)), 0), "minus_one": (1, -1),
    }.get(reward, reward)  # fmt: skip
    assert dataset.reward_map.scale == pytest.approx(scale, rel=1e-12)
    assert dataset.reward_map.shift == shift
    rewards = rows_of_all(dataset)["next", "reward"].squeeze(-1)
    mapped = scale * raw + shift
    np.testing.assert_allclose(rewards.numpy(), mapped, rtol=1e-6)
    assert dataset.range_of(("next", "reward")) == pytest.approx((mapped.min(), mapped.max()))
    if when == "build":
        refused("reward='raw' is another scaling; pass the first", tmp_path / "shards", load_shards)


def rows_of_shards(folder, lengths, shards):
    """The transitions of each shard: episodes are whole and keep their numbers."""
    dataset, seen, rows = in_shards(folder, lengths, shards), [], []
    for number in range(shards):
        with dataset.shard(number) as table:
            ids, ends = table["collector", "traj_ids"], table["next", "done"].squeeze(-1)
            assert bool(ends[-1])
            episodes = ids[ends].tolist()
            assert ids.bincount()[episodes].tolist() == [lengths[each] for each in episodes]
            seen += episodes
            rows.append(len(table))
    assert seen == list(range(len(lengths)))
    return rows


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
def test_shards_are_cut_at_the_ends_of_episodes_nearest_to_equal_parts(
    tmp_path, lengths, shards, rows
):
    assert rows_of_shards(tmp_path, lengths, shards) == rows


def test_shards_differ_from_equal_parts_by_at_most_the_longest_episode():
    from iql_torchrl.data.shards import episodes_of_shards

    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, rng.integers(2, 60), rng.integers(1, 80))
        shards = int(rng.integers(1, len(lengths) + 1))
        edges = episodes_of_shards(lengths, shards, "log")
        rows = [lengths[a:b].sum() for a, b in itertools.pairwise(edges)]
        assert (np.diff(edges) > 0).all()
        assert np.abs(np.array(rows) - lengths.sum() / shards).max() <= lengths.max()


def test_an_agent_is_made_from_the_record_alone(copied):
    for shard in copied.glob("shard-*"):
        shutil.rmtree(shard)
    agent = make_agent(config(), load_shards(copied))
    other = make_agent(config(), load_dataset(numbered(LENGTHS), **SPACES))
    mine, theirs = agent.loss.state_dict(), other.loss.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    np.testing.assert_array_equal(agent.task.episodes, other.task.episodes)
    data_of(agent.task, load_shards(copied))  # as sharing an agent does
    with pytest.raises(ValueError, match="whose episodes are not those"):
        data_of(agent.task, load_dataset(numbered(LENGTHS, seed=1), **SPACES))


# -- damage, in a folder and at an address


def missing(folder):
    shutil.rmtree(folder / "shard-00001")


def truncated(folder):
    path = folder / "shard-00001" / "action.memmap"
    path.write_bytes(path.read_bytes()[:-8])


def without_a_file(folder):
    (folder / "shard-00001" / "action.memmap").unlink()


def flipped(folder):
    flip(folder / "shard-00001" / "action.memmap")


def exchanged(folder):
    """With a shard of another dataset, that is complete in itself."""
    in_shards(folder.parent / "other", LENGTHS, 3, seed=1)
    shutil.rmtree(folder / "shard-00001")
    shutil.move(folder.parent / "other" / "shards" / "shard-00001", folder)


FAULTS = {
    missing: "(shard-00001/observation.memmap is missing); copy the folder again",
    truncated: "shard-00001/action.memmap has 160 bytes|, built with 168",
    without_a_file: "shard-00001/action.memmap is missing); copy the folder again",
    flipped: "action.memmap has another content than when it was built",
    exchanged: "shard-00001/observation.memmap has another content than when it was built",
}


@pytest.fixture
def memory():
    """fsspec's file system in memory, which is emptied afterwards."""
    system = needs("fsspec").filesystem("memory")
    yield system
    system.rm("/logs", recursive=True)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("place", ["folder", "address", "cached"])
def test_a_damaged_shard_is_refused_with_one_sentence(copied, tmp_path, memory, fault, place):
    fault(copied)
    memory.put(str(copied), "/logs/shards", recursive=True)
    location, cache = str(copied) if place == "folder" else "memory://logs/shards", None
    if place == "cached":
        cache = tmp_path / "cache"
    dataset = load_shards(location, cache=cache)
    compared = place != "folder" and fault in (truncated, flipped, exchanged)
    for read, of in (
        (lambda number: dataset.shard(number).__enter__(), 1),
        (dataset.replay_buffer, 8),
    ):
        message = refused(f"{location}|{FAULTS[fault]}", of, read)
        assert ("in its copy" in message) == compared
    with dataset.shard(0) as rows:  # the others stay usable
        assert len(rows) == dataset.shards[0].rows
    if cache is not None:  # no copy of what is damaged stays
        names = [f"shard-00001/{name}.memmap" for name in ("action", "observation")]
        wrong = {
            dataset.saved.files[name][1]
            for name in names[: 2 if fault in (missing, exchanged) else 1]
        }
        whole = {digest for _, digest in dataset.saved.files.values()}
        assert {path.name for path in cache.iterdir()} < whole - wrong


@pytest.mark.parametrize(
    ("shards", "change", "text"),
    [
        (0, {}, "expected an integer, at least 1, got 0"),
        (True, {}, "got True"),
        (11, {}, "10 episodes do not fill 11 shards of whole episodes; choose at most 10"),
        (3, {"reward": np.full(68, np.nan, np.float32)}, "next.reward is NaN or infinite"),
    ],
)
def test_a_build_that_fails_leaves_nothing(tmp_path, shards, change, text):
    source = numbered(LENGTHS) | change
    refused(text, source, build_shards, folder=tmp_path / "shards", shards=shards, **SPACES)
    assert list(tmp_path.iterdir()) == []


def test_what_needs_all_transitions_refuses_shards(three, tmp_path):
    dataset, folder = three, Path(three.saved.location.name)
    refused("a folder of shards, |data.load_shards(", folder)
    with pytest.raises(
        DatasetError, match="a dataset in 3 shards, and this needs all transitions at once"
    ):
        _ = dataset.transitions
    for name in ("windows", "split", "device_sampler"):
        with pytest.raises(AttributeError, match=f"and {name} needs all transitions at once"):
            getattr(dataset, name)
    with pytest.raises(AttributeError, match="no attribute 'window'"):
        _ = dataset.window
    with pytest.raises(TypeError, match=r"dataset is ShardedDataset.*shards are not possible"):
        IQLPopulation([config()], dataset)
    again = {"folder": tmp_path / "again", "shards": 2}
    refused("is a built dataset already; build shards from the", folder, build_shards, **again)


def test_an_address_that_cannot_be_reached_is_named(three, monkeypatch, memory):
    memory.put(three.saved.location.name, "/logs/shards", recursive=True)
    refused("memory://logs: built.json is missing", "memory://logs", load_shards)
    refused("nosuch://log: cannot be read |Protocol not known", "nosuch://log", load_shards)
    dataset = load_shards("memory://logs/shards")
    for name in ("cat_file", "get_file"):
        refuse = Mock(side_effect=ConnectionError("no route to host"))
        monkeypatch.setattr(type(memory), name, refuse)
    words = "memory://logs/shards: cannot be read (ConnectionError: no route to host); check"
    refused(words, "memory://logs/shards", load_shards)
    refused(words, 8, dataset.replay_buffer)
