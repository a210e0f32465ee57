"""Data that are easily misread: order and gaps of rows, autoreset, integers, ranges, huge rewards."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from small_logs import counted, drift, loaded, marked, refused

from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset

NEXT = "next_observation"


def assert_same(found, expected):
    assert found.episode_lengths.tolist() == expected.episode_lengths.tolist()
    keys = list(expected.transitions.keys(True, True))
    assert set(found.transitions.keys(True, True)) == set(keys)
    for key in keys:
        assert torch.equal(found.transitions[key], expected.transitions[key]), key


def without(data, *names):
    return {key: values for key, values in data.items() if key not in names}


# -- interleaved rows and recurring ids


def taking_turns(envs, steps):
    """Rows sorted by environment, with their ids; and the same rows as row = t * envs + env."""
    ordered, ends = drift([steps] * envs)
    ordered |= {"truncated": ends, "env_index": np.arange(envs).repeat(steps)}
    order = np.arange(envs * steps).reshape(envs, steps).T.ravel()
    return ordered, {key: values[order] for key, values in ordered.items()}


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("envs", [2, 5, 12])
def test_interleaved_rows_are_refused_and_ids_repair_them(envs, successors):
    ordered, data = taking_turns(envs, 300)
    left_out = () if successors else (NEXT,)
    ordered, data = without(ordered, *left_out), without(data, "env_index", *left_out)
    words = f"numpy.arange(rows) % {envs}, and pass columns={{'env_index'"
    refused(f"{envs} environments are interleaved|{words}", data)
    data["number"] = np.arange(envs * 300) % envs
    found, texts = loaded(data, columns={"env_index": "number"})
    assert_same(found, load_dataset(ordered))
    assert texts == []
    assert any(f"whose {envs} ids take turns" in note for note in found.notes)


@pytest.mark.parametrize("names", [np.array([10, 9, 8]), np.array(["c", "b", "a"])])
def test_recurring_ids_are_sorted_stably(names):
    data = counted(4, 4, 4)
    order = np.arange(12).reshape(3, 4).T.ravel()
    number = np.arange(3).repeat(4)
    mixed = {key: values[order] for key, values in data.items()} | {"episode": names[number][order]}
    mixed = without(mixed, "truncated", NEXT)
    found = load_dataset(mixed)
    assert found.episode_lengths.tolist() == [3, 3, 3]
    seen = found.transitions["observation"][:, 0].tolist()
    assert seen == [0, 1, 2, 100, 101, 102, 200, 201, 202]
    assert any("sorted by 'episode'" in note for note in found.notes)


def test_ids_numbered_anew_in_joined_files_are_separate_episodes():
    data, _ = drift([20] * 6)
    found = load_dataset(without(data, "truncated") | {"episode": np.tile([0, 1, 2], 2).repeat(20)})
    assert found.episode_lengths.tolist() == [20] * 6
    assert any("every block is an episode" in note for note in found.notes)


# -- done flags


def test_columns_of_units_below_one_are_compared_in_their_unit():
    """Positions in nanometres: another row's next observation is not equal to this one's."""
    data = without(drift([20, 30])[0], "truncated")
    found = load_dataset(data | {key: 1e-9 * data[key] for key in ("observation", NEXT)})
    assert found.episode_lengths.tolist() == [20, 30]
    assert marked(found) == ([], [19, 49])


def test_rewards_of_dropped_rows_are_missed():
    data = without(counted(*[10] * 30), NEXT)
    data["reward"] = data["truncated"].astype(np.float32)
    words = r"30 dropped last rows have 100% of all rewards.*next_observation, or reward_offset"
    with pytest.warns(DatasetWarning, match=words):
        assert not load_dataset(data).transitions["next", "reward"].any()
    same = data | {"reward": np.ones(300, np.float32)}
    assert loaded(same)[1] == []


@pytest.mark.parametrize("option", ["env", "env_spec"])
def test_episodes_beyond_the_time_limit(option, tmp_path):
    data = counted(*[20] * 10) | {"action": np.zeros(200, np.int64) + np.arange(200) % 2}
    data["observation"], data[NEXT] = (np.tile(data[key], 2) for key in ("observation", NEXT))
    made = gym.make("CartPole-v1", max_episode_steps=10)
    env = made if option == "env" else made.spec
    found, texts = loaded(data, env=env, columns={})
    assert len(found) == 200
    assert (
        sum("up to 20 steps, but the environment ends them after 10" in text for text in texts) == 1
    )
    assert loaded(data, env=gym.make("CartPole-v1", max_episode_steps=20))[1] == []


@pytest.mark.parametrize("rows", [30, 10_000])
@pytest.mark.parametrize("named", [(), ("terminated", "truncated")])
def test_one_episode_of_everything_is_never_silent(rows, named):
    rng = np.random.default_rng(0)
    data = {
        "observation": rng.standard_normal((rows, 3)),
        "action": rng.integers(0, 3, rows),
        "reward": rng.standard_normal(rows),
    }
    columns = {"terminated": None, "truncated": None}
    if named:
        data |= {name: np.zeros(rows, bool) for name in named}
        columns = {}
    with pytest.warns(DatasetWarning, match=f"all {rows:,} rows were read as one episode"):
        load_dataset(data, columns=columns)


# -- integers and ranges


def table(rows=300, **columns):
    rng = np.random.default_rng(0)
    return {
        "observation": rng.standard_normal((rows, 2)).astype(np.float32),
        "action": rng.uniform(-1, 1, (rows, 1)).astype(np.float32),
        "reward": rng.standard_normal(rows).astype(np.float32),
        "terminated": np.ones(rows, bool),
        "truncated": np.zeros(rows, bool),
    } | columns


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (1_700_000_000 + 512 * np.arange(300), (1,)),  # Unix seconds
        (18 + np.arange(300) * 7 % 73, (1,)),  # ages
        (np.arange(300) * 997 % 40_000, (1,)),  # few of many numbers
        (np.arange(900, dtype=np.uint8).reshape(300, 3), (3,)),
        (np.arange(300) % 5 - 2, (1,)),
        (np.arange(300) % 48, 48),  # states of a tabular MDP
        (np.arange(300)[:, None] % 7, 7),
        (np.arange(300, dtype=np.uint8) % 12 + 1, 13),
    ],
)
def test_integers_are_numbers_or_categories(values, expected):
    values = np.random.default_rng(1).permutation(values)
    data = table(observation=values)
    if values.max() > 2**24:  # float32 rounds them
        refused("would round; subtract a constant", data | {"observation": values + 1})
        found = load_dataset(data, dtype=torch.float64)
    else:
        found = load_dataset(data)
    space = found.observation_space
    assert (space.n if isinstance(space, gym.spaces.Discrete) else space.shape) == expected
    assert any("observation: integers" in note for note in found.notes)
    assert found.transitions["observation"].flatten().tolist() == values.flatten().tolist()


@pytest.mark.parametrize("doses", [np.arange(300) % 10 + 6, np.arange(300) % 2 * 9 + 6])
def test_doses_have_the_bounds_of_the_data(doses):
    found, texts = loaded(table(action=doses.astype(np.float32)[:, None]))
    space = found.action_space
    assert (space.low.tolist(), space.high.tolist()) == ([6], [15])
    assert len(texts) == 1
    assert "integers from 6 to 15" in texts[0]


def test_labels_below_zero_name_their_space():
    labels = np.arange(300) % 3 - 1
    words = re.escape("gymnasium.spaces.Discrete(3, start=-1)")
    with pytest.warns(DatasetWarning, match=words):
        assert load_dataset(table(action=labels.astype(float)[:, None])).action_space.shape == (1,)
    with pytest.raises(DatasetError, match=words):
        load_dataset(table(action=labels))
    for kind in (np.int64, np.float32):
        given = gym.spaces.Discrete(3, start=-1)
        found = load_dataset(table(action=labels.astype(kind)), action_space=given)
        assert found.transitions["action"].flatten().tolist() == (labels + 1).tolist()


# -- rewards


@pytest.mark.parametrize("sign", [1, -1])
def test_a_handful_of_huge_rewards_is_reported(sign):
    data = table(4000)
    data["reward"][[5, 1000, 3999]] = sign * 1e12
    with pytest.warns(DatasetWarning, match=r"3 of 4000 rewards are of magnitude 1e\+12"):
        load_dataset(data)


@pytest.mark.parametrize(("usual", "goal"), [(0, 1), (-0.01, 100), (-1, 0), (0, -500)])
def test_sparse_rewards_are_not_huge(usual, goal):
    reward = np.full(4000, usual, np.float32)
    reward[[5, 1000, 3999]] = goal
    assert loaded(table(4000, reward=reward))[1] == []


def test_a_reward_beyond_float32_is_named():
    reward = np.ones(300)
    reward[7] = 1e39
    words = r"reward has the value 1e\+39, beyond the range of float32.*row 7 .*dtype=torch.float64"
    with pytest.raises(DatasetError, match=words):
        load_dataset(table(reward=reward))
    with pytest.warns(DatasetWarning, match="1 of 300 rewards"):
        load_dataset(table(reward=reward), dtype=torch.float64)


# -- vector environments


def recorded(name, envs, mode=None, rows=2000):
    """What a loop over a vector environment writes: row = t * envs + env."""
    options = {} if mode is None else {"vector_kwargs": {"autoreset_mode": mode}}
    vector = gym.make_vec(name, num_envs=envs, vectorization_mode="sync", **options)
    rng, done = np.random.default_rng(0), np.zeros(envs, bool)
    columns = {key: [] for key in ("observation", "action", "reward", NEXT)}
    columns |= {key: [] for key in ("terminated", "truncated", "env_index", "fake")}
    observation, _ = vector.reset(seed=0)
    for _ in range(rows // envs):
        if mode == AutoresetMode.DISABLED and done.any():
            observation, _ = vector.reset(options={"reset_mask": done})
        action = rng.integers(0, 2, envs)
        if name == "Pendulum-v1":
            action = rng.uniform(-2, 2, (envs, 1)).astype(np.float32)
        fake = done & (mode is None)
        following, reward, terminated, truncated, _ = vector.step(action)
        row = (observation.copy(), action, reward, following.copy(), terminated, truncated)
        for values, value in zip(columns.values(), (*row, np.arange(envs), fake), strict=True):
            values.append(value)
        observation, done = following, terminated | truncated
    vector.close()
    return {key: np.concatenate(values) for key, values in columns.items()}


def space_of(name):
    return {"action_space": gym.spaces.Box(-2, 2, (1,))} if name == "Pendulum-v1" else {}


def of_single_environments(data, name, last=True):
    """The transitions of every environment after the other, without the steps of resets.

    ``last``: also each environment's last one, unless it is a reset.
    """
    kept = ~data["fake"]
    if not last:
        kept[-int(data["env_index"].max() + 1) :] = False
    order = np.argsort(data["env_index"], kind="stable")
    rows = {key: values[order[kept[order]]] for key, values in data.items() if key != "fake"}
    return loaded(rows, autoreset=False, **space_of(name))[0]


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("envs", [1, 4])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_autoreset_in_the_next_step(name, envs, successors):
    data = recorded(name, envs)
    expected = of_single_environments(data, name, last=successors)
    fakes, left_out = int(data["fake"].sum()), ("fake",) if successors else ("fake", NEXT)
    data = without(data, *left_out)
    found, texts = loaded(data, autoreset=True, **space_of(name))
    assert fakes > 5
    assert any(f"dropped {fakes} rows" in note for note in found.notes)
    assert_same(found, expected)
    assert not any("autoreset" in text for text in texts)
    found, texts = loaded(data, **space_of(name))
    assert not any("final_obs" in text for text in texts)
    if successors:
        assert_same(found, expected)
    else:
        assert sum("Pass autoreset=True to drop them" in text for text in texts) == 1
    kept, _ = loaded(data, autoreset=False, **space_of(name))
    if successors:
        assert len(kept) == len(expected) + fakes


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("envs", [1, 4])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_other_modes_of_autoreset_are_not_mistaken(name, envs, successors, mode):
    data = recorded(name, envs, mode)
    expected = of_single_environments(data, name)
    data = without(data, *(("fake",) if successors else ("fake", NEXT)))
    found, texts = loaded(data, **space_of(name))
    if successors:
        assert_same(found, expected)
    assert not any("autoreset" in text for text in texts)
    lost = successors and mode == AutoresetMode.SAME_STEP and name == "Pendulum-v1"
    assert any("infos['final_obs']" in text for text in texts) == lost  # CartPole's all terminate
    texts = loaded(data, autoreset=True, **space_of(name))[1]
    words = re.compile(r"autoreset=True dropped (\d+) rows, of which \1 have rewards")
    assert any(words.search(text) for text in texts)


def test_steps_without_reward_after_the_start_of_an_episode_stay():
    data, ends = drift([30] * 5)
    data |= {"truncated": ends, "reward": np.where(np.roll(ends, 1), 0.0, 1.0)}
    assert load_dataset(data).episode_lengths.tolist() == [30] * 5


# -- gaps in time


def clinic(times, patients=20, visits=100):
    """Glucose of patients that rises after meals, with the rows deleted at random, and the time."""
    rng, rows = np.random.default_rng(0), patients * visits
    glucose = 100 + np.cumsum(0.3 * rng.standard_normal(rows)) + 80 * (np.arange(rows) % 25 > 20)
    data = {
        "observation": np.stack([glucose, rng.standard_normal(rows).cumsum() / 10], 1),
        "action": rng.uniform(-1, 1, (rows, 1)),
        "reward": rng.standard_normal(rows),
        "episode": np.arange(patients).repeat(visits),
        "time": times(np.tile(np.arange(visits), patients)),
    }
    kept = np.ones(rows, bool)
    kept[rng.choice(rows, 124, replace=False)] = False
    data = {key: values[kept] for key, values in data.items()}
    step = np.tile(np.arange(visits), patients)[kept]
    return data, (np.diff(step) != 1)


TIMES = {
    "hours": lambda step: step,
    "float": lambda step: 0.1 * step,
    "datetime64": lambda step: np.datetime64("2024-03-01T00:00") + step * np.timedelta64(15, "m"),
    "text": lambda step: np.datetime_as_string(np.datetime64("2024-03-01T00:00:00") + 900 * step),
}


@pytest.mark.parametrize("kind", TIMES)
def test_gaps_in_time_end_episodes(kind):
    data, gaps = clinic(TIMES[kind])
    found, texts = loaded(data, columns={"terminated": None})
    ends = np.append(gaps, True)
    lengths = np.diff(np.flatnonzero(ends), prepend=-1) - 1
    assert found.episode_lengths.tolist() == lengths[lengths > 0].tolist()
    assert any("time ('time') has gaps" in note for note in found.notes)
    assert texts == []  # the rise after a meal is not a missing flag
    whole = load_dataset(data, columns={"terminated": None, "time": None})
    assert whole.episode_lengths.tolist() == [n - 1 for n in np.bincount(data["episode"])]


def test_times_that_are_not_dates_are_refused():
    data = table(time=np.array(["noon"] * 300))
    refused("time ('time') has text that is not a date|'time': None", data)


def test_irregular_times_are_not_gaps():
    rng = np.random.default_rng(0)
    data, ends = drift([100] * 20)
    time = np.cumsum(rng.exponential(1.0, 2000))
    found, texts = loaded(data | {"truncated": ends, "time": time})
    assert found.episode_lengths.tolist() == [100] * 20
    assert texts == []
    assert not any("gaps" in note for note in found.notes)


def test_steps_are_kept_where_the_next_observation_of_an_end_is_unknown():
    """``groupby.shift(-1)`` leaves NaN there, and ``diff().fillna(0)`` a reward of 0 at the start."""
    rows, draw = 50, np.random.default_rng(0)
    ends, observation = np.arange(rows) % 10 == 9, draw.normal(size=(rows, 2)).cumsum(0)
    observation[1:] += 9 * ends.cumsum()[:-1, None]  # every episode starts elsewhere
    observation[10::10] = observation[9:-1:10]  # and its first row is where the last one ended
    following, reward = np.roll(observation, -1, 0), draw.normal(size=rows)
    following[ends], reward[::10] = np.nan, 0
    table = {
        "observation": observation, "next_observation": following, "reward": reward,
        "action": draw.uniform(-1, 1, (rows, 1)), "terminated": ends,
    }  # fmt: skip
    with pytest.warns(DatasetWarning, match="Pass autoreset=True to drop them"):
        dataset = load_dataset(table)  # they look so, and are kept: nothing proves it
    assert dataset.episode_lengths.tolist() == [10] * 5
    assert np.allclose(dataset.transitions["next", "reward"][:, 0], reward)


def test_an_unknown_observation_after_truncation_has_a_remedy():
    rows, draw = 20, np.random.default_rng(0)
    ends, observation = np.arange(rows) % 10 == 9, draw.normal(size=(rows, 2))
    following = np.roll(observation, -1, 0)
    following[ends] = np.nan
    table = {
        "observation": observation, "next_observation": following, "reward": draw.normal(size=rows),
        "action": draw.uniform(-1, 1, (rows, 1)), "terminated": np.zeros(rows, bool),
        "truncated": ends,
    }  # fmt: skip
    with pytest.raises(DatasetError, match=re.escape("pass columns={'next_observation': None}")):
        load_dataset(table)
    dataset = load_dataset(table, columns={"next_observation": None})
    assert dataset.episode_lengths.tolist() == [9, 9]


def test_steps_of_a_process_that_continues_are_kept():
    """Days of 24 hours; the first reward of each is 0, and the observation does not jump there."""
    rows, draw = 240, np.random.default_rng(0)
    wave = np.sin(np.arange(rows + 1) / 7)[:, None] + 0.01 * draw.normal(size=(rows + 1, 1))
    reward = draw.normal(size=rows)
    reward[::24] = 0
    table = {
        "observation": wave[:-1], "next_observation": wave[1:], "reward": reward,
        "action": draw.uniform(-1, 1, (rows, 1)), "terminated": np.zeros(rows, bool),
        "truncated": np.arange(rows) % 24 == 23,
    }  # fmt: skip
    with pytest.warns(DatasetWarning, match=r"Pass autoreset=True to drop them, or .* steps"):
        dataset = load_dataset(table)
    assert dataset.episode_lengths.tolist() == [24] * 10
    resets = {name: values.copy() for name, values in table.items()}
    for start in range(24, rows, 24):  # the row from the old day's end to the new day's start
        resets["observation"][start + 1 : start + 24] += 9 * draw.choice([-1, 1])
        resets["next_observation"][start : start + 23] = resets["observation"][
            start + 1 : start + 24
        ]
    resets["observation"][24::24] = resets["next_observation"][23:-1:24]
    assert load_dataset(resets).episode_lengths.tolist() == [24] + [23] * 9


@pytest.mark.parametrize("unit", [1.0, 1e-7])
def test_joined_recordings_of_any_unit_are_other_episodes(unit):
    def recording(seed, steps=50, episodes=4):
        draw = np.random.default_rng(seed)
        path = draw.normal(size=(episodes, steps + 1, 2)).cumsum(1) * unit
        return {
            "observation": path[:, :-1].reshape(-1, 2),
            "next_observation": path[:, 1:].reshape(-1, 2),
            "action": draw.uniform(-1, 1, (episodes * steps, 1)),
            "reward": draw.normal(size=episodes * steps),
            "terminated": np.zeros(episodes * steps, bool),
            "episode": np.repeat(np.arange(episodes), steps),
        }

    parts = [recording(seed) for seed in (0, 1)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert load_dataset(joined).episode_lengths.tolist() == [50] * 8


def test_ids_that_take_turns_are_sorted_despite_rounding_of_large_observations():
    """float32 keeps 1e6 to a sixteenth; the ids of four episodes take turns in blocks of ten rows."""
    draw = np.random.default_rng(0)
    path = 1e6 + draw.normal(size=(4, 51, 2)).cumsum(1)
    turns = np.concatenate([
        np.arange(10) + 10 * block + 50 * number for block in range(5) for number in range(4)
    ])  # fmt: skip
    table = {
        "observation": path[:, :-1].reshape(-1, 2),
        "next_observation": path[:, 1:].reshape(-1, 2).astype(np.float32),
        "action": draw.uniform(-1, 1, (200, 1)),
        "reward": draw.normal(size=200),
        "terminated": np.zeros(200, bool),
        "episode": np.repeat(np.arange(4), 50),
    }
    dataset = load_dataset({name: values[turns] for name, values in table.items()})
    assert dataset.episode_lengths.tolist() == [50] * 4
