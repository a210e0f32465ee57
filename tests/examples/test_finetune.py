"""Offline, then online: the rows that the collector adds to the log, and that learning continues."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from example_scripts import load, run, table
from small_agents import following
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


@pytest.fixture
def cartpole():
    generator = np.random.default_rng(0)
    observation = generator.normal(size=(20, 4)).astype(np.float32)
    columns = {
        "observation": observation,
        "next_observation": following(observation, np.arange(20) % 10 == 9),
        "action": generator.integers(2, size=20),
        "reward": generator.normal(size=20),
        "terminated": np.arange(20) % 10 == 9,
        "truncated": np.zeros(20, bool),
    }
    return load_dataset(columns, env="CartPole-v1")


def collect(dataset, steps, *, config=CONFIG, fraction=None, agent=None, **options):
    """Agent, buffer and what ``learn_online`` yielded."""
    torch.manual_seed(0)
    agent = agent or make_agent(config, dataset)
    buffer = example.make_buffer(dataset, config, steps, fraction)
    counts = list(example.learn_online(agent, dataset, buffer, steps=steps, **options))
    return agent, buffer, counts


def updates_made(agent) -> set[int]:
    """What Adam itself counted, over every trained tensor."""
    return {int(state["step"]) for state in agent.optimizer.state.values()}


def weights(agent) -> dict[str, torch.Tensor]:
    """Networks, target critics and Adam's moments, copied."""
    result = {name: tensor.clone() for name, tensor in agent.loss.state_dict().items()}
    for number, state in enumerate(agent.optimizer.state.values()):
        result |= {f"adam.{number}.{name}": tensor.clone() for name, tensor in state.items()}
    return result


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_online_steps_are_rows_of_the_log(pendulum):
    _, buffer, _ = collect(pendulum, 30, updates_per_step=0)
    log, whole = pendulum.transitions, buffer[:]
    assert len(whole) == len(log) + 30
    assert set(whole.keys(True, True)) - {"index"} == set(log.keys(True, True))
    for key in log.keys(True, True):
        assert whole[key].dtype == log[key].dtype, key
        assert whole[key].shape[1:] == log[key].shape[1:], key
        assert torch.equal(whole[key][: len(log)], log[key]), f"{key}: the log must stay"
    online = whole[len(log) :]
    assert online["observation"].dtype == torch.float32
    assert (online["action"].abs() <= 2).all()
    assert (online[EPISODE] == len(pendulum.episode_lengths)).all(), "episodes get numbers anew"

    cosine, sine, velocity = online["observation"].double().unbind(-1)
    torque = online["action"].double().squeeze(-1)
    raw = -(torch.atan2(sine, cosine) ** 2 + 0.1 * velocity**2 + 0.001 * torque**2)
    mapped = online["next", "reward"].squeeze(-1).double()
    torch.testing.assert_close(mapped, SCALE * raw + SHIFT, rtol=1e-5, atol=1e-5)


def test_time_limits_are_truncations_and_learned_through(pendulum):
    agent, buffer, _ = collect(pendulum, 210, updates_per_step=0)
    online = buffer[:][len(pendulum) :]
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
    target = agent.loss.td_target(agent.loss.read(last))
    expected = last["next", "reward"] + CONFIG.discount * after
    torch.testing.assert_close(target.flatten(), expected.flatten())


@pytest.mark.parametrize(
    ("steps", "ratio", "expected"),
    [
        (6, 1, [(n, n) for n in range(1, 7)]),
        (5, 0.5, [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]),
        (2, 3, [(1, 3), (2, 6)]),
        (10, 0.1, [*((n, 0) for n in range(1, 10)), (10, 1)]),
    ],
)
def test_updates_per_step(pendulum, steps, ratio, expected):
    agent, buffer, counts = collect(pendulum, steps, updates_per_step=ratio)
    assert counts == expected
    assert updates_made(agent) == {expected[-1][1]}
    assert len(buffer) == len(pendulum) + steps


def test_both_phases_equal_a_loop_by_hand(pendulum):
    """A new agent that gets the same steps one by one, without phases, is equal bit for bit."""
    agent = make_agent(CONFIG, pendulum)
    buffer = example.make_buffer(pendulum, CONFIG, 6, None)
    for _ in range(5):
        agent.step(buffer.sample())
    list(example.learn_online(agent, pendulum, buffer, steps=6))
    online = buffer[:][len(pendulum) :].exclude("index")

    other = make_agent(CONFIG, pendulum)
    capacity = len(pendulum) + 6
    again = pendulum.replay_buffer(CONFIG.batch_size, seed=CONFIG.seed, capacity=capacity)
    for _ in range(5):
        other.step(again.sample())
    for number in range(6):
        again.extend(online[number : number + 1])
        other.step(again.sample())
    assert_same(weights(agent), weights(other))


def test_actions_are_sampled_and_bounded(pendulum):
    agent = make_agent(CONFIG, pendulum)
    (log_std,) = (p for name, p in agent.policy.named_parameters() if name.endswith("log_std"))
    with torch.no_grad():
        log_std.fill_(-1.0)
    _, buffer, _ = collect(pendulum, 100, agent=agent, updates_per_step=0)
    online = buffer[:][len(pendulum) :]
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        mean = agent.policy(online.select("observation").clone())["action"]
    # e^-1 of half the range, 2, is 0.74; clipping at the bounds takes a little
    assert 0.5 < (online["action"] - mean).std() < 0.95
    with torch.no_grad():
        log_std.fill_(2.0)
    _, buffer, _ = collect(pendulum, 50, agent=agent, updates_per_step=0)
    action = buffer[:][len(pendulum) :]["action"]
    assert action.min() == -2
    assert action.max() == 2


