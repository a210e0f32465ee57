"""Every kind of bad input is refused, or reported, with its key and place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from small_logs import Arrays, table
from tensordict import TensorDict

from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset

Change = Callable[[Arrays], Any]


def discrete() -> Arrays:
    return table() | {"action": ROWS % 4, "action_mask": np.ones((15, 4), bool)}


def put(key: str, index: Any, value: Any) -> Change:
    return lambda data: data[key].__setitem__(index, value)


def to(key: str, value: Callable[[Any], Any]) -> Change:
    return lambda data: data.update({key: value(data[key])})


def both(value: Callable[[Any], Any]) -> Change:
    return lambda data: [to(key, value)(data) for key in ("observation", "next_observation")]


def without(*keys: str) -> Change:
    return lambda data: [data.pop(key) for key in keys]


def adding(**more: Any) -> Change:
    return lambda data: data.update(more)


def each(*changes: Change) -> Change:
    return lambda data: [change(data) for change in changes]


keep = adding()
ROWS = np.arange(15)
BOX = Box(-1, 1, (2,), np.float32)
IN_BOX, OF_FOUR = {"action_space": BOX}, {"action_space": Discrete(4)}
NAN = np.nan
# name: (what spoils a clean table, words that the error must contain, options)
BAD: dict[str, Any] = {
    "observation NaN": (
        put("observation", (7, 1), NAN), "observation|NaN|row 7|episode 1|step 2|of 15",
    ),
    "observation inf": (put("observation", (2, 0), np.inf), "observation|row 2"),
    "next observation NaN": (put("next_observation", (3, 0), NAN), "next.observation|row 3"),
    "action NaN": (put("action", (4, 0), NAN), "action|row 4", IN_BOX),
    "reward NaN": (put("reward", 14, NAN), "next.reward|row 14|episode 2"),
    "reward minus inf": (put("reward", 0, -np.inf), "next.reward|row 0"),
    "overflow of float32": (
        to("reward", lambda r: np.where(ROWS == 5, 1e300, r.astype(float))),
        "next.reward|row 5",
    ),
    "action above bounds": (
        put("action", (6, 1), 1.5), "action|1.5|[-1, 1]|row 6|clip_actions", IN_BOX,
    ),
    "action below bounds": (put("action", (6, 1), -3), "action|row 6", IN_BOX),
    "action of wrong width": (to("action", lambda a: a[:, :1]), "action|(1,)|(2,)", IN_BOX),
    "float actions for Discrete": (to("action", lambda a: a[:, 0]), "action|float32|int64", OF_FOUR),
    "integer actions for Box": (to("action", lambda a: a.astype(int)), "action|int64|float32", IN_BOX),
    "MultiDiscrete too large": (
        to("action", lambda a: np.full((15, 2), 3)),
        "action|row 0", {"action_space": MultiDiscrete([4, 3])},
    ),
    "mask for Box": (adding(action_mask=np.ones((15, 2), bool)), "action_mask", IN_BOX),
    "log probability NaN": (adding(action_log_prob=np.full(15, NAN)), "action_log_prob|row 0"),
    "log probability per dimension": (
        adding(action_log_prob=np.zeros((15, 2))), "action_log_prob|(15, 2)",
    ),
    "observation category too large": (
        both(lambda o: np.full(15, 5)), "observation|row", IN_BOX | {"observation_space": Discrete(5)},
    ),
    "float observation for Discrete": (
        both(lambda o: np.ones(15)), "float64|int64", IN_BOX | {"observation_space": Discrete(5)},
    ),
    "observation of wrong width": (
        to("observation", lambda o: o[:, :2]), "(2,)|(3,)", {"observation_space": Box(-9, 9, (3,))},
    ),
    "next observation of other width": (
        to("next_observation", lambda o: o[:, :2]), "next/observation|(2,)",
    ),
    "rewards short": (to("reward", lambda r: r[:-1]), "reward|14|15"),
    "actions short": (to("action", lambda a: a[:-2]), "action|13|15"),
    "flags long": (to("terminated", lambda t: np.append(t, False)), "terminated|16|15"),
    "rewards of two columns": (to("reward", lambda r: np.stack([r, r], 1)), "reward|(15, 2)"),
    "rewards of text": (to("reward", lambda r: r.astype(str)), "reward"),
    "object observations": (to("observation", lambda o: np.array([None] * 15)), "observation|object"),
    "ragged lists": (
        lambda d: d.update(observation=[[1.0, 2.0]] * 14 + [[1.0]]),
        "observation|different lengths|numpy.concatenate",
    ),
    "rewards as one list per episode": (
        lambda d: d.update(reward=[[1.0] * 4, [1.0] * 6, [1.0] * 5]), "reward|different lengths",
    ),
    "complex rewards": (to("reward", lambda r: r * 1j), "reward|complex64"),
    "one number as rewards": (to("reward", lambda r: 3.0), "reward|single value"),
    "no rewards but None": (to("reward", lambda r: None), "reward|single value"),
    "boolean rewards": (to("reward", lambda r: r > 0), "next.reward|bool"),
    "boolean actions": (to("action", lambda a: a > 0), "action|bool"),
    "actions of no columns": (to("action", lambda a: a[:, :0]), "action|(15, 0)"),
    "observations of no columns": (both(lambda o: o[:, :0]), "observation|(15, 0)|no numbers"),
    "actions in groups": (to("action", lambda a: {"arm": a, "hand": a}), "action|arm, hand"),
    "masked rewards": (to("reward", lambda r: np.ma.masked_array(r, r > 0)), "reward|masked"),
    "sparse tensor": (to("reward", lambda r: torch.from_numpy(r).to_sparse()), "reward|sparse"),
    "categories without end": (
        to("action", lambda a: np.full(15, 2**63, np.uint64)), "action|9223372036854775808|category",
    ),
    "episode number NaN": (adding(episode=np.full(15, NAN)), "episode|NaN|row 0"),
    "columns as a list": (keep, "columns|dict", {"columns": ["reward"]}),
    "limit as text": (keep, "limit|'9'", {"limit": "9"}),
    "limit as a fraction": (keep, "limit|7.5", {"limit": 7.5}),
    "step limit 0": (keep, "max_episode_steps|0", {"max_episode_steps": 0}),
    "reward None": (keep, "reward|None", {"reward": None}),
    "reward of text": (keep, "scale, shift", {"reward": ("1", "0")}),
    "one reference score": (keep, "reference_scores|random, expert", {"reference_scores": 3.0}),
    "space of text": (keep, "action_space|str", {"action_space": "Box"}),
    "empty": (lambda d: d.update({k: v[:0] for k, v in d.items()}), "observation|0 rows"),
    "no observation": (without("observation"), "observation|columns"),
    "no action": (without("action"), "no column for action"),
    "no reward": (without("reward"), "no column for reward"),
    "no terminated": (without("terminated"), "no column for terminated"),
    "done only": (
        lambda d: d.update(done=d.pop("terminated") | d.pop("truncated")), "terminated|'done'|merge",
    ),
    "two names for one key": (lambda d: d.update(rewards=d["reward"]), "reward, rewards|columns"),
    "flag of 2": (to("terminated", lambda t: t * 2), "terminated|2|row 4|0 or 1"),
    "flag NaN": (to("truncated", lambda t: np.where(t, NAN, 0.0)), "truncated|row 9"),
    "episode goes on after its end": (
        each(put("terminated", 2, True), put("next_observation", 2, 9), adding(episode=ROWS // 5)),
        "row 2|episode",
    ),
    "ends cannot be found": (without("truncated", "next_observation"), "max_episode_steps"),
    "only truncated one-row episodes": (
        each(without("next_observation"), adding(truncated=ROWS >= 0, terminated=ROWS < 0)),
        "no transition is left",
    ),
    "columns names nothing": (keep, "'r'|reward", {"columns": {"reward": "r"}}),
    "columns of an unknown key": (keep, "'rew'", {"columns": {"rew": "reward"}}),
    "columns for one key": (
        keep, "observation|name of one column", {"columns": {"observation": ["a", "b"]}},
    ),
    "columns leaves out reward": (keep, "left out", {"columns": {"reward": None}}),
    "reward offset 2": (keep, "reward_offset|2", {"reward_offset": 2}),
    "limit 0": (keep, "limit|0", {"limit": 0}),
    "concatenate a plain observation": (keep, "concatenate|not a Dict", {"concatenate": ["a"]}),
    "concatenate an unknown leaf": (
        both(lambda o: {"a": o}), "'b'|leaves are a", {"concatenate": ["b"]},
    ),
    "next leaves differ": (
        each(both(lambda o: {"a": o}), to("next_observation", lambda o: {"b": o["a"]})),
        "next_observation|leaves",
    ),
    "return range of equal returns": (
        put("reward", slice(None), 1.0), "return_range", {"reward": "return_range"},
    ),
    "reward map unknown": (keep, "reward|tanh", {"reward": "tanh"}),
    "reward scale 0": (keep, "scale", {"reward": (0.0, 1.0)}),
    "reward triple": (keep, "scale, shift", {"reward": (1.0, 1.0, 1.0)}),
    "half precision": (keep, "dtype|float16", {"dtype": torch.float16}),
    "reference task unknown": (keep, "reference_scores|cheetah", {"reference_scores": "cheetah"}),
    "environment unknown": (keep, "NoSuch-v0|install", {"env": "NoSuch-v0"}),
    "environment of another shape": (keep, "action|(2,)", {"env": "Pendulum-v1"}),
}  # fmt: skip
BAD_DISCRETE: dict[str, Any] = {
    "discrete action too large": (put("action", 9, 4), "action|row 9|Discrete(4)", OF_FOUR),
    "discrete action negative": (put("action", 9, -1), "row 9", OF_FOUR),
    "discrete action negative, no space": (
        each(without("action_mask"), put("action", 9, -1)), "action|-1|row 9",
    ),
    "Discrete from 2": (
        without("action_mask"),
        "action|start <= value < start + n|Discrete(4, start=2)",
        {"action_space": Discrete(4, start=2)},
    ),
    "mask forbids the action": (put("action_mask", (6, 2), False), "action_mask|forbids|row 6"),
    "mask allows nothing": (put("action_mask", 5, False), "action_mask|row 5"),
    "mask of wrong width": (to("action_mask", lambda m: m[:, :3]), "action_mask|(3,)", OF_FOUR),
    "mask of floats": (to("action_mask", lambda m: m * 0.5), "action_mask|0 or 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD, *BAD_DISCRETE])
def test_bad_input_is_refused_with_its_place(case: str) -> None:
    data = table() if case in BAD else discrete()
    spoil, words, *options = (BAD | BAD_DISCRETE)[case]
    spoil(data)
    with pytest.raises(DatasetError) as caught:
        load_dataset(data, **dict(*options))
    for word in words.split("|"):
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
    for key in ("observation", "next_observation"):
        data[key][:, 1] = 3.0
    notes = " ".join(load_dataset(data).notes)
    assert "every reward is 2;" in notes
    assert "observation never changes in 1 of 3 columns (1)" in notes


def test_states_that_occur_as_next_observations_only_are_in_the_guessed_space() -> None:
    data = table()
    states = np.tile(np.arange(6), (3, 1))  # Episodes end in state 5.
    data.update(observation=states[:, :-1].reshape(-1), next_observation=states[:, 1:].reshape(-1))
    assert load_dataset(data).observation_space == Discrete(6)
    for key in ("observation", "next_observation"):
        data[key] = np.stack([data[key], 0 * data[key]], 1)
    assert load_dataset(data).observation_space == MultiDiscrete([6, 1])


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


def test_an_end_without_a_mark_is_truncated() -> None:
    data = table()
    data["truncated"][14] = False
    with pytest.warns(DatasetWarning):
        rows = load_dataset(data).transitions
    assert bool(rows["next", "truncated"][14])
    assert not bool(rows["next", "terminated"][14])


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
