"""Windows of observations: contents, masks, memory, sampling and stacks."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from small_logs import counted, refused
from torchrl.data import SamplerWithoutReplacement

from iql_torchrl import load_dataset
from iql_torchrl.data import (
    DatasetWarning,
    WindowSampler,
    stacked_space,
    stacked_statistics,
)
from iql_torchrl.networks import stack_frames

BOTH = ("observation", "o"), (("next", "observation"), "next_o")


def frames_of(windows, row):
    batch = windows[[row]]
    entries = (
        batch["observation"][0, :, 0],
        batch["history_mask"][0],
        batch["next", "observation"][0, :, 0],
        batch["next", "history_mask"][0],
    )
    return tuple(entry.tolist() for entry in entries)


def test_windows_by_hand():
    """Episodes 0, 1, 2 | 100, 101 with a last next observation of 3 and 102."""
    data = load_dataset(counted(3, 2, terminated=[0]))
    windows = data.windows(3)
    no, yes = False, True
    assert [frames_of(windows, row) for row in range(5)] == [
        ([0, 0, 0], [no, no, yes], [0, 0, 1], [no, yes, yes]),
        ([0, 0, 1], [no, yes, yes], [0, 1, 2], [yes, yes, yes]),
        ([0, 1, 2], [yes, yes, yes], [1, 2, 3], [yes, yes, yes]),
        ([100, 100, 100], [no, no, yes], [100, 100, 101], [no, yes, yes]),
        ([100, 100, 101], [no, yes, yes], [100, 101, 102], [yes, yes, yes]),
    ]
    batch, plain = windows[:], data.transitions
    assert batch.shape == (5,)
    masks = {"history_mask", ("next", "history_mask")}
    assert {*batch.keys(True, True)} == {*plain.keys(True, True), *masks}
    for key in {*plain.keys(True, True)} - {"observation", ("next", "observation")}:
        assert torch.equal(batch[key], plain[key])
    mask = torch.tensor([False, True, False, True, False])
    for chosen in (mask, mask.tolist()):
        assert windows[chosen]["next", "reward"].flatten().tolist() == [1, 0]
    with pytest.raises(IndexError, match=r"mask \[3\].*tensor \[5\]"):
        windows[mask[:3]]


def reference(transitions, lengths, length):
    """The windows by loops over episodes."""
    now = transitions["observation"].numpy()
    following = transitions["next", "observation"].numpy()
    windows = {"o": [], "m": [], "next_o": [], "next_m": []}
    start = 0
    for count in lengths:
        episode = [*now[start : start + count], following[start + count - 1]]
        for step in range(count):
            for name, last in (("", step), ("next_", step + 1)):
                real = episode[max(0, last - length + 1) : last + 1]
                missing = length - len(real)
                windows[f"{name}o"].append([episode[0]] * missing + real)
                windows[f"{name}m"].append([False] * missing + [True] * len(real))
        start += count
    return {name: np.array(rows) for name, rows in windows.items()}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=8),
    st.integers(1, 7),
    st.integers(0, 2**16),
)
def test_windows_equal_a_loop_over_episodes(lengths, length, seed):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=1000).astype(np.float32)
    rows = counted(*lengths, observe=lambda t: values[t.astype(int), None] * [1, 2])
    data, length = load_dataset(rows, clip_actions=True), min(length, max(lengths))
    expected = reference(data.transitions, lengths, length)
    windows = data.windows(length)
    rows = torch.as_tensor(generator.integers(0, len(data), 20))
    for batch in (windows[rows], windows.device_sampler(4, seed=0).gather(rows)):
        for key, name in (*BOTH, ("history_mask", "m"), (("next", "history_mask"), "next_m")):
            np.testing.assert_array_equal(batch[key].numpy(), expected[name][rows.numpy()])
    for part in data.split(0.5, seed=0) if len(lengths) > 1 else ():
        kept = [int(n) for n in part.episode_lengths]
        of_part = part.windows(min(length, max(kept)))[:]["observation"].numpy()
        windows = reference(part.transitions, kept, of_part.shape[1])
        np.testing.assert_array_equal(of_part, windows["o"])
    stacked = data.frame_stack(length)[rows]
    for key, name in BOTH:
        flat = expected[name][rows.numpy()].reshape(len(rows), -1)
        np.testing.assert_array_equal(stacked[key].numpy(), flat)


# -- Dict observations, memory, sampling


def leaves(steps):
    """A camera, a category, a scalar and a matrix, all of them functions of the step."""
    images = steps[:, None, None, None] + np.arange(24).reshape(4, 2, 3)
    return {
        "camera": (images % 256).astype(np.uint8),
        "category": steps.astype(np.int64) % 5,
        "matrix": steps[:, None, None] * np.ones((2, 2), np.float32),
        "vector": np.stack([steps, -steps], 1).astype(np.float32),
    }


@pytest.fixture
def mixed():
    return load_dataset(counted(6, 4, 1, observe=leaves))


def test_every_leaf_of_a_dict_has_windows_and_its_own_dtype(mixed):
    batch, plain = mixed.windows(4)[:], mixed.transitions
    for name in ("camera", "category", "matrix", "vector"):
        key = ("observation", name)
        assert batch[key].dtype == plain[key].dtype
        assert batch[key].shape == (11, 4, *plain[key].shape[1:])
        assert torch.equal(batch[key][:, -1], plain[key])
        assert torch.equal(batch["next"][key][:, -1], plain["next"][key])
        assert torch.equal(batch[key][:, 1:], batch["next"][key][:, :-1])
    stacked = mixed.frame_stack(4)[:]
    assert "history_mask" not in stacked
    assert {name: tuple(values.shape) for name, values in stacked["observation"].items()} == {
        "camera": (11, 4, 2, 12), "category": (11, 4), "matrix": (11, 2, 2, 4), "vector": (11, 8),
    }  # fmt: skip
    one, plain = (d.device_sampler(16, seed=3) for d in (mixed.frame_stack(1), mixed))
    for _ in range(3):
        first, second = one.sample(), plain.sample()
        assert {*first.keys(True, True)} == {*second.keys(True, True)}
        assert (first == second).all()


def test_every_frame_is_held_once_and_nothing_is_copied(mixed):
    windows = mixed.windows(2)
    sampler = windows.device_sampler(4)
    camera, following = ("observation", "camera"), ("next", "observation", "camera")
    rows = mixed.transitions
    assert sampler.column(camera).data_ptr() == rows[camera].data_ptr()
    assert torch.equal(sampler.column(following), rows[following][[5, 9, 10]])
    frames = sum(t.nbytes for t in sampler.tables if t.dtype == torch.uint8)
    assert frames == (11 + 3) * 24
    stored = {t.data_ptr() for t in windows.table().values(True, True)}
    assert rows[following].data_ptr() not in stored


def test_memory_mapped_tables_have_the_same_windows(tmp_path):
    np.savez(tmp_path / "data.npz", **counted(6, 4, 1, observe=lambda t: leaves(t)["camera"]))
    memory = load_dataset(tmp_path / "data.npz")
    mapped = load_dataset(tmp_path / "data.npz", memmap=tmp_path / "table")
    for length, stack in ((3, False), (2, True)):
        one, two = (d.windows(length, stack=stack) for d in (memory, mapped))
        assert (one[:] == two[:]).all()
        first, second = (w.device_sampler(8, seed=0).sample() for w in (one, two))
        assert (first == second).all()
        tensors = two.device_sampler(8).tables
        assert all(type(t) is torch.Tensor for t in tensors)


def test_a_buffer_yields_the_batches_of_the_same_rows_and_a_sampler_goes_on(mixed):
    windows = mixed.windows(3)
    buffer, again = (windows.replay_buffer(8, seed=5) for _ in range(2))
    plain = mixed.replay_buffer(8, seed=5)
    for _ in range(3):
        batch = buffer.sample()
        assert (batch == again.sample()).all()
        rows = batch["index"]
        assert torch.equal(rows, plain.sample()["index"])
        assert (batch.exclude("index") == windows[rows]).all()
    with pytest.raises(RuntimeError, match="doesn't allow writing"):
        buffer.extend(mixed.transitions[:1])
    with pytest.raises(RuntimeError, match="windows cannot be written to"):
        buffer.storage.set(0, mixed.transitions[:1])
    sampler, fresh = (windows.device_sampler(8, seed=seed) for seed in (1, 2))
    assert isinstance(sampler, WindowSampler)
    sampler.sample()
    fresh.load_state_dict(sampler.state_dict())
    assert (fresh.sample() == sampler.sample()).all()
    whole = windows.replay_buffer(11, sampler=SamplerWithoutReplacement(), seed=0).sample()
    assert whole["index"].sort().values.tolist() == list(range(11))


def test_wrong_windows_are_refused():
    data = load_dataset(counted(3, 2))
    refused("windows of 4 steps | the longest has 3;", 4, data.windows)
    assert len(data.windows(3)) == 5
    for wrong in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match=r"length is .*expected an integer >= 1"):
            data.windows(wrong)
    with pytest.raises(ValueError, match="jumps is 'skip'; choose one of error, restart"):
        data.windows(2, jumps="skip")


def test_discontinuities_are_refused_or_begin_a_history():
    """The next observation of row 2 of the first episode, of 5 rows, is not row 3's observation."""
    source = counted(5, 2)
    source["next_observation"][2] = [7, -7]
    with pytest.warns(DatasetWarning, match="not the following row's observation in 1 rows"):
        data = load_dataset(source)
    refused("in 1 transitions inside episodes, first transition 2, |'restart'", 2, data.windows)
    windows = data.windows(2, jumps="restart")
    no, yes = False, True
    assert [frames_of(windows, row) for row in (1, 2, 3, 4)] == [
        ([0, 1], [yes, yes], [1, 2], [yes, yes]),
        ([1, 2], [yes, yes], [2, 7], [yes, yes]),
        ([3, 3], [no, yes], [3, 4], [yes, yes]),
        ([3, 4], [yes, yes], [4, 5], [yes, yes]),
    ]
    refused("the longest has 3 between discontinuities", 4, data.windows, jumps="restart")


