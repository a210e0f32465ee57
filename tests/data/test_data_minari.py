"""Minari datasets are read completely: every transition once, none across two episodes."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from tensordict.nn import TensorDictModule

from iql_torchrl import evaluate
from iql_torchrl.data import DatasetError, DatasetWarning, OfflineDataset, load_dataset

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
GOALS = gym.spaces.Dict({"observation": BOX, "goal": gym.spaces.Box(-9, 9, (2,), np.float64)})
ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def sampled(space: gym.Space[Any], rows: int) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return {name: sampled(child, rows) for name, child in space.spaces.items()}
    return np.stack([np.asarray(space.sample()) for _ in range(rows)])


def episode(
    observations: gym.Space[Any], actions: gym.Space[Any], length: int, ending: str = "truncated",
    infos: Any = None,
) -> EpisodeBuffer:  # fmt: skip
    flags = {name: np.zeros(length, bool) for name in ("terminated", "truncated")}
    for name in flags:
        flags[name][-1] = ending in (name, "both")
    return EpisodeBuffer(
        id=None,
        observations=sampled(observations, length + 1),
        actions=sampled(actions, length),
        rewards=np.random.default_rng(length).standard_normal(length),
        terminations=flags["terminated"],
        truncations=flags["truncated"],
        infos=infos or {},
    )


def write(
    name: str, buffers: list[EpisodeBuffer], observations: gym.Space[Any] = BOX,
    actions: gym.Space[Any] = ACTION, **more: Any,
) -> minari.MinariDataset:  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for authors and permalinks.
        return minari.create_dataset_from_buffers(
            name, buffers, observation_space=observations, action_space=actions,
            description="made by a test", **more,
        )  # fmt: skip


def leaves(values: Any, prefix: tuple[str, ...] = ("observation",)) -> dict[Any, Any]:
    if isinstance(values, dict):
        return {k: v for n, c in values.items() for k, v in leaves(c, (*prefix, n)).items()}
    return {prefix: values}


def assert_same(dataset: OfflineDataset, stored: minari.MinariDataset) -> None:
    rows, start = dataset.transitions, 0
    for number, given_episode in enumerate(stored.iterate_episodes()):
        length = len(given_episode.rewards)
        part = rows[start : start + length]
        for key, values in leaves(given_episode.observations).items():
            kept = part[key].dtype
            assert torch.equal(part[key], torch.tensor(values[:-1]).to(kept))
            assert torch.equal(part[("next", *key)], torch.tensor(values[1:]).to(kept))
        assert torch.equal(
            part["action"], torch.tensor(given_episode.actions).to(part["action"].dtype)
        )
        raw = torch.tensor(given_episode.rewards).float().unsqueeze(-1)
        assert torch.equal(part["next", "reward"], raw)
        terminated = torch.tensor(given_episode.terminations).unsqueeze(-1)
        truncated = torch.tensor(given_episode.truncations).unsqueeze(-1) & ~terminated
        truncated[-1] |= ~terminated[-1]
        assert torch.equal(part["next", "terminated"], terminated)
        assert torch.equal(part["next", "truncated"], truncated)
        assert torch.equal(part["next", "done"], terminated | truncated)
        assert bool((part["collector", "traj_ids"] == number).all())
        assert dataset.episode_lengths[number] == length
        assert np.isclose(dataset.episode_returns[number], given_episode.rewards.sum())
        start += length
    assert start == len(dataset)


endings = st.sampled_from(["terminated", "truncated", "both", "neither"])


@given(
    episodes=st.lists(st.tuples(st.integers(1, 50), endings), min_size=1, max_size=4),
    nested=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_transition_arrives_exactly_once(
    root: Path, episodes: list[tuple[int, str]], nested: bool
) -> None:
    space = GOALS if nested else BOX
    shutil.rmtree(root / "made", ignore_errors=True)
    stored = write("made/any-v0", [episode(space, ACTION, *e) for e in episodes], space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        assert_same(load_dataset("made/any-v0"), stored)


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (gym.spaces.Discrete(500), gym.spaces.Discrete(6)),
        (gym.spaces.MultiDiscrete([3, 4]), gym.spaces.MultiDiscrete([2, 5])),
        (gym.spaces.Box(0, 255, (4, 4), np.uint8), gym.spaces.Discrete(3)),
        (gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), gym.spaces.Discrete(3)),
        (GOALS, gym.spaces.Discrete(3)),
    ],
)
@pytest.mark.parametrize("storage", ["hdf5", "arrow", "parquet"])
def test_spaces_and_storages(
    root: Path, storage: str, observations: gym.Space[Any], actions: gym.Space[Any]
) -> None:
    if storage != "hdf5":
        pytest.importorskip("pyarrow")
    elif observations.shape == (4, 4) and minari.__version__ == "0.5.3":
        pytest.skip("Minari 0.5.3 writes small pictures as JPEG and reads them as plain numbers")
    buffers = [episode(observations, actions, n) for n in (1, 7)]
    stored = write("made/spaces-v0", buffers, observations, actions, data_format=storage)
    dataset = load_dataset("made/spaces-v0")
    assert_same(dataset, stored)
    first = dataset.transitions[0]
    for key in leaves(dict(observations.spaces) if observations is GOALS else 0):
        assert dataset.observation_spec[key].is_in(first[key])
    assert dataset.action_spec.is_in(first["action"])


class GoalEnv(gym.Env[Any, Any]):
    """Two steps; the reward is 1 where the action is the goal less the observation's start."""

    observation_space, action_space = GOALS, ACTION

    def _observed(self) -> Any:
        return {"observation": np.full(3, self.steps + 0.25), "goal": self.goal}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.goal = 0, self.np_random.uniform(0.5, 1.0, 2)
        return self._observed(), {}

    def step(self, action: Any) -> Any:
        reward = float(np.allclose(action, self.goal - self.steps - 0.25, atol=1e-6))
        self.steps += 1
        return self._observed(), reward, False, self.steps == 2, {}


