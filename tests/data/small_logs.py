"""Small logs: rows that count, random walks, numbered rows; their files, and what is read from them."""

import io
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from extras import needs

from iql_torchrl.data import DatasetError, DatasetWarning, build_shards, load_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
LENGTHS = [7, 3, 12, 5, 5, 9, 2, 8, 6, 11]
UNEQUAL = (4, 2, 5)
#: Rows of the transitions of ``UNEQUAL`` where the second episode terminates, and of those after them.
KEPT, FOLLOWING = [0, 1, 2, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 5, 7, 8, 9, 10]
SPACES = {
    "observation_space": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "action_space": gym.spaces.Box(-1, 1, (2,), np.float32),
}


def ends_of(lengths):
    return np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)


def pair(steps):
    return np.stack([steps, -steps], 1).astype(np.float32)


def counted(*lengths, terminated=(), observe=pair):
    """Step n of episode t has the reward n and observes 100 t + n, and 100 t + n + 1 after it.

    The episodes ``terminated`` terminate, the others are truncated.
    """
    number = np.repeat(np.arange(len(lengths)), lengths)
    steps = np.concatenate([np.arange(float(n)) for n in lengths])
    ends, ended = ends_of(lengths), np.isin(number, terminated)
    return {
        "observation": observe(100 * number + steps),
        "next_observation": observe(100 * number + steps + 1),
        "action": np.linspace(-1, 1, len(steps), dtype=np.float32)[:, None],
        "reward": steps.astype(np.float32),
        "terminated": ends & ended,
        "truncated": ends & ~ended,
    }


def step_table(**columns):
    """One row a step, as lists; the second of three episodes terminates. A column None is left out."""
    rows = counted(*UNEQUAL, terminated=[1])
    rows = {key: rows[key].tolist() for key in ("observation", "action", "reward", "terminated")}
    rows |= {"episode_index": np.repeat(np.arange(3), UNEQUAL).tolist(), **columns}
    return {key: values for key, values in rows.items() if values is not None}


def drift(lengths, width=3, seed=0, *, successors=True):
    """Random walks of the given lengths from random places, without flags, and their ends."""
    rng = np.random.default_rng(seed)
    walks = [
        10 * rng.standard_normal(width) + np.cumsum(0.1 * rng.standard_normal((n + 1, width)), 0)
        for n in lengths
    ]
    rows, ends = sum(lengths), ends_of(lengths)
    data = {
        "observation": np.concatenate([walk[:-1] for walk in walks]),
        "next_observation": np.concatenate([walk[1:] for walk in walks]),
        "action": rng.uniform(-1, 1, (rows, 2)),
        "reward": rng.standard_normal(rows),
    }
    data = {key: values.astype(np.float32) for key, values in data.items()}
    if not successors:
        del data["next_observation"]
    return data | {"terminated": ends & False, "truncated": ends & False}, ends


def numbered(lengths, seed=0):
    """Random rows whose observation begins with their number; all episodes are truncated."""
    rng, rows, ends = np.random.default_rng(seed), sum(lengths), ends_of(lengths)
    observation = rng.normal(5.0, 2.0, (rows + 1, 3)).astype(np.float32)
    observation[:, 0] = np.arange(rows + 1)
    following = observation[1:].copy()
    following[ends] = rng.normal(5.0, 2.0, (len(lengths), 3))  # seen by no row
    return {
        "observation": observation[:-1],
        "next_observation": following,
        "action": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "reward": rng.normal(size=rows).astype(np.float32),
        "terminated": np.zeros(rows, bool),
        "truncated": ends,
    }


# -- files


