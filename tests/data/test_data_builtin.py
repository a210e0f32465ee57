"""Built-in datasets: real Minari data, the same each time, complete or not written at all."""

import io
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
import torch
from extras import needs
from small_logs import assert_is_minaris
from tensordict.nn import TensorDictModule

from iql_torchrl.data import builtin, load_dataset
from iql_torchrl.data.__main__ import main
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset, make_dataset
from iql_torchrl.data.builtin.icu_sepsis import SepsisTables
from iql_torchrl.data.builtin.recipes import maze_controller, play, swing_up_torque
from iql_torchrl.evaluation.rollout import evaluate

PENDULUM, ICU = "pendulum/mixed-v0", "icu-sepsis/clinician-v0"


def made(name, episodes):
    """The stored dataset, every step of which ``load_dataset`` reads, and what is read."""
    assert make_dataset(name, episodes=episodes, progress=False) == name
    stored, dataset = minari.load_dataset(name), load_dataset(name)
    assert_is_minaris(dataset, stored)
    return stored, dataset


def mean_return(env, controller, episodes=100):
    """As reference scores are measured: ``controller(generator)`` acts in each episode."""
    returns = []
    for seed in range(1_000_000, 1_000_000 + episodes):
        act = controller(np.random.default_rng(seed))
        returns.append(sum(play(env, act, *env.reset(seed=seed))["rewards"]))
    return np.mean(returns)


def test_pendulum_is_a_real_minari_dataset_whose_seeds_and_actions_replay_it(minari_root):
    stored, dataset = made(PENDULUM, 40)
    assert os.environ["MINARI_DATASETS_PATH"] == str(minari_root)
    assert list(minari.list_local_datasets()) == [PENDULUM]
    assert sorted(path.name for path in minari_root.iterdir()) == ["pendulum"]
    metadata = stored.storage.metadata
    assert (stored.total_episodes, stored.total_steps) == (40, 8000)
    assert metadata["description"] == BUILTIN[PENDULUM].description
    assert metadata["author"] == {"iql_torchrl"}
    assert stored.env_spec.id == "Pendulum-v1"
    env = stored.recover_environment(eval_env=True)
    for number, episode in zip(range(8), stored.iterate_episodes(), strict=False):
        assert episode.observations.shape == (201, 3)
        assert episode.observations.dtype == episode.actions.dtype == np.float32
        assert episode.actions.shape == (200, 1)
        assert np.abs(episode.actions).max() <= 2.0
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * 199 + [True]
        (saved,) = stored.storage.get_episode_metadata([number])
        actions = iter(episode.actions)
        again = play(env, lambda *_, a=actions: next(a), *env.reset(seed=saved["seed"]))
        np.testing.assert_array_equal(again["observations"], episode.observations)
        assert again["rewards"] == episode.rewards.tolist()
    # its reference scores are those of the policies that they name
    low, high = dataset.reference_scores
    expert = mean_return(env, lambda _: lambda seen, _: swing_up_torque(seen))
    uniform = mean_return(env, lambda g: lambda *_: g.uniform(-2, 2, 1).astype(np.float32))
    assert (low, high) == pytest.approx((uniform, expert), abs=1e-3)
    log = dataset.episode_returns.mean()
    assert low + 150 < log < high - 400, "mediocre: well above random, well below the controller"


def test_the_seed_decides_the_log(tmp_path, monkeypatch):
    logs = []
    monkeypatch.chdir(tmp_path)
    for folder, seed in ((tmp_path / "a", 0), ("relative", 0), (tmp_path / "c", 1)):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
        make_dataset(PENDULUM, episodes=4, seed=seed, progress=False)
        logs.append(load_dataset(PENDULUM).transitions)
    assert (logs[0] == logs[1]).all()
    assert not (logs[0]["action"] == logs[2]["action"]).all()


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_what_is_interrupted_leaves_nothing_that_minari_lists(
    minari_root, monkeypatch, tmp_path, error
):
    killed = tmp_path.with_name(f"{tmp_path.name}-killed")

    def interrupted(*_):
        shutil.copytree(minari_root, killed)  # what a process leaves that is killed here
        raise error

    storage = "minari.dataset._storages.hdf5_storage.HDF5Storage.update_episodes"
    with monkeypatch.context() as patch:
        patch.setattr(storage, interrupted)
        with pytest.raises(type(error)):
            make_dataset(PENDULUM, episodes=1, progress=False)
    assert list(minari_root.iterdir()) == []
    assert os.environ["MINARI_DATASETS_PATH"] == str(minari_root)
    assert list(killed.iterdir()) != []
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(killed))
    assert minari.list_local_datasets() == {}
    make_dataset(PENDULUM, episodes=1, progress=False)
    assert list(minari.list_local_datasets()) == [PENDULUM]


