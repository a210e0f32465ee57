"""Agents for observations that are more than one vector: nested, mixed, images, the last several."""

from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import Walk, following, small_columns
from tensordict import TensorDict
from torch import nn

from iql_torchrl import (
    BackgroundEvaluation,
    IQLConfig,
    captured,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.agent import Agent
from iql_torchrl.data import DeviceSampler
from iql_torchrl.evaluation import Acting
from iql_torchrl.evaluation.acting import policy_dtype
from iql_torchrl.evaluation.policy_input import policy_input
from iql_torchrl.evaluation.policy_input import stacked as frames_of
from iql_torchrl.networks import ImageEncoder
from iql_torchrl.population import IQLPopulation
from iql_torchrl.selection import fitted_q_evaluation
from iql_torchrl.trainers import OfflineTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")
CAMERA = spaces.Box(0, 255, (12, 10, 3), np.uint8)
MIXED = {
    "arm": spaces.Dict(
        {"grip": spaces.Discrete(3), "speed": spaces.Box(-np.inf, np.inf, (2,), np.float32)}
    ),
    "flags": spaces.MultiBinary(4),
    "grid": spaces.Box(-1, 1, (2, 3), np.float32),
    "level": spaces.Box(0, 9, (), np.float32),
    "mode": spaces.MultiDiscrete([2, 3]),
}


class Mixed(gym.Env):
    """The reward is the first action, in a world of ten steps that is otherwise random."""

    def __init__(self, camera: bool = False, discrete: bool = False) -> None:
        leaves = {"camera": CAMERA, **MIXED} if camera else MIXED
        self.observation_space = spaces.Dict(leaves)
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (2,), np.float32)
        self.clock = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.clock = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.clock += 1
        reward = float(np.asarray(action, np.float64).reshape(-1)[0])
        return self.observation_space.sample(), reward, False, self.clock == 10, {}


def stacked(observations, space):
    if isinstance(space, spaces.Dict):
        return {k: stacked([o[k] for o in observations], s) for k, s in space.spaces.items()}
    values = torch.from_numpy(np.stack([np.asarray(o) for o in observations]))
    return values.long() if isinstance(space, spaces.MultiBinary) else values


def dataset_of(rows: int = 60, **kind):
    env = Mixed(**kind)
    env.observation_space.seed(0)
    env.action_space.seed(0)
    actions = np.stack([np.asarray(env.action_space.sample()) for _ in range(rows)])
    columns = {"action": actions, "reward": actions.reshape(rows, -1)[:, 0].astype(np.float32)}
    raw = [env.observation_space.sample() for _ in range(rows)]
    return load_dataset(columns | episodes(raw, env.observation_space), env=lambda: Mixed(**kind))


def episodes(raw, space, length: int = 10):
    ends = np.arange(len(raw)) % length == length - 1
    return {
        "observation": stacked(raw, space),
        "next_observation": stacked(
            [raw[row] for row in following(np.arange(len(raw)), ends)], space
        ),
        "terminated": np.zeros(len(raw), bool),
        "truncated": ends,
    }


def config(**options) -> IQLConfig:
    small = {"updates": 4, "hidden": (8,), "batch_size": 16, "reward": "raw", "image_features": 5}
    return IQLConfig(**small | options)


