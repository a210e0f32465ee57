"""Minari datasets are read completely: every transition once, none across two episodes."""

import dataclasses
import os
import re
import shutil
import warnings
from unittest.mock import Mock

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from extras import needs
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from small_logs import assert_is_minaris, leaves, marked, refused
from tensordict.nn import TensorDictModule

from iql_torchrl import evaluate
from iql_torchrl.data import DatasetError, DatasetWarning, load_dataset

BOX, ACTION = Box(-np.inf, np.inf, (3,), np.float64), Box(-1, 1, (2,), np.float32)
GOALS = Dict({"observation": BOX, "goal": Box(-9, 9, (2,), np.float64)})


def sampled(space, rows):
    if isinstance(space, Dict):
        return {name: sampled(child, rows) for name, child in space.spaces.items()}
    return np.stack([np.asarray(space.sample()) for _ in range(rows)])


def episode(length, ending="truncated", observations=BOX, actions=ACTION, **more):
    end = np.arange(length) == length - 1
    return EpisodeBuffer(
        id=None,
        observations=sampled(observations, length + 1),
        actions=sampled(actions, length),
        rewards=np.random.default_rng(length).standard_normal(length),
        terminations=end & (ending in ("terminated", "both")),
        truncations=end & (ending in ("truncated", "both")),
        **more,
    )


