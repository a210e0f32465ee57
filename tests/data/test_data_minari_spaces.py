"""Minari datasets whose spaces networks cannot read as they are: texts, Tuples, Dicts of actions."""

import collections
import json
import pickle
import warnings

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from extras import needs
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from minari.data_collector import EpisodeBuffer
from small_agents import Walk
from small_logs import refused
from tensordict.nn import TensorDictModule

from iql_torchrl import IQLConfig, evaluate, make_agent
from iql_torchrl.data import DatasetError, load_dataset
from iql_torchrl.data.codec import Adaptation, action_leaves, flat_action_space, unflat_action
from iql_torchrl.data.readers.environments import adapted_env
from iql_torchrl.data.readers.minari import open_minari
from iql_torchrl.data.readers.options import ReadOptions

STEPS = 4
PLACE, SPEED = Box(-99, 99, (2,), np.float32), Box(-9, 9, (3,), np.float32)
MISSION = Dict(
    {"arm": Dict({"place": PLACE, "speed": SPEED}), "direction": Discrete(4), "mission": Text(9)}
)
MOVE, GRIP, TURN = Box(-2, 2, (2,), np.float32), Box(0, 1, (1,), np.float32), Discrete(3)


def counted(shape, number, rows):
    """Row t of episode e holds 10 e + t, 10 e + t + 0.25, ... in its entries."""
    size = int(np.prod(shape))
    steps = 10.0 * number + np.arange(rows)[:, None] + 0.25 * np.arange(size)
    return steps.reshape(rows, *shape).astype(np.float32)


def mission(number, rows):
    return {
        "arm": {"place": counted((2,), number, rows), "speed": counted((3,), number, rows)},
        "direction": (number + np.arange(rows)) % 4,
        "mission": ["go left"] * rows,
    }


def three(number, rows):
    return (number + np.arange(rows)) % 3