def save(path, data):
    """Write an npz, HDF5, CSV or Parquet file, as its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **data)
    elif path.suffix == ".parquet":
        save_parquet(path, data)
    elif path.suffix == ".csv":
        names = [f"{k}.0" if v.ndim == 2 else k for k, v in data.items()]  # one number each
        cells = zip(*(v.ravel().tolist() for v in data.values()), strict=True)
        path.write_text("\n".join(",".join(map(str, line)) for line in (names, *cells)))
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for key, values in data.items():
                file[key] = values
    return path


def save_parquet(path, data, **options):
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in data.items()}
    parquet.write_table(pa.table(lists), path, **options)
    return path


def png(values):
    data = io.BytesIO()
    needs("PIL.Image").fromarray(values).save(data, "png")
    return data.getvalue()


def in_shards(folder, lengths, shards, seed=0, **options):
    """``shards`` in ``folder / "shards"`` of a dataset that is deleted afterwards."""
    source = save(folder / "log.npz", numbered(lengths, seed))
    dataset = build_shards(source, folder / "shards", shards, **{**SPACES, **options})
    source.unlink()
    return dataset


def flip(path):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# -- what is read


def first(dataset, key="observation"):
    """The first number of each row of an entry."""
    return dataset.transitions[key].reshape(len(dataset), -1)[:, 0].tolist()


def marked(dataset):
    """The rows that terminate, and those that are truncated."""
    flags = (dataset.transitions["next", name] for name in ("terminated", "truncated"))
    return tuple(flag.flatten().nonzero().flatten().tolist() for flag in flags)


def assert_counted(dataset, lengths, terminated=(), key=("observation",)):
    """``dataset`` is ``counted(*lengths, terminated=...)``, read without its next observations.

    Truncated episodes lose their last row, which has no successor; terminated ones keep it.
    """
    kept = [n - (number not in terminated) for number, n in enumerate(lengths)]
    expected = counted(*kept, terminated=terminated, observe=lambda steps: steps)
    ended, now, following = (
        expected[name] for name in ("terminated", "observation", "next_observation")
    )
    assert dataset.episode_lengths.tolist() == kept
    assert first(dataset, key) == now.tolist()
    assert first(dataset, ("next", *key)) == np.where(ended, now, following).tolist()
    assert first(dataset, ("next", "reward")) == expected["reward"].tolist()
    assert marked(dataset) == tuple(
        np.flatnonzero(expected[name]).tolist() for name in ("terminated", "truncated")
    )


def leaves(values, prefix=("observation",)):
    if isinstance(values, dict):
        return {k: v for n, c in values.items() for k, v in leaves(c, (*prefix, n)).items()}
    return {prefix: values}


def assert_is_minaris(dataset, stored):
    """``dataset`` has every step of the Minari dataset ``stored``, once and equal."""
    rows, start = dataset.transitions, 0
    for number, episode in enumerate(stored.iterate_episodes()):
        length = len(episode.rewards)
        part = rows[start : start + length]
        terminated = np.asarray(episode.terminations)
        truncated = np.asarray(episode.truncations) & ~terminated
        truncated[-1] |= ~terminated[-1]
        entries = {
            ("action",): episode.actions, ("next", "reward"): episode.rewards,
            ("next", "terminated"): terminated, ("next", "truncated"): truncated,
            ("next", "done"): terminated | truncated,
        }  # fmt: skip
        for key, values in leaves(episode.observations).items():
            if key[-1] != "action_mask":
                entries |= {key: values[:-1], ("next", *key): values[1:]}
        for key, values in entries.items():
            expected = torch.tensor(np.array(values)).to(part[key].dtype)
            assert torch.equal(part[key], expected.reshape(part[key].shape)), key
        assert bool((part["collector", "traj_ids"] == number).all())
        assert dataset.episode_lengths[number] == length
        assert np.isclose(dataset.episode_returns[number], np.sum(episode.rewards))
        start += length
    assert start == len(dataset)


def rows_of_all(dataset):
    """The rows of all shards, in memory."""
    parts = []
    for number in range(len(dataset.shards)):
        with dataset.shard(number) as rows:
            parts.append(rows.clone())
    return torch.cat(parts)


def loaded(data, **options):
    """The dataset and the sentences of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetWarning)
        dataset = load_dataset(data, **options)
    return dataset, [str(w.message) for w in caught]


def warned(data, **options):
    """The warnings of ``load_dataset``."""
    return loaded(data, **options)[1]


def refused(words, source, read=load_dataset, **options):
    """``read`` raises one sentence that has all ``words``, which ``|`` separates; the sentence."""
    with pytest.raises(DatasetError) as caught:
        read(source, **options)
    message = str(caught.value)
    assert all(word in message for word in words.split("|")), message
    assert "\n" not in message
    return message
