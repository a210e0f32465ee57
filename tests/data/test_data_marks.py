"""Marks that mean different things to different authors: terminations, ends of trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from iql_torchrl.data import DatasetError, DatasetWarning, OfflineDataset, load_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")

Arrays = dict[str, Any]
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


def flag(dataset: OfflineDataset, name: str) -> list[int]:
    return dataset.transitions["next", name].flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [None, {"terminated": "masks"}, {"not_terminated": "masks"}])
def test_masks_terminate_and_terminals_end_trajectories(form: str, columns: Any) -> None:
    dataset = load_dataset(FORMS[form](), columns=columns)
    assert dataset.episode_lengths.tolist() == [6, 6, 6]
    assert dataset.episode_returns.tolist() == [-4, -5, -6]
    # Goal rows: steps 2 and 3 of the first trajectory, and the last step of the second.
    assert flag(dataset, "terminated") == [2, 3, 11]
    assert flag(dataset, "truncated") == [5, 17]
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


def test_terminals_in_their_other_places_of_the_compact_form() -> None:
    data = compact()
    data["terminals"] = 1 - data["valids"]
    only_last = load_dataset(data)
    data.pop("terminals")
    for dataset in (only_last, load_dataset(data)):
        assert dataset.episode_lengths.tolist() == [6, 6, 6]
        assert flag(dataset, "terminated") == [2, 3, 11]
        assert flag(dataset, "truncated") == [5, 17]


def test_late_rewards_of_the_compact_form_move_with_their_marks() -> None:
    dataset = load_dataset(compact(goals=[(0, 3), (1, 6)]), reward_offset=1)
    assert dataset.episode_returns.tolist() == [-5, -5, -6]
    assert flag(dataset, "terminated") == [2, 11]  # The steps that arrive at goals 3 and 6.
    assert flag(dataset, "truncated") == [5, 17]


def test_raw_rows_with_masks_drop_the_row_without_a_successor() -> None:
    dataset = load_dataset(recorded())
    assert dataset.episode_lengths.tolist() == [6, 6, 6]
    assert flag(dataset, "terminated") == [2, 3, 11]
    assert flag(dataset, "truncated") == [5, 17]


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
def test_files_are_read_as_dicts_are(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    if suffix == "npz":
        np.savez(path, **regular())
    else:
        with h5py.File(path, "w") as file:
            for key, values in regular().items():
                file[key] = values
    dataset = load_dataset(path, memmap=tmp_path / "table")
    assert flag(dataset, "terminated") == [2, 3, 11]
    assert dataset.episode_lengths.tolist() == [6, 6, 6]
    assert load_dataset(path, memmap=tmp_path / "table").episode_lengths.tolist() == [6, 6, 6]


def test_own_transitions_with_goal_rows_are_read_again() -> None:
    dataset = load_dataset(regular())
    again = load_dataset(dataset.transitions)
    assert (again.transitions == dataset.transitions).all()
    assert again.episode_lengths.tolist() == [6, 6, 6]
    joined = load_dataset([regular(), regular()])
    assert joined.episode_lengths.tolist() == [6] * 6
    assert flag(joined, "terminated") == [2, 3, 11, 20, 21, 29]


def test_masks_without_terminals_end_trajectories_where_rows_do_not_follow() -> None:
    data = regular()
    del data["terminals"]
    dataset = load_dataset(data)
    assert dataset.episode_lengths.tolist() == [6, 6, 6]
    assert flag(dataset, "terminated") == [2, 3, 11]


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
        masks=np.ones((18, 4)), terminated=np.arange(18) == 7, truncated=np.arange(18) == 17
    )
    assert flag(load_dataset(data), "terminated") == [7]


def test_masks_that_mean_the_opposite_are_reported() -> None:
    data = regular(trajectories=8)
    data["masks"] = 1 - data["masks"]
    with pytest.warns(DatasetWarning, match=r"mean the opposite.*'terminated': 'masks'"):
        load_dataset(data)


def test_valids_without_masks_are_reported() -> None:
    data = compact()
    del data["masks"]
    with pytest.warns(DatasetWarning, match="no column marks which rows terminate"):
        dataset = load_dataset(data)
    assert flag(dataset, "terminated") == []
    assert flag(dataset, "truncated") == [5, 11, 17]
    named = load_dataset(data, columns={"terminated": None, "truncated": "terminals"})
    assert (named.transitions == dataset.transitions).all()


def test_data_without_rewards_says_how_to_get_them(tmp_path: Path) -> None:
    data = {**recorded(), "qpos": np.zeros((21, 4)), "qvel": np.zeros((21, 4))}
    del data["rewards"], data["masks"]
    np.savez(tmp_path / "cube.npz", **data)
    with pytest.raises(DatasetError, match=r"no column for reward.*no rewards.*single.*task"):
        load_dataset(tmp_path / "cube.npz")


# ---- marks that the rows contradict ----------------------------------------------------------


def drift(lengths: list[int], width: int = 3, seed: int = 0) -> tuple[Arrays, np.ndarray]:
    """Random walks of the given lengths from random places, without marks, and their ends."""
    rng = np.random.default_rng(seed)
    walks = [
        10 * rng.standard_normal(width) + np.cumsum(0.1 * rng.standard_normal((n + 1, width)), 0)
        for n in lengths
    ]
    rows = sum(lengths)
    ends = np.zeros(rows, bool)
    ends[np.cumsum(lengths) - 1] = True
    data = {
        "observation": np.concatenate([walk[:-1] for walk in walks]),
        "next_observation": np.concatenate([walk[1:] for walk in walks]),
        "action": rng.uniform(-1, 1, (rows, 2)),
        "reward": rng.standard_normal(rows),
        "terminated": np.zeros(rows, bool),
        "truncated": np.zeros(rows, bool),
    }
    return data, ends


VARYING = [40, 25, 33, 28, 45, 31, 20, 36]


@pytest.mark.parametrize("successors", [True, False])
def test_terminations_inside_a_trajectory_that_goes_on_are_reported(successors: bool) -> None:
    data, ends = drift(VARYING)
    data["truncated"] = ends
    data["terminated"][[7, 50, 120, 180]] = True
    if not successors:
        del data["next_observation"]
    with pytest.warns(DatasetWarning) as caught:
        load_dataset(data)
    (text,) = (str(w.message) for w in caught)
    assert "4 of the 4 rows marked terminated ('terminated')" in text
    assert "columns={'episode': ...}" in text
    assert "columns={'terminated': None, 'truncated': 'terminated'}" in text
    # The remedy it names: numbered trajectories are not split.
    data["episode"] = np.cumsum(ends) - ends
    dataset = load_dataset(data)
    kept = np.array(VARYING) - (0 if successors else 1)
    assert dataset.episode_lengths.tolist() == kept.tolist()
    assert len(flag(dataset, "terminated")) == 4


@pytest.mark.parametrize("successors", ["own", "none", "shifted"])
def test_true_terminations_are_not_reported(successors: str) -> None:
    data, ends = drift(VARYING)
    data["terminated"] = ends
    if successors == "none":
        del data["next_observation"]
    elif successors == "shifted":  # As d4rl.qlearning_dataset shifts them, across ends too.
        data["next_observation"] = np.roll(data["observation"], -1, axis=0)
    dataset = load_dataset(data)
    assert dataset.episode_lengths.tolist() == VARYING
    one, _ = drift([50])
    one["terminated"][-1] = True
    assert len(load_dataset(one)) == 50


def test_unrelated_rows_are_not_judged() -> None:
    rng = np.random.default_rng(0)
    data, ends = drift(VARYING)
    data["observation"] = rng.standard_normal((len(ends), 3))
    del data["next_observation"]
    data["terminated"] = ends
    load_dataset(data)
    data["terminated"], data["truncated"] = ~data["truncated"] & False, ends
    load_dataset(data)


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


@pytest.mark.parametrize("lengths", [[1] * 40, [3] * 40, [30, 30], [30, 29, 30, 30]])
def test_few_or_short_or_varying_episodes_that_terminate_are_ordinary(lengths: list[int]) -> None:
    data, ends = drift(lengths)
    data["terminated"] = ends
    assert load_dataset(data).episode_lengths.tolist() == lengths


def test_ends_of_both_kinds_at_one_length_are_ordinary() -> None:
    data, ends = drift([30] * 4)
    data["terminated"] = ends & (np.arange(120) < 60)
    data["truncated"] = ends & ~data["terminated"]
    load_dataset(data)


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("lengths", [VARYING, [10, 10, 10], [500, 500]])
def test_tables_without_any_mark_that_jump_are_reported(
    successors: bool, lengths: list[int]
) -> None:
    data, _ = drift(lengths)
    if not successors:
        del data["next_observation"]
    with pytest.warns(DatasetWarning) as caught:
        load_dataset(data)
    text = str(caught[0].message)
    assert f"there are {len(lengths) - 1} rows" in text
    assert "no row is marked" in text
    assert "max_episode_steps" in text


@pytest.mark.parametrize("kind", ["walk", "bounce", "unrelated", "constant"])
def test_one_long_trajectory_without_marks_is_ordinary(kind: str) -> None:
    data, _ = drift([3000], width=6)
    del data["next_observation"]
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
def test_real_files_without_their_marks_are_reported() -> None:
    with np.load(SHARED / "halfcheetah_medium.npz") as file:
        data = {key: file[key][:30_000] for key in file.files if key != "next_obs"}
    load_dataset(data)
    data["truncated"] = np.zeros(30_000, bool)
    with pytest.warns(DatasetWarning, match=r"there are (29|3\d) rows from which the observation"):
        load_dataset(data)
    with h5py.File(SHARED / "d4rl_door_human_v0.hdf5") as file:
        data = {k: file[k][:] for k in ("observations", "actions", "rewards", "terminals")}
    data.update(terminals=data["terminals"] & False, timeouts=data["terminals"] & False)
    with pytest.warns(DatasetWarning, match="there are 24 rows from which the observation jumps"):
        load_dataset(data)


@shared
def test_real_terminals_at_misplaced_marks_are_reported() -> None:
    with h5py.File(SHARED / "d4rl_door_human_v0.hdf5") as file:
        data = {k: file[k][:] for k in ("observations", "actions", "rewards")}
        data["terminals"] = file["timeouts"][:]
    with pytest.warns(DatasetWarning, match="25 of the 25 rows marked terminated"):
        load_dataset(data, columns={"truncated": None})


def test_a_termination_that_no_column_marks_is_allowed_when_said() -> None:
    data, ends = drift(VARYING)
    del data["terminated"]
    data["truncated"] = ends
    with pytest.raises(DatasetError, match="no column for terminated"):
        load_dataset(data)
    dataset = load_dataset(data, columns={"terminated": None})
    assert flag(dataset, "terminated") == []
    assert torch.equal(dataset.transitions["next", "truncated"].flatten(), torch.as_tensor(ends))
