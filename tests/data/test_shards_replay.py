"""Batches from shards: which transitions, their proportions and order, resumed, and from addresses."""

import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import needs
from scipy.stats import chisquare
from small_logs import LENGTHS, flip, in_shards, rows_of_all

from iql_torchrl.data import DatasetError, ShardedReplay, load_shards
from iql_torchrl.data.shards import Rotation

EQUAL = [5] * 12  # six shards of two episodes of five rows
ADDRESS = "memory://logs/shards"


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """Of ``EQUAL`` in six shards; no test changes its files."""
    return in_shards(tmp_path_factory.mktemp("equal"), EQUAL, 6)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Of ``LENGTHS`` in five shards; no test changes its files."""
    return in_shards(tmp_path_factory.mktemp("unequal"), LENGTHS, 5)


def rows_of(batch):
    """The numbers of a batch's transitions in the dataset."""
    return batch["observation"][:, 0].numpy().astype(int)


def sequence(replay, batches):
    leaves = [replay.sample() for _ in range(batches)]
    return [torch.cat([v.double().flatten() for v in b.values(True, True)]) for b in leaves]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- the order of the shards -----------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "loaded"), [(1, 1), (2, 1), (5, 2), (5, 4), (6, 3), (9, 8)])
@pytest.mark.parametrize("seed", range(5))
def test_each_pass_loads_every_shard_once_and_none_that_is_loaded(shards, loaded, seed):
    rotation = Rotation(shards, loaded, seed)
    stream = list(rotation.loaded)
    while len(stream) < 8 * shards:
        stays = [s for place, s in enumerate(rotation.loaded) if place != rotation.oldest]
        assert rotation.coming not in stays
        stream.append(rotation.coming)
        place = rotation.advance()
        assert rotation.loaded[place] == stream[-1]
        # the oldest was replaced: the last ones of the stream are loaded
        assert sorted(rotation.loaded) == sorted(stream[-loaded:])
    for start in range(0, len(stream), shards):
        assert sorted(stream[start : start + shards]) == list(range(shards))


def test_orders_differ_and_every_first_one_is_equally_likely():
    def stream(seed, shards=10, loaded=2, length=18):
        rotation = Rotation(shards, loaded, seed)
        return (*rotation.loaded, *(rotation.loaded[rotation.advance()] for _ in range(length)))

    assert stream(0) == stream(0) != stream(1)
    assert stream(0)[:10] != stream(0)[10:]
    # of three shards, one loaded: six orders of the first pass
    counts = Counter(stream(seed, 3, 1, 2) for seed in range(1200))
    assert len(counts) == 6
    assert chisquare(list(counts.values())).pvalue > 1e-3


# -- which rows --------------------------------------------------------------------------------------


def test_a_loaded_shard_is_drawn_from_in_proportion_to_its_rows(tmp_path):
    """Shards of 2, 4 and 6 rows, all loaded: row r of the places together is drawn by number r."""
    dataset = in_shards(tmp_path, [2, 4, 6], 3)
    assert [shard.rows for shard in dataset.shards] == [2, 4, 6]
    replay = dataset.replay_buffer(4096, seed=5, loaded=3)
    rows = {0: [0, 1], 1: [2, 3, 4, 5], 2: [6, 7, 8, 9, 10, 11]}
    placed = np.concatenate([rows[number] for number in replay.loaded_shards()])
    numbers = torch.randint(12, (4096,), generator=torch.Generator().manual_seed(5))
    found = rows_of(replay.sample())
    np.testing.assert_array_equal(found, placed[numbers.numpy()])
    shares = [np.isin(found, rows[number]).mean() for number in range(3)]
    np.testing.assert_allclose(shares, [2 / 12, 4 / 12, 6 / 12], atol=0.03)