def write(name, buffers, observations=BOX, actions=ACTION, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for authors and permalinks.
        return minari.create_dataset_from_buffers(
            name, buffers, observation_space=observations, action_space=actions, **more
        )


endings = st.sampled_from(["terminated", "truncated", "both", "neither"])


@given(
    episodes=st.lists(st.tuples(st.integers(1, 50), endings), min_size=1, max_size=4),
    nested=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_transition_arrives_exactly_once(minari_root, episodes, nested):
    space = GOALS if nested else BOX
    shutil.rmtree(minari_root / "made", ignore_errors=True)
    stored = write("made/any-v0", [episode(*each, space) for each in episodes], space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        assert_is_minaris(load_dataset("made/any-v0"), stored)


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (Discrete(500), Discrete(6)),
        (MultiDiscrete([3, 4]), MultiDiscrete([2, 5])),
        (Box(0, 255, (4, 4), np.uint8), Discrete(3)),
        (Box(0, 255, (32, 32, 3), np.uint8), Discrete(3)),
        (GOALS, Discrete(3)),
    ],
)
@pytest.mark.parametrize("storage", ["hdf5", "arrow", "parquet"])
def test_spaces_and_storages(minari_root, storage, observations, actions):
    if storage != "hdf5":
        needs("pyarrow")
    elif observations.shape == (4, 4) and minari.__version__ == "0.5.3":
        pytest.skip("Minari 0.5.3 writes small pictures as JPEG and reads them as plain numbers")
    buffers = [episode(n, "truncated", observations, actions) for n in (1, 7)]
    stored = write("made/spaces-v0", buffers, observations, actions, data_format=storage)
    dataset = load_dataset("made/spaces-v0")
    assert_is_minaris(dataset, stored)
    row = dataset.transitions[0]
    for key in leaves(dict(observations.spaces) if observations is GOALS else 0):
        assert dataset.observation_spec[key].is_in(row[key])
    assert dataset.action_spec.is_in(row["action"])


class GoalEnv(gym.Env):
    """Two steps; the reward is 1 where the action is the goal less the observation's start."""

    observation_space, action_space = GOALS, ACTION

    def _observed(self):
        return {"observation": np.full(3, self.steps + 0.25), "goal": self.goal}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.goal = 0, self.np_random.uniform(0.5, 1.0, 2)
        return self._observed(), {}

    def step(self, action):
        reward = float(np.allclose(action, self.goal - self.steps - 0.25, atol=1e-6))
        self.steps += 1
        return self._observed(), reward, False, self.steps == 2, {}


@pytest.mark.parametrize("names", [["goal", "observation"], ["observation", "goal"], ["goal"]])
def test_the_environment_joins_leaves_as_the_rows_do(minari_root, names):
    stored = write("made/goals-v0", [episode(5, "truncated", GOALS)], GOALS)
    options = {"env": GoalEnv, "concatenate": names, "memmap": minari_root / "table"}
    dataset = load_dataset("made/goals-v0", **options)
    rows = torch.tensor(np.concatenate([stored[0].observations[name] for name in names], 1)).float()
    assert torch.equal(dataset.transitions["observation"], rows[:-1])
    assert torch.equal(dataset.transitions["next", "observation"], rows[1:])
    assert dataset.observation_spec["observation"].shape == rows.shape[1:]
    assert dataset.statistics["observation"].mean.shape == rows.shape[1:]
    again = load_dataset("made/goals-v0", env=dataset.make_env, concatenate=names)
    for made in (dataset.make_env(), again.make_env()):
        assert made.observation_space == dataset.observation_space
        joined, _ = made.reset(seed=3)
        plain, _ = GoalEnv().reset(seed=3)
        np.testing.assert_array_equal(joined, np.concatenate([plain[name] for name in names]))
        assert made.observation_space.contains(joined)
    if names[0] == "goal" and len(names) == 2:  # where a policy finds the goal and the start
        first = TensorDictModule(
            lambda x: (x[:, :2] - x[:, 2:4]).clamp(-1, 1), ["observation"], ["action"]
        )
        for data in (dataset, again):
            played = evaluate(first, data.make_env, episodes=3, num_envs=2, seed=0)
            assert played.returns.tolist() == [2.0] * 3


@pytest.mark.parametrize("place", ["observation", "leaves", "info"])
def test_masks_and_log_probabilities(minari_root, place):
    actions, mask = Discrete(3), np.ones((6, 3), np.int8)
    mask[1, 0] = 0
    space = Dict({"state": Discrete(9), "action_mask": MultiBinary(3)})
    infos = {"action_log_prob": np.arange(6) * -1.0}
    if place == "info":
        space, infos["action_mask"] = Discrete(9), mask
    elif place == "leaves":
        space = Dict({**space.spaces, "other": Discrete(2)})
    made = episode(5, "truncated", space, actions, infos=infos)
    made.actions[:] = 2
    if place != "info":
        made.observations["action_mask"][:] = mask
    write("made/mask-v0", [made], space, actions)
    rows = load_dataset("made/mask-v0").transitions
    assert torch.equal(rows["action_mask"], torch.as_tensor(mask[:-1]).bool())
    assert torch.equal(rows["next", "action_mask"], torch.as_tensor(mask[1:]).bool())
    observed = ("observation", "state") if place == "leaves" else "observation"
    assert rows[observed].shape == (5,)
    assert rows["action_log_prob"].tolist() == [-1, -2, -3, -4, -5]


def test_several_are_joined_and_differences_named(minari_root):
    write("made/a-v0", [episode(4), episode(2)])
    write("made/b-v0", [episode(3)])
    write("made/c-v0", [episode(3, "truncated", GOALS)], GOALS)
    dataset = load_dataset(["made/a-v0", "made/b-v0"])
    assert dataset.transitions["collector", "traj_ids"].tolist() == [0] * 4 + [1] * 2 + [2] * 3
    refused("made/c-v0: observation_space is Dict", ["made/a-v0", "made/c-v0"])
    none = minari.load_dataset("made/a-v0").filter_episodes(lambda e: False)
    refused("made/a-v0: the dataset has no episodes", none)


def test_limit_keeps_complete_episodes(minari_root):
    write("made/a-v0", [episode(n) for n in (4, 5, 6)])
    for limit in (9, 14):
        assert load_dataset("made/a-v0", limit=limit).episode_lengths.tolist() == [4, 5]
    cut = load_dataset("made/a-v0", limit=3)
    assert cut.episode_lengths.tolist() == [3]
    assert marked(cut) == ([], [2])
    assert load_dataset(["made/a-v0", "made/a-v0"], limit=20).episode_lengths.sum() == 19


def test_another_selection_of_episodes_is_another_table(minari_root):
    whole = write("made/a-v0", [episode(n) for n in (2, 3, 4)])
    one, other = (whole.filter_episodes(lambda e, a=a: e.id != a) for a in (2, 0))
    for source, lengths in (
        ("made/a-v0", [2, 3, 4]),
        (one, [2, 3]),
        (other, [3, 4]),
        (whole, [2, 3, 4]),
        ([one], [2, 3]),
    ):
        dataset = load_dataset(source, memmap=minari_root / "table")
        assert dataset.episode_lengths.tolist() == lengths


def test_terminations_at_one_fixed_length_are_reported(minari_root):
    write("equal-v0", [episode(6, "terminated") for _ in range(4)])
    (note,) = [note for note in load_dataset("equal-v0").notes if "time limit" in note]
    assert re.search("all 4 terminations.* come at step 6 of .*pass columns=", note)
    write("cut-v0", [episode(6) for _ in range(4)])
    load_dataset("cut-v0")


def test_a_mistyped_id_lists_neighbours(minari_root):
    write("pendulum/mixed-v0", [episode(2)])
    for wrong in ("pendulum/mixd-v0", "pendulum/mixed", "absent/log-v0"):
        refused("pendulum/mixed-v0", wrong, download=False)


@pytest.mark.parametrize("wrong", ["pendulum/mixed-v0", "pendulum/mixd-v0", "pendulum/mixed-v1"])
def test_only_names_that_are_not_built_in_are_asked_for_on_the_network(
    wrong, minari_root, monkeypatch
):
    offline = Mock(side_effect=ConnectionError("no route\nto host"))
    monkeypatch.setattr("minari.storage.hosting.download_dataset", offline)
    refused("not among the local |no route to host", "pendulum/absent-v0")
    monkeypatch.setattr("minari.storage.hosting.download_dataset", None)  # is not called
    make = "python -m iql_torchrl.data make pendulum/mixed-v0"
    refused(f"ensure_dataset('pendulum/mixed-v0')|{make}", wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward_offset": 1}, "reward_offset is for tables"),
        ({"columns": {"reward": "r"}}, "columns names ['reward'], but Minari's own keys are fixed"),
        (
            {"columns": {"action_mask": "legal"}},
            "maps action_mask to 'legal', but the episodes have",
        ),
        ({"columns": {"action_mask": "infos/legal"}}, "a mask needs Discrete actions"),
    ],
)
def test_what_is_for_tables_and_masks_are_refused(minari_root, options, words):
    infos = {"legal": np.ones((4, 2), np.int8)} if "infos" in str(options) else {}
    write("made/a-v0", [episode(3, infos=infos)])
    refused(words, "made/a-v0", **options)
    (minari_root / "made/a-v0/data/metadata.json").write_text("{")
    refused("made/a-v0: the local copy cannot be read", "made/a-v0")