def write(name, observe=mission, space=MISSION, actions=three, action_space=TURN, **options):
    """Two truncated episodes of ``STEPS``, of what ``observe`` and ``actions`` give for each."""
    ends = np.arange(STEPS) == STEPS - 1
    buffers = [
        EpisodeBuffer(
            observations=observe(number, STEPS + 1), actions=actions(number, STEPS),
            rewards=np.arange(STEPS) + 0.5, terminations=ends & False, truncations=ends, infos={},
        )
        for number in range(2)
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for authors and permalinks.
        return minari.create_dataset_from_buffers(
            name, buffers, observation_space=space, action_space=action_space, **options
        )


class Words(gym.Space):
    """A space that only one package knows, as that of MiniGrid's missions."""


def at_step(values, step):
    if isinstance(values, dict):
        return {name: at_step(each, step) for name, each in values.items()}
    if isinstance(values, tuple):
        return tuple(at_step(each, step) for each in values)
    return values[step]


def env_of(observe, space, action_space=TURN, pay=float):
    """Makes environments that repeat the observations of the first episode."""
    seen, reward = observe(0, STEPS + 1), lambda step, action: float(pay(action))
    return lambda: Walk(space, action_space, lambda step: at_step(seen, step), reward)


mission_env = env_of(mission, Dict({**MISSION.spaces, "mission": Words()}))


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
def test_columns_of_minari(minari_root, storage):
    """Every column by hand: 2 episodes of 4 steps, of 5 observations."""
    if storage != "hdf5":
        needs("pyarrow")
    stored = write("made/m-v0", data_format=storage)
    opened = open_minari(stored, ReadOptions())
    values = {name: np.asarray(column[:]) for name, column in opened.columns.items()}
    leaves = ("arm/place", "arm/speed", "direction")
    sides = {f"{side}observation/{leaf}" for side in ("", "next/") for leaf in leaves}
    assert values.keys() == sides | {"action", "reward", "terminated", "truncated", "episode"}
    assert values["observation/direction"].tolist() == [0, 1, 2, 3, 1, 2, 3, 0]
    assert values["next/observation/direction"].tolist() == [1, 2, 3, 0, 2, 3, 0, 1]
    assert values["observation/arm/place"][:, 1].tolist() == [
        0.25, 1.25, 2.25, 3.25, 10.25, 11.25, 12.25, 13.25
    ]  # fmt: skip
    assert values["next/observation/arm/place"][3].tolist() == [4.0, 4.25]
    assert values["action"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert values["reward"].tolist() == [0.5, 1.5, 2.5, 3.5] * 2
    assert not values["terminated"].any()
    assert np.flatnonzero(values["truncated"]).tolist() == [3, 7]
    assert values["episode"].tolist() == [0] * 4 + [1] * 4
    place = opened.columns["observation/arm/place"]
    assert place.shape == (8, 2)
    assert place.dtype == np.float32
    np.testing.assert_array_equal(place[2:6], values["observation/arm/place"][2:6])
    assert opened.observation_space == Dict({k: MISSION[k] for k in ("arm", "direction")})
    assert opened.notes == (
        "left out of the observation: 'mission' (no tensor form: Text); "
        "kept: 'arm/place', 'arm/speed', 'direction'.",
    )


def test_a_selection_and_any_order_of_slices(minari_root):
    stored = write("made/m-v0")
    opened = open_minari(stored.filter_episodes(lambda e: e.id == 1), ReadOptions())
    column = opened.columns["observation/direction"]
    assert column[2:4].tolist() == [3, 0]
    assert column[0:1].tolist() == [1]
    assert opened.columns["episode"].tolist() == [0] * 4
    column = open_minari(stored, ReadOptions()).columns["next/observation/direction"]
    assert [column[n : n + 1].item() for n in (7, 0, 4, 3)] == [1, 1, 2, 0]


def test_texts_are_left_out_of_rows_and_environment(minari_root):
    write("made/m-v0")
    dataset = load_dataset("made/m-v0", env=mission_env)
    assert list(dataset.observation_space.spaces) == ["arm", "direction"]
    assert dataset.transitions["observation", "direction"].tolist() == [0, 1, 2, 3, 1, 2, 3, 0]
    assert "mission" not in dataset.transitions["observation"]
    assert any("'mission' (no tensor form: Text)" in note for note in dataset.notes)
    env = dataset.make_env()
    assert env.observation_space == dataset.observation_space
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    # action 1 where the direction is odd: 0 + 1 + 0 + 1
    odd = TensorDictModule(lambda d: d % 2, [("observation", "direction")], ["action"])
    played = evaluate(odd, dataset.make_env, episodes=2, num_envs=2, seed=0)
    assert played.returns.tolist() == [2.0, 2.0]
    agent = make_agent(IQLConfig(hidden=(8,)), dataset)
    assert agent.act(observation) in (0, 1, 2)
    again = load_dataset("made/m-v0", env=dataset.make_env)
    assert again.make_env().observation_space == dataset.observation_space


@pytest.mark.parametrize(
    ("chosen", "kept", "left"),
    [
        (["direction", "arm"], ["arm/place", "arm/speed", "direction"], "'mission' ("),
        (["arm.speed", "direction"], ["arm/speed", "direction"], "'arm/place', 'mission'"),
        ("arm", ["arm/place", "arm/speed"], "'direction', 'mission'"),
        ("arm/speed", [""], "'arm/place', 'direction', 'mission'"),
        (["direction"], [""], "'arm/place', 'arm/speed', 'mission'"),
    ],
)
def test_leaves_are_chosen(minari_root, chosen, kept, left):
    write("made/m-v0")
    dataset = load_dataset("made/m-v0", env=mission_env, columns={"observation": chosen})
    observed = dataset.transitions.select("observation", ("next", "observation"))
    keys = {tuple(filter(None, ("observation", *leaf.split("/")))) for leaf in kept}
    assert set(observed.keys(True, True)) == {
        (*side, *key) if side or len(key) > 1 else key[0]
        for side in ((), ("next",))
        for key in keys
    }
    assert any(f"left out of the observation: {left}" in note for note in dataset.notes)
    if chosen == "arm/speed":
        rows = torch.tensor([[0, 0.25, 0.5], [1, 1.25, 1.5]])
        assert torch.equal(dataset.transitions["observation"][:2], rows)
    observation, _ = dataset.make_env().reset()
    assert dataset.observation_space.contains(observation)
    assert dataset.make_env().observation_space == dataset.observation_space


@pytest.mark.parametrize("columns", [{}, {"observation": ["arm", "direction"]}])
def test_leaves_are_joined(minari_root, columns):
    write("made/m-v0")
    joined = ["arm/speed", "arm/place"]
    dataset = load_dataset("made/m-v0", env=mission_env, columns=columns, concatenate=joined)
    row = [1, 1.25, 1.5, 1, 1.25]
    assert dataset.transitions["observation"][1].tolist() == row
    env = dataset.make_env()
    env.reset()
    observation = env.step(0)[0]
    assert observation.tolist() == row
    assert observation.dtype == np.float32
    assert env.observation_space == dataset.observation_space


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"observation": "hand"}, "maps observation to 'hand'"),
        ({"observation": ["direction", "mission"]}, "'mission'; the observation is Dict of"),
        ({"observation": None}, "observation cannot be left out"),
        ({"reward": "r"}, "only observation, action_mask, action_log_prob can be named"),
    ],
)
def test_leaves_that_cannot_be_chosen(minari_root, columns, words):
    write("made/m-v0")
    refused(words, "made/m-v0", columns=columns)