@pytest.mark.parametrize("names", [["goal", "observation"], ["observation", "goal"], ["goal"]])
def test_the_environment_joins_leaves_as_the_rows_do(root: Path, names: list[str]) -> None:
    stored = write("made/goals-v0", [episode(GOALS, ACTION, 5)], GOALS)
    dataset = load_dataset("made/goals-v0", env=GoalEnv, concatenate=names)
    rows = torch.tensor(np.concatenate([stored[0].observations[name] for name in names], 1)).float()
    assert torch.equal(dataset.transitions["observation"], rows[:-1])
    assert torch.equal(dataset.transitions["next", "observation"], rows[1:])
    assert dataset.observation_spec["observation"].shape == rows.shape[1:]
    assert dataset.statistics["observation"].mean.shape == rows.shape[1:]
    made = dataset.make_env()
    assert made.observation_space == dataset.observation_space
    joined, _ = made.reset(seed=3)
    plain, _ = GoalEnv().reset(seed=3)
    np.testing.assert_array_equal(joined, np.concatenate([plain[name] for name in names]))
    assert made.observation_space.contains(joined)


def test_evaluate_works_with_a_joined_dataset(root: Path) -> None:
    write("made/goals-v0", [episode(GOALS, ACTION, 5)], GOALS)
    for env in (GoalEnv, lambda: load_dataset(
        "made/goals-v0", env=GoalEnv, concatenate=["goal", "observation"]
    ).make_env()):  # fmt: skip
        dataset = load_dataset("made/goals-v0", env=env, concatenate=["goal", "observation"])
        policy = TensorDictModule(
            lambda x: (x[:, :2] - x[:, 2:4]).clamp(-1, 1), ["observation"], ["action"]
        )
        played = evaluate(policy, dataset.make_env, episodes=3, num_envs=2, seed=0)
        assert played.returns.tolist() == [2.0] * 3


@pytest.mark.parametrize("place", ["observation", "info"])
def test_masks_and_log_probabilities(root: Path, place: str) -> None:
    actions, mask = gym.spaces.Discrete(3), np.ones((6, 3), np.int8)
    mask[1, 0] = 0
    space: gym.Space[Any] = gym.spaces.Dict(
        {"state": gym.spaces.Discrete(9), "action_mask": gym.spaces.MultiBinary(3)}
    )
    infos: dict[str, Any] = {"action_log_prob": np.arange(6) * -1.0}
    if place == "info":
        space, infos["action_mask"] = gym.spaces.Discrete(9), mask
    made = episode(space, actions, 5, infos=infos)
    made.actions[:] = 2
    if place == "observation":
        made.observations["action_mask"][:] = mask
    write("made/mask-v0", [made], space, actions)
    rows = load_dataset("made/mask-v0").transitions
    assert torch.equal(rows["action_mask"], torch.as_tensor(mask[:-1]).bool())
    assert torch.equal(rows["next", "action_mask"], torch.as_tensor(mask[1:]).bool())
    assert rows["observation"].shape == (5,)
    assert rows["action_log_prob"].tolist() == [-1, -2, -3, -4, -5]