def test_truncated_files_and_lengths_that_disagree_are_named(minari_root):
    write("made/a-v0", [episode(400)])
    file = minari_root / "made/a-v0/data/main_data.hdf5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused("main_data.hdf5", "made/a-v0")
    made = episode(5)
    short = dataclasses.replace(made, observations=made.observations[:-1])
    write("made/b-v0", [episode(3), short])
    refused("episode 1 has 5 rows of observations, expected 6", "made/b-v0")


def test_the_environment_and_scores_are_recovered(minari_root):
    env = gym.make("Pendulum-v1")
    made = episode(5, "truncated", env.observation_space, env.action_space)
    scores = {"ref_min_score": -1000.0, "ref_max_score": -100.0}
    write("made/pendulum-v0", [made], None, None, env="Pendulum-v1", **scores)
    dataset = load_dataset("made/pendulum-v0")
    assert dataset.make_env().spec.id == "Pendulum-v1"
    assert dataset.reference_scores == (-1000.0, -100.0)
    assert dataset.normalised_score([-1000.0, -100.0]).tolist() == [0.0, 100.0]
    assert float(dataset.action_spec.space.high) == 2.0
    write("made/other-v0", [made], env.observation_space, env.action_space)
    joined = load_dataset(["made/pendulum-v0", "made/other-v0"])
    assert any("name different environments; none is used" in note for note in joined.notes)
    write("made/a-v0", [episode(2)])
    dataset = load_dataset("made/a-v0")
    with pytest.raises(DatasetError, match="pass env="):
        dataset.make_env()
    with pytest.raises(DatasetError, match="reference_scores"):
        dataset.normalised_score(0.0)


def test_a_table_of_joined_datasets_is_reused(minari_root):
    """Columns again, they are other objects with the same files and the same selection."""
    for name in ("one", "two"):
        write(f"made/{name}-v0", [episode(3), episode(5)])

    def load(*indices):
        parts = [minari.load_dataset(f"made/{name}-v0") for name in ("one", "two")]
        parts[1] = parts[1].filter_episodes(lambda each: each.id in indices)
        return load_dataset([parts], memmap=minari_root / "table")

    assert load(0).episode_lengths.tolist() == [3, 5, 3]
    assert load(1).episode_lengths.tolist() == [3, 5, 5]
    built = (minari_root / "table" / "built.json").stat()
    assert load(1).episode_lengths.tolist() == [3, 5, 5]
    assert os.path.samestat(built, (minari_root / "table" / "built.json").stat())