def test_a_next_observation_may_differ_from_the_following_row_by_rounding():
    """By the readers' rule, a norm of 1e-6, they are equal, and windows have the following row's."""
    source = counted(5, 2)
    source["next_observation"][0] += np.float32(5e-7)
    data = load_dataset(source)
    assert data.transitions["next", "observation"][0, 0] != 1.0
    assert frames_of(data.windows(2), 0)[2] == [0, 1]
    source["next_observation"][0] += np.float32(1e-5)
    with pytest.warns(DatasetWarning, match="not the following row's observation in 1 rows"):
        data = load_dataset(source)
    refused("in 1 transitions inside episodes, first transition 0", 2, data.windows)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_depth_in_wide_unsigned_integers_has_windows_and_chunks(kind):
    """Of which torch has no index_put on a CPU."""
    rows = counted(3, 2, observe=lambda t: (60_000 + t[:, None]).astype(kind))
    space = spaces.Box(0, 65_535, (1,), kind)
    data = load_dataset(rows, observation_space=space)
    windows, chunks = data.windows(2), data.chunks(2)
    assert windows[:]["next", "observation"].dtype == getattr(torch, np.dtype(kind).name)
    following = [[60_000 + x for x in pair] for pair in ((0, 1), (1, 2), (2, 3), (100, 101))]
    assert windows[:]["next", "observation"].squeeze(2).tolist()[:4] == following
    assert chunks[:]["next", "observation"].flatten().tolist() == [
        60_002, 60_003, 60_003, 60_102, 60_102
    ]  # fmt: skip
    indices = torch.arange(5)
    for form in (windows, chunks):
        batch = form.device_sampler(4).gather(indices)
        assert (batch == form[indices].exclude("collector")).all()