def test_an_observation_of_text_alone_is_refused(minari_root):
    write("made/m-v0", lambda n, rows: ["left"] * rows, Text(9))
    refused("the observation is Text|no leaf with a tensor form", "made/m-v0")


def test_the_record_of_a_saved_dataset_keeps_the_leaves(minari_root):
    write("made/m-v0")
    options = {"env": mission_env, "columns": {"observation": ["direction"]}}
    for _ in range(2):  # built, then reused
        dataset = load_dataset("made/m-v0", memmap=minari_root / "table", **options)
        assert dataset.make_env().observation_space == Discrete(4)
    alone = load_dataset(minari_root / "table", env=mission_env)
    assert alone.adaptation == Adaptation(("direction",))
    assert alone.make_env().observation_space == Discrete(4)
    changed = Adaptation(("a/b",), ("c",), "mask", flat_action=True)
    assert Adaptation(**json.loads(json.dumps(vars(changed)))) == changed


def pair(number, rows):
    return counted((2,), number, rows), (number + np.arange(rows)) % 5 + 3


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
def test_tuples_become_dicts(minari_root, storage):
    if storage != "hdf5":
        needs("pyarrow")
    space = Tuple([PLACE, Discrete(5, start=3)])
    write("made/t-v0", pair, space, data_format=storage)
    dataset = load_dataset("made/t-v0", env=env_of(pair, space))
    assert dataset.observation_space == Dict({"0": PLACE, "1": Discrete(5, start=3)})
    assert dataset.transitions["observation", "1"].tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
    assert dataset.transitions["next", "observation", "0"][4].tolist() == [11, 11.25]
    assert dataset.make_env().reset()[0]["1"] == 3
    # the indices 0, 1, 2, 3 pay 0 + 1 + 1 + 1
    policy = TensorDictModule(lambda n: n.clamp(max=1), [("observation", "1")], ["action"])
    played = evaluate(policy, dataset.make_env, episodes=1, seed=0)
    assert played.returns.tolist() == [3.0]
    place = load_dataset("made/t-v0", env=env_of(pair, space), columns={"observation": "0"})
    assert place.observation_space == PLACE
    assert place.make_env().reset()[0].tolist() == [0, 0.25]


def moves(number, rows):
    """The grip is t / 10, the move -1, 1."""
    return {
        "move": np.tile(np.float32([-1, 1]), (rows, 1)),
        "grip": np.float32(np.arange(rows) / 10)[:, None],
    }


def place(number, rows):
    return counted((2,), number, rows)


def test_dicts_of_boxes_are_one_vector_of_actions(minari_root):
    """Leaves are in the order of their names, also where the environment has another order."""
    space = Dict({"move": MOVE, "grip": GRIP})
    write("made/a-v0", place, PLACE, moves, space)
    other = Dict(collections.OrderedDict(move=MOVE, grip=GRIP))
    assert list(other.spaces) == ["move", "grip"]
    pay = lambda a: 100 * a["grip"][0] + 10 * a["move"][0] + a["move"][1]  # noqa: E731
    dataset = load_dataset("made/a-v0", env=env_of(place, PLACE, other, pay))
    assert dataset.action_space == Box(np.float32([0, -2, -2]), np.float32([1, 2, 2]))
    expected = torch.tensor([[0, -1, 1], [0.1, -1, 1], [0.2, -1, 1], [0.3, -1, 1]])
    assert torch.equal(dataset.transitions["action"], torch.cat([expected, expected]))
    assert any("the leaves grip, move, in this order" in note for note in dataset.notes)
    chosen = torch.tensor([0.5, -2.0, 1.0])  # pays 100 * 0.5 - 10 * 2 + 1 in each of four steps
    policy = TensorDictModule(lambda x: chosen.expand(len(x), 3), ["observation"], ["action"])
    played = evaluate(policy, dataset.make_env, episodes=2, num_envs=2, seed=0)
    assert played.returns.tolist() == [4 * 31.0] * 2
    agent = make_agent(IQLConfig(hidden=(8,)), dataset)
    action = agent.act(np.zeros(2, np.float32))
    env = dataset.make_env()
    assert env.action_space == dataset.action_space
    env.reset()
    env.step(action)
    assert pickle.loads(pickle.dumps(Adaptation(flat_action=True))) == dataset.adaptation