def test_several_are_joined_and_differences_named(root: Path) -> None:
    write("made/a-v0", [episode(BOX, ACTION, 4), episode(BOX, ACTION, 2)])
    write("made/b-v0", [episode(BOX, ACTION, 3)])
    write("made/c-v0", [episode(GOALS, ACTION, 3)], GOALS)
    dataset = load_dataset(["made/a-v0", "made/b-v0"])
    assert dataset.transitions["collector", "traj_ids"].tolist() == [0] * 4 + [1] * 2 + [2] * 3
    with pytest.raises(DatasetError, match=r"made/c-v0: observation_space is Dict"):
        load_dataset(["made/a-v0", "made/c-v0"])


def test_limit_keeps_complete_episodes(root: Path) -> None:
    write("made/a-v0", [episode(BOX, ACTION, n) for n in (4, 5, 6)])
    for limit in (9, 14):
        assert load_dataset("made/a-v0", limit=limit).episode_lengths.tolist() == [4, 5]
    cut = load_dataset("made/a-v0", limit=3)
    assert cut.episode_lengths.tolist() == [3]
    assert cut.transitions["next", "truncated"].flatten().tolist() == [False, False, True]
    assert load_dataset(["made/a-v0", "made/a-v0"], limit=20).episode_lengths.sum() == 19


def test_terminations_at_one_fixed_length_are_reported(root: Path) -> None:
    write("equal-v0", [episode(BOX, ACTION, 6, "terminated") for _ in range(4)])
    with pytest.warns(DatasetWarning, match="all 4 terminations come at step 6 .*truncations"):
        load_dataset("equal-v0")
    write("cut-v0", [episode(BOX, ACTION, 6, "truncated") for _ in range(4)])
    load_dataset("cut-v0")


def test_a_mistyped_id_lists_neighbours(root: Path) -> None:
    write("pendulum/mixed-v0", [episode(BOX, ACTION, 2)])
    for wrong in ("pendulum/mixd-v0", "pendulum/mixed", "absent/log-v0"):
        with pytest.raises(DatasetError, match="pendulum/mixed-v0") as caught:
            load_dataset(wrong, download=False)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["pendulum/mixed-v0", "pendulum/mixd-v0", "pendulum/mixed-v1"])
def test_a_built_in_name_is_not_asked_for_on_the_network(
    wrong: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("minari.storage.hosting.download_dataset", asked)
    with pytest.raises(DatasetError, match=r"ensure_dataset\('pendulum/mixed-v0'\)") as caught:
        load_dataset(wrong)
    assert "python -m iql_torchrl.data make pendulum/mixed-v0" in str(caught.value)


def test_a_failed_download_is_one_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("minari.storage.hosting.download_dataset", offline)
    with pytest.raises(DatasetError, match=r"not among the local .*no route to host"):
        load_dataset("pendulum/absent-v0")


def test_a_truncated_file_is_named(root: Path) -> None:
    write("made/a-v0", [episode(BOX, ACTION, 400)])
    file = root / "made/a-v0/data/main_data.hdf5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DatasetError, match=r"main_data.hdf5"):
        load_dataset("made/a-v0")


def test_lengths_that_disagree_are_named(root: Path) -> None:
    made = episode(BOX, ACTION, 5)
    short = dataclasses.replace(made, observations=made.observations[:-1])
    write("made/a-v0", [episode(BOX, ACTION, 3), short])
    with pytest.raises(DatasetError, match="episode 1 has 5 rows of observations, expected 6"):
        load_dataset("made/a-v0")


def test_the_environment_and_scores_are_recovered(root: Path) -> None:
    env = gym.make("Pendulum-v1")
    made = episode(env.observation_space, env.action_space, 5)
    write(
        "made/pendulum-v0", [made], None, None, env="Pendulum-v1", ref_min_score=-1000.0,
        ref_max_score=-100.0,
    )  # fmt: skip
    dataset = load_dataset("made/pendulum-v0")
    fresh = dataset.make_env()
    assert fresh.spec is not None
    assert fresh.spec.id == "Pendulum-v1"
    assert dataset.reference_scores == (-1000.0, -100.0)
    assert dataset.normalised_score([-1000.0, -100.0]).tolist() == [0.0, 100.0]
    assert float(dataset.action_spec.space.high) == 2.0
    write("made/a-v0", [episode(BOX, ACTION, 2)])
    dataset = load_dataset("made/a-v0")
    with pytest.raises(DatasetError, match="pass env="):
        dataset.make_env()
    with pytest.raises(DatasetError, match="reference_scores"):
        dataset.normalised_score(0.0)