# -- stacks


@pytest.mark.parametrize(
    ("shape", "stacked", "channel"),
    [((), (3,), 0), ((2,), (6,), 0), ((5, 4), (5, 4, 3), 2), ((5, 4, 2), (5, 4, 6), 2),
     ((2, 5, 4), (6, 5, 4), 0), ((3, 3, 3), (3, 3, 9), 2), ((2, 2, 2, 2), (2, 2, 2, 6), 3),
     ((4, 2, 5, 6), (4, 6, 5, 6), 1)],
)  # fmt: skip
def test_frames_are_stacked_on_their_channels(shape, stacked, channel):
    window = torch.randn(7, 3, *shape)
    out = stack_frames(window, len(shape))
    assert out.shape == (7, *stacked)
    for number, part in enumerate(out.chunk(3, channel + 1)):
        assert torch.equal(part.reshape(7, *shape), window[:, number])


def test_stacks_lie_in_the_stacked_space(mixed):
    space = stacked_space(mixed.observation_space, 3)
    shapes = {name: leaf.shape for name, leaf in space.spaces.items()}
    assert shapes == {"camera": (4, 2, 9), "category": (3,), "matrix": (2, 2, 3), "vector": (6,)}
    stacks = mixed.frame_stack(3)[:]["observation"]
    for row in range(len(mixed)):
        frame = {name: values[row].numpy() for name, values in stacks.items()}
        assert space.contains(frame)
    frame["category"][0] = 5  # the camera's bounds and the number of categories are kept
    assert not space.contains(frame)
    low, high = np.array([[0, 1], [2, 3]]), np.array([[10, 11], [12, 13]])
    box = stacked_space(spaces.Box(low, high, dtype=np.int64), 2)
    assert np.array_equal(box.low, [[[0, 0], [1, 1]], [[2, 2], [3, 3]]])
    assert np.array_equal(box.high[..., 1], high)
    assert stacked_space(spaces.MultiDiscrete([2, 3]), 2).nvec.tolist() == [2, 3, 2, 3]
    assert stacked_space(spaces.MultiBinary(2), 2).shape == (4,)
    assert stacked_space(box, 1) is box
    with pytest.raises(ValueError, match="cannot be stacked"):
        stacked_space(spaces.Text(3), 2)


def test_stacked_statistics_are_those_of_each_frame():
    observe = lambda t: np.stack([t, 0 * t + 7, t % 3], 1).astype(np.float32)  # noqa: E731
    data = load_dataset(counted(6, 4, observe=observe))
    one = data.statistics["observation"]
    two = stacked_statistics(data.statistics, 2)["observation"]
    assert one.constant == (1,)
    assert two.constant == (1, 4)
    assert torch.equal(two.mean, torch.cat([one.mean, one.mean]))
    assert torch.equal(two.std, torch.cat([one.std, one.std]))
    assert two.count == one.count
