"""What is legitimate and was refused, or misread: read to values by hand, without warnings."""

import json

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from small_logs import refused

from iql_torchrl import IQLConfig, make_agent
from iql_torchrl.data import DatasetWarning, build_shards, load_dataset

ROWS, STEPS = 60, 6


def dataset(**changed):
    """Independent contexts in ten episodes of six steps that terminate; None leaves a column out."""
    rng = np.random.default_rng(0)
    data = {
        "observation": rng.normal(size=(ROWS, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "reward": rng.normal(size=ROWS).astype(np.float32),
        "terminated": np.arange(ROWS) % STEPS == STEPS - 1,
        "truncated": np.zeros(ROWS, bool),
        **changed,
    }
    return {key: values for key, values in data.items() if values is not None}


def table(data):
    """One column per number, as CSV files and data frames have them."""
    return {
        (key if values.ndim == 1 else f"{key}.{number}"): column
        for key, values in data.items()
        for number, column in enumerate(values.reshape(len(values), -1).T)
    }


def stored(kind, data, folder):
    """The same data as a source of this kind."""
    pandas = pytest.importorskip("pandas")
    path = folder / f"log.{kind}"
    if kind == "arrays":
        return data
    if kind == "npz":
        np.savez(path, **data)
        return path
    frame = pandas.DataFrame(table(data))
    if kind == "frame":
        return frame
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif kind == "npy":
        np.save(path, frame.to_records(index=False))
    else:
        frame.to_parquet(path)
    return path


ALL_KINDS = pytest.mark.parametrize("kind", ["arrays", "npz", "csv", "parquet", "frame", "jsonl"])


@ALL_KINDS
def test_booleans_are_actions_and_rewards(kind, tmp_path):
    yes = np.arange(ROWS) % 3 == 0
    data = load_dataset(stored(kind, dataset(action=yes, reward=~yes), tmp_path))
    assert data.action_space == gym.spaces.Discrete(2)
    assert data.transitions["action"].flatten().tolist() == [1, 0, 0] * 20
    assert data.transitions["next", "reward"].flatten().tolist() == [0.0, 1.0, 1.0] * 20


@ALL_KINDS
def test_episode_ids_are_text(kind, tmp_path):
    names = np.array([f"p-{row // 5:02}" for row in range(ROWS)])
    names = names if kind != "npz" else names.astype("U")
    changed = {"terminated": np.arange(ROWS) % 5 == 4, "episode": names}
    data = load_dataset(stored(kind, dataset(**changed), tmp_path))
    assert data.episode_lengths.tolist() == [5] * 12


@pytest.mark.parametrize("kind", ["arrays", "npz", "fixed.h5", "varying.h5"])
def test_text_of_bytes_is_decoded(kind, tmp_path):
    names = [f"p-é{row // 5:02}" for row in range(ROWS)]
    texts = {"episode": names, "action": ["left", "right"] * 30}
    texts = {key: np.char.encode(values, "utf-8") for key, values in texts.items()}
    changed = dataset(terminated=np.arange(ROWS) % 5 == 4, **texts)
    source = stored(kind, changed, tmp_path) if "." not in kind else tmp_path / kind
    if "." in kind:
        with h5py.File(source, "w") as file:
            for key, values in changed.items():
                varies = key in texts and kind == "varying.h5"
                dtype = h5py.string_dtype() if varies else values.dtype
                file.create_dataset(key, data=values, dtype=dtype)
    data = load_dataset(source)
    assert data.episode_lengths.tolist() == [5] * 12
    assert data.transitions["action"].flatten().tolist() == [0, 1] * 30


def test_every_row_of_a_bandit_terminates():
    data = load_dataset(dataset(terminated=np.ones(ROWS, bool), truncated=None))
    assert data.episode_lengths.tolist() == [1] * ROWS
    assert not data.warnings
    smooth = np.sin(np.arange(ROWS) / 4)[:, None]  # such as the temperature of each hour
    for following in (None, np.roll(smooth, -1)):
        source = dataset(observation=smooth, terminated=np.ones(ROWS), next_observation=following)
        assert not load_dataset(source).warnings


def test_next_observations_of_terminations_may_be_nan():
    source = dataset()
    source["next_observation"] = np.roll(source["observation"], -1, 0)
    source["next_observation"][source["terminated"]] = np.nan
    data = load_dataset(source)
    assert torch.isfinite(data.transitions["next", "observation"]).all()
    assert any("next_observation is NaN in 10 rows that terminate" in note for note in data.notes)
    source["next_observation"][7] = np.nan
    refused("NaN or infinite | first at row 7 of 60", source)


def test_joined_datasets_have_the_union_of_guessed_spaces():
    many, few = np.arange(ROWS) % 3, np.arange(ROWS) % 2
    assert load_dataset([dataset(action=few), dataset(action=many)]).action_space.n == 3
    wide = np.tile([[-4.0, 3.0], [0.5, -0.5]], (30, 1))
    with pytest.warns(DatasetWarning, match="reach -4 to 3"):
        bounds = load_dataset([dataset(), dataset(action=wide)]).action_space
    assert bounds.low[0] == -4
    assert bounds.high[1] == 3


def test_joined_dicts_are_told_apart():
    narrow = dataset(observation=np.zeros((ROWS, 2), np.float32))
    refused("dataset 2: observation has rows of shape", [dataset(), narrow])
    assert load_dataset([dataset(), dataset()]).name == "dataset 1 + dataset 2"
    assert load_dataset(dataset()).name == "arrays"


def test_joined_text_is_numbered_together(tmp_path):
    first = dataset(action=np.array(["b", "a"] * 30))
    second = dataset(action=np.array(["c", "b"] * 30))
    for options in ({}, {"memmap": tmp_path / "built"}):
        data = load_dataset([first, second], **options)
        assert data.action_space == gym.spaces.Discrete(3)
        assert data.transitions["action"].flatten().tolist() == [1, 0] * 30 + [2, 1] * 30
        assert any("'a' 0, 'b' 1, 'c' 2" in note for note in data.notes)
    second["action"] = np.arange(ROWS) % 2
    refused("action has numbers, and the text 'a', first at row 1;", [first, second])


def test_text_is_equal_on_both_sides_of_next():
    rooms = np.array(["kitchen", "hall", "attic"] * 20)
    source = dataset(observation=rooms, next_observation=np.roll(rooms, -1))
    data = load_dataset(source)
    assert data.transitions["observation"].flatten().tolist() == [2, 1, 0] * 20
    assert data.transitions["next", "observation"].flatten().tolist() == [1, 0, 2] * 20


@pytest.mark.parametrize("key", ["observation", "next_observation", "action"])
def test_one_text_in_a_column_of_numbers_is_refused_with_its_row(key):
    numbers = np.array([str(row / 8) for row in range(ROWS)])
    source = dataset(observation=numbers, next_observation=np.roll(numbers, -1))
    refused("stored as text", source)
    if key == "action":
        source |= {
            "observation": dataset()["observation"],
            "next_observation": dataset()["observation"],
        }
    source[key] = numbers.copy()
    source[key][53] = "n/a"
    place = key.replace("next_", "next.")
    refused(f"arrays: {place} has numbers, |'n/a', first at row 53;", source)


def test_a_constant_action_dimension():
    action = np.stack([np.linspace(-1, 1, ROWS), np.full(ROWS, 3.0)], 1).astype(np.float32)
    with pytest.warns(DatasetWarning, match="data's own range"):
        data = load_dataset(dataset(action=action))
    assert data.action_space.low.tolist() == [-1, 2]
    assert data.action_space.high.tolist() == [1, 4]
    assert make_agent(IQLConfig(hidden=(8,)), data)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("memmap", [False, True])
def test_actions_beyond_a_bound_by_rounding(kind, memmap, tmp_path):
    high = np.array([0.1, 200, np.inf], np.float32)
    action = np.tile(np.array([0.05, 3, 1e3], kind), (ROWS, 1))
    action[3, 1] = 200 * (1 + 3 * float(np.finfo(kind).eps))
    options = {"action_space": gym.spaces.Box(-high, high)}
    options |= {"memmap": tmp_path / "built"} if memmap else {}
    data = load_dataset(dataset(action=action), **options)
    assert data.transitions["action"][3, 1] == 200
    action[57, 0] = 0.11  # 10 % of a small bound
    refused("outside its bounds | first at row 57 of 60", dataset(action=action), **options)


def test_actions_of_one_float_without_a_dimension(tmp_path):
    data = load_dataset(dataset(action=np.linspace(-1, 1, ROWS, dtype=np.float32)))
    assert data.action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    assert data.transitions["action"].shape == (ROWS, 1)
    assert make_agent(IQLConfig(hidden=(8,)), data)


def test_log_probabilities():
    actions, values = np.arange(ROWS) % 2, np.full(ROWS, 0.25)
    data = load_dataset(dataset(action=actions, action_prob=values))
    assert data.transitions["action_log_prob"].flatten()[0] == pytest.approx(np.log(0.25))
    for action in (actions, actions.astype(str), np.array(["l", "r"])[actions]):
        if action.dtype.kind == "U" and action[0].isdigit():
            continue
        refused(
            "expected logarithms of probabilities", dataset(action=action, action_log_prob=values)
        )
    values[7] = np.nan
    with pytest.warns(DatasetWarning, match="NaN in 1 of 60 rows; the column is left out"):
        data = load_dataset(dataset(action=actions, action_log_prob=np.log(values)))
    assert "action_log_prob" not in set(data.transitions.keys())
    words = "dataset 1: .* NaN in 1 of 60 rows; the column is left out. The same of 2 more.$"
    with pytest.warns(DatasetWarning, match=words) as found:
        load_dataset([dataset(action=actions, action_log_prob=np.log(values))] * 3)
    assert len(found) == 1


@pytest.mark.parametrize("unread", [np.nan, 0.0])
def test_probabilities_of_rows_that_are_no_transitions_are_not_read(unread):
    values, valid = np.full(ROWS, 0.25), np.ones(ROWS, bool)
    values[[9, 23]], valid[[9, 23]] = unread, False
    logs = np.where(valid, np.log(0.25), np.nan)
    for column in ({"action_prob": values}, {"action_log_prob": logs}):
        data = load_dataset(dataset(action=np.arange(ROWS) % 2, valids=valid, **column))
        assert len(data) == ROWS - 2
        np.testing.assert_allclose(data.transitions["action_log_prob"], np.log(0.25), rtol=1e-6)


def test_leaves_and_lists_of_columns_have_guessed_spaces(tmp_path):
    pandas = pytest.importorskip("pandas")
    yes = np.arange(ROWS) % 2 == 0
    dicts = dataset(observation={"a": dataset()["observation"], "b": np.arange(ROWS) % 5, "c": yes})
    assert load_dataset(dicts).observation_space == gym.spaces.Dict(
        a=gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
        b=gym.spaces.Discrete(5), c=gym.spaces.Discrete(2),
    )  # fmt: skip
    steps = dataset(
        observation=None, action=None, x=np.arange(ROWS) * 37 % 60 / 8, y=np.ones(ROWS), a=yes
    )
    columns = {"observation": ["x", "y"], "action": "a"}
    pandas.DataFrame(steps).to_csv(tmp_path / "table.csv")
    for source in (pandas.DataFrame(steps), tmp_path / "table.csv"):
        found = load_dataset(source, columns=columns).transitions["observation"]
        assert found.tolist() == [[row * 37 % 60 / 8, 1.0] for row in range(ROWS)]


# -- the row of the file


def truncated(ends):
    """Every episode's last row is dropped: without next observations it has none."""
    return {"terminated": np.zeros(ROWS, bool), "truncated": ends}


@pytest.mark.parametrize("key", ["observation", "action", "reward"])
@pytest.mark.parametrize("case", ["plain", "dropped", "sorted", "second", "memmap", "shards"])
def test_errors_name_the_row_of_the_source(key, case, tmp_path):
    source = dataset()
    if case == "dropped":
        source |= truncated(source["terminated"])
    if case == "sorted":
        source["episode"] = np.array([f"e{number:02}" for number in np.arange(ROWS) % 10])
        source["terminated"] = np.arange(ROWS) >= 50
    for row in (58, 49):
        source[key].reshape(ROWS, -1)[row, -1] = np.nan
    row = 49 if case != "sorted" else 58  # the id of row 58 comes before that of row 49
    items = [dataset(), source] if case == "second" else source
    load, options = load_dataset, {}
    if case in ("memmap", "shards"):
        options["memmap" if case == "memmap" else "folder"] = tmp_path / "built"
    if case == "shards":
        load, options["shards"] = build_shards, 2
    refused(f"is NaN or infinite | first at row {row} of 60 ", items, load, **options)


def test_rows_beyond_the_limit_are_not_checked():
    source = dataset()
    source["reward"][58] = np.nan
    assert len(load_dataset(source, limit=12)) == 12
    assert len(load_dataset([dataset(), source], limit=70)) == 66
    assert load_dataset([dataset(), dataset()], limit=64).episode_lengths.tolist() == [6] * 10
    assert load_dataset([dataset(), dataset()], limit=4).episode_lengths.tolist() == [4]
    short = {
        key: values[-2:] for key, values in dataset().items()
    }  # after an episode that does not fit
    assert load_dataset([dataset(), short], limit=9).episode_lengths.tolist() == [6]
    # a mistyped path is an error anyway
    refused("no such file", [dataset(), "there/is/none.npz"], limit=12)


WIDE = [2**63 + 5, 2**70, -(2**70)]


@pytest.mark.parametrize("first_id", WIDE)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "arrays"])
def test_ids_of_more_than_63_bits_are_not_rounded(tmp_path, kind, first_id):
    numbers = [first_id + row // 5 for row in range(20)]
    rows = [
        {
            "episode": number,
            "observation": row / 8,
            "action": row % 2,
            "reward": 1.0,
            "terminated": False,
        }
        for row, number in enumerate(numbers)
    ]
    path = tmp_path / f"ids.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    source = {key: [row[key] for row in rows] for key in rows[0]} if kind == "arrays" else path
    assert load_dataset(source).episode_lengths.tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("wrap", ["({}, {})", "({},{},)", "(np.float64({}), np.float64({}))"])
def test_tuples_of_numbers_in_csv_are_vectors(tmp_path, wrap):
    actions = dataset()["action"].astype(float)
    frame = table(dataset(action=None)) | {
        "action": np.array([f'"{wrap.format(*row)}"' for row in actions.tolist()])
    }
    lines = [",".join(map(str, row)) for row in zip(*frame.values(), strict=True)]
    (tmp_path / "tuples.csv").write_text("\n".join([",".join(frame), *lines]))
    found = load_dataset(tmp_path / "tuples.csv").transitions["action"]
    np.testing.assert_allclose(found, actions, rtol=1e-6)


def test_texts_in_brackets_are_categories(tmp_path):
    lines = [f"{row / 8},({'ab'[row % 2]}),1.0,{row % 6 == 5}" for row in range(18)]
    (tmp_path / "t.csv").write_text("\n".join(["observation,action,reward,terminated", *lines]))
    data = load_dataset(tmp_path / "t.csv", columns={"truncated": None})
    assert data.action_space == gym.spaces.Discrete(2)


def test_lists_of_tensors_dates_of_episodes_and_text_of_numpy_2():
    rows = dataset()["observation"]
    halves = [torch.from_numpy(row).bfloat16() for row in rows]
    found = load_dataset(dataset(observation=halves)).transitions["observation"]
    assert torch.equal(found, torch.stack(halves).float())
    rewards = [torch.tensor(1.0, requires_grad=True)] * ROWS
    assert load_dataset(dataset(reward=rewards)).episode_returns.tolist() == [6.0] * 10
    days = np.datetime64("2024-02-28") + np.arange(ROWS) // 4
    by_day = load_dataset(dataset(terminated=np.zeros(ROWS, bool), truncated=None, episode=days))
    assert by_day.episode_lengths.tolist() == [3] * 15
    texts = np.array(["a", "b"] * (ROWS // 2), np.dtypes.StringDType())
    assert load_dataset(dataset(action=texts)).action_space == gym.spaces.Discrete(2)


def test_python_integers_are_integers():
    actions = np.array([row % 12 for row in range(ROWS)], object)
    data = load_dataset(dataset(action=actions))
    assert data.action_space == gym.spaces.Discrete(12)
    assert data.transitions["action"].tolist() == actions.tolist()


def test_probabilities_that_float32_rounds_above_one():
    above = np.nextafter(np.float32(1), np.float32(2))
    actions = np.arange(ROWS) % 2
    data = load_dataset(dataset(action=actions, action_prob=np.full(ROWS, above)))
    assert (data.transitions["action_log_prob"] == 0).all()
    assert len(load_dataset(dataset(action=actions, action_log_prob=np.full(ROWS, 1.2e-7)))) == ROWS
    refused("is 1.00001, and outside", dataset(action=actions, action_prob=np.full(ROWS, 1.00001)))


def test_probabilities_can_be_left_out_by_either_name():
    actions = np.arange(ROWS) % 2
    parts = [dataset(action=actions, action_prob=np.full(ROWS, 0.5)), dataset(action=actions)]
    refused("leave it out with columns={'action_log_prob': None}", parts)
    for name in ("action_log_prob", "action_prob"):
        data = load_dataset(parts, columns={name: None})
        assert "action_log_prob" not in set(data.transitions.keys())


def test_columns_of_pandas_of_several_levels_and_of_intervals():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table(dataset()))
    expected = load_dataset(frame)
    frame["age_group"] = pandas.cut(frame["reward"], 3)
    months = pandas.period_range("2024-01", periods=ROWS, freq="M")
    frame["month"] = pandas.Categorical(months)
    frame.columns = pandas.MultiIndex.from_tuples([(name, "") for name in frame.columns])
    assert (load_dataset(frame).transitions == expected.transitions).all()
    refused("age_group|interval", frame, columns={"episode": "age_group"})


@pytest.mark.parametrize("kind", ["jsonl", "nullable", "csv"])
def test_an_integer_reward_may_be_missing_where_no_transition_is(tmp_path, kind):
    pandas = pytest.importorskip("pandas")
    rewards = [row // STEPS if row % STEPS < STEPS - 1 else None for row in range(ROWS)]
    frame = pandas.DataFrame(table(dataset(reward=None, terminated=np.zeros(ROWS, bool))))
    frame = frame.assign(reward=pandas.array(rewards, "Int64"), episode=np.arange(ROWS) // STEPS)
    source, path = frame.drop(columns="truncated"), tmp_path / f"rewards.{kind}"
    if kind == "jsonl":
        source.to_json(path, orient="records", lines=True)
    elif kind == "csv":
        source.to_csv(path, index=False)
    data = load_dataset(source if kind == "nullable" else path)
    assert data.episode_returns.tolist() == [number * (STEPS - 1) for number in range(10)]


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 2)])
def test_categories_stay_integers_where_the_next_one_is_missing(shape):
    seen = np.arange(np.prod(shape)).reshape(shape) % 5
    after = np.roll(seen, -1, 0).astype(float)
    ended = np.arange(ROWS) % STEPS == STEPS - 1
    after[ended] = np.nan
    data = load_dataset(dataset(observation=seen, next_observation=after))
    expected = load_dataset(dataset(observation=seen, next_observation=np.roll(seen, -1, 0)))
    assert data.observation_space == expected.observation_space
    found = data.transitions["next", "observation"].numpy()
    assert found.dtype == expected.transitions["observation"].numpy().dtype
    assert found.reshape(shape)[~ended].tolist() == np.roll(seen, -1, 0)[~ended].tolist()
    after[0] = np.nan  # whose value is bootstrapped
    refused("next.observation is NaN", dataset(observation=seen, next_observation=after))