def test_mixed_leaves_are_encoded_as_documented():
    """By hand in NumPy, leaf by leaf in the space's order."""
    dataset = dataset_of()
    agent = make_agent(config(), dataset)
    features = agent.loss.encoder_network(dataset.transitions[7:9].copy())["features"]
    o = dataset.transitions["observation"][7]

    def standard(*path):
        logged = dataset.statistics[("observation", *path)]
        value = o[path].numpy().astype(np.float64).ravel()
        return (value - logged.mean.numpy().ravel()) / logged.std.numpy().ravel()

    arm = np.eye(3)[int(o["arm", "grip"])], standard("arm", "speed")
    modes = np.eye(2)[int(o["mode"][0])], np.eye(3)[int(o["mode"][1])]
    expected = [*arm, o["flags"].numpy(), standard("grid"), standard("level"), *modes]
    assert features.shape == (2, 3 + 2 + 4 + 6 + 1 + 5)
    np.testing.assert_allclose(features[0], np.concatenate(expected), rtol=1e-4, atol=1e-5)
    assert len(agent.optimizer.param_groups) == 3  # the encoder has no parameters


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def trained(agent, dataset, folder):
    """``agent`` after four updates, a checkpoint in ``folder`` included; names of what changed."""
    before = {name: p.detach().clone() for name, p in agent.loss.named_parameters()}
    OfflineTrainer(
        agent=agent, dataset=dataset, total_updates=4, folder=folder, progress_bar=False
    ).train()
    return [n for n, p in agent.loss.named_parameters() if not torch.equal(p, before[n])]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ({}, {}),
        ({}, {"policy": "flow", "num_samples": 5, "flow_steps": 4}),
        ({"discrete": True}, {"num_critics": 3}),
        ({"camera": True}, {"random_shift": 2}),
        slow({}, {"policy": "flow"}),
        slow({"camera": True}, {"encoder_gradient": "all", "image_encoder": "residual"}),
        slow({"camera": True}, {"policy": "flow", "num_samples": 4, "actor_ema": 0.9}),
        slow({"camera": True}, {"actor_objective": "ddpg_bc", "order": "simultaneous"}),
        slow({"camera": True}, {"policy": "mixture", "num_samples": 3}),
    ],
)
def test_an_agent_trains_acts_is_saved_and_exported(kind, options, tmp_path):
    dataset = dataset_of(**kind)
    agent = make_agent(config(**options), dataset)
    score = partial(evaluate, make_env=dataset.make_env, episodes=2, seed=0)
    before = score(agent.policy).returns
    moved = trained(agent, dataset, tmp_path / "run")
    for network in ("actor", "qvalue", "value", *(["encoder"] if "camera" in kind else [])):
        assert any(name.startswith(f"{network}_network") for name in moved), network
    after = score(agent.policy).returns
    assert "discrete" in kind or (before != after).any()  # the policy is the trained one
    np.testing.assert_allclose(score(agent.policy, num_envs=2).returns, after, rtol=1e-5)
    again = Agent.load(tmp_path / "run")
    assert again.config == agent.config
    drawn = [score(each.policy, deterministic=False).returns for each in (agent, again)]
    np.testing.assert_array_equal(*drawn)
    if "num_samples" in options:  # critics and noise are sent to another process too
        options = {"episodes": 2, "seed": 0}
        with BackgroundEvaluation(agent.policy, dataset.make_env, **options) as background:
            background.submit(1)
            (_, result), *_ = background.results(wait=True)
        np.testing.assert_allclose(result.returns, after, rtol=1e-5)
    observation, _ = Mixed(**kind).reset(seed=5)
    action = agent.act(observation)
    np.testing.assert_array_equal(action, again.act(observation))
    program = torch.export.load(agent.export(tmp_path / "policy.pt2")).module()
    inputs = TensorDict(stacked([observation], dataset.observation_space), batch_size=[1])
    found = program(*(inputs[key[1:]] for key in agent.policy.in_keys))
    np.testing.assert_allclose(found[0].numpy(), action, atol=1e-5)


def test_categories_out_of_range_are_named():
    dataset = dataset_of()
    agent = make_agent(config(), dataset)
    sampler = DeviceSampler(dataset.transitions, 8)
    sampler.column(("observation", "mode"))[3, 1] = 7
    with pytest.raises(ValueError, match=r"observation\.mode has category 7; .* from 0 to 2"):
        captured(agent.step, sampler)()


def test_an_encoder_of_the_user_is_trained_and_loaded(tmp_path):
    dataset = dataset_of()
    own = nn.Sequential(nn.Linear(2, 7), nn.Tanh())
    agent = make_agent(config(), dataset, encoders={"arm.speed": own})
    before = own[0].weight.detach().clone()
    trained(agent, dataset, tmp_path)
    assert not torch.equal(before, own[0].weight)
    with pytest.raises(Exception, match=r"encoder of yours for 'arm\.speed'"):
        Agent.load(tmp_path)
    fresh = nn.Sequential(nn.Linear(2, 7), nn.Tanh())
    again = Agent.load(tmp_path, encoders={"arm.speed": fresh})
    torch.testing.assert_close(fresh[0].weight, own[0].weight)
    observation, _ = Mixed().reset(seed=5)
    np.testing.assert_array_equal(agent.act(observation), again.act(observation))


