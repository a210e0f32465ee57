"""Every kind of bad input is refused, or reported, with its key and place."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text
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
FROM_TWO = {"action_space": Discrete(4, start=2)}
NAN = np.nan
# (what spoils a clean table, words that the error must contain, options)
BAD = [
    (put("observation", (7, 1), NAN), "observation|NaN|row 7|episode 1|step 2|of 15"),
    (put("observation", (2, 0), np.inf), "observation|row 2"),
    (put("next_observation", (3, 0), NAN), "next.observation|row 3"),
    (put("action", (4, 0), NAN), "action|row 4", IN_BOX),
    (put("reward", 14, NAN), "next.reward|row 14|episode 2"),
    (put("reward", 0, -np.inf), "next.reward|row 0"),
    (to("reward", lambda r: np.where(ROWS == 5, 1e300, r.astype(float))), "next.reward|row 5"),
    (put("action", (6, 1), 1.5), "action|1.5|[-1, 1]|row 6|clip_actions", IN_BOX),
    (put("action", (6, 1), -3), "action|row 6", IN_BOX),
    (to("action", lambda a: a[:, :1]), "action|(1,)|(2,)", IN_BOX),
    (to("action", lambda a: a[:, 0]), "action|float32|int64", OF_FOUR),
    (to("action", lambda a: a.astype(int)), "action|int64|float32", IN_BOX),
    (
        to("action", lambda a: np.full((15, 2), 3)),
        "action|row 0", {"action_space": MultiDiscrete([4, 3])},
    ),
    (adding(action_mask=np.ones((15, 2), bool)), "action_mask", IN_BOX),
    (
        adding(action_log_prob=np.zeros((15, 2))), "action_log_prob|(15, 2)",
        {"columns": {"action_log_prob": "action_log_prob"}},
    ),
    (both(lambda o: np.full(15, 5)), "observation|row", IN_BOX | {"observation_space": Discrete(5)}),
    (both(lambda o: np.full(15, 1.5)), "float64|int64", IN_BOX | {"observation_space": Discrete(5)}),
    (both(lambda o: o[:, :2]), "(2,)|(3,)", {"observation_space": Box(-9, 9, (3,))}),
    (to("next_observation", lambda o: o[:, :2]), "next_observation|(2,)|(3,)"),
    (
        each(both(lambda o: o[:, 0]), to("next_observation", lambda o: o[:, None])),
        "next_observation|(1,)|()",
    ),
    (to("reward", lambda r: r[:-1]), "reward|14|15"),
    (to("action", lambda a: a[:-2]), "action|13|15"),
    (to("terminated", lambda t: np.append(t, False)), "terminated|16|15"),
    (to("reward", lambda r: np.stack([r, r], 1)), "reward|(15, 2)"),
    (to("reward", lambda r: r.astype(str)), "reward"),
    (to("observation", lambda o: np.array([None] * 15)), "observation|object"),
    (
        lambda d: d.update(observation=[[1.0, 2.0]] * 14 + [[1.0]]),
        "observation|different lengths|numpy.concatenate",
    ),
    (
        to("reward", lambda r: np.stack([r, r], 1)),
        "reward|15 episodes of 2 steps|episode: numpy.repeat(numpy.arange(15), 2)|15 steps of 2 "
        "environments|env_index: numpy.tile(numpy.arange(2), 15)",
    ),
    (to("terminated", lambda t: np.where(t, "T", "F")), "'F' at row 0|by true and false"),
    (lambda d: d.update(time=np.array(["31.01.2024"] * 15)), "time|31.01.2024|ISO 8601"),
    (lambda d: d.update(observation="BCJNGGhA"), "single value|output_compress_columns=[]"),
    (lambda d: d.update(reward=[[1.0] * 4, [1.0] * 6, [1.0] * 5]), "reward|different lengths"),
    (to("reward", lambda r: r * 1j), "reward|complex64"),
    (to("reward", lambda r: 3.0), "reward|single value"),
    (to("reward", lambda r: None), "reward|single value"),
    (to("action", lambda a: a[:, :0]), "action|(15, 0)"),
    (both(lambda o: o[:, :0]), "observation|(15, 0)|no numbers"),
    (to("action", lambda a: {"arm": a, "hand": a}), "action|arm, hand"),
    (to("reward", lambda r: np.ma.masked_array(r, r > 0)), "reward|masked"),
    (to("reward", lambda r: torch.from_numpy(r).to_sparse()), "reward|sparse"),
    (to("action", lambda a: np.full(15, 2**63, np.uint64)), "action|9223372036854775808|category"),
    (adding(episode=np.full(15, NAN)), "episode|NaN|row 0"),
    (keep, "columns|dict", {"columns": ["reward"]}),
    (keep, "limit|'9'", {"limit": "9"}),
    (keep, "limit|7.5", {"limit": 7.5}),
    (keep, "max_episode_steps|0", {"max_episode_steps": 0}),
    (keep, "reward|7", {"reward": 7}),
    (keep, "scale, shift", {"reward": ("1", "0")}),
    (keep, "reference_scores|random, expert", {"reference_scores": 3.0}),
    (keep, "action_space|str", {"action_space": "Box"}),
    (lambda d: d.update({k: v[:0] for k, v in d.items()}), "observation|0 rows"),
    (without("observation"), "observation|columns"),
    (without("action"), "no column for action"),
    (without("reward"), "no column for reward"),
    (without("terminated"), "no column for terminated"),
    (lambda d: d.update(done=d.pop("terminated") | d.pop("truncated")), "terminated|'done'|merge"),
    (lambda d: d.update(rewards=d["reward"]), "reward, rewards|columns"),
    (to("terminated", lambda t: t * 2), "terminated|2|row 4|0 or 1"),
    (to("truncated", lambda t: np.where(t, NAN, 0.0)), "truncated|row 9"),
    (
        each(put("terminated", 2, True), put("next_observation", 2, 9), adding(episode=ROWS // 5)),
        "row 2|episode",
    ),
    (without("truncated", "next_observation"), "max_episode_steps"),
    (
        each(without("next_observation"), adding(truncated=ROWS >= 0, terminated=ROWS < 0)),
        "no transition is left",
    ),
    (keep, "'r'|reward", {"columns": {"reward": "r"}}),
    (keep, "'rew'", {"columns": {"rew": "reward"}}),
    (keep, "reward|name of one column", {"columns": {"reward": ["a", "b"]}}),
    (keep, "observation|name of one column|list of names", {"columns": {"observation": []}}),
    (keep, "observation to 'a'|the data has|reward", {"columns": {"observation": ["a", "reward"]}}),
    (
        adding(a=np.ones((15, 2))),
        "'a', one of the columns of observation|shape (15, 2)|(15, 1)",
        {"columns": {"observation": ["reward", "a"]}},
    ),
    (
        adding(a=np.ones(9)),
        "'a', one of the columns of observation|9 rows|15",
        {"columns": {"observation": ["reward", "a"]}},
    ),
    (keep, "left out", {"columns": {"action": None}}),
    (keep, "reward_offset|2", {"reward_offset": 2}),
    (keep, "limit|0", {"limit": 0}),
    (keep, "concatenate|not a Dict", {"concatenate": ["a"]}),
    (both(lambda o: {"a": o}), "'b'|leaves are a", {"concatenate": ["b"]}),
    (
        each(both(lambda o: {"a": o}), to("next_observation", lambda o: {"b": o["a"]})),
        "next_observation|leaves",
    ),
    (put("reward", slice(None), 1.0), "return_range", {"reward": "return_range"}),
    (keep, "reward|tanh", {"reward": "tanh"}),
    (keep, "scale", {"reward": (0.0, 1.0)}),
    (keep, "scale, shift", {"reward": (1.0, 1.0, 1.0)}),
    (keep, "dtype|float16", {"dtype": torch.float16}),
    (keep, "reference_scores|cheetah", {"reference_scores": "cheetah"}),
    (keep, "NoSuch-v0|install", {"env": "NoSuch-v0"}),
    (keep, "action|(2,)", {"env": "Pendulum-v1"}),
    (keep, "env: Env has no spec", {"env": gym.Env()}),
    (keep, "env: expected|got int", {"env": 3}),
    (keep, "the leaves|expected the same", {"observation_space": Dict(a=BOX)}),
    (both(lambda o: np.full((15, 3), 2)), "observation|row 0", {"observation_space": MultiBinary(3)}),
    (keep, "observation: a Text space has no tensor form", {"observation_space": Text(3)}),
    (both(lambda o: {"a": o, "b": ROWS}), "joins only Boxes of floats", {"concatenate": ["a", "b"]}),
]  # fmt: skip
BAD_DISCRETE = [
    (put("action", 9, 4), "action|row 9|Discrete(4)", OF_FOUR),
    (put("action", 9, -1), "row 9", OF_FOUR),
    (each(without("action_mask"), put("action", 9, -1)), "action|-1|row 9|Discrete(5, start=-1)"),
    (
        without("action_mask"),
        "action|start <= value < start + n|Discrete(4, start=2)", FROM_TWO,
    ),
    (put("action_mask", (6, 2), False), "action_mask|forbids|row 6"),
    (put("action_mask", 5, False), "action_mask|row 5"),
    (to("action_mask", lambda m: m[:, :3]), "action_mask|(3,)", OF_FOUR),
    (to("action_mask", lambda m: m * 0.5), "action_mask|0 or 1"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*BAD, *BAD_DISCRETE], ids=lambda case: case[1])
def test_bad_input_is_refused_with_its_place(case):
    data = table() if case in BAD else discrete()
    spoil, words, *options = case
    spoil(data)
    refused(words, data, **dict(*options))


@pytest.mark.parametrize(
    ("spoil", "words", "marks"),
    [
        (put("truncated", 4, True), "terminated and truncated", ([4], [9, 14])),
        (put("truncated", 14, False), "without a done flag", ([4], [9, 14])),
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
    other = {"infos": [[1], [1, 2]], "names": ["a"] * 15, "seed": 3, "episode": {"seed": [1, 2]}}
    data = table() | other  # unused columns may contain anything
    data["reward"][:] = 2.0
    both(lambda o: o * [1, 0, 1] + [0, 3, 0])(data)
    notes = " ".join(load_dataset(data).notes)
    assert "every reward is 2;" in notes
    assert "observation never changes in 1 of 3 columns (1)" in notes


def test_states_that_occur_as_next_observations_only_are_in_the_guessed_space():
    data = counted(5, 5, 5, observe=lambda steps: steps.astype(int) % 100)  # episodes end in 5
    assert load_dataset(data).observation_space == Discrete(6)
    both(lambda o: np.stack([o, 0 * o], 1))(data)
    assert load_dataset(data).observation_space == Box(-np.inf, np.inf, (2,), np.float32)
    categories = load_dataset(data, observation_space=MultiDiscrete([6, 1]))
    assert categories.transitions["observation"].dtype == torch.int64


@pytest.mark.parametrize(
    ("times", "apart"),
    [
        (1.7e9 + 2.0 * ROWS, "128"),  # Unix seconds: every 64th would be another number
        (-1.7e9 + 0.01 * ROWS, "128"),
        (2.0**24 + ROWS, "2"),
        (1.7e9 + 3600.0 * ROWS, None),  # 28 units of rounding
        (2.0 * ROWS, None),
        (1 + 1e-15 * ROWS, None),  # the rounding of float64
        (0.8 + 3e-7 * np.sin(ROWS), None),  # a body at rest in a simulator
        (np.full(15, 1.7e9), None),
    ],
)
def test_changes_that_float32_removes_are_reported(times, apart):
    columns = {"observation": ["x", "time"], "next_observation": None}
    data = table() | {"x": table()["observation"][:, 0].astype(float), "time": times}
    texts = warned(data, columns=columns)
    assert len(texts) == (apart is not None)
    for words in ("observation: column 'time' changes", f"are {apart} apart", "Subtract"):
        assert not texts or words in texts[0]
    assert warned(data | {"time": times - times[0]}, columns=columns) == []
    assert warned(data, columns=columns, dtype=torch.float64) == []
    data = table() | {"observation": np.stack([times, ROWS / 7, times], 1)}
    texts = warned(data, columns={"next_observation": None})
    assert len(texts) == (apart is not None)
    assert not texts or "observation: column 0, 2 changes" in texts[0]


def test_changes_of_actions_that_float32_removes_are_reported():
    actions = 1e9 + np.where(ROWS % 2 == 0, -0.5, 0.5)[:, None]  # float32: 64 apart, all equal
    with pytest.warns(
        DatasetWarning, match="action: column 'action' changes by about 1 .* are 64 apart"
    ):
        load_dataset(table() | {"action": actions}, action_space=Box(1e9 - 1, 1e9 + 1, (1,), float))
    near = {"action_space": Box(-1, 1, (1,), float)}
    assert warned(table() | {"action": actions - 1e9}, **near) == []


NUMBERS = ROWS % 4


@pytest.mark.parametrize(
    ("actions", "remedy"),
    [
        (NUMBERS.astype(np.float32), "astype(int)"),
        (NUMBERS[:, None].astype(float), "astype(int)"),
        (np.eye(4, dtype=np.float32)[NUMBERS], "argmax(axis=1)"),
        (np.eye(4, dtype=int)[NUMBERS], "argmax(axis=1)"),
        (
            np.array([[-1.0], [0], [1]])[NUMBERS % 3],
            "action_space=gymnasium.spaces.Discrete(3, start=-1)",
        ),
        (NUMBERS[:, None] / 3, None),
        (np.zeros((15, 1)), None),
        (np.stack([NUMBERS, NUMBERS % 2], 1), None),
    ],
)
def test_discrete_actions_stored_as_floats_are_reported(actions, remedy):
    texts = warned(table() | {"action": actions})
    assert len(texts) == (remedy is not None)
    assert remedy is None or remedy in texts[0]


def test_actions_that_are_nan_in_dropped_rows_have_a_guessed_space():
    data = table() | {"terminated": np.zeros(15, bool), "truncated": ROWS % 5 == 4}
    del data["next_observation"]
    actions = np.where(data["truncated"], NAN, NUMBERS)
    texts = warned(data | {"action": actions})
    assert len(texts) == 1
    assert "integers from 0 to 3 stored as floats" in texts[0]
    with pytest.warns(DatasetWarning, match="reach -4 to 5"):
        space = load_dataset(data | {"action": actions * 3 - 4}).action_space
    assert space == Box(-4, 5, (1,), np.float64)


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
    assert np.array_equal(rows["action"].numpy(), data["action"].clip(-1, 1))


def test_dtypes_are_kept():
    wide = load_dataset(table(), dtype=torch.float64).transitions
    assert wide["observation"].dtype == wide["next", "reward"].dtype == torch.float64
    assert load_dataset(table()).transitions["action"].dtype == torch.float32
    picked = load_dataset(discrete()).transitions
    assert picked["action"].dtype == torch.int64
    assert picked["action"].shape == (15,)
    assert picked["next", "action_mask"].dtype == torch.bool


def test_what_newcomers_try_first_names_the_way_out():
    bandit = table() | {"x": ROWS * 1.0, "y": ROWS * 2.0}
    for key in ("next_observation", "observation", "terminated", "truncated"):
        del bandit[key]
    columns = {"observation": ["x", "y"]}
    message = refused("no column for terminated|add a column of ones", bandit, columns=columns)
    assert "among action, reward, x, y;" in message  # without the joined "x, y"
    columns["terminated"] = None
    message = refused("neither truncated|add a column of ones", bandit, columns=columns)
    assert "columns={'truncated': None}" not in message
    flags = {"terminated": np.ones(15)}
    assert len(load_dataset(bandit | flags, columns=columns | {"terminated": "terminated"})) == 15
    message = refused(
        "'x', one of the|'a' at row 0|0 and 1 a category",
        bandit | {"x": ["a"] * 15},
        columns=columns,
    )
    assert "numpy.concatenate" not in message
    single = {key: values[:, None] for key, values in table().items()}  # of one environment
    words = r"rows of shape (1, 3), expected (3,); join the steps|env_index"
    refused(
        words, single, observation_space=gym.spaces.Box(-np.inf, np.inf, (3,)), action_space=BOX
    )


def test_integers_that_float64_rounds_are_refused():
    wide = 1_700_000_000_000_000_000 + 100 * ROWS
    options = {"columns": {"next_observation": None}, "dtype": torch.float64}
    words = (
        "observation has the integer 17|torch.float64 would round|from times, or pass observation_"
    )
    refused(words, table() | {"observation": wide}, **options)
    even = 2**53 + 2 * ROWS  # exact
    found = load_dataset(table() | {"observation": even}, **options)
    assert set(found.transitions["observation"].long().flatten().tolist()) < set(even.tolist())