def test_every_entry_of_a_row_is_that_of_the_log(unequal):
    whole = rows_of_all(unequal).exclude("collector")
    replay = unequal.replay_buffer(32, seed=0, loaded=2, replace_every=2)
    for _ in range(12):
        batch = replay.sample()
        assert set(batch.keys(True, True)) == set(whole.keys(True, True))
        assert bool((batch == whole[rows_of(batch)]).all())
    assert rows_of(replay.sample(7)).shape == (7,)


def test_batches_are_uniform_within_the_loaded_shards_and_over_many_passes_in_all(equal):
    """Counts of rows, each shard's number of batches while it was loaded, and their chi-squared."""
    replay = equal.replay_buffer(256, seed=0, loaded=2, replace_every=3)
    counts, batches = np.zeros(60), np.zeros(6)
    for number in range(6 * 3 * 12):
        rows = np.bincount(rows_of(replay.sample()), minlength=60)
        loaded = replay.loaded_shards()
        assert len(replay) == 20
        assert rows.reshape(6, 10)[loaded].sum() == 256  # and no row of the other shards
        counts, batches = counts + rows, batches + np.bincount(loaded, minlength=6)
        if number < 3:
            assert chisquare(rows.reshape(6, 10)[loaded].flatten()).pvalue > 1e-3
    # 12 passes of 18 batches, each shard loaded for 6 batches of each; at the ends of the run less
    assert batches.sum() == 2 * 216
    assert np.abs(batches - 72).max() <= 6
    assert chisquare(counts, np.repeat(batches * 256 / 20, 10)).pvalue > 1e-3
    assert np.abs(counts / counts.mean() - 1).max() < 0.15


def test_all_shards_loaded_is_the_whole_log_with_mapped_rewards(equal):
    replay = equal.replay_buffer(64, seed=0, loaded=6, replace_every=1)
    before = replay.loaded_shards()
    counts = sum(np.bincount(rows_of(replay.sample()), minlength=60) for _ in range(50))
    assert replay.loaded_shards() == before  # nothing is replaced
    assert chisquare(counts).pvalue > 1e-3
    mapped = load_shards(equal.saved.location.name, reward=(2.0, -1.0))
    raw, batch = (
        dataset.replay_buffer(32, seed=0, loaded=2).sample() for dataset in (equal, mapped)
    )
    assert torch.equal(batch["next", "reward"], raw["next", "reward"] * 2 - 1)


def test_the_next_shard_is_read_by_a_thread_before_it_is_needed(equal, monkeypatch):
    load, read, done = ShardedReplay._load, [], threading.Event()

    def noted(self, number, slot):
        load(self, number, slot)
        read.append((number, threading.current_thread() is threading.main_thread()))
        if len(read) == 3:
            done.set()

    monkeypatch.setattr(ShardedReplay, "_load", noted)
    replay = equal.replay_buffer(8, seed=0, loaded=2, replace_every=5)
    assert done.wait(60)  # no batch was drawn yet
    first = replay.loaded_shards()
    assert [main for _, main in read] == [True, True, False]
    assert [number for number, _ in read[:2]] == first
    for _ in range(6):
        replay.sample()
    assert replay.loaded_shards() == [read[2][0], first[1]]


# -- state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [0, 3, 5, 62])
def test_a_loaded_state_continues_with_the_same_bits(unequal, batches):
    """In the middle of a replacement's turn, at its end, and in later passes."""
    settings = {"loaded": 2, "replace_every": 5}
    replay = unequal.replay_buffer(16, seed=3, **settings)
    sequence(replay, batches)
    state = replay.state_dict()
    expected = sequence(replay, 60)
    other = load_shards(unequal.saved.location.name).replay_buffer(16, seed=9, **settings)
    sequence(other, 8)
    other.load_state_dict(state)
    assert same(sequence(other, 60), expected)
    replay.load_state_dict(state)  # also back in the same replay
    assert same(sequence(replay, 60), expected)
    again, another = (unequal.replay_buffer(16, seed=seed, **settings) for seed in (3, 4))
    sequence(again, batches)
    assert same(sequence(again, 60), expected)  # as every replay of this seed
    assert not same(sequence(another, batches + 60)[batches:], expected)