def test_what_does_not_fit_is_refused():
    dataset = dataset_of(camera=True)
    features = r"into features \(2, F\): it gives \(2, 2, 1\)"
    for encoders, error, message in (
        ({"lidar": nn.Identity()}, ValueError, r"'lidar', which is not a part .*arm\.grip.*camera"),
        ({"camera": nn.Conv2d(3, 4, 3)}, ValueError, r"encoders\['camera'\], a Conv2d, does not t"),
        ({"arm.speed": nn.Unflatten(1, (2, 1))}, ValueError, features),
        ({"camera": 3}, TypeError, "is int; expected a torch module"),
    ):
        with pytest.raises(error, match=message):
            make_agent(config(), dataset, encoders=encoders)
    agent = make_agent(config(), dataset)
    smaller = dataset.transitions[:4].copy()
    smaller["observation", "camera"] = smaller["observation", "camera"][:, :8]
    with pytest.raises(ValueError, match=r"shape \(4, 8, 10, 3\); expected .* \(12, 10, 3\)"):
        agent.step(smaller)
    lacking = dataset.transitions[:4].exclude(("observation", "flags"))
    with pytest.raises(KeyError, match=r"'flags'\) is not in the batch"):
        agent.step(lacking)
    with pytest.raises(ValueError, match="random_shift is 2 and encoder_network has no images"):
        make_agent(config(random_shift=2), dataset_of())
    floats = spaces.Box(0, 1, CAMERA.shape, np.float32)
    space = spaces.Dict({**dataset.observation_space.spaces, "camera": floats})
    transitions = dataset.transitions.clone()
    for side in (("observation", "camera"), ("next", "observation", "camera")):
        transitions[side] = transitions[side].float()
    wrong = replace(dataset, observation_space=space, transitions=transitions)
    with pytest.raises(ValueError, match=r"observation\.camera are images of floats between 0 and"):
        make_agent(config(), wrong)


def test_runs_of_a_population_share_an_encoder_without_parameters():
    dataset = dataset_of()
    configs = [config(seed=seed, temperature=seed) for seed in (0, 1)]
    population = IQLPopulation(configs, dataset)
    for _ in population.train(4):
        pass
    agent = make_agent(configs[1], dataset)
    sampler = DeviceSampler(dataset.transitions, 16, seed=configs[0].seed)
    for _ in range(4):
        agent.step(sampler.sample())
    member = population.member(1)
    rows = dataset.transitions[:5].copy()
    torch.testing.assert_close(
        member.policy(rows.copy())["action"], agent.policy(rows)["action"], rtol=0, atol=1e-5
    )
    scores = fitted_q_evaluation(
        {"one": member}, *dataset.split(0.5, 0), discount=0.9, updates=20, hidden=(8,)
    )
    assert np.isfinite(scores.initial_values).all()


HIGH = np.array([[1, 2], [3, 4]], np.float32)


@pytest.mark.parametrize(
    ("space", "place"),
    [(spaces.Box(-np.ones((2, 2), np.float32), HIGH), (1, 0)), (spaces.Box(0, 2, ()), ())],
)
def test_actions_of_another_shape_are_flattened_in_data_and_environment(space, place):
    space.seed(0)
    actions = np.stack([space.sample() for _ in range(40)])
    columns = small_columns(
        action=actions, terminated=np.zeros(40, bool), truncated=np.ones(40, bool)
    )
    columns |= {
        "reward": actions[(slice(None), *place)],
        "next_observation": -columns["observation"],
    }
    zeros = np.zeros(3, np.float32)
    seen, pay = spaces.Box(-1, 1, (3,)), lambda step, action: float(action[place])
    make_env = partial(Walk, seen, space, lambda step: zeros, pay, steps=1)
    shaped = load_dataset(columns, env=make_env)
    flat = shaped.flatten_actions()
    np.testing.assert_array_equal(flat.transitions["action"].numpy(), actions.reshape(40, -1))
    assert flat.action_space == spaces.Box(space.low.ravel(), space.high.ravel())
    agent = make_agent(config(), flat)
    agent.step(flat.replay_buffer(8, seed=0).sample())
    action = agent.act(zeros).reshape(space.shape)[place]
    result = evaluate(agent.policy, flat.make_env, episodes=1, seed=0)
    np.testing.assert_allclose(result.returns[0], action, rtol=1e-6)
    with pytest.raises(ValueError, match=r"pass dataset\.flatten_actions\(\)"):
        make_agent(config(), shaped)


