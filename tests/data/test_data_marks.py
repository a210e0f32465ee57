"""Marks that mean different things to different authors: terminations, ends of trajectories."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_logs import Arrays, drift, flag, warned

from iql_torchrl.data import DatasetError, DatasetWarning, OfflineDataset, load_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")

STEPS = 6  # transitions of each trajectory; its observations are one more
GOALS = [(0, 2), (0, 3), (1, 5)]  # (trajectory, step) from a goal state


def recorded(trajectories: int = 3, goals: list[tuple[int, int]] = GOALS) -> Arrays:
    """OGBench's raw rows: the last one of a trajectory has no next row; step n is 100 t + n."""
    rows = np.array([100.0 * t + n for t in range(trajectories) for n in range(STEPS + 1)])
    at_goal = np.isin(rows, [100.0 * t + n for t, n in goals])
    return {
        "observations": np.stack([rows, -rows], 1).astype(np.float32),
        "actions": np.linspace(-1, 1, len(rows), dtype=np.float32)[:, None],
        "terminals": rows % 100 == STEPS,
        "rewards": at_goal.astype(np.float32) - 1,
        "masks": 1 - at_goal.astype(np.float32),
    }


def regular(**options: Any) -> Arrays:
    """OGBench's default form: shifted next observations, each trajectory's last row dropped."""
    raw = recorded(**options)
    kept = ~raw["terminals"]
    following = np.flatnonzero(kept) + 1
    data = {key: values[kept] for key, values in raw.items()}
    data["next_observations"] = raw["observations"][following]
    data["terminals"] = raw["terminals"][following].astype(np.float32)
    return data


def compact(**options: Any) -> Arrays:
    """OGBench's ``compact_dataset=True``: ``valids`` is 0 at the row without a next one."""
    data = recorded(**options)
    end = data["terminals"]
    data["valids"] = 1 - end.astype(np.float32)
    data["terminals"] = (end | np.append(end[1:], True)).astype(np.float32)
    return data


FORMS = {"regular": regular, "compact": compact}


def read(dataset: OfflineDataset) -> tuple[list[int], list[int], list[int]]:
    """Lengths of episodes, and the rows that are terminated and truncated."""
    return dataset.episode_lengths.tolist(), flag(dataset, "terminated"), flag(dataset, "truncated")


#: Goal rows: steps 2 and 3 of the first trajectory, and the last step of the second.
READ = ([6, 6, 6], [2, 3, 11], [5, 17])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [None, {"terminated": "masks"}, {"not_terminated": "masks"}])
def test_masks_terminate_and_terminals_end_trajectories(form: str, columns: Any) -> None:
    dataset = load_dataset(FORMS[form](), columns=columns)
    assert read(dataset) == READ
    assert dataset.episode_returns.tolist() == [-4, -5, -6]
    assert flag(dataset, "done") == [2, 3, 5, 11, 17]
    rows = dataset.transitions
    steps = [100.0 * t + n for t in range(3) for n in range(6)]
    assert rows["observation"][:, 0].tolist() == steps
    assert rows["next", "observation"][:, 0].tolist() == [step + 1 for step in steps]
    assert rows["collector", "traj_ids"].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert any("'masks' was read as 0 where a row terminates" in note for note in dataset.notes)


@pytest.mark.parametrize("form", FORMS)
def test_goal_rows_do_not_split_episodes_for_scale_and_split(form: str) -> None:
    dataset = load_dataset(FORMS[form](), reward="return_range")
    assert dataset.reward_map.scale == pytest.approx(1000 / 2)  # Returns from -6 to -4.
    first, second = dataset.split(2 / 3, seed=0)
    assert sorted(map(len, (first, second))) == [6, 12]


def test_other_forms_of_the_same_rows() -> None:
    data, regular_rows = compact(), regular()
    data["terminals"] = 1 - data["valids"]  # only at the rows without a next one
    assert read(load_dataset(data)) == READ
    del data["terminals"], regular_rows["terminals"]
    assert read(load_dataset(data)) == READ
    assert read(load_dataset(recorded())) == READ  # raw rows drop the row without a successor
    without_terminals = load_dataset(regular_rows)  # trajectories end where rows do not follow
    assert read(without_terminals)[:2] == READ[:2]


