"""Done flags that mean different things to different authors, and flags that the rows contradict."""

import re

import h5py
import numpy as np
import pytest
from small_logs import SHARED, counted, drift, first, marked, refused, shared, warned

from iql_torchrl.data import DatasetWarning, load_dataset

STEPS = 6  # transitions of each trajectory; its observations are one more
GOALS = [(0, 2), (0, 3), (1, 5)]  # (trajectory, step) from a goal state


def recorded(trajectories=3, goals=GOALS):
    """OGBench's raw rows: the last one of a trajectory has no next row; step n is 100 t + n."""
    rows = counted(*[STEPS + 1] * trajectories)
    at_goal = np.isin(rows["observation"][:, 0], [100.0 * t + n for t, n in goals])
    return {
        "observations": rows["observation"],
        "actions": rows["action"],
        "terminals": rows["truncated"],
        "rewards": at_goal.astype(np.float32) - 1,
        "masks": 1 - at_goal.astype(np.float32),
    }


def regular(**options):
    """OGBench's default form: shifted next observations, each trajectory's last row dropped."""
    raw = recorded(**options)
    kept = ~raw["terminals"]
    following = np.flatnonzero(kept) + 1
    data = {key: values[kept] for key, values in raw.items()}
    data["next_observations"] = raw["observations"][following]
    data["terminals"] = raw["terminals"][following].astype(np.float32)
    return data


def compact(**options):
    """OGBench's ``compact_dataset=True``: ``valids`` is 0 at the row without a next one."""
    data = recorded(**options)
    end = data["terminals"]
    data["valids"] = 1 - end.astype(np.float32)
    data["terminals"] = (end | np.append(end[1:], True)).astype(np.float32)
    return data


def read(dataset):
    """Lengths of episodes, and the rows that are terminated and truncated."""
    return dataset.episode_lengths.tolist(), *marked(dataset)


#: Goal rows: steps 2 and 3 of the first trajectory, and the last step of the second.
READ = ([6, 6, 6], [2, 3, 11], [5, 17])


@pytest.mark.parametrize("form", [regular, compact])
@pytest.mark.parametrize("columns", [None, {"terminated": "masks"}, {"not_terminated": "masks"}])
def test_masks_terminate_and_terminals_end_trajectories(form, columns):
    dataset = load_dataset(form(), columns=columns, reward="return_range")
    assert read(dataset) == READ
    assert dataset.episode_returns.tolist() == [-4, -5, -6]
    assert dataset.reward_map.scale == pytest.approx(1000 / 2)
    rows = dataset.transitions
    assert rows["next", "done"].flatten().nonzero().flatten().tolist() == [2, 3, 5, 11, 17]
    assert first(dataset) == [100.0 * t + n for t in range(3) for n in range(6)]
    assert first(dataset, ("next", "observation")) == [step + 1 for step in first(dataset)]
    assert rows["collector", "traj_ids"].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert any("'masks' was read as 0 where a row terminates" in note for note in dataset.notes)
    assert sorted(map(len, dataset.split(2 / 3, seed=0))) == [6, 12]
    again = load_dataset(load_dataset(form()).transitions)
    assert (again.transitions == load_dataset(form()).transitions).all()
    assert read(again) == READ


def test_other_forms_of_the_same_rows():
    data, regular_rows = compact(), regular()
    assert read(load_dataset(data, columns={"truncated": "terminals"})) == READ
    data["terminals"] = 1 - data["valids"]  # only at the rows without a next one
    assert read(load_dataset(data)) == READ
    del data["terminals"], regular_rows["terminals"]
    assert read(load_dataset(data)) == READ
    assert read(load_dataset(recorded())) == READ  # raw rows drop the row without a successor
    without_terminals = load_dataset(regular_rows)  # trajectories end where rows do not follow
    assert read(without_terminals)[:2] == READ[:2]
    late = load_dataset(compact(goals=[(0, 3), (1, 6)]), reward_offset=1)
    assert late.episode_returns.tolist() == [-5, -5, -6]
    assert marked(late) == ([2, 11], [5, 17])  # the steps that arrive at goals 3 and 6
    assert read(load_dataset([regular(), regular()])) == (
        [6] * 6, [2, 3, 11, 20, 21, 29], [5, 17, 23, 35],
    )  # fmt: skip