def test_discrete_actions_are_not_flattened():
    with pytest.raises(ValueError, match="flatten_actions is for a Box"):
        dataset_of(discrete=True).flatten_actions()


def stack_env(shape, kind):
    picture = spaces.Box(0, 255 if kind == np.uint8 else 1, shape, kind)

    class Pictures(Mixed):
        def __init__(self):
            super().__init__()
            self.observation_space = picture

    return lambda: gym.wrappers.FrameStackObservation(Pictures(), 4)


@pytest.mark.parametrize(
    ("shape", "kind", "options"),
    [
        ((10, 12, 3), np.uint8, {"random_shift": 1}),
        ((10, 12, 1), np.float32, {}),
        ((3, 10, 12), np.uint8, {"history": 2, "history_encoder": "stack"}),
        ((10, 12, 3), np.uint8, {"history": 2}),
    ],
)
def test_stacks_of_images_are_folded_into_channels(shape, kind, options, tmp_path):
    make_env = stack_env(shape, kind)
    space = make_env().observation_space
    assert space.shape == (4, *shape)
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 256, (40, *space.shape)) / (1 if kind == np.uint8 else 255)
    actions = draw.uniform(-1, 1, (40, 2)).astype(np.float32)
    columns = {"action": actions, "reward": actions[:, 0], **episodes(rows.astype(kind), space)}
    dataset = load_dataset(columns, env=make_env, reward="raw")
    assert not dataset.statistics
    agent = make_agent(config(**options), dataset)
    moved = trained(agent, dataset, tmp_path / "run")
    assert any(name.startswith("encoder_network") for name in moved)
    encoder = next(m for m in agent.loss.encoder_network.modules() if isinstance(m, ImageEncoder))
    channels = 12 if 3 in shape else 4
    joined = 2 if options.get("history_encoder") == "stack" else 1
    assert encoder.convolutions[0].in_channels == channels * joined
    result = evaluate(agent.policy, make_env, episodes=2, seed=0)
    assert len(result.returns) == 2
    given = rows[: options["history"]] if "history" in options else rows[0]
    action = agent.act(given.astype(kind))
    np.testing.assert_array_equal(Agent.load(tmp_path / "run").act(given.astype(kind)), action)
    if not options:
        program = torch.export.load(agent.export(tmp_path / "policy.pt2")).module()
        found = program(torch.from_numpy(given.astype(kind))[None])
        np.testing.assert_allclose(found[0].numpy(), action, atol=1e-5)


def test_images_under_bfloat16():
    dataset = dataset_of(camera=True)
    one, half = (make_agent(config(precision=p), dataset) for p in ("float32", "bfloat16"))
    batch = dataset.replay_buffer(16, seed=0).sample()
    exact, rounded = one.step(batch.copy()), half.step(batch.copy())
    for name in ("loss_value", "loss_qvalue", "loss_actor"):
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.05, atol=0.05)
    encoder = half.loss.encoder_network_params
    assert all(leaf.dtype == torch.float32 for leaf in encoder.parameters())


