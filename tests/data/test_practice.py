"""Datasets as practitioners have them: nothing misread in silence, nothing legitimate refused."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from extras import needs
from gymnasium.spaces import Box, Dict, Discrete
from small_logs import counted, drift, first, marked, refused, warned

from iql_torchrl import IQLConfig, make_agent
from iql_torchrl.data import DatasetWarning, load_dataset

RNG = np.random.default_rng(1)
KEYS = ("observation", "action", "reward", "terminated", "truncated", "next_observation")


def bandit(rows=400, seed=0):
    """Independent contexts; every row terminates."""
    rng = np.random.default_rng(seed)
    return {
        "observation": rng.standard_normal((rows, 3)).astype(np.float32),
        "action": rng.integers(0, 3, rows),
        "reward": rng.standard_normal(rows),
        "terminated": np.ones(rows, bool),
    }


def of_40_steps(rows=400, **columns):
    """Independent observations in episodes that terminate after 40 steps."""
    ends = np.arange(rows) % 40 == 39
    return {**bandit(rows), "terminated": ends, "truncated": ends & False, **columns}


def notes(dataset):
    return " ".join(dataset.notes)


# -- rows of several environments


def vector_rows(name, envs, steps, mode="NEXT_STEP"):
    """Rows of a vector environment in the order of time: row = t * envs + env."""
    autoreset = gym.vector.AutoresetMode[mode]
    env = gym.make_vec(
        name, envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": autoreset}
    )
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    rows = {key: [] for key in (*KEYS, "env_index")}
    for _ in range(steps):
        action = env.action_space.sample()
        following, reward, terminated, truncated, info = env.step(action)
        after = following.copy()
        for number in np.flatnonzero(info.get("_final_obs", np.zeros(envs, bool))):
            after[number] = info["final_obs"][number]
        step = (observation, action, reward, terminated, truncated, after, np.arange(envs))
        for values, value in zip(rows.values(), step, strict=True):
            values.append(np.array(value))
        observation = following
    env.close()
    return {key: np.concatenate(values) for key, values in rows.items()}


def real_steps(rows, envs):
    """Rows sorted by environment, without those after an end of the same environment."""
    order = np.argsort(rows["env_index"], kind="stable")
    ended = (rows["terminated"] | rows["truncated"])[order]
    after = np.append(False, ended[:-1]) & (np.arange(len(order)) % (len(order) // envs) > 0)
    return order[~after]


@pytest.mark.parametrize(("name", "envs"), [("CartPole-v1", 4), ("Pendulum-v1", 1)])
def test_rows_that_vector_environments_write_at_resets_are_dropped(name, envs):
    rows = vector_rows(name, envs, 900)
    kept = real_steps(rows, envs)
    fake = 900 * envs - len(kept)
    assert fake > 1
    dataset = load_dataset(rows, env=name)
    assert np.array_equal(dataset.transitions["observation"], rows["observation"][kept])
    after = dataset.transitions["next", "observation"].numpy()
    assert np.array_equal(after, rows["next_observation"][kept])
    assert f"dropped {fake} rows that a vector environment wrote" in notes(dataset)
    all_rows = load_dataset(
        rows, env=lambda: gym.make(name, max_episode_steps=300), autoreset=False
    )
    assert len(all_rows) == 900 * envs
    # Without next observations a warning names the option.
    del rows["next_observation"]
    assert any("autoreset=True" in text for text in warned(rows, env=name))
    dataset = load_dataset(rows, env=name, autoreset=True)
    assert f"dropped {fake} rows" in notes(dataset)
    done = (rows["terminated"] | rows["truncated"])[kept]
    last = np.append(rows["env_index"][kept][1:] != rows["env_index"][kept][:-1], True)
    assert len(dataset) == len(kept) - (last & ~done).sum()


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP"])
def test_other_forms_of_autoreset_and_episodes_that_are_split_by_hand_stay(mode):
    rows = vector_rows("CartPole-v1", 2, 300, "SAME_STEP")
    if mode == "NEXT_STEP":
        kept = real_steps(raw := vector_rows("CartPole-v1", 2, 300), 2)
        rows = {key: values[kept] for key, values in raw.items()}
    dataset = load_dataset(rows, env="CartPole-v1")
    assert len(dataset) == len(rows["reward"])
    assert "vector environment" not in notes(dataset)


def test_steps_without_reward_after_the_start_of_an_episode_stay():
    data, ends = drift([30] * 5)
    data |= {"truncated": ends, "reward": np.where(np.roll(ends, 1), 0.0, 1.0)}
    assert load_dataset(data).episode_lengths.tolist() == [30] * 5


def interleaved(envs=5, steps=60):
    data, ends = drift([steps] * envs, seed=3)
    data["truncated"] = ends
    order = np.arange(envs * steps).reshape(envs, steps).T.reshape(-1)
    return data, {key: values[order] for key, values in data.items()}


@pytest.mark.parametrize("following", [True, False])
def test_interleaved_environments_are_refused_without_ids_and_sorted_by_them(following):
    data, mixed = interleaved()
    if not following:
        del data["next_observation"], mixed["next_observation"]
    message = refused("rows of 5 environments are interleaved|columns={'env_index': ...}", mixed)
    assert "numpy.arange(rows) % 5" in message
    for key, ids in (
        ("env_index", np.arange(300) % 5),
        ("episode", [f"p{n % 5}" for n in range(300)]),
    ):
        dataset = load_dataset(mixed | {key: np.array(ids)})
        assert (dataset.transitions == load_dataset(data).transitions).all()
        assert "rows are sorted by" in notes(dataset)


def test_ids_that_number_episodes_anew_are_not_joined():
    data, ends = drift([20, 30, 25, 20, 30, 25])
    data |= {"truncated": ends, "episode": (np.cumsum(ends) - ends) % 3}
    assert load_dataset(data).episode_lengths.tolist() == [20, 30, 25, 20, 30, 25]
    del data["truncated"], data["next_observation"]
    assert load_dataset(data).episode_lengths.tolist() == [19, 29, 24, 19, 29, 24]


# -- boundaries


def test_gaps_of_time_end_episodes():
    data, ends = drift([100, 100], successors=False)
    times = np.tile(np.arange(100) * 300.0, 2)
    keep = np.ones(200, bool)
    keep[[10, 40, 41, 150]] = False
    rows = data | {"episode": np.cumsum(ends) - ends, "time": times}
    rows = {key: values[keep] for key, values in rows.items()}
    del rows["truncated"]
    for time in (rows["time"], np.datetime64("2026-01-01", "s") + rows["time"].astype("m8[s]")):
        dataset = load_dataset(rows | {"time": time})
        assert dataset.episode_lengths.tolist() == [9, 28, 57, 49, 48]
        assert "gaps of more than 450 (a usual step is 300) after 3 rows" in notes(dataset)
    assert load_dataset(rows, columns={"time": None}).episode_lengths.tolist() == [96, 98]
    irregular = np.cumsum(np.random.default_rng(0).exponential(size=196))
    assert load_dataset(rows | {"time": irregular}).episode_lengths.tolist() == [96, 98]


def test_all_rows_in_one_episode_are_never_silent():
    data = bandit()
    del data["terminated"]
    (text,) = warned(data, columns={"terminated": None, "truncated": None})
    assert "all 400 rows were read as one episode" in text


def test_rewards_of_dropped_rows():
    ends = np.arange(400) % 40 == 39
    data = of_40_steps(terminated=ends & False, truncated=ends, reward=ends.astype(float))
    texts = warned(data)
    assert "10 dropped last rows have 100% of all rewards" in texts[0]
    assert warned(data | {"reward": np.ones(400)}) == []


def test_episodes_longer_than_the_environment_lets_them_be():
    def env():
        return gym.make("CartPole-v1", max_episode_steps=10)

    data = of_40_steps(observation=np.zeros((400, 4), np.float32))
    data["action"] %= 2
    (text,) = warned(data, env=env)
    assert "up to 40 steps" in text
    assert "after 10" in text


# -- spaces


@pytest.mark.parametrize(
    ("observation", "space"),
    [
        (RNG.integers(18, 91, 400), Box(-np.inf, np.inf, (1,), np.float32)),  # ages
        (RNG.integers(0, 200, (400, 5)).astype(np.uint8), Box(-np.inf, np.inf, (5,))),
        (RNG.integers(0, 30, 400), Discrete(30)),  # states of a table
        (np.array(["low", "high"] * 200), Discrete(2)),
        (np.arange(400) % 2 == 0, Discrete(2)),
    ],
)  # fmt: skip
def test_integers_are_numbers_or_categories(observation, space):
    dataset = load_dataset(of_40_steps(observation=observation))
    assert dataset.observation_space == space
    assert "observation" in notes(dataset)


def test_large_integers_are_not_categories():
    times = 1_700_000_000 + RNG.permutation(400)
    refused("which torch.float32 would round", of_40_steps(observation=times))
    dataset = load_dataset(of_40_steps(observation=times), dtype=torch.float64)
    assert dataset.transitions["observation"][:, 0].tolist() == times.tolist()


@pytest.mark.parametrize(
    ("action", "space", "words"),
    [
        (np.arange(400.0)[:, None] % 10 + 6, Box(6, 15, (1,), np.float64), "Discrete(16)"),
        (np.arange(400.0) % 3 - 1, Box(-1, 1, (1,), np.float64), "Discrete(3, start=-1)"),
        (np.linspace(-1, 1, 400), Box(-1, 1, (1,), np.float64), ""),
        (np.arange(400) % 2 == 0, Discrete(2), ""),
        (np.array(["b", "a", "c", "a"] * 100), Discrete(3), ""),
    ],
)
def test_spaces_of_actions(action, space, words):
    texts = warned(of_40_steps(action=action))
    assert any(words in text for text in texts) if words else texts == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        assert load_dataset(of_40_steps(action=action)).action_space == space


def test_negative_labels_and_constant_dimensions():
    labels = of_40_steps(action=np.arange(400) % 3 - 1)
    refused("action_space=gymnasium.spaces.Discrete(3, start=-1)", labels)
    dataset = load_dataset(labels, action_space=Discrete(3, start=-1))
    assert dataset.transitions["action"][:3].tolist() == [0, 1, 2]
    both = np.stack([np.linspace(-3, 3, 400), np.full(400, 2.0)], 1)
    (text,) = warned(of_40_steps(action=both))
    assert "own range" in text
    bounded = load_dataset(of_40_steps(action=both), action_space=Box(-4, 4, (2,)))
    assert bounded.action_space.shape == (2,)


def test_joined_datasets_have_the_union_of_their_spaces():
    less, more = of_40_steps(action=np.arange(400) % 2), of_40_steps(action=np.arange(400) % 3)
    assert load_dataset([less, more]).action_space == Discrete(3)
    texts = [of_40_steps(action=np.array(names * 200)) for names in (["b", "c"], ["a", "b"])]
    assert load_dataset(texts).transitions["action"][[0, 1, 400]].tolist() == [1, 2, 0]
    wide = of_40_steps(action=np.linspace(-3, 3, 400)[:, None])
    (text,) = warned([of_40_steps(action=wide["action"] / 3), wide])
    assert "-3 to 3" in text


# -- values


def test_a_handful_of_rewards_that_dominate():
    rewards = np.random.default_rng(0).standard_normal(4000)
    rewards[[5, 100, 2000]] = 1e12
    (text,) = warned(of_40_steps(4000, reward=rewards))
    assert "3 of 4000 rewards" in text
    sparse = np.where(np.isin(np.arange(4000), [5, 100, 2000]), 1.0, 0.0)
    assert warned(of_40_steps(4000, reward=sparse)) == []
    assert warned(of_40_steps(4000, reward=np.where(sparse > 0, 100, -0.01))) == []
    rewards[5] = 1e39
    refused(
        "next.reward has the value 1e+39, beyond the range of float32",
        of_40_steps(4000, reward=rewards),
    )


def test_rows_of_the_source_are_named_after_rows_were_dropped_and_sorted():
    data, ends = drift([10] * 8, successors=False)
    data |= {"truncated": ends, "action": data["action"].copy()}
    data["action"][47, 0] = 3
    box = {"action_space": Box(-1, 1, (2,), np.float32)}
    refused("first at row 47 of 80 (episode 4, step 7)", data, **box)
    order = np.arange(80).reshape(8, 10).T.reshape(-1)
    mixed = {key: values[order] for key, values in data.items()} | {"episode": order // 10}
    refused(f"first at row {order.tolist().index(47)} of 80 (episode 4, step 7)", mixed, **box)


def test_values_that_are_never_used_or_optional_may_be_missing():
    data = counted(5, 5, 5, terminated=[0, 1, 2])
    data["next_observation"][[4, 9]] = np.nan
    rows = load_dataset(data)
    assert rows.transitions["next", "observation"][4].tolist() == [4, -4]
    assert "next_observation is NaN in 2 rows that terminate" in notes(rows)
    probabilities = np.full(15, 0.25)
    dataset = load_dataset(data | {"action_prob": probabilities})
    assert torch.allclose(dataset.transitions["action_log_prob"], torch.tensor(0.25).log())
    logs = np.log(probabilities)
    logs[3] = np.nan
    (text,) = warned(data | {"action_log_prob": logs})
    assert "NaN in 1 of 15 rows; the column is left out" in text
    discrete = data | {"action": np.arange(15) % 3, "action_log_prob": probabilities}
    refused("action_log_prob is 0.25 at row 0, more than 0|action_prob", discrete)
    cells = np.array(["1.5"] * 15, object)
    cells[7] = "n/a"
    refused(
        "has numbers, and the text 'n/a', first at row 7",
        data | {"observation": cells},
        columns={"next_observation": None},
    )


def test_bandits_horizons_and_shuffled_transitions_give_no_false_warning():
    assert warned(bandit()) == []  # no truncated column
    assert warned(of_40_steps()) == []
    assert "If that is a time limit" in notes(load_dataset(of_40_steps()))
    data, ends = drift([40] * 10)
    data["truncated"] = ends
    order = np.random.default_rng(0).permutation(400)
    texts = " ".join(warned({key: values[order] for key, values in data.items()}))
    assert "not in the order of time" in texts
    assert "Repair" not in texts


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_actions_beyond_a_bound_by_rounding(kind):
    data = of_40_steps(action=np.linspace(-1, 1, 400).astype(kind)[:, None])
    data["action"][-1] = 1 + 4 * np.finfo(np.float32 if kind == np.float64 else kind).eps
    dataset = load_dataset(data, action_space=Box(-1, 1, (1,), np.float32))
    assert dataset.transitions["action"].max() == 1
    data["action"][7] = 1.1
    refused("outside its bounds|row 7 of 400", data, action_space=Box(-1, 1, (1,), np.float32))


def test_one_dimensional_actions_train():
    dataset = load_dataset(of_40_steps(action=np.linspace(-1, 1, 400).astype(np.float32)))
    agent = make_agent(IQLConfig(hidden=(8, 8)), dataset)
    agent.step(dataset.replay_buffer(16, seed=0).sample())
    assert first(dataset, ("action",))[0] == -1


def test_columns_of_units_below_one_are_compared_in_their_unit():
    """Positions in micrometres: another row's next observation is not equal to this one's."""
    data = drift([20, 30])[0]
    data |= {
        "observation": 1e-9 * data["observation"],
        "next_observation": 1e-9 * data["next_observation"],
    }
    del data["truncated"]
    assert load_dataset(data).episode_lengths.tolist() == [20, 30]
    assert marked(load_dataset(data)) == ([], [19, 49])


def test_frames_of_pandas_and_leaves(tmp_path):
    pandas = needs("pandas")
    rows = of_40_steps(observation={"a": bandit()["observation"], "b": np.arange(400) % 5})
    assert load_dataset(rows).observation_space == Dict(
        a=Box(-np.inf, np.inf, (3,), np.float32), b=Discrete(5)
    )
    steps = of_40_steps() | {"x": RNG.standard_normal(400), "y": 1.0}
    del steps["observation"]
    table, columns = pandas.DataFrame(steps), {"observation": ["x", "y"]}
    expected = load_dataset(table, columns=columns).transitions
    table.to_csv(tmp_path / "table.csv")
    assert (load_dataset(tmp_path / "table.csv", columns=columns).transitions == expected).all()