def test_masks_that_repeat_terminals_are_ordinary_terminations():
    data = regular(goals=[(0, 5), (1, 5), (2, 5)])
    data["next_observations"][5::6] = data["observations"][[6, 12, 0]]  # As some loaders shift.
    assert read(load_dataset(data)) == ([6, 6, 6], [5, 11, 17], [])
    # With D4RL's timeouts beside them, too.
    data["masks"][11], data["terminals"][11] = 1, 0
    dataset = load_dataset({**data, "timeouts": np.arange(18) == 11})
    assert marked(dataset) == ([5, 17], [11])


def test_masks_and_terminated_must_agree():
    data = regular()
    data["terminated"] = data["masks"] == 0
    assert marked(load_dataset(data))[0] == [2, 3, 11]
    data["terminated"] = data.pop("terminals") == 1
    refused("'masks' | and 'terminated' | disagree in 4 of 18", data)
    chosen = load_dataset(data, columns={"not_terminated": "masks", "terminated": None})
    assert marked(chosen)[0] == [2, 3, 11]
    both = {"not_terminated": "masks", "terminated": "terminated"}
    refused("one is the opposite of the other", data, columns=both)
    # Masks of another kind are not ours.
    rows = np.arange(18)
    data.update(masks=np.ones((18, 4)), terminated=rows == 7, truncated=rows % 6 == 5)
    assert marked(load_dataset(data))[0] == [7]
    inverted = regular(trajectories=8)
    (text,) = warned(inverted | {"masks": 1 - inverted["masks"]})
    assert re.search("mean the opposite.*'terminated': 'masks'", text)


def test_absent_rewards_masks_and_terminations():
    data = {**recorded(), "qpos": np.zeros((21, 4)), "qvel": np.zeros((21, 4))}
    del data["rewards"], data["masks"]
    task = "one single task (OGBench: load_dataset('ogbench/ENV"
    refused(f"no column for reward|no rewards|{task}", data)
    data, ends = walk(terminated=None, truncated=ends_too)
    refused("no column for terminated", data)
    dataset = load_dataset(data, columns={"terminated": None})
    assert marked(dataset) == ([], np.flatnonzero(ends).tolist())
    data = compact()
    del data["masks"]
    with pytest.warns(DatasetWarning, match="no column says which rows terminate"):
        dataset = load_dataset(data)
    assert read(dataset) == ([6, 6, 6], [], [5, 11, 17])
    named = load_dataset(data, columns={"terminated": None, "truncated": "terminals"})
    assert (named.transitions == dataset.transitions).all()


# ---- flags that the rows contradict ----------------------------------------------------------

VARYING = [40, 25, 33, 28, 45, 31, 20, 36]


def walk(lengths=VARYING, successors=True, seed=0, **columns):
    """``drift`` with these columns, which may be functions of the ends; one that is None is dropped."""
    data, ends = drift(lengths, seed=seed, successors=successors)
    data |= {key: value(ends) if callable(value) else value for key, value in columns.items()}
    return {key: values for key, values in data.items() if values is not None}, ends


def ends_too(ends):
    return ends


def noise(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 3))


def report(words, data, **options):
    """There is one warning, which has these words."""
    (text,) = warned(data, **options)
    assert all(word in text for word in words.split("|")), text


@pytest.mark.parametrize("successors", [True, False])
def test_terminations_inside_a_trajectory_that_continues_are_reported(successors):
    data, ends = walk(successors=successors, truncated=ends_too)
    data["terminated"][[7, 50, 120, 180]] = True
    report(
        "4 of the 4 rows flagged terminated ('terminated')|columns={'episode': ...}|"
        "columns={'terminated': None, 'truncated': 'terminated'}",
        data,
    )
    # The remedy it names: numbered trajectories are not split.
    dataset = load_dataset(data | {"episode": np.cumsum(ends) - ends})
    assert dataset.episode_lengths.tolist() == [n if successors else n - 1 for n in VARYING]
    assert len(marked(dataset)[0]) == 4