def test_late_rewards_of_the_compact_form_move_with_their_marks() -> None:
    dataset = load_dataset(compact(goals=[(0, 3), (1, 6)]), reward_offset=1)
    assert dataset.episode_returns.tolist() == [-5, -5, -6]
    assert flag(dataset, "terminated") == [2, 11]  # The steps that arrive at goals 3 and 6.
    assert flag(dataset, "truncated") == [5, 17]


def test_own_transitions_with_goal_rows_are_read_again() -> None:
    dataset = load_dataset(regular())
    again = load_dataset(dataset.transitions)
    assert (again.transitions == dataset.transitions).all()
    assert again.episode_lengths.tolist() == [6, 6, 6]
    joined = load_dataset([regular(), regular()])
    assert joined.episode_lengths.tolist() == [6] * 6
    assert flag(joined, "terminated") == [2, 3, 11, 20, 21, 29]


def test_masks_that_repeat_terminals_are_ordinary_terminations() -> None:
    data = regular(goals=[(0, 5), (1, 5), (2, 5)])
    data["next_observations"][5::6] = data["observations"][[6, 12, 0]]  # As some loaders shift.
    with pytest.warns(DatasetWarning, match="come at step 6"):
        dataset = load_dataset(data)
    assert dataset.episode_lengths.tolist() == [6, 6, 6]
    assert flag(dataset, "terminated") == [5, 11, 17]
    # With D4RL's timeouts beside them, too.
    data["masks"][11], data["terminals"][11] = 1, 0
    dataset = load_dataset({**data, "timeouts": np.arange(18) == 11})
    assert (flag(dataset, "terminated"), flag(dataset, "truncated")) == ([5, 17], [11])


def test_masks_and_terminated_must_agree() -> None:
    data = regular()
    data["terminated"] = data["masks"] == 0
    assert flag(load_dataset(data), "terminated") == [2, 3, 11]
    data["terminated"] = data.pop("terminals") == 1
    with pytest.raises(DatasetError, match=r"'masks' .* and 'terminated' .* disagree in 4 of 18"):
        load_dataset(data)
    chosen = load_dataset(data, columns={"not_terminated": "masks", "terminated": None})
    assert flag(chosen, "terminated") == [2, 3, 11]
    with pytest.raises(DatasetError, match="one is the opposite of the other"):
        load_dataset(data, columns={"not_terminated": "masks", "terminated": "terminated"})
    # Masks of another kind are not ours.
    del data["terminated"]
    data.update(
        masks=np.ones((18, 4)), terminated=np.arange(18) == 7, truncated=np.arange(18) % 6 == 5
    )
    assert flag(load_dataset(data), "terminated") == [7]


def test_masks_that_mean_the_opposite_are_reported() -> None:
    data = regular(trajectories=8)
    (text,) = warned(data | {"masks": 1 - data["masks"]})
    assert re.search("mean the opposite.*'terminated': 'masks'", text)


def test_valids_without_masks_are_reported() -> None:
    data = compact()
    del data["masks"]
    with pytest.warns(DatasetWarning, match="no column marks which rows terminate"):
        dataset = load_dataset(data)
    assert read(dataset) == ([6, 6, 6], [], [5, 11, 17])
    named = load_dataset(data, columns={"terminated": None, "truncated": "terminals"})
    assert (named.transitions == dataset.transitions).all()


def test_the_error_about_missing_rewards_tells_how_to_get_them(tmp_path: Path) -> None:
    data = {**recorded(), "qpos": np.zeros((21, 4)), "qvel": np.zeros((21, 4))}
    del data["rewards"], data["masks"]
    np.savez(tmp_path / "cube.npz", **data)
    with pytest.raises(DatasetError, match=r"no column for reward.*no rewards.*single.*task"):
        load_dataset(tmp_path / "cube.npz")


# ---- marks that the rows contradict ----------------------------------------------------------


VARYING = [40, 25, 33, 28, 45, 31, 20, 36]