def test_tuples_of_categories_are_one_vector(minari_root):
    space = Tuple([Discrete(3), MultiDiscrete([2, 4], start=[5, 0])])

    def chosen(number, rows):
        return three(number, rows), np.stack([5 + np.arange(rows) % 2, 3 - np.arange(rows)], 1)

    write("made/a-v0", place, PLACE, chosen, space)
    pay = lambda a: 100 * a[0] + 10 * a[1][0] + a[1][1]  # noqa: E731
    dataset = load_dataset("made/a-v0", env=env_of(place, PLACE, space, pay))
    assert dataset.action_space == MultiDiscrete([3, 2, 4], start=[0, 5, 0])
    expected = [[0, 0, 3], [1, 1, 2], [2, 0, 1], [0, 1, 0]]
    assert dataset.transitions["action"][:4].tolist() == expected
    index = torch.tensor([2, 1, 3])  # the action 2, (6, 3) pays 263
    policy = TensorDictModule(lambda x: index.expand(len(x), 3), ["observation"], ["action"])
    played = evaluate(policy, dataset.make_env, episodes=1, seed=0)
    assert played.returns.tolist() == [4 * 263.0]


def test_one_category_in_a_dict_stays_discrete(minari_root):
    space = Dict({"turn": Discrete(3, start=1)})
    write("made/a-v0", place, PLACE, lambda n, rows: {"turn": three(n, rows) + 1}, space)
    make_env = env_of(place, PLACE, space, lambda action: action["turn"])
    dataset = load_dataset("made/a-v0", env=make_env)
    assert dataset.action_space == Discrete(3, start=1)
    assert dataset.transitions["action"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    agent = make_agent(IQLConfig(hidden=(8,)), dataset)
    assert agent.act(np.zeros(2, np.float32)) in (1, 2, 3)
    last = TensorDictModule(lambda x: torch.full((len(x),), 2), ["observation"], ["action"])
    assert evaluate(last, dataset.make_env, episodes=1, seed=0).returns.tolist() == [12.0]


def test_a_mixture_of_actions_is_refused(minari_root):
    space = Dict({"turn": Discrete(3), "move": MOVE})

    def chosen(number, rows):
        return {"turn": three(number, rows), "move": np.zeros((rows, 2), np.float32)}

    write("made/a-v0", place, PLACE, chosen, space)
    refused("move (Box of shape (2,)|turn (Discrete(3))|TransformAction", "made/a-v0")


def test_a_mask_in_the_observation_is_given_by_the_environment(minari_root):
    """The agent of such a dataset acts with the masks that its environments give."""
    space = Dict({"state": PLACE, "action_mask": MultiBinary(3)})

    def observe(number, rows):
        masks = np.zeros((rows, 3), np.int8)
        masks[np.arange(rows), three(number, rows)] = 1
        return {"state": place(number, rows), "action_mask": masks}

    write("made/a-v0", observe, space)
    dataset = load_dataset("made/a-v0", env=env_of(observe, space))
    assert dataset.observation_space == PLACE
    assert dataset.transitions["action_mask"].long().argmax(1).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    observation, info = dataset.make_env().reset()
    assert observation.tolist() == [0, 0.25]
    assert info["action_mask"].tolist() == [1, 0, 0]
    agent = make_agent(IQLConfig(hidden=(8,)), dataset)
    # only the actions 0, 1, 2, 0 are allowed
    assert evaluate(agent.policy, dataset.make_env, episodes=1, seed=0).returns.tolist() == [3.0]


def test_actions_return_to_their_space():
    space = Dict({"b": Tuple([Box(-1, 1, (2, 2)), Box(-1, 1, (1,))]), "a": Box(-1, 1, ())})
    assert list(action_leaves(space)) == [("a",), ("b", "0"), ("b", "1")]
    flat = flat_action_space(space, "made")
    assert flat.shape == (6,)
    action = unflat_action(np.float32([1, 2, 3, 4, 5, 6]) / 10, space)
    assert space.contains(action)
    assert action["a"] == np.float32(0.1)
    assert action["b"][0].tolist() == np.float32([[0.2, 0.3], [0.4, 0.5]]).tolist()
    assert action["b"][1].tolist() == np.float32([0.6]).tolist()


def test_an_adapted_environment_is_made_of_its_spec():
    adaptation = Adaptation(flat_action=True)
    env = adapted_env(lambda: gym.make("Pendulum-v1"), adaptation)
    again = gym.make(env.spec)
    assert again.action_space == env.action_space == Box(-2, 2, (1,), np.float32)
    with pytest.raises(DatasetError, match=r"Pendulum-v1: concatenate=.*not a Dict"):
        Adaptation(concatenate=("a",)).observation_space(env.observation_space, "Pendulum-v1")