def test_a_dataset_made_meanwhile_is_kept(minari_root, monkeypatch):
    real = minari.create_dataset_from_buffers

    def with_another(**options):
        monkeypatch.setattr(minari, "create_dataset_from_buffers", real)
        with monkeypatch.context() as patch:
            patch.setenv("MINARI_DATASETS_PATH", str(minari_root))
            make_dataset(PENDULUM, episodes=2, progress=False)
        return real(**options)

    monkeypatch.setattr(minari, "create_dataset_from_buffers", with_another)
    with pytest.raises(ValueError, match="made by another process meanwhile"):
        make_dataset(PENDULUM, episodes=1, progress=False)
    assert minari.load_dataset(PENDULUM).total_episodes == 2
    assert ensure_dataset(PENDULUM) == PENDULUM, "used as it is"
    assert minari.load_dataset(PENDULUM).total_episodes == 2
    with pytest.raises(ValueError, match="already exists"):
        make_dataset(PENDULUM, episodes=1)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_progress_bar_is_for_terminals(minari_root, monkeypatch, terminal):
    text = io.StringIO()
    text.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", text)
    make_dataset(PENDULUM, episodes=1)
    assert ("pendulum/mixed-v0" in text.getvalue()) == terminal


def test_misuse_is_named(minari_root):
    with pytest.raises(ValueError, match=r"no built-in dataset 'pendulum'; .*pendulum/mix"):
        make_dataset("pendulum")
    with pytest.raises(ValueError, match="no built-in dataset"):
        ensure_dataset("halfcheetah")
    for wrong in ({"episodes": 0}, {"seed": -1}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            make_dataset(PENDULUM, **wrong)


@pytest.mark.parametrize(
    ("name", "module"), [("pointmaze/umaze-v0", "gymnasium_robotics"), (ICU, "icu_sepsis")]
)
def test_a_missing_package_is_named_with_its_remedy(minari_root, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}.*pip install .iql_torchrl\[datasets\]"):
        make_dataset(name, episodes=1, progress=False)
    assert list(minari_root.iterdir()) == []


def test_sepsis_log_matches_the_model_and_loads_with_masks(minari_root):
    needs("icu_sepsis")
    env = gymnasium.make("Sepsis/ICU-Sepsis-v2", disable_env_checker=True)
    tables, dynamics = SepsisTables(env), env.unwrapped.dynamics
    stored, dataset = made(ICU, 250)
    for number, episode in enumerate(stored.iterate_episodes()):
        states, actions = episode.observations, episode.actions
        assert len(states) == len(actions) + 1
        masks = episode.infos["action_mask"]
        np.testing.assert_array_equal(masks, tables.admissible[states])
        assert masks[np.arange(len(actions)), actions].all(), "logged actions are admissible"
        chances = tables.clinician[states[:-1], actions]
        np.testing.assert_allclose(episode.infos["action_log_prob"], np.log(chances))
        assert (dynamics["tx_mat"][states[:-1], actions, states[1:]] > 0).all()
        rewards = dynamics["r_mat"][states[:-1], actions, states[1:]]
        np.testing.assert_array_equal(episode.rewards, rewards)
        assert episode.terminations.tolist() == [False] * (len(actions) - 1) + [True]
        assert states[-1] >= 713
        if number == 60:
            break
    table = dataset.transitions
    assert table["action_mask"].shape == (len(dataset), 25)
    assert table["action_mask"].gather(1, table["action"].unsqueeze(1)).all()
    assert torch.isfinite(table["action_log_prob"]).all()
    policy = TensorDictModule(lambda mask: mask.float(), ["action_mask"], ["action"])
    result = evaluate(policy, dataset.make_env, episodes=5, num_envs=2, seed=0)
    assert set(result.returns) <= {0.0, 1.0}
    # values agree with rollouts, and masks with the environment
    for seed in range(20):
        state, info = env.reset(seed=seed)
        assert np.flatnonzero(tables.admissible[state]).tolist() == info["admissible_actions"]
    np.testing.assert_allclose(tables.clinician.sum(axis=1), 1.0)
    assert not tables.clinician[~tables.admissible].any()
    clinician = tables.value(tables.clinician)
    assert tables.value() < clinician < tables.optimal_value() < 1
    assert dataset.episode_returns.mean() == pytest.approx(clinician, abs=4 * np.sqrt(0.25 / 1000))
    values = tables.value(), tables.optimal_value()
    assert BUILTIN[ICU].reference_scores == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("pointmaze/umaze-v0", 300),
        pytest.param("pointmaze/medium-v0", 600, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("default")  # what an optional package says on import is its own affair
def test_pointmaze_controller_reaches_goal_after_goal(minari_root, name, steps):
    needs("gymnasium_robotics")
    stored, dataset = made(name, 3)
    for episode in stored.iterate_episodes():
        assert set(episode.observations) == {"observation", "achieved_goal", "desired_goal"}
        assert episode.actions.shape == (steps, 2)
        assert np.abs(episode.actions).max() <= 1.0
        assert episode.truncations.tolist() == [False] * (steps - 1) + [True]
        assert not episode.terminations.any()
        assert episode.rewards.sum() >= 1
        seen, position, target = (
            episode.observations[key] for key in ("observation", "achieved_goal", "desired_goal")
        )
        np.testing.assert_array_equal(position, seen[:, :2])
        # The environment shows the reached target once more before it shows the new one.
        reached = np.linalg.norm(position - target, axis=1)[1:] <= 0.45
        np.testing.assert_array_equal(episode.rewards, reached)
    env = stored.recover_environment()
    low, high = dataset.reference_scores
    expert = mean_return(env, lambda g: maze_controller(env.unwrapped.maze, 0.0, g), 10)
    assert expert == pytest.approx(high, abs=2.0)
    assert high > low + 1
    joined = load_dataset(name, concatenate=["observation", "desired_goal"])
    assert joined.transitions["observation"].shape == (3 * steps, 6)


def test_describe_reads_the_columns_that_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = ["speed,push,profit,time_limit", "0.5,0.1,1.5,0", "0.25,-0.1,2.5,1"]
    Path("log.csv").write_text("\n".join(lines))
    columns = ["observation=speed", "action=push", "reward=profit", "truncated=time_limit"]
    assert main(["describe", "log.csv", "--columns", *columns, "terminated="]) == 0
    out = capsys.readouterr().out
    assert "1.5 to 1.5" in out.partition("next/reward")[2]  # the cut last row is dropped
    assert main(["describe", "log.csv", "--columns", *columns]) == 1
    assert "terminated" in capsys.readouterr().err
    columns[0] = "observation=push,speed"
    assert main(["describe", "log.csv", "--columns", *columns, "terminated="]) == 0
    assert "0.1 to 0.5, float32 (2,)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["describe", "log.csv", "--columns", "reward"])
    assert "'reward' has no '='; expected KEY=NAME" in capsys.readouterr().err


def test_command_line_lists_makes_and_describes(minari_root, monkeypatch, capsys):
    short = {PENDULUM: replace(BUILTIN[PENDULUM], episodes=4)}
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BUILTIN)
    monkeypatch.setattr(builtin, "BUILTIN", short)
    assert main(["make", PENDULUM, "--quiet"]) == 0
    assert main(["make", PENDULUM, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{PENDULUM}\n{PENDULUM}\n"
    assert main(["make", PENDULUM, "--seed", "3", "--quiet"]) == 1
    assert "already exists" in capsys.readouterr().err
    assert main(["describe", PENDULUM]) == 0
    out = capsys.readouterr().out
    for text in (
        "episodes                  4\n", "steps                     800\n",
        "0 by termination, 4 by truncation", "reference returns", "next/reward",
    ):  # fmt: skip
        assert text in out
    assert main(["describe", "/no/such/file.npz"]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILTIN))
def test_full_size(minari_root, name):
    ensure_dataset(name, progress=False)
    dataset = load_dataset(name)
    assert len(dataset.episode_returns) == BUILTIN[name].episodes
    low, high = dataset.reference_scores
    assert low < high
    if name == PENDULUM:
        assert -1000 < dataset.episode_returns.mean() < -700