@pytest.mark.parametrize("successors", [True, False])
def test_terminations_inside_a_trajectory_that_continues_are_reported(successors: bool) -> None:
    data, ends = drift(VARYING, successors=successors)
    data["truncated"] = ends
    data["terminated"][[7, 50, 120, 180]] = True
    (text,) = warned(data)
    assert "4 of the 4 rows marked terminated ('terminated')" in text
    assert "columns={'episode': ...}" in text
    assert "columns={'terminated': None, 'truncated': 'terminated'}" in text
    # The remedy it names: numbered trajectories are not split.
    data["episode"] = np.cumsum(ends) - ends
    dataset = load_dataset(data)
    assert dataset.episode_lengths.tolist() == [n if successors else n - 1 for n in VARYING]
    assert len(flag(dataset, "terminated")) == 4


@pytest.mark.parametrize("successors", ["own", "none", "shifted"])
def test_true_terminations_are_not_reported(successors: str) -> None:
    data, ends = drift(VARYING)
    data["terminated"] = ends
    if successors == "none":
        del data["next_observation"]
    elif successors == "shifted":  # As d4rl.qlearning_dataset shifts them, across ends too.
        data["next_observation"] = np.roll(data["observation"], -1, axis=0)
    assert load_dataset(data).episode_lengths.tolist() == VARYING
    one, end = drift([50])
    assert len(load_dataset(one | {"terminated": end})) == 50


@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_unrelated_rows_give_no_warning(name: str) -> None:
    data, ends = drift(VARYING, successors=False)
    data["observation"] = np.random.default_rng(0).standard_normal((len(ends), 3))
    assert warned(data | {name: ends}) == []


def test_rows_marked_both_ways_terminate_and_are_kept_without_successors() -> None:
    data, ends = drift(VARYING, successors=False)
    data["terminated"][ends.nonzero()[0][[0, 2]]] = True
    data["truncated"] = ends
    with pytest.warns(DatasetWarning, match="2 steps were marked both"):
        dataset = load_dataset(data)
    # Truncated episodes lose their last row, terminated ones keep it.
    assert dataset.episode_lengths.tolist() == [40, 24, 33, 27, 44, 30, 19, 35]
    assert flag(dataset, "terminated") == [39, 40 + 24 + 33 - 1]


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_marks_of_short_episodes_are_reported(shift: int) -> None:
    # Every tenth row ends an episode, so the true ends are among the 99 % of unmarked rows.
    data, ends = drift([8, 9, 10, 11, 12] * 20, successors=False)
    data["terminated"] = np.roll(ends, shift)
    data["terminated"][0], data["terminated"][-1] = False, True
    assert re.search(r"of the (99|100|101) rows marked terminated", warned(data)[0])


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
def test_next_observations_of_other_rows_are_reported(marks: str, spoil: Any, words: str) -> None:
    data, ends = drift(VARYING)
    del data["truncated"]
    data[marks] = ends if marks == "truncated" else np.cumsum(ends) - ends
    assert warned(data) == []
    data["next_observation"] = spoil(data)
    (text,) = warned(data)
    assert words in text
    assert "rows inside episodes" in text


@pytest.mark.parametrize("marked", [True, False])
def test_shuffled_transitions_are_reported(marked: bool) -> None:
    data, ends = drift(VARYING)
    order = np.random.default_rng(1).permutation(len(ends))
    data = {
        k: v[order] for k, v in (data | {"truncated": ends}).items() if marked or k != "truncated"
    }
    assert any("not in the order of time" in text for text in warned(data))


@pytest.mark.parametrize("name", ["truncated", "terminated"])
def test_missing_and_shifted_marks_are_reported_where_successors_are_known(name: str) -> None:
    data, ends = drift(VARYING)
    assert warned(data | {name: ends}) == []
    data[name] = ends & (np.cumsum(ends) % 2 == 0)  # without rows 39, 97, ...
    (text,) = warned(data)
    assert "in 4 rows inside episodes, first at row 39" in text
    assert "marks of ends are missing" in text
    for shift, words in ((1, "one row after"), (-1, "one row before")):
        data[name] = np.roll(ends, shift)
        data[name][[0, -1]] = False, True
        assert any(words in text or "continues the same" in text for text in warned(data)), shift


def test_the_seam_of_a_ring_buffer_is_reported() -> None:
    data, ends = drift([40, 40])
    data["truncated"] = ends
    # 70 rows of capacity, 75 steps recorded: steps 70 ... 74 lie where 0 ... 4 were.
    order = np.concatenate([np.arange(70, 75), np.arange(5, 70)])
    data = {key: values[order] for key, values in data.items()}
    data["truncated"][-1] = True
    (text,) = warned(data)
    assert "in 1 rows inside episodes, first at row 4" in text
    assert "a ring buffer overwrote" in text
    data["truncated"][4] = True
    assert warned(data) == []