def test_other_settings_and_settings_that_cannot_be(equal):
    state = equal.replay_buffer(8, seed=0, loaded=2, replace_every=5).state_dict()
    for options, text in (
        ({"loaded": 3, "replace_every": 5}, "loaded = 2, and this one has 3"),
        ({"loaded": 2, "replace_every": 4}, "replace_every = 5, and this one has 4"),
    ):
        with pytest.raises(ValueError, match=text):
            equal.replay_buffer(8, seed=0, **options).load_state_dict(state)
    for options, text in (
        ({"loaded": 7}, "loaded is 7 and log.npz has 6 shards; choose at most 6"),
        ({"loaded": 0}, "loaded is 0; expected an integer >= 1"),
        ({"replace_every": 0}, "replace_every is 0; expected"),
        ({"batch_size": 2.5}, "batch_size is 2.5; expected"),
    ):
        with pytest.raises(ValueError, match=text):
            equal.replay_buffer(**{"batch_size": 8, **options})


def test_a_shard_that_is_lost_while_training_is_named_at_its_batch(tmp_path):
    dataset = in_shards(tmp_path, EQUAL, 3)
    expected = sequence(dataset.replay_buffer(8, seed=0, loaded=1, replace_every=2), 8)
    replay = dataset.replay_buffer(8, seed=0, loaded=1, replace_every=2)
    replay._coming.result()
    (last,) = {0, 1, 2} - {replay.loaded_shards()[0], replay.rotation.coming}
    place = tmp_path / "shards" / f"shard-{last:05d}"
    shutil.move(place, tmp_path / "away")
    assert same(sequence(replay, 4), expected[:4])  # of the first two shards
    said = rf"shard {last} could not be read, nor a second time .*shard-{last:05d}/.*is missing"
    for _ in range(2):  # tried again at every batch
        with pytest.raises(DatasetError, match=said):
            replay.sample()
    shutil.move(tmp_path / "away", place)
    assert same(sequence(replay, 4), expected[4:])  # as if it had always been there


# -- addresses ---------------------------------------------------------------------------------------


@pytest.fixture
def memory(equal):
    """A dataset in shards on fsspec's file system in memory."""
    system = needs("fsspec").filesystem("memory")
    system.put(equal.saved.location.name, "/logs/shards", recursive=True)
    yield system
    system.rm("/logs", recursive=True)


def test_an_address_gives_the_batches_of_the_folder(memory, equal):
    settings = {"seed": 0, "loaded": 2, "replace_every": 3}
    expected = sequence(equal.replay_buffer(8, **settings), 30)
    for address in (ADDRESS, Path(equal.saved.location.name).as_uri()):  # file:///...
        dataset = load_shards(address)
        assert not dataset.saved.location.is_local
        assert same(sequence(dataset.replay_buffer(8, **settings), 30), expected)


def test_copies_stay_in_the_cache_and_nowhere_else(memory, monkeypatch, tmp_path):
    settings, cache = {"seed": 0, "loaded": 2, "replace_every": 1}, tmp_path / "cache"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    expected = sequence(load_shards(ADDRESS).replay_buffer(8, **settings), 12)
    dataset = load_shards(ADDRESS, cache=cache)
    replay = dataset.replay_buffer(8, **settings)
    assert same(sequence(replay, 12), expected)
    replay._coming.result()
    assert list((tmp_path / "temporary").iterdir()) == []
    digests = {digest for name, (_, digest) in dataset.saved.files.items() if "/" in name}
    assert {path.name for path in cache.iterdir()} == digests
    for number in range(6):
        memory.rm(f"/logs/shards/shard-{number:05d}", recursive=True)
    again = load_shards(ADDRESS, cache=cache).replay_buffer(8, **settings)
    assert same(sequence(again, 12), expected)
    flip(cache / dataset.saved.files["shard-00000/action.memmap"][1])
    with pytest.raises(DatasetError, match="another content"):
        load_shards(ADDRESS, cache=cache).replay_buffer(8, loaded=6).sample()
