"""Hints about episode boundaries: the statistic by hand, each fault found, and silence elsewhere."""

import numpy as np
import pytest
from small_logs import drift

from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.readers.contradictions import differs
from iql_torchrl.data.readers.hints import (
    ROWS,
    boundary_hints,
    distance,
    interleaved_by,
    leading_values,
    rank,
    steps_of,
)

KEY = ("observation",)
LENGTHS = [40, 25, 33, 28, 45, 31, 20, 36, 29, 41, 38, 27]


def test_distances_and_ranks_by_hand():
    difference = np.array([[1.0, -2.0], [10.0, 0.0], [0.5, 1.0]])
    # In units of 1 and 2, at most 5: (1 + 1) / 2, (5 + 0) / 2, (0.5 + 0.5) / 2.
    assert distance(difference, np.array([1.0, 2.0])).tolist() == [1.0, 2.5, 0.5]
    # 1 is above one of three; 3 is above two and equal to one: (1 + 2.5) / (2 * 3).
    assert rank(np.array([1.0, 3.0]), np.array([3.0, 0.0, 2.0])) == pytest.approx(3.5 / 6)
    assert rank(np.array([7.0]), np.array([1.0, 2.0])) == 1.0


def test_steps_of_a_table_by_hand():
    time = np.arange(31.0)
    values = np.stack([2 * time, -time, time * 0 + 4, np.where(time == 3, np.nan, time)], 1)
    ended = np.isin(time[:-1], [9, 19])
    values[10:, 0] += 100  # a jump of 102, after an end
    steps = steps_of(values, ended)
    assert steps.values.shape == (31, 2)  # neither the constant column nor the one with NaN
    assert steps.unit.tolist() == [2.0, 1.0]
    assert steps.length.tolist() == [1.0] * 9 + [3.0] + [1.0] * 20  # (5 + 1) / 2 at the jump
    assert steps.inside.sum() == 28
    few = steps_of(values, time[:-1] < 25)  # 5 rows inside are too few: all count
    assert few.inside.all()
    assert steps_of(values[:20], ended[:19]) is None
    assert steps_of(values[:, 2:], ended) is None