def test_truncated_ends_from_which_the_next_row_continues_are_reported() -> None:
    data, ends = drift([200])
    data["truncated"] = np.arange(200) % 20 == 19
    (text,) = warned(data)
    assert "9 of the 9 rows marked truncated ('truncated')" in text
    data["terminated"], data["truncated"] = ends, ends & False
    assert warned(data) == []


def test_both_kinds_of_marks_on_rows_that_continue_are_reported() -> None:
    rng = np.random.default_rng(0)
    rows = np.arange(300)
    walk = np.cumsum(rng.normal(size=(300, 3)), 0).astype(np.float32)
    ends, first = rows % 20 == 19, rows // 20 % 3 == 0
    data = {"observations": walk, "actions": np.tanh(rng.normal(size=(300, 2))).astype(np.float32)}
    data |= {"rewards": walk[:, 0], "terminals": ends & first, "timeouts": ends & ~first}
    with pytest.warns(DatasetWarning) as seen:
        load_dataset(data)
    text = " ".join(str(each.message) for each in seen)
    assert "5 of the 5 rows marked terminated" in text
    assert "9 of the 9 rows marked truncated" in text


def test_rounding_and_constant_observations_are_no_breaks() -> None:
    data, ends = drift(VARYING)
    data["truncated"] = ends
    data["observation"] = data["observation"].astype(np.float16)
    data["next_observation"] = data["next_observation"].astype(np.float32)
    assert warned(data) == []
    data["observation"] = data["next_observation"] = np.ones((len(ends), 1))
    assert warned(data) == []


@pytest.mark.parametrize("steps", [30, 70])
def test_a_wrong_step_limit_is_reported_where_observations_jump(steps: int) -> None:
    data, ends = drift([50] * 12, seed=3, successors=False)
    del data["truncated"]
    data["done"] = ends
    (text,) = warned(data, max_episode_steps=steps)
    assert "the observation jumps to the following row's in " in text
    assert "rows inside episodes, first at row 49" in text
    assert "max_episode_steps" in text
    assert "columns={'truncated': 'done'}" in text
    assert load_dataset(data, max_episode_steps=50).episode_lengths.tolist() == [49] * 12
    data["done"] = ~ends  # Not a column of ends.
    assert "'done'" not in warned(data, max_episode_steps=steps)[0]


def test_missing_marks_are_reported_where_observations_jump() -> None:
    data, ends = drift([40] * 12, successors=False)
    starts = data["observation"][::40].repeat(40, 0)
    data["observation"] += 3 * np.arange(480)[:, None] % 120 - starts  # Episodes begin at 0.
    data["truncated"] = ends.copy()
    assert warned(data) == []
    data["truncated"][39:240:80] = False
    (text,) = warned(data)
    assert "jumps to the following row's in 3 rows inside episodes, first at row 39" in text
    assert "marks of ends are missing there" in text


def test_few_kept_rows_are_reported_and_marked_short_episodes_are_not() -> None:
    data, ends = drift([30] * 4)
    data["truncated"] = ~ends  # Inverted.
    contexts = np.random.default_rng(0).standard_normal((120, 3))
    bandit = {**data, "observation": contexts, "next_observation": contexts}
    bandit.update(terminated=np.ones(120, bool), truncated=ends & False)
    del data["next_observation"]
    assert any("of 120 rows make transitions" in text for text in warned(data))
    short = {**data, "observation": contexts, "terminated": np.arange(120) % 4 > 0}
    assert not any("have one row" in text for text in warned(short | {"truncated": ends}))
    assert warned(bandit) == []
    assert warned({k: v for k, v in bandit.items() if k != "next_observation"}) == []


@pytest.mark.parametrize("successors", [True, False])
def test_inverted_terminations_are_reported(successors: bool) -> None:
    data, ends = drift([60] * 12, successors=successors)
    data["terminated"] = ~ends
    text = warned(data)[0]
    assert "columns={'not_terminated': 'terminated'}" in text
    # A bandit's log: each row is an episode, and the next context has nothing to do with it.
    data["terminated"] = ends | True
    data["observation"] = np.random.default_rng(0).standard_normal((720, 3))
    if successors:
        data["next_observation"] = np.roll(data["observation"], -1, 0)
    assert warned(data) == []