def test_doubles_become_floats_as_in_the_log(pendulum):
    def make_env():
        env = pendulum.make_env()
        space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        return gymnasium.wrappers.TransformObservation(env, lambda o: o.astype(np.float64), space)

    _, buffer, _ = collect(replace(pendulum, env=make_env), 3)
    assert len(buffer) == len(pendulum) + 3
    assert buffer[:]["next", "observation"].dtype == torch.float32


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
    buffer = example.make_buffer(pendulum, CONFIG, 40, None)
    for step, _ in example.learn_online(agent, pendulum, buffer, steps=40, updates_per_step=0):
        if step == 20:
            with torch.no_grad():
                bias.fill_(-20.0)
    action = buffer[:][len(pendulum) :]["action"].flatten()
    assert (action[20:] < -1.8).all()
    assert not (action[:20] < -1.8).any()


def test_dropout_rests_while_acting(pendulum):
    agent = make_agent(replace(CONFIG, dropout=0.5), pendulum)
    (dropout,) = (m for m in agent.policy.modules() if isinstance(m, torch.nn.Dropout))
    modes = []
    dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    collect(pendulum, 2, agent=agent)
    assert modes[-4:] == [False, True, False, True], "act, update, act, update"


@pytest.mark.parametrize(("fraction", "from_log"), [(0.5, 8), (0.25, 4)])
def test_a_fixed_share_of_the_log(pendulum, fraction, from_log):
    fresh = example.make_buffer(pendulum, CONFIG, 10, fraction)
    assert (fresh.sample()[EPISODE] < 4).all()
    agent, buffer, counts = collect(pendulum, 10, fraction=fraction)
    assert counts[-1] == (10, 10)
    assert updates_made(agent) == {10}
    for _ in range(5):
        batch = buffer.sample()
        assert batch.batch_size == (16,)
        assert (batch[EPISODE] < 4).sum() == from_log


def test_the_pool_is_sampled_uniformly(pendulum):
    _, buffer, _ = collect(pendulum, 400, updates_per_step=0)
    drawn = torch.cat([buffer.sample()[EPISODE] >= 4 for _ in range(300)]).double()
    # 4,800 draws, a third of them online: five standard deviations are 0.034
    assert abs(drawn.mean() - 400 / 1200) < 0.034


def test_discrete_actions(cartpole):
    agent, buffer, _ = collect(cartpole, 40)
    assert updates_made(agent) == {40}
    online = buffer[:][20:]
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
    buffer = pendulum.replay_buffer(4, capacity=len(pendulum) + 1)
    with pytest.raises(ValueError, match=words):
        next(example.learn_online(agent, changed, buffer, steps=1))
    assert len(buffer) == len(pendulum)


def test_the_closing_table_by_hand():
    def row(phase, steps, value):
        return {"phase": phase, "online_steps": steps, "return_mean": value}

    history = [row("offline", 0, -9.0), row("offline", 0, -5.0)]
    online = [(100, -6.0), (200, -7.0), (300, -8.0), (1000, -1.0)]
    history += [row("online", *point) for point in online]
    result = example.around_switch(history)
    assert result == {"before": -5.0, "lowest early": -7.0, "end": -1.0}


TINY = ["--offline-updates", "4", "--online-steps", "8", "--eval-every", "4", "--episodes", "2"]
TINY += ["--batch-size", "8"]


def test_a_whole_run(pendulum, capsys, tmp_path):
    for name in ("a", "b"):
        # half of each batch from the eight online steps: they matter for the numbers
        arguments = [*TINY, "--seeds", "0", "1", "--temperature", "2", "--log-fraction", "0.5"]
        assert run(example, *arguments, "--output", tmp_path / name) == 0
    out = capsys.readouterr().out
    for words in ("before", "lowest early", "end", "seed 0", "seed 1", "the log"):
        assert words in out
    folder = tmp_path / "a"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "finetune.png", "metrics.csv"]
    assert (folder / "finetune.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert (config["temperature"], config["schedule"], config["updates"]) == (2.0, "constant", 12)
    rows = table(folder / "metrics.csv")
    points = [(r["seed"], r["phase"], r["updates"], r["online_steps"]) for r in rows]
    assert points == [
        (seed, *point)
        for seed in "01"
        for point in [("offline", "4", "0"), ("online", "8", "4"), ("online", "12", "8")]
    ]
    assert all(np.isfinite(float(r["return_mean"])) for r in rows)
    assert rows[2]["return_mean"] != rows[5]["return_mean"]
    same = (tmp_path / "b" / "metrics.csv").read_text()
    assert (folder / "metrics.csv").read_text() == same, "the same seeds give the same numbers"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--online-steps", "0"], "at least 1"),
        (["--expectile", "0.3"], "expectile is 0.3"),
        (["--eval-every", "0"], "at least 1"),
        (["--offline-updates", "0", "--updates-per-step", "0"], "nothing is learned"),
        (["--dataset", "no-such-file.hdf5"], "error: no-such-file.hdf5: no such file"),
        (["--log-fraction", "1.5"], "1.5"),
    ],
)
def test_mistakes_get_one_sentence(pendulum, capsys, tmp_path, arguments, words):
    assert run(example, *TINY, *arguments, "--output", tmp_path / "run") == 2
    assert words in capsys.readouterr().err