def test_what_is_read_is_bounded():
    class Wide:
        shape, dtype, read = (10**9, 3, 100), np.dtype("f4"), []

        def __getitem__(self, rows):
            start, stop, _ = rows.indices(self.shape[0])
            self.read.append(stop - start)
            return np.zeros((stop - start, *self.shape[1:]), self.dtype)

    values = leading_values(
        {("observation", "a"): Wide(), ("observation", "b"): np.zeros((50_000, 2))}
    )
    assert Wide.read == [2**21 // 300]
    assert values.shape == (2**21 // 300, 128)
    assert len(leading_values({KEY: np.zeros(10**5)})) == ROWS
    pictures = {KEY: np.zeros((100, 8, 8, 3), np.uint8)}
    assert leading_values(pictures).shape == (0, 0)
    assert interleaved_by(pictures) is None


# -- faults


def walk(lengths=LENGTHS, seed=0):
    """Random walks: observation, next observation, ends."""
    data, ends = drift(lengths, seed=seed)
    return data["observation"], data["next_observation"], ends


def hints(observation, last, *, terminated=None, following=None, reward=None, ids=False, unused=()):
    rows, names = len(last), {"truncated": "timeouts", "terminated": "dead"}
    columns = {
        "observation": observation,
        "next/reward": np.ones(rows) if reward is None else reward,
    }
    return boundary_hints(
        Columns(
            "log", columns, paths=names | ({"episode": "id"} if ids else {}), unused=dict(unused)
        ),
        np.zeros(rows, bool) if terminated is None else terminated,
        last,
        None if following is None else differs({KEY: observation}, {KEY: following}, rows),
    )


def said(words, *arguments, **options):
    (text,) = hints(*arguments, **options)
    assert all(word in text for word in words.split("|")), text


def test_right_flags_give_no_hint():
    observation, following, ends = walk()
    for options in ({}, {"terminated": ends}, {"following": following}, {"ids": True}):
        assert hints(observation, ends, **options) == []


def test_missing_flags():
    observation, following, ends = walk()
    rows = np.flatnonzero(ends)
    removed = rows[[0, 2, 3, 6]]  # 39, 97, 125, 221
    last = ends & ~np.isin(np.arange(len(ends)), removed)
    said(
        "jumps in 4 rows inside episodes (of 393 looked at), first at row 39|missing",
        observation,
        last,
    )
    assert hints(observation, last, ids=True) == []
    assert hints(observation, last, following=following) == []  # exact checks compare these
    assert hints(observation, ends & ~np.isin(np.arange(len(ends)), removed[:2])) == []  # too few
    none = np.arange(len(ends)) == len(ends) - 1
    said("in 11 rows|first at row 39|all 393 rows were read as one episode", observation, none)
    unused = {"done": ends.astype(int), "is_last": ends[:, None] * 2, "other": ends}
    said(
        "'done' looks like done flags: columns={'truncated': 'done'}",
        observation,
        none,
        unused=unused.items(),
    )


@pytest.mark.parametrize(
    ("shift", "words"), [(-1, "before|one row later"), (1, "after|one row earlier")]
)
@pytest.mark.parametrize("known", [True, False])
def test_shifted_flags(shift, words, known):
    observation, following, ends = walk()
    last = np.roll(ends, shift)
    last[[0, -1]] = False, True
    said(f"shifted|{words}", observation, last, following=following if known else None)
    assert hints(observation, last, ids=True) == []


def test_rows_that_continue():
    observation, following, _ = walk([400])
    last = np.arange(400) % 25 == 24  # 15 of these rows are followed by a row
    said("15 of the 15 rows flagged truncated ('timeouts')|on purpose", observation, last)
    terminated = last & (np.arange(400) % 50 == 49)
    words = "7 of the 7 rows flagged terminated ('dead')|{'terminated': None, 'truncated': 'dead'}"
    texts = hints(observation, last, terminated=terminated, following=following)
    assert len(texts) == 2
    assert all(word in texts[0] for word in words.split("|"))
    assert "8 of the 8 rows flagged truncated" in texts[1]
    # Next observations that are not the next rows' prove that episodes end there.
    assert hints(observation, last, following=following + 0.01) == []
    said("columns={'not_terminated': 'dead'}", observation, ~last, terminated=~last)


def vector_rows(reward):
    """After each end a row that leads from the last observation to the first one: its reward is 0."""
    observation, following, ends = walk()
    source = np.insert(np.arange(len(ends)), np.flatnonzero(ends) + 1, np.flatnonzero(ends))
    fake = np.insert(np.zeros(len(ends), bool), np.flatnonzero(ends) + 1, True)
    rows = np.where(fake[:, None], following[source], observation[source])
    return rows, ends[source] & ~fake, np.where(fake, 0.0, reward)


@pytest.mark.parametrize("ids", [True, False])
def test_recorded_resets_of_vector_environments(ids):
    rows, last, reward = vector_rows(1.0)
    words = "after 12 of the 12 ends of episodes have reward 0|autoreset|autoreset=True"
    said(words, rows, last, reward=reward, ids=ids)
    # Without rewards it may also be a shift.
    sparse = hints(*vector_rows(0.0)[:2], reward=reward * 0, ids=ids)
    assert ids or ("shifted" in sparse[0] and "autoreset=True" in sparse[0])
    assert not (ids and sparse)


def test_recorded_resets_after_large_steps():
    """The last step of an episode is its largest; the last row of an environment has no reset."""
    rows, last, reward = vector_rows(1.0)
    ends = np.flatnonzero(last)
    before = np.repeat(rows[ends - 1], 1, axis=0)
    rows[ends + 1] = before + 4 * (rows[ends] - before)  # 4 usual steps from the last observation
    rows[ends] = before + 2 * (rows[ends] - before)
    cut = last.copy()
    cut[ends[0] - 5] = True  # ends without a reset
    words = "after 12 of the 13 ends of episodes have reward 0|autoreset=True"
    said(words, rows, cut, reward=reward, ids=True)
    reward[ends + 1] = 1.0
    assert hints(rows, cut, reward=reward, ids=True) == []


@pytest.mark.parametrize("ids", [True, False])
def test_next_observations_of_vector_environments_that_reset_in_the_same_step(ids):
    observation, following, ends = walk()
    rows = np.flatnonzero(ends)[:-1]
    following[rows] = observation[rows + 1]
    words = "of 11 of the 11 rows that end episodes|infos['final_obs']|'next_observation': None"
    said(words, observation, ends, following=following, ids=ids)
    # the value of a next observation is not used where a row terminates
    assert hints(observation, ends, terminated=ends, following=following, ids=ids) == []
    # rows of several environments: the last of each has its true next observation
    following[rows[[3, 7]]] += 1.0
    said("of 9 of the 11 rows", observation, ends, following=following, ids=ids)


# -- silence


def independent(rng):
    return rng.standard_normal((400, 4))


def categories(rng):
    return np.eye(6)[rng.integers(6, size=400)]


def near_constant(rng):
    return 20 + 0.01 * rng.integers(-1, 2, (400, 3))


def constant(rng):
    return np.ones((400, 2))


def states(rng):
    return rng.permutation(64)[np.cumsum(rng.choice([-1, 1, -8, 8], 400)) % 64]


def period(rng):
    """A week's pattern with noise: rows 7 apart are near, but not nearer than rows 14 apart."""
    return 3 * np.tile(rng.standard_normal((7, 3)), (58, 1))[:400] + 0.1 * rng.standard_normal(
        (400, 3)
    )


@pytest.mark.parametrize(
    "make",
    [independent, categories, near_constant, constant, states, period],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_do_not_move_give_no_hint(make, seed):
    rng = np.random.default_rng(seed)
    observation, last = make(rng), rng.random(400) < 0.05
    assert interleaved_by({KEY: observation}) is None
    for flags in (last, np.roll(last, 1), last & False, last | True):
        assert hints(observation, flags, terminated=flags) == []
        assert hints(observation, flags, reward=np.zeros(400)) == []


@pytest.mark.parametrize("seed", range(3))
def test_flags_where_a_controller_reaches_its_target_are_not_shifted(seed):
    """It turns to the next target one row later, as in D4RL's maze2d; nothing is reset."""
    rng = np.random.default_rng(seed)
    place, speed, target, states, reached = np.zeros(2), np.zeros(2), np.ones(2), [], []
    for _ in range(4000):
        states.append(np.concatenate([place, speed]))
        reached.append(bool(np.linalg.norm(target - place) < 0.3))
        place = place + 0.05 * speed
        force = 10 * (target - place) - 6 * speed + 0.1 * rng.standard_normal(2)
        speed = speed + 0.05 * force
        if reached[-1]:
            target = rng.uniform(-3, 3, 2)
    observation, ends = np.array(states), np.array(reached)
    ends[-1] = True
    steps = steps_of(observation, ends[:-1])
    rows = np.flatnonzero(steps.ended)[:-1] + 1
    assert len(rows) > 100
    assert rank(steps.length[rows], steps.length[steps.inside]) > 0.85  # longer, but not a reset
    for following in (observation[np.minimum(np.arange(4000) + 1, 3999)], None):
        assert not any("shifted" in text for text in hints(observation, ends, following=following))


@pytest.mark.parametrize("seed", range(3))
def test_events_inside_episodes_give_no_hint(seed):
    """A stock that is refilled, and a ball that bounces: few columns change at once."""
    rng = np.random.default_rng(seed)
    stock = np.array([90.0, 60.0, 40.0])
    stocks, time = [], np.arange(600) % 30 / 30
    for _ in range(600):
        stock = np.where(stock < 10, 100.0, stock - rng.poisson(5, 3))
        stocks.append(stock)
    ball = np.stack([4 * time * (1 - time), 4 - 8 * time], 1)
    slow = np.cumsum(0.1 * rng.standard_normal((600, 3)), 0)
    for values in (np.array(stocks), np.concatenate([ball, slow], 1)):
        assert hints(values, np.arange(600) == 599) == []


# -- interleaved environments


@pytest.mark.parametrize("envs", [2, 3, 16])
def test_interleaved_rows(envs):
    walks = [walk(seed=seed)[0] for seed in range(envs)]
    rows = np.stack(walks, 1).reshape(-1, 3)
    assert interleaved_by({KEY: rows}) == envs
    dictionary = {("observation", "a"): rows[:, :2], ("observation", "b"): rows[:, 2]}
    assert interleaved_by(dictionary) == envs
    assert interleaved_by({KEY: np.concatenate(walks)}) is None
    assert interleaved_by({KEY: rows[:100]}) is None  # too few rows