@pytest.mark.parametrize("cut", [0, 3])
def test_terminations_at_one_fixed_length_are_reported(cut: int) -> None:
    data, ends = drift([30, 30, 30, 30])
    data["terminals"] = ends
    del data["terminated"], data["truncated"]
    data = {key: values[: len(ends) - cut] for key, values in data.items()}
    with pytest.warns(DatasetWarning, match=r"'terminals'.*come at step 30 .*a time limit") as seen:
        dataset = load_dataset(data)
    assert str(seen[0].message) in dataset.notes
    data["terminals"][-1] = True
    remedy = load_dataset(data, columns={"terminated": None, "truncated": "terminals"})
    assert flag(remedy, "terminated") == []
    assert flag(remedy, "truncated") == [29, 59, 89, 119 - cut]


@pytest.mark.parametrize(
    ("lengths", "last"),
    [([1] * 40, 40), ([3] * 40, 120), ([30, 30], 60), ([30, 29, 30, 30], 119), ([30] * 4, 60)],
)
def test_few_or_short_or_varying_episodes_that_terminate_are_ordinary(
    lengths: list[int], last: int
) -> None:
    data, ends = drift(lengths)
    data["terminated"] = ends & (np.arange(len(ends)) < last)
    data["truncated"] = ends & ~data["terminated"]
    assert load_dataset(data).episode_lengths.tolist() == lengths


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("lengths", [VARYING, [10, 10, 10], [500, 500]])
def test_tables_without_any_mark_that_jump_are_reported(
    successors: bool, lengths: list[int]
) -> None:
    data, _ = drift(lengths, successors=successors)
    text = warned(data)[0]
    assert f"in {len(lengths) - 1} rows inside episodes" in text
    assert "no row is marked" in text
    assert "max_episode_steps" in text


@pytest.mark.parametrize("kind", ["walk", "bounce", "unrelated", "constant"])
def test_one_long_trajectory_without_marks_is_ordinary(kind: str) -> None:
    data, _ = drift([3000], width=6, successors=False)
    if kind == "bounce":  # A ball: each bounce reverses its speed at once.
        time = np.arange(3000) % 100 / 100
        ball = np.stack([4 * time * (1 - time), 4 - 8 * time], 1)
        data["observation"] = np.concatenate([data["observation"], ball], 1)
    if kind == "unrelated":
        data["observation"] = np.random.default_rng(0).standard_normal((3000, 3))
    if kind == "constant":
        data["observation"] = np.repeat(data["observation"][::300], 300, axis=0)
    assert len(load_dataset(data)) == 2999


@shared
def test_real_files_without_or_with_misplaced_marks_are_reported() -> None:
    with np.load(SHARED / "halfcheetah_medium.npz") as file:
        data = {key: file[key][:30_000] for key in file.files if key != "next_obs"}
    assert warned(data) == []
    (text,) = warned(data | {"truncated": np.zeros(30_000, bool)})
    assert re.search(r"the observation jumps.* in (29|3\d) rows inside.*no row is marked", text)
    with h5py.File(SHARED / "d4rl_door_human_v0.hdf5") as file:
        data = {
            k: file[k][:] for k in ("observations", "actions", "rewards", "terminals", "timeouts")
        }
    none = data["terminals"] & False
    (text,) = warned(data | {"terminals": none, "timeouts": none})
    assert re.search("the observation jumps to .* in 24 rows inside.*no row is marked", text)
    data["terminals"] = data.pop("timeouts")
    (text,) = warned(data, columns={"truncated": None})
    assert "24 of the 25 rows marked terminated" in text


def test_columns_may_state_that_no_row_terminates() -> None:
    data, ends = drift(VARYING)
    del data["terminated"]
    data["truncated"] = ends
    with pytest.raises(DatasetError, match="no column for terminated"):
        load_dataset(data)
    dataset = load_dataset(data, columns={"terminated": None})
    assert flag(dataset, "terminated") == []
    assert torch.equal(dataset.transitions["next", "truncated"].flatten(), torch.as_tensor(ends))
