"""Chunks of actions: contents and ends by hand, discontinuities, histories, sampling, refusals."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from small_logs import counted, refused

from iql_torchrl import load_dataset
from iql_torchrl.data import Chunks, DatasetWarning, WindowSampler

NO, YES = False, True


def table(*lengths, terminated=(), flags=None):
    """As ``counted``, and the action of row n is n + 1; ``flags``: rows that terminate besides."""
    rows = counted(*lengths, terminated=terminated)
    count = len(rows["reward"])
    rows["action"] = np.arange(1, count + 1, dtype=np.float32)[:, None]
    for row in flags or ():
        rows["terminated"][row] = True
    return load_dataset(rows, action_space=spaces.Box(0, 99, (1,)))


def shown(chunks, row):
    batch = chunks[[row]]
    following = batch["next"]
    return (
        batch["observation"][0, 0].item(),
        batch["action"][0].tolist(),
        batch["chunk_mask"][0].tolist(),
        following["reward"][0].tolist(),
        following["observation"][0, 0].item(),
        [following[name].item() for name in ("terminated", "truncated", "done")],
    )


def test_chunks_that_meet_ends_by_hand():
    """Episode 0 terminates after 3 steps, episode 1 is truncated after 2: rewards 0, 1, 2 | 0, 1."""
    chunks = table(3, 2, terminated=[0]).chunks(3)
    ended, cut = [YES, NO, YES], [NO, YES, YES]
    assert [shown(chunks, row) for row in range(5)] == [
        (0, [1, 2, 3], [YES, YES, YES], [0, 1, 2], 3, ended),
        (1, [2, 3, 4], [YES, YES, NO], [1, 2, 0], 3, ended),  # 4, 5: of the next episode
        (2, [3, 4, 5], [YES, NO, NO], [2, 0, 0], 3, ended),
        (100, [4, 5, 0], [YES, YES, NO], [0, 1, 0], 102, cut),  # 0: cut short
        (101, [5, 0, 0], [YES, NO, NO], [1, 0, 0], 102, cut),
    ]
    assert chunks.count.tolist() == [3, 2, 1, 2, 1]


def test_a_termination_inside_an_episode_ends_a_chunk():
    data = table(5, flags=[1])
    chunks = Chunks(data.transitions, np.array([5]), 3)  # one episode, which continues after row 1
    assert [shown(chunks, row)[2:5] for row in range(4)] == [
        ([YES, YES, NO], [0, 1, 0], 2),
        ([YES, NO, NO], [1, 0, 0], 2),
        ([YES, YES, YES], [2, 3, 4], 5),
        ([YES, YES, NO], [3, 4, 0], 5),
    ]


def test_a_discontinuity_ends_a_chunk_only_where_it_is_allowed():
    rows = counted(4)
    rows["next_observation"][1] = (50, -50)
    with pytest.warns(DatasetWarning, match="not the following row's observation in 1 rows"):
        data = load_dataset(rows)
    refused("first transition 1, the next observation is not", 2, data.chunks)
    chunks = data.chunks(2, jumps="restart")
    assert chunks.count.tolist() == [2, 1, 2, 1]
    assert chunks[[1]]["next", "observation"].tolist() == [[50, -50]]
    assert not chunks[[1]]["next", "done"].any()


def by_loops(data, size):
    """Rewards, masks and places of the last row of each chunk."""
    done = data.transitions["next", "done"].squeeze(1).tolist()
    reward = data.transitions["next", "reward"].squeeze(1).tolist()
    result = []
    for row in range(len(done)):
        count = 1
        while count < size and not done[row + count - 1]:
            count += 1
        kept = [reward[row + n] if n < count else 0 for n in range(size)]
        result.append((kept, [n < count for n in range(size)], row + count - 1))
    return result


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    size=st.integers(1, 5),
    history=st.integers(1, 3),
    ended=st.sets(st.integers(0, 5)),
)
def test_chunks_equal_loops_and_windows(lengths, size, history, ended):
    lengths = [*lengths, 6]  # so that no size is longer than every episode
    data = table(*lengths, terminated=ended & set(range(len(lengths))))
    chunks, plain = data.chunks(size, history=history), data.transitions
    windows = data.windows(history) if history > 1 else plain
    batch = chunks[:]
    for row, (reward, mask, last) in enumerate(by_loops(data, size)):
        assert batch["next", "reward"][row].tolist() == reward
        assert batch["chunk_mask"][row].tolist() == mask
        actions = plain["action"][row : last + 1, 0]
        assert torch.equal(batch["action"][row, : len(actions)], actions)
        for key in ("observation", "history_mask")[: 1 + (history > 1)]:
            assert torch.equal(batch[key][row], windows[[row]][key][0])
            assert torch.equal(batch["next", key][row], windows[[last]]["next", key][0])
        for name in ("terminated", "truncated", "done"):
            assert torch.equal(batch["next", name][row], plain["next", name][last])


def test_chunks_of_one_action_are_the_transitions():
    data = table(3, 2, terminated=[0])
    batch, plain = data.chunks(1)[:], data.transitions
    assert {*batch.keys(True, True)} == {*plain.keys(True, True), "chunk_mask"}
    for key in plain.keys(True, True):
        assert torch.equal(batch[key], plain[key]), key
    assert batch["chunk_mask"].all()


def test_samplers_draw_the_same_chunks():
    data = table(7, 5, terminated=[1])
    chunks = data.chunks(3, history=2, stack=True)
    sampler, buffer = chunks.device_sampler(8, seed=3), chunks.replay_buffer(8, seed=3)
    assert isinstance(sampler, WindowSampler)
    for _ in range(2):
        one, two = sampler.sample(), buffer.sample()
        left_out = {("collector", "traj_ids"), "index"}
        assert {*one.keys(True, True)} == {*two.keys(True, True)} - left_out
        for key in one.keys(True, True):
            assert torch.equal(one[key], two[key]), key
    assert len(sampler) == len(chunks) == 12


def test_nothing_is_stored_several_times():
    data = table(30, 20)
    chunks = data.chunks(10)
    assert chunks.chunks["actions",].data_ptr() == data.transitions["action"].data_ptr()
    assert chunks.chunks["rewards",].data_ptr() == data.transitions["next", "reward"].data_ptr()
    held = sum(tensor.nbytes for tensor in chunks.device_sampler(4).tables)
    rows = data.transitions.exclude(("next", "observation"), "collector")
    places = 3 * 8 * len(data)  # first, final_place, count
    ends = 2 * 2 * 4  # next observations of two episodes
    plain = sum(value.nbytes for value in rows.values(True, True))
    assert held == plain + places + ends


class Counting(torch.Tensor):
    """Counts the rows that are read of it."""

    rows = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.index_select:
            cls.rows += len(args[2])
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize(("history", "windows", "chunks"), [(1, 2, 2), (3, 4, 6)])
def test_each_frame_of_a_batch_is_read_once(history, windows, chunks):
    """Windows and next windows of one row overlap; those of a chunk's ends are two."""
    data = table(7, 5)
    for form, frames in (
        (data.windows(history, stack=True), windows),
        (data.chunks(3, history=history), chunks),
    ):
        form.frames = {k: v.as_subclass(Counting) for k, v in form.frames.items()}
        Counting.rows = 0
        form[torch.tensor([0, 4, 6, 11, 2])]
        assert Counting.rows == 5 * frames


def test_the_log_probability_of_one_action_is_left_out():
    rows = counted(4)
    rows["action_log_prob"] = np.zeros(4, np.float32)
    assert "action_log_prob" not in load_dataset(rows).chunks(2)[:]


def test_what_cannot_be_chunked_is_refused():
    data = table(3, 2)
    refused("chunks of 4 actions| the longest has 3", 4, data.chunks)
    with pytest.raises(ValueError, match=r"size is 0; expected an integer"):
        data.chunks(0)
    rows = counted(4)
    rows["action"] = np.arange(4)
    refused("actions are torch.int64 |Discrete actions have no", 2, load_dataset(rows).chunks)