@pytest.mark.parametrize(
    ("dtype", "standardise"), [(torch.float32, True), (torch.float32, False), (torch.float64, True)]
)
@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.MultiDiscrete([3, 2], start=[1, 0]),
        spaces.MultiBinary(2),
        spaces.Box(-3, 3, (2,), np.int64),
        spaces.Box(-3, 3, (2,), np.float64),
        spaces.Dict(a=spaces.MultiBinary(2), b=spaces.Box(-3, 3, (2,), np.float64)),
    ],
    ids=["category", "categories", "bits", "whole", "float64", "mixed"],
)
def test_every_kind_of_numbers_trains_and_acts(space, dtype, standardise):
    """In both dtypes of the data: an update, and the same action for a row and its raw observation."""
    space.seed(0)
    raw = [space.sample() for _ in range(12)]
    actions = np.linspace(-0.9, 0.9, 24).reshape(12, 2).astype(np.float32)
    columns = {"action": actions, "reward": np.arange(12, dtype=np.float32)}
    given = {"observation_space": space, "action_space": spaces.Box(-1, 1, (2,), np.float32)}
    dataset = load_dataset(columns | episodes(raw, space, 4), dtype=dtype, reward="raw", **given)
    agent = make_agent(config(batch_size=12, standardise=standardise), dataset)
    agent.step(dataset.transitions.copy())
    assert {p.dtype for p in agent.loss.parameters()} == {dtype}
    with torch.no_grad():
        expected = agent.policy.eval()(dataset.transitions.copy())["action"]
    reading = {"flat": False, "dtype": policy_dtype(agent.policy)}
    for row in range(4):
        np.testing.assert_allclose(agent.act(raw[row]), expected[row], rtol=1e-6, atol=1e-6)
        if dtype is torch.float64:  # not rounded to float32 on the way
            seen = policy_input(frames_of([raw[row]], space), [1], space, **reading).select(
                "observation"
            )
            kept = dataset.transitions[row : row + 1].select("observation")
            for key in seen.keys(True, True):
                assert seen[key].dtype == kept[key].dtype
                assert seen[key].tolist() == kept[key].tolist()


# -- agents that read the last several observations


@pytest.mark.parametrize(
    ("kind", "encoder"),
    [
        ({}, "lstm"),
        ({"discrete": True}, "stack"),
        slow({}, "transformer"),
        slow({"camera": True}, "stack"),
        slow({"camera": True}, "transformer"),
    ],
)
def test_a_history_from_a_config_to_an_exported_program(kind, encoder, tmp_path):
    dataset = dataset_of(**kind)
    agent = make_agent(config(history=3, history_encoder=encoder, history_features=8), dataset)
    moved = trained(agent, dataset, tmp_path / "run")
    learns = encoder != "stack" or "camera" in kind
    assert any(name.startswith("encoder_network") for name in moved) is learns
    result = evaluate(agent.policy, dataset.make_env, episodes=3, seed=0, num_envs=2)
    assert len(result.returns) == 3
    env, again = Mixed(**kind), Agent.load(tmp_path / "run")
    acting = Acting(agent.policy, env.observation_space, env.action_space)
    seen = [env.reset(seed=4)[0]]
    for _ in range(5):
        action = acting.act(seen[-1])
        seen.append(env.step(action)[0])
    last = seen[2:5]  # those behind the last action
    window = raw_stack(last)
    np.testing.assert_array_equal(agent.act(window), action)
    np.testing.assert_array_equal(again.act(window), action)
    with pytest.raises(ValueError, match="is a single one and the policy reads the last 3;"):
        agent.act(seen[-1])
    program = torch.export.load(agent.export(tmp_path / "policy.pt2")).module()
    leaves = TensorDict(stacked(last, env.observation_space), batch_size=[3]).unsqueeze(0)
    keys = [key[1:] for key in agent.policy.in_keys if key != "history_mask"]
    given = [leaves[key] for key in keys]
    mask = torch.ones(1, 3, dtype=torch.bool)
    np.testing.assert_allclose(program(*given, mask)[0].numpy(), action, atol=1e-5)


def raw_stack(observations):
    if isinstance(observations[0], dict):
        return {k: raw_stack([o[k] for o in observations]) for k in observations[0]}
    return np.stack(observations)


def test_what_reads_single_observations_refuses_a_history():
    dataset = dataset_of()
    settings = config(history=3)
    with pytest.raises(ValueError, match=r"history is 3; the runs of a population read single"):
        IQLPopulation([settings], dataset)
    agent = make_agent(settings, dataset)
    with pytest.raises(ValueError, match=r"candidate 'a' reads the last 3 observations"):
        fitted_q_evaluation({"a": agent}, *dataset.split(0.5, 0), discount=0.9)
    with pytest.raises(KeyError, match=r"'history_mask' is not in the batch.*dataset\.windows\("):
        agent.step(dataset.transitions[:4])
    with pytest.raises(TypeError, match=r"found Agent; pass its \.policy"):
        evaluate(agent, dataset.make_env, episodes=1, seed=0)
    with pytest.raises(ValueError, match="windows of 30 steps are longer than every episode"):
        OfflineTrainer(agent=make_agent(config(history=30), dataset), dataset=dataset)
