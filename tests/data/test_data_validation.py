"""Every kind of bad input is refused, or reported, with its key and place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset

Arrays = dict[str, Any]


def table(episodes: int = 3, length: int = 5) -> Arrays:
    """A clean table of float observations (N, 3) and actions (N, 2)."""
    rng = np.random.default_rng(0)
    rows = episodes * length
    ends = np.arange(rows) % length == length - 1
    walks = rng.standard_normal((episodes, length + 1, 3)).astype(np.float32)
    return {
        "observation": walks[:, :-1].reshape(rows, 3),
        "next_observation": walks[:, 1:].reshape(rows, 3),
        "action": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "reward": rng.standard_normal(rows).astype(np.float32),
        "terminated": ends & (np.arange(rows) < length),
        "truncated": ends & (np.arange(rows) >= length),
    }


def discrete() -> Arrays:
    data = table()
    data["action"] = np.arange(15) % 4
    data["action_mask"] = np.ones((15, 4), bool)
    return data


def put(key: str, index: Any, value: Any) -> Callable[[Arrays], None]:
    def change(data: Arrays) -> None:
        data[key][index] = value

    return change


def to(key: str, value: Callable[[Any], Any]) -> Callable[[Arrays], None]:
    def change(data: Arrays) -> None:
        data[key] = value(data[key])

    return change


def constant_column(data: Arrays) -> None:
    data["observation"][:, 1] = data["next_observation"][:, 1] = 3.0


def without(*keys: str) -> Callable[[Arrays], None]:
    def change(data: Arrays) -> None:
        for key in keys:
            del data[key]

    return change


def adding(**more: Any) -> Callable[[Arrays], None]:
    return lambda data: data.update(more)


BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
NAN = np.nan
# name: (clean table, what spoils it, options, words the error must contain)
BAD: dict[str, tuple[Callable[[], Arrays], Callable[[Arrays], Any], Arrays, list[str]]] = {
    "observation NaN": (
        table, put("observation", (7, 1), NAN), {},
        ["observation", "NaN", "row 7", "episode 1", "step 2", "of 15"],
    ),
    "observation inf": (table, put("observation", (2, 0), np.inf), {}, ["observation", "row 2"]),
    "next observation NaN": (
        table, put("next_observation", (3, 0), NAN), {}, ["next.observation", "row 3"],
    ),
    "action NaN": (table, put("action", (4, 0), NAN), {"action_space": BOX}, ["action", "row 4"]),
    "reward NaN": (table, put("reward", 14, NAN), {}, ["next.reward", "row 14", "episode 2"]),
    "reward minus inf": (table, put("reward", 0, -np.inf), {}, ["next.reward", "row 0"]),
    "overflow of float32": (
        table, to("reward", lambda r: np.where(np.arange(15) == 5, 1e300, r.astype(float))), {},
        ["next.reward", "row 5"],
    ),
    "action above bounds": (
        table, put("action", (6, 1), 1.5), {"action_space": BOX},
        ["action", "1.5", "[-1, 1]", "row 6", "clip_actions"],
    ),
    "action below bounds": (
        table, put("action", (6, 1), -3), {"action_space": BOX}, ["action", "row 6"],
    ),
    "action of wrong width": (
        table, to("action", lambda a: a[:, :1]), {"action_space": BOX}, ["action", "(1,)", "(2,)"],
    ),
    "float actions for Discrete": (
        table, to("action", lambda a: a[:, 0]), {"action_space": gym.spaces.Discrete(4)},
        ["action", "float32", "int64"],
    ),
    "integer actions for Box": (
        table, to("action", lambda a: a.astype(int)), {"action_space": BOX},
        ["action", "int64", "float32"],
    ),
    "discrete action too large": (
        discrete, put("action", 9, 4), {"action_space": gym.spaces.Discrete(4)},
        ["action", "row 9", "Discrete(4)"],
    ),
    "discrete action negative": (
        discrete, put("action", 9, -1), {"action_space": gym.spaces.Discrete(4)}, ["row 9"],
    ),
    "discrete action negative, no space": (
        lambda: {k: v for k, v in discrete().items() if k != "action_mask"},
        put("action", 9, -1), {}, ["action", "-1", "row 9"],
    ),
    "Discrete from 2": (
        discrete, without("action_mask"), {"action_space": gym.spaces.Discrete(4, start=2)},
        ["action", "start <= value < start + n", "Discrete(4, start=2)"],
    ),
    "MultiDiscrete too large": (
        table, to("action", lambda a: np.full((15, 2), 3)),
        {"action_space": gym.spaces.MultiDiscrete([4, 3])}, ["action", "row 0"],
    ),
    "mask forbids the action": (
        discrete, put("action_mask", (6, 2), False), {}, ["action_mask", "forbids", "row 6"],
    ),
    "mask allows nothing": (discrete, put("action_mask", 5, False), {}, ["action_mask", "row 5"]),
    "mask of wrong width": (
        discrete, to("action_mask", lambda m: m[:, :3]), {"action_space": gym.spaces.Discrete(4)},
        ["action_mask", "(3,)"],
    ),
    "mask of floats": (
        discrete, to("action_mask", lambda m: m * 0.5), {}, ["action_mask", "0 or 1"],
    ),
    "mask for Box": (
        table, adding(action_mask=np.ones((15, 2), bool)), {"action_space": BOX}, ["action_mask"],
    ),
    "log probability NaN": (
        table, adding(action_log_prob=np.full(15, NAN)), {}, ["action_log_prob", "row 0"],
    ),
    "log probability per dimension": (
        table, adding(action_log_prob=np.zeros((15, 2))), {}, ["action_log_prob", "(15, 2)"],
    ),
    "observation category too large": (
        table, lambda d: d.update(observation=np.full(15, 5), next_observation=np.full(15, 5)),
        {"observation_space": gym.spaces.Discrete(5), "action_space": BOX}, ["observation", "row"],
    ),
    "float observation for Discrete": (
        table, lambda d: d.update(observation=np.ones(15), next_observation=np.ones(15)),
        {"observation_space": gym.spaces.Discrete(5), "action_space": BOX}, ["float64", "int64"],
    ),
    "observation of wrong width": (
        table, to("observation", lambda o: o[:, :2]),
        {"observation_space": gym.spaces.Box(-9, 9, (3,)), "action_space": BOX}, ["(2,)", "(3,)"],
    ),
    "next observation of other width": (
        table, to("next_observation", lambda o: o[:, :2]), {}, ["next/observation", "(2,)"],
    ),
    "rewards short": (table, to("reward", lambda r: r[:-1]), {}, ["reward", "14", "15"]),
    "actions short": (table, to("action", lambda a: a[:-2]), {}, ["action", "13", "15"]),
    "flags long": (
        table, to("terminated", lambda t: np.append(t, False)), {}, ["terminated", "16", "15"],
    ),
    "rewards of two columns": (
        table, to("reward", lambda r: np.stack([r, r], 1)), {}, ["reward", "(15, 2)"],
    ),
    "rewards of text": (table, to("reward", lambda r: r.astype(str)), {}, ["reward"]),
    "object observations": (
        table, to("observation", lambda o: np.array([None] * 15)), {}, ["observation", "object"],
    ),
    "ragged lists": (
        table, lambda d: d.update(observation=[[1.0, 2.0]] * 14 + [[1.0]]), {},
        ["observation", "different lengths", "numpy.concatenate"],
    ),
    "rewards as one list per episode": (
        table, lambda d: d.update(reward=[[1.0] * 4, [1.0] * 6, [1.0] * 5]), {},
        ["reward", "different lengths"],
    ),
    "complex rewards": (table, to("reward", lambda r: r * 1j), {}, ["reward", "complex64"]),
    "one number as rewards": (table, to("reward", lambda r: 3.0), {}, ["reward", "single value"]),
    "no rewards but None": (table, to("reward", lambda r: None), {}, ["reward", "single value"]),
    "boolean rewards": (table, to("reward", lambda r: r > 0), {}, ["next.reward", "bool"]),
    "boolean actions": (table, to("action", lambda a: a > 0), {}, ["action", "bool"]),
    "actions of no columns": (table, to("action", lambda a: a[:, :0]), {}, ["action", "(15, 0)"]),
    "observations of no columns": (
        table, lambda d: d.update(observation=np.ones((15, 0)), next_observation=np.ones((15, 0))),
        {}, ["observation", "(15, 0)", "no numbers"],
    ),
    "actions in groups": (
        table, to("action", lambda a: {"arm": a, "hand": a}), {}, ["action", "arm, hand"],
    ),
    "masked rewards": (
        table, to("reward", lambda r: np.ma.masked_array(r, r > 0)), {}, ["reward", "masked"],
    ),
    "sparse tensor": (
        table, to("reward", lambda r: torch.from_numpy(r).to_sparse()), {}, ["reward", "sparse"],
    ),
    "categories without end": (
        table, to("action", lambda a: np.full(15, 2**63, np.uint64)), {},
        ["action", "9223372036854775808", "category"],
    ),
    "episode number NaN": (
        table, adding(episode=np.full(15, NAN)), {}, ["episode", "NaN", "row 0"],
    ),
    "columns as a list": (table, adding(), {"columns": ["reward"]}, ["columns", "dict"]),
    "limit as text": (table, adding(), {"limit": "9"}, ["limit", "'9'"]),
    "limit as a fraction": (table, adding(), {"limit": 7.5}, ["limit", "7.5"]),
    "step limit 0": (table, adding(), {"max_episode_steps": 0}, ["max_episode_steps", "0"]),
    "reward None": (table, adding(), {"reward": None}, ["reward", "None"]),
    "reward of text": (table, adding(), {"reward": ("1", "0")}, ["scale, shift"]),
    "one reference score": (
        table, adding(), {"reference_scores": 3.0}, ["reference_scores", "random, expert"],
    ),
    "space of text": (table, adding(), {"action_space": "Box"}, ["action_space", "str"]),
    "empty": (
        table, lambda d: d.update({k: v[:0] for k, v in d.items()}), {}, ["observation", "0 rows"],
    ),
    "no observation": (table, without("observation"), {}, ["observation", "columns"]),
    "no action": (table, without("action"), {}, ["no column for action"]),
    "no reward": (table, without("reward"), {}, ["no column for reward"]),
    "no terminated": (table, without("terminated"), {}, ["no column for terminated"]),
    "done only": (
        table, lambda d: d.update(done=d.pop("terminated") | d.pop("truncated")), {},
        ["terminated", "'done'", "merge"],
    ),
    "two names for one key": (
        table, lambda d: d.update(rewards=d["reward"]), {}, ["reward, rewards", "columns"],
    ),
    "flag of 2": (
        table, to("terminated", lambda t: t * 2), {}, ["terminated", "2", "row 4", "0 or 1"],
    ),
    "flag NaN": (
        table, to("truncated", lambda t: np.where(t, NAN, 0.0)), {}, ["truncated", "row 9"],
    ),
    "episode goes on after its end": (
        table,
        lambda d: (
            d["terminated"].__setitem__(2, True), d.update(episode=np.arange(15) // 5),
            d["next_observation"].__setitem__(2, 9.0),
        ),
        {}, ["row 2", "episode"],
    ),
    "ends cannot be found": (
        table, without("truncated", "next_observation"), {}, ["max_episode_steps"],
    ),
    "only truncated one-row episodes": (
        table, lambda d: (d.pop("next_observation"), d.update(truncated=np.ones(15, bool)),
                         d["terminated"].fill(False)), {},
        ["no transition is left"],
    ),
    "columns names nothing": (table, adding(), {"columns": {"reward": "r"}}, ["'r'", "reward"]),
    "columns of an unknown key": (table, adding(), {"columns": {"rew": "reward"}}, ["'rew'"]),
    "columns leaves out reward": (table, adding(), {"columns": {"reward": None}}, ["left out"]),
    "reward offset 2": (table, adding(), {"reward_offset": 2}, ["reward_offset", "2"]),
    "limit 0": (table, adding(), {"limit": 0}, ["limit", "0"]),
    "concatenate a plain observation": (
        table, adding(), {"concatenate": ["a"]}, ["concatenate", "not a Dict"],
    ),
    "concatenate an unknown leaf": (
        table, lambda d: d.update({k: {"a": d[k]} for k in ("observation", "next_observation")}),
        {"concatenate": ["b"]}, ["'b'", "leaves are a"],
    ),
    "next leaves differ": (
        table, lambda d: d.update(
            observation={"a": d["observation"]}, next_observation={"b": d["observation"]}
        ), {}, ["next_observation", "leaves"],
    ),
    "return range of equal returns": (
        table, put("reward", slice(None), 1.0), {"reward": "return_range"}, ["return_range"],
    ),
    "reward map unknown": (table, adding(), {"reward": "tanh"}, ["reward", "tanh"]),
    "reward scale 0": (table, adding(), {"reward": (0.0, 1.0)}, ["scale"]),
    "reward triple": (table, adding(), {"reward": (1.0, 1.0, 1.0)}, ["scale, shift"]),
    "half precision": (table, adding(), {"dtype": torch.float16}, ["dtype", "float16"]),
    "reference task unknown": (
        table, adding(), {"reference_scores": "cheetah"}, ["reference_scores", "cheetah"],
    ),
    "environment unknown": (table, adding(), {"env": "NoSuch-v0"}, ["NoSuch-v0", "install"]),
    "environment of another shape": (table, adding(), {"env": "Pendulum-v1"}, ["action", "(2,)"]),
}  # fmt: skip


def test_there_are_enough_cases() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_place(case: str) -> None:
    make, spoil, options, words = BAD[case]
    data = make()
    spoil(data)
    with pytest.raises(DatasetError) as caught:
        load_dataset(data, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (put("truncated", 4, True), ["terminated and truncated"]),
        (put("truncated", 14, False), ["without a mark"]),
        (put("action", (0, 0), 1.7), ["actions reach", "pass env="]),
    ],
)
def test_doubtful_input_is_reported(spoil: Callable[[Arrays], None], words: list[str]) -> None:
    data = table()
    spoil(data)
    with pytest.warns(DatasetWarning) as caught:
        dataset = load_dataset(data)
    text = str(caught[0].message)
    assert all(word in text for word in words), text
    assert text in dataset.notes


def test_equal_rewards_and_constant_columns_are_noted_without_a_warning() -> None:
    data = table()
    data["reward"][:] = 2.0
    constant_column(data)
    notes = " ".join(load_dataset(data).notes)
    assert "every reward is 2;" in notes
    assert "observation never changes in 1 of 3 columns (1)" in notes


def test_states_that_occur_as_next_observations_only_are_in_the_guessed_space() -> None:
    data = table()
    states = np.tile(np.arange(6), (3, 1))  # Episodes end in state 5.
    data.update(observation=states[:, :-1].reshape(-1), next_observation=states[:, 1:].reshape(-1))
    assert load_dataset(data).observation_space == gym.spaces.Discrete(6)
    for key in ("observation", "next_observation"):
        data[key] = np.stack([data[key], 0 * data[key]], 1)
    assert load_dataset(data).observation_space == gym.spaces.MultiDiscrete([6, 1])


def test_discrete_actions_stored_as_floats_are_reported() -> None:
    data = table()
    numbers = np.arange(15) % 4
    for actions, remedy in (
        (numbers.astype(np.float32), "astype(int)"),
        (numbers[:, None].astype(float), "astype(int)"),
        (np.eye(4, dtype=np.float32)[numbers], "argmax(axis=1)"),
        (np.eye(4, dtype=int)[numbers], "argmax(axis=1)"),
    ):
        with pytest.warns(DatasetWarning, match="actions") as caught:
            load_dataset({**data, "action": actions})
        assert remedy in str(caught[0].message)
        assert len(caught) == 1
    for ordinary in (np.array([-1.0, 0, 1])[numbers % 3], numbers / 3, np.zeros(15)):
        load_dataset({**data, "action": ordinary[:, None]})
    load_dataset({**data, "action": np.stack([numbers, numbers % 2], 1)})


def test_unused_columns_may_contain_anything() -> None:
    data = table()
    data.update(infos=[[1], [1, 2]], names=["a"] * 15, seed=3, episode={"seed": [1, 2]})
    assert len(load_dataset(data)) == 15


@pytest.mark.parametrize("kind", [np.longdouble, np.float16, ">f4"])
def test_floats_of_other_sizes_are_read(kind: Any) -> None:
    data = table()
    data["reward"] = np.arange(15).astype(kind)
    data["observation"] = data["observation"].astype(kind)
    assert load_dataset(data).transitions["next", "reward"].flatten().tolist() == list(range(15))


def test_half_precision_tensors_are_read() -> None:
    data = {key: torch.as_tensor(values) for key, values in table().items()}
    data["reward"] = torch.arange(15, dtype=torch.bfloat16)
    for source in (data, TensorDict(data, [15])):
        rows = load_dataset(source).transitions
        assert rows["next", "reward"].flatten().tolist() == list(range(15))


def test_npz_files_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "log.npz"
    np.savez(path, **table(), infos=np.array([None] * 15))
    assert len(load_dataset(path)) == 15
    np.savez(path, **{**table(), "reward": np.array([None] * 15)})
    with pytest.raises(DatasetError, match=r"log\.npz: reward has Python objects"):
        load_dataset(path)
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DatasetError, match=r"log\.npz: contains one array of shape \(3,\)"):
        load_dataset(path)


def test_termination_wins_over_truncation() -> None:
    data = table()
    data["truncated"][4] = True
    with pytest.warns(DatasetWarning):
        rows = load_dataset(data).transitions
    assert bool(rows["next", "terminated"][4])
    assert not bool(rows["next", "truncated"][4])


def test_clipping_is_counted() -> None:
    data = table()
    data["action"][[1, 3], 0] = 4.0
    with pytest.warns(DatasetWarning, match="2 rows had actions outside"):
        rows = load_dataset(data, action_space=BOX, clip_actions=True).transitions
    assert rows["action"].max() == 1.0
    assert np.allclose(rows["action"][1, 1], data["action"][1, 1])


def test_dtypes_are_kept() -> None:
    wide = load_dataset(table(), dtype=torch.float64).transitions
    assert wide["observation"].dtype == wide["next", "reward"].dtype == torch.float64
    assert load_dataset(table()).transitions["action"].dtype == torch.float32
    picked = load_dataset(discrete()).transitions
    assert picked["action"].dtype == torch.int64
    assert picked["action"].shape == (15,)
    assert picked["next", "action_mask"].dtype == torch.bool


def test_other_containers_are_refused() -> None:
    with pytest.raises(DatasetError, match="int cannot be read"):
        load_dataset(3)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="batch dimension"):
        load_dataset(TensorDict({"observation": torch.ones(3)}, []))
    with pytest.raises(DatasetError, match="empty list"):
        load_dataset([])