@pytest.mark.parametrize("successors", ["own", "none", "shifted"])
def test_true_terminations_are_not_reported(successors):
    data, _ = walk(successors=successors != "none", terminated=ends_too)
    if successors == "shifted":  # As d4rl.qlearning_dataset shifts them, across ends too.
        data["next_observation"] = np.roll(data["observation"], -1, axis=0)
    assert load_dataset(data).episode_lengths.tolist() == VARYING
    assert len(load_dataset(walk([50], terminated=ends_too)[0])) == 50


def test_rows_flagged_both_ways_terminate_and_are_kept_without_successors():
    data, ends = walk(successors=False, truncated=ends_too)
    data["terminated"][ends.nonzero()[0][[0, 2]]] = True
    with pytest.warns(DatasetWarning, match="2 steps are both"):
        dataset = load_dataset(data)
    # Truncated episodes lose their last row, terminated ones keep it.
    assert dataset.episode_lengths.tolist() == [40, 24, 33, 27, 44, 30, 19, 35]
    assert marked(dataset)[0] == [39, 40 + 24 + 33 - 1]


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_flags_of_short_episodes_are_reported(shift):
    # Every tenth row ends an episode, so the true ends are among the 99 % of unmarked rows.
    data, ends = walk([8, 9, 10, 11, 12] * 20, successors=False)
    data["terminated"] = np.roll(ends, shift)
    data["terminated"][0], data["terminated"][-1] = False, True
    where = "before" if shift == -1 else "after"
    words = rf"flags of the (99|100) ends of episodes are shifted: each lies one row {where}"
    assert re.search(words, warned(data)[0])


@pytest.mark.parametrize("marks", ["truncated", "episode"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: np.roll(d["next_observation"], 1, 0), "contain the same row's observation"),
        (lambda d: d["observation"].copy(), "contain the same row's observation"),
        (lambda d: np.roll(d["next_observation"], -1, 0), "contain the observation two rows later"),
        (lambda d: d["next_observation"] * 10, "in another scale"),
    ],
)
def test_next_observations_of_other_rows_are_reported(marks, spoil, words):
    data, ends = walk(truncated=None)
    data[marks] = ends if marks == "truncated" else np.cumsum(ends) - ends
    assert warned(data) == []
    data["next_observation"] = spoil(data)
    report(f"{words}|rows inside episodes", data)


@pytest.mark.parametrize("marks", [ends_too, None])
def test_shuffled_transitions_are_reported(marks):
    data, ends = walk(truncated=marks)
    order = np.random.default_rng(1).permutation(len(ends))
    texts = warned({key: values[order] for key, values in data.items()})
    assert any("not in the order of time" in text for text in texts)


@pytest.mark.parametrize("name", ["truncated", "terminated"])
def test_missing_and_shifted_flags_are_reported_where_successors_are_known(name):
    data, ends = walk(**{name: ends_too})
    assert warned(data) == []
    data[name] = ends & (np.cumsum(ends) % 2 == 0)  # without rows 39, 97, ...
    report("in 4 rows inside episodes, first at row 39|done flags are missing", data)
    for shift, words in ((1, "one row after"), (-1, "one row before")):
        data[name] = np.roll(ends, shift)
        data[name][[0, -1]] = False, True
        assert any(words in text or "continues the same" in text for text in warned(data)), shift


def test_the_seam_of_a_ring_buffer_is_reported():
    data, _ = walk([40, 40], truncated=ends_too)
    # 70 rows of capacity, 75 steps recorded: steps 70 ... 74 lie where 0 ... 4 were.
    order = np.concatenate([np.arange(70, 75), np.arange(5, 70)])
    data = {key: values[order] for key, values in data.items()}
    data["truncated"][-1] = True
    report("in 1 rows inside episodes, first at row 4|a ring buffer overwrote", data)
    data["truncated"][4] = True
    assert warned(data) == []


