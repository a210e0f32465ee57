"""Offline, then online: the rows that the collector adds to the dataset; that learning continues."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from example_scripts import load, run, table
from small_agents import small_columns
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl import PRESETS, load_dataset, make_agent
from iql_torchrl.data.builtin import make_dataset

example = load("iql_finetune")
SCALE, SHIFT = 0.5, 2.0
CONFIG = replace(PRESETS["quick"], hidden=(8,), batch_size=16, schedule="constant", seed=3)
EPISODE = ("collector", "traj_ids")


@pytest.fixture(scope="module")
def minari_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        make_dataset("pendulum/mixed-v0", episodes=4, progress=False)
    return root


@pytest.fixture
def pendulum(minari_root, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_root))
    return load_dataset("pendulum/mixed-v0", reward=(SCALE, SHIFT), progress=False)


def collect(dataset, steps, agent=None):
    """``steps`` rows from the environment, ``(steps,)``."""
    torch.manual_seed(0)
    agent = agent or make_agent(CONFIG, dataset)
    return torch.cat(list(example.act_online(agent, dataset, steps)))


def test_online_steps_are_rows_of_the_dataset(pendulum):
    online, dataset = collect(pendulum, 30), pendulum.transitions
    assert len(online) == 30
    assert set(online.keys(True, True)) == set(dataset.keys(True, True))
    for key in dataset.keys(True, True):
        assert online[key].dtype == dataset[key].dtype, key
        assert online[key].shape[1:] == dataset[key].shape[1:], key
    assert (online["action"].abs() <= 2).all()
    assert (online[EPISODE] == len(pendulum.episode_lengths)).all(), "episodes get numbers anew"

    cosine, sine, velocity = online["observation"].double().unbind(-1)
    torque = online["action"].double().squeeze(-1)
    raw = -(torch.atan2(sine, cosine) ** 2 + 0.1 * velocity**2 + 0.001 * torque**2)
    mapped = online["next", "reward"].squeeze(-1).double()
    torch.testing.assert_close(mapped, SCALE * raw + SHIFT, rtol=1e-5, atol=1e-5)


def test_time_limits_are_truncations_and_learned_through(pendulum):
    agent = make_agent(CONFIG, pendulum)
    online = collect(pendulum, 210, agent)
    assert torch.flatten(online["next", "truncated"]).nonzero().flatten().tolist() == [199]
    assert torch.equal(online["next", "done"], online["next", "truncated"])
    assert not online["next", "terminated"].any()
    joined = (online["next", "observation"][:-1] == online["observation"][1:]).all(-1)
    assert (~joined).nonzero().flatten().tolist() == [199], "the last observation is the true one"
    first = len(pendulum.episode_lengths)
    assert online[EPISODE].tolist() == [first] * 200 + [first + 1] * 10

    last = online[199:200]
    with torch.no_grad(), agent.loss.value_network_params.to_module(agent.loss.value_network):
        after = agent.loss.value_network(last["next"].select("observation"))["state_value"]
    target = agent.loss.td_target(agent.loss.prepare_batch(last))
    expected = last["next", "reward"] + CONFIG.discount * after
    torch.testing.assert_close(target.flatten(), expected.flatten())


def test_both_phases_equal_a_loop_by_hand(pendulum, monkeypatch):
    """A new agent that gets the same steps one by one, without phases, is equal bit for bit."""
    agents = []
    monkeypatch.setattr(
        example, "make_agent", lambda *a: agents.append(make_agent(*a)) or agents[0]
    )
    options = example.Options(offline_updates=5, online_steps=6, eval_every=100, episodes=1)
    capacity = len(pendulum) + 6
    buffer, again = (
        pendulum.replay_buffer(CONFIG.batch_size, seed=CONFIG.seed, capacity=capacity)
        for _ in range(2)
    )
    points = list(example.run(pendulum, CONFIG, options, buffer))
    assert [point["update"] for point in points] == [5, 11]
    dataset, online = pendulum.transitions, buffer[:][len(pendulum) :].exclude("index")
    assert len(online) == 6
    assert all(
        torch.equal(buffer[:][key][: len(dataset)], dataset[key])
        for key in dataset.keys(True, True)
    )

    other = make_agent(CONFIG, pendulum)
    for number in range(11):
        if number >= 5:
            again.extend(online[number - 5 : number - 4])
        other.step(again.sample())
    (agent,) = agents
    for tensors in zip(agent.loss.parameters(), other.loss.parameters(), strict=True):
        assert torch.equal(*tensors)
    states = (list(each.optimizer.state.values()) for each in (agent, other))
    for first, second in zip(*states, strict=True):
        assert first["step"] == 11
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_actions_are_sampled_and_bounded(pendulum):
    agent = make_agent(CONFIG, pendulum)
    (log_std,) = (p for name, p in agent.policy.named_parameters() if name.endswith("log_std"))
    with torch.no_grad():
        log_std.fill_(-1.0)
    online = collect(pendulum, 100, agent)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        mean = agent.policy(online.select("observation").clone())["action"]
    # e^-1 of half the range, 2, is 0.74; clipping at the bounds takes a little
    assert 0.5 < (online["action"] - mean).std() < 0.95
    with torch.no_grad():
        log_std.fill_(2.0)
    action = collect(pendulum, 50, agent)["action"]
    assert action.min() == -2
    assert action.max() == 2


def test_doubles_become_floats_as_in_the_log(pendulum):
    def make_env():
        env = pendulum.make_env()
        space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        return gymnasium.wrappers.TransformObservation(env, lambda o: o.astype(np.float64), space)

    online = collect(replace(pendulum, env=make_env), 3)
    assert online["next", "observation"].dtype == torch.float32


def test_what_acts_is_what_is_trained(pendulum):
    """Pushing the mean to its lower bound pushes the next action there."""
    agent = make_agent(CONFIG, pendulum)
    parameters = dict(agent.policy.named_parameters())
    (log_std,) = (p for name, p in parameters.items() if name.endswith("log_std"))
    bias = list(parameters.values())[-1]
    assert bias.shape == (1,)
    with torch.no_grad():
        log_std.fill_(-4.0)
        bias.fill_(0.5)
    actions = []
    for row in example.act_online(agent, pendulum, 40):
        actions.append(row["action"].item())
        if len(actions) == 20:
            with torch.no_grad():
                bias.fill_(-20.0)
    assert max(actions[20:]) < -1.8
    assert not min(actions[:20]) < -1.8


def test_dropout_rests_while_acting(pendulum):
    agent = make_agent(replace(CONFIG, dropout=0.5), pendulum)
    (dropout,) = (m for m in agent.policy.modules() if isinstance(m, torch.nn.Dropout))
    modes = []
    dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    for _ in example.act_online(agent, pendulum, 2):
        modes.append(agent.policy.training)
    assert modes[-4:] == [False, True, False, True], "act, update, act, update"


def test_discrete_actions():
    generator = np.random.default_rng(0)
    observation = generator.normal(size=(20, 4)).astype(np.float32)
    flags = {"terminated": np.arange(20) % 10 == 9, "truncated": np.zeros(20, bool)}
    columns = small_columns(20, observation, generator.integers(2, size=20), **flags)
    online = collect(load_dataset(columns, env="CartPole-v1"), 40)
    assert online["action"].dtype == torch.int64
    assert online["action"].shape == (40,)
    assert torch.equal(online["next", "done"], online["next", "terminated"])
    assert online["next", "terminated"].any(), "forty random steps drop the pole"
    pushed_right = online["next", "observation"][:, 1] > online["observation"][:, 1]
    assert torch.equal(pushed_right, online["action"] == 1), "the cart obeys the action"
    assert 0 < pushed_right.sum() < 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.set("action_log_prob", torch.zeros(len(t))), "'action_log_prob' is missing"),
        (
            lambda t: t.set("action", t["action"].double()),
            "'action' is torch.float32 .* torch.float64",
        ),
        (lambda t: t.set("observation", t["observation"][:, :2]), r"shape \(3,\) .* shape \(2,\)"),
        (
            lambda t: t.set(("next", "terminated"), t["next", "terminated"].squeeze(-1)),
            r"'next', 'terminated'\) is torch.bool of shape \(1,\)",
        ),
    ],
)
def test_another_layout_is_refused_in_a_sentence(pendulum, change, words):
    changed = replace(pendulum, transitions=change(pendulum.transitions.clone()))
    agent = make_agent(CONFIG, pendulum)
    with pytest.raises(ValueError, match=words):
        next(example.act_online(agent, changed, 1))


TINY = ["--offline-updates", "4", "--online-steps", "8", "--eval-every", "4", "--episodes", "2"]
TINY += ["--batch-size", "8"]


def test_a_whole_run(pendulum, capsys, tmp_path):
    for name in ("a", "b"):
        arguments = [*TINY, "--temperature", "2", "--limit", "400", "--output", tmp_path / name]
        assert run(example, *arguments) == 0
    out = capsys.readouterr().out
    for words in ("(offline)", "(online)", "The dataset: -"):
        assert words in out
    folder = tmp_path / "a"
    assert (folder / "finetune.png").read_bytes().startswith(b"\x89PNG")
    rows = table(folder / "metrics.csv")
    assert [row["update"] for row in rows] == ["4", "8", "12"]
    assert all(np.isfinite(float(row["return_mean"])) for row in rows)
    same = (tmp_path / "b" / "metrics.csv").read_text()
    assert (folder / "metrics.csv").read_text() == same, "the same seed gives the same numbers"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--online-steps", "0"], "at least 1"),
        (["--expectile", "0.3"], "expectile is 0.3"),
        (["--eval-every", "0"], "at least 1"),
        (["--dataset", "no-such-file.hdf5"], "error: no-such-file.hdf5: no such file"),
        (
            ["--action-chunk", "3", "--dataset", "none"],
            "collection with action chunks or histories",
        ),
        (["--history", "4", "--dataset", "none"], "history is 4: online collection"),
    ],
)
def test_mistakes_get_one_sentence(pendulum, capsys, tmp_path, arguments, words):
    assert run(example, *TINY, *arguments, "--output", tmp_path / "run") == 2
    assert words in capsys.readouterr().err
