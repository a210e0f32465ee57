"""Every kind of bad input is refused, or reported, with its key and place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from small_logs import counted, drift, marked, refused, warned
from tensordict import TensorDict

from iql_torchrl.data import DatasetWarning, load_dataset


def table():
    """A clean table: three episodes of five steps, of which the first terminates."""
    data, ends = drift([5, 5, 5])
    return data | {"terminated": ends & (ROWS < 5), "truncated": ends & (ROWS >= 5)}


def discrete():
    return table() | {"action": ROWS % 4, "action_mask": np.ones((15, 4), bool)}


def put(key, index, value):
    return lambda data: data[key].__setitem__(index, value)


def to(key, value):
    return lambda data: data.update({key: value(data[key])})


def both(value):
    return lambda data: [to(key, value)(data) for key in ("observation", "next_observation")]


def without(*keys):
    return lambda data: [data.pop(key) for key in keys]


def adding(**more):
    return lambda data: data.update(more)


def each(*changes):
    return lambda data: [change(data) for change in changes]


keep = adding()
ROWS = np.arange(15)
BOX = Box(-1, 1, (2,), np.float32)
IN_BOX, OF_FOUR = {"action_space": BOX}, {"action_space": Discrete(4)}
NAN = np.nan
# name: (what spoils a clean table, words that the error must contain, options)
BAD = {
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
BAD_DISCRETE = {
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
def test_bad_input_is_refused_with_its_place(case):
    data = table() if case in BAD else discrete()
    spoil, words, *options = (BAD | BAD_DISCRETE)[case]
    spoil(data)
    refused(words, data, **dict(*options))


@pytest.mark.parametrize(
    ("spoil", "words", "marks"),
    [
        (put("truncated", 4, True), "terminated and truncated", ([4], [9, 14])),
        (put("truncated", 14, False), "without a mark", ([4], [9, 14])),
        (put("action", (0, 0), 1.7), "actions reach|pass env=", ([4], [9, 14])),
    ],
)
def test_doubtful_input_is_reported_and_both_and_absent_marks_repaired(spoil, words, marks):
    data = table()
    spoil(data)
    with pytest.warns(DatasetWarning) as caught:
        dataset = load_dataset(data)
    text = str(caught[0].message)
    assert all(word in text for word in words.split("|")), text
    assert text in dataset.notes
    assert marked(dataset) == marks


def test_equal_rewards_and_constant_columns_are_noted_without_a_warning():
    data = table()
    data["reward"][:] = 2.0
    both(lambda o: o * [1, 0, 1] + [0, 3, 0])(data)
    notes = " ".join(load_dataset(data).notes)
    assert "every reward is 2;" in notes
    assert "observation never changes in 1 of 3 columns (1)" in notes


def test_states_that_occur_as_next_observations_only_are_in_the_guessed_space():
    data = counted(5, 5, 5, observe=lambda steps: steps.astype(int) % 100)  # episodes end in 5
    assert load_dataset(data).observation_space == Discrete(6)
    both(lambda o: np.stack([o, 0 * o], 1))(data)
    assert load_dataset(data).observation_space == MultiDiscrete([6, 1])


NUMBERS = ROWS % 4


@pytest.mark.parametrize(
    ("actions", "remedy"),
    [
        (NUMBERS.astype(np.float32), "astype(int)"),
        (NUMBERS[:, None].astype(float), "astype(int)"),
        (np.eye(4, dtype=np.float32)[NUMBERS], "argmax(axis=1)"),
        (np.eye(4, dtype=int)[NUMBERS], "argmax(axis=1)"),
        (np.array([[-1.0], [0], [1]])[NUMBERS % 3], None),
        (NUMBERS[:, None] / 3, None),
        (np.zeros((15, 1)), None),
        (np.stack([NUMBERS, NUMBERS % 2], 1), None),
    ],
)
def test_discrete_actions_stored_as_floats_are_reported(actions, remedy):
    texts = warned(table() | {"action": actions})
    assert len(texts) == (remedy is not None)
    assert remedy is None or remedy in texts[0]


def test_unused_columns_may_contain_anything():
    other = {"infos": [[1], [1, 2]], "names": ["a"] * 15, "seed": 3, "episode": {"seed": [1, 2]}}
    assert len(load_dataset(table() | other)) == 15


@pytest.mark.parametrize("kind", [np.longdouble, np.float16, ">f4", torch.bfloat16])
def test_floats_of_other_sizes_are_read(kind):
    data = table() | {"reward": ROWS.astype(np.float32)}
    if kind is torch.bfloat16:
        data = {key: torch.as_tensor(values) for key, values in data.items()}
        sources = [data | {"reward": data["reward"].to(kind)}]
        sources.append(TensorDict(sources[0], [15]))
    else:
        sources = [data | {key: data[key].astype(kind) for key in ("reward", "observation")}]
    for source in sources:
        rows = load_dataset(source).transitions
        assert rows["next", "reward"].flatten().tolist() == list(range(15))


def test_clipping_is_counted():
    data = table()
    data["action"][[1, 3], 0] = 4.0
    with pytest.warns(DatasetWarning, match="2 rows had actions outside"):
        rows = load_dataset(data, action_space=BOX, clip_actions=True).transitions
    assert rows["action"].max() == 1.0
    assert np.allclose(rows["action"][1, 1], data["action"][1, 1])


def test_dtypes_are_kept():
    wide = load_dataset(table(), dtype=torch.float64).transitions
    assert wide["observation"].dtype == wide["next", "reward"].dtype == torch.float64
    assert load_dataset(table()).transitions["action"].dtype == torch.float32
    picked = load_dataset(discrete()).transitions
    assert picked["action"].dtype == torch.int64
    assert picked["action"].shape == (15,)
    assert picked["next", "action_mask"].dtype == torch.bool