def test_ends_from_which_the_next_row_continues_are_reported():
    each = np.arange(300) % 20 == 19
    data, ends = walk([300], truncated=each)
    report("14 of the 14 rows flagged truncated ('truncated')", data)
    assert warned(data | {"terminated": ends, "truncated": ends & False}) == []
    both = walk([300], successors=False, observation=np.cumsum(noise(300), 0).astype(np.float32))[0]
    terminated = each & (np.arange(300) // 20 % 3 == 0)
    text = " ".join(warned(both | {"terminated": terminated, "truncated": each & ~terminated}))
    assert "5 of the 5 rows flagged terminated" in text
    assert "9 of the 9 rows flagged truncated" in text


@pytest.mark.parametrize("steps", [30, 70])
def test_a_wrong_step_limit_is_reported(steps):
    data, _ = walk([50] * 12, False, 3, truncated=None)
    count = {30: "16 of the 19", 70: "7 of the 8"}[steps]  # the others are ends by chance
    words = f"{count} rows flagged truncated ('max_episode_steps')"
    report(words, data, max_episode_steps=steps)
    assert load_dataset(data, max_episode_steps=50).episode_lengths.tolist() == [49] * 12


def test_missing_flags_are_reported_where_observations_jump():
    data, ends = walk([40] * 12, successors=False, truncated=ends_too)
    starts = data["observation"][::40].repeat(40, 0)
    data["observation"] += 3 * np.arange(480)[:, None] % 120 - starts  # Episodes begin at 0.
    assert warned(data) == []
    data["truncated"] = ends & ~np.isin(np.arange(480), np.arange(39, 240, 80))
    jumps = "the observation jumps in 3 rows inside episodes (of 480 looked at), first at row 39"
    report(f"{jumps}|done flags are missing there", data)
    done = " 'done' looks like done flags: columns={'truncated': 'done'}."
    report(done, data | {"done": ends.astype(int)})
    assert done not in warned(data | {"done": ~ends})[0]


def test_few_kept_rows_are_reported_and_flagged_short_episodes_are_not():
    data, ends = walk([30] * 4, successors=False)
    contexts, none = noise(120), ends & False
    assert any("of 120 rows make transitions" in t for t in warned(data | {"truncated": ~ends}))
    short = {**data, "observation": contexts, "terminated": np.arange(120) % 4 > 0}
    assert not any("have one row" in text for text in warned(short | {"truncated": ends}))
    bandit = {**data, "observation": contexts, "terminated": ends | True, "truncated": none}
    assert warned(bandit) == warned(bandit | {"next_observation": contexts}) == []


@pytest.mark.parametrize("successors", [True, False])
def test_inverted_terminations_are_reported(successors):
    data, ends = walk([60] * 12, successors, terminated=lambda ends: ~ends)
    assert any("columns={'not_terminated': 'terminated'}" in text for text in warned(data))
    # A bandit's log: each row is an episode, and the next context has nothing to do with it.
    data.update(terminated=ends | True, observation=noise(720))
    if successors:
        data["next_observation"] = np.roll(data["observation"], -1, 0)
    assert warned(data) == []


@pytest.mark.parametrize("cut", [0, 3])
def test_terminations_at_one_fixed_length_are_reported(cut):
    data, ends = walk([30] * 4, terminals=ends_too, terminated=None, truncated=None)
    data = {key: values[: len(ends) - cut] for key, values in data.items()}
    words = r"'terminals'.*come at step 30 .*time limit"
    assert any(re.search(words, note) for note in load_dataset(data).notes)
    data["terminals"][-1] = True
    remedy = load_dataset(data, columns={"terminated": None, "truncated": "terminals"})
    assert marked(remedy) == ([], [29, 59, 89, 119 - cut])


@pytest.mark.parametrize(
    ("lengths", "last"),
    [([1] * 40, 40), ([3] * 40, 120), ([30, 30], 60), ([30, 29, 30, 30], 119), ([30] * 4, 60)],
)
def test_few_or_short_or_varying_episodes_that_terminate_are_ordinary(lengths, last):
    data, ends = walk(lengths)
    data["terminated"] = ends & (np.arange(len(ends)) < last)
    data["truncated"] = ends & ~data["terminated"]
    assert load_dataset(data).episode_lengths.tolist() == lengths


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("lengths", [VARYING, [10, 10, 10], [500, 500]])
def test_tables_without_any_flag_are_reported(successors, lengths):
    data, _ = walk(lengths, successors)
    text = " ".join(warned(data))
    if successors:
        assert f"in {len(lengths) - 1} rows inside episodes" in text
    else:
        assert f"all {sum(lengths):,} rows were read as one episode" in text
    done = {"done": np.append(np.zeros(sum(lengths) - 1), 1)}
    named = "'done' looks like done flags" in " ".join(warned(data | done))
    assert named == (lengths == VARYING and not successors)


def ball():
    """Each bounce reverses its speed at once."""
    time = np.arange(3000) % 100 / 100
    walked = drift([3000], width=6)[0]["observation"]
    return np.concatenate([walked, np.stack([4 * time * (1 - time), 4 - 8 * time], 1)], 1)


@pytest.mark.parametrize(
    "observation",
    [
        drift([3000], width=6)[0]["observation"],
        ball(),
        noise(3000),
        drift([3000])[0]["observation"][::300].repeat(300, 0),
    ],
    ids=["walk", "bounce", "unrelated", "constant"],
)
def test_one_long_trajectory_without_flags_is_said_to_be_one_episode(observation):
    data, _ = walk([3000], successors=False, observation=observation)
    report("all 3,000 rows were read as one episode", data)
    assert load_dataset(data | {"episode": np.zeros(3000, int)}).episode_lengths.tolist() == [2999]


@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_unrelated_rows_rounding_and_constants_give_no_warning(name):
    data, ends = walk(successors=False, **{name: ends_too})
    assert warned(data | {"observation": noise(len(ends))}) == []
    data, ends = walk(**{name: ends_too})
    data["observation"] = data["observation"].astype(np.float16)
    assert warned(data) == []
    data["observation"] = data["next_observation"] = np.ones((len(ends), 1))
    assert warned(data) == []


@shared
def test_real_files_without_or_with_misplaced_flags_are_reported():
    with np.load(SHARED / "halfcheetah_medium.npz") as file:
        data = {key: file[key][:30_000] for key in file.files if key != "next_obs"}
    assert warned(data) == []
    report("all 30,000 rows were read as one", data | {"truncated": np.zeros(30_000, bool)})
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    with h5py.File(SHARED / "d4rl_door_human_v0.hdf5") as file:
        data = {name: file[name][:] for name in names}
    none = data["terminals"] & False
    report("all 6,729 rows were read as one", data | {"terminals": none, "timeouts": none})
    report("24 of the 25 rows flagged truncated", data | {"terminals": none})
    data["terminals"] = data.pop("timeouts")
    report("24 of the 25 rows flagged terminated", data, columns={"truncated": None})


def test_rows_against_the_order_of_time_are_refused():
    data = {"observation": np.arange(40.0), "action": np.zeros(40), "reward": np.ones(40)}
    data |= {
        "terminated": np.zeros(40, bool),
        "episode": np.arange(40) // 10,
        "time": np.arange(40.0),
    }
    assert load_dataset(data).episode_lengths.tolist() == [9, 9, 9, 9]
    backwards = {name: column[::-1] for name, column in data.items()}
    refused(
        "goes back inside episodes, after 36 of 40 rows, first at row 0|sort them by", backwards
    )
    assert len(load_dataset(backwards, columns={"time": None})) == 36
