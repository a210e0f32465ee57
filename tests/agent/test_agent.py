"""make_agent: parts that fit the data, on one device, from one seed."""

import copy
import io
import json
import pickle
from contextlib import nullcontext
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import (
    HIGH,
    LOW,
    box_agent,
    config,
    discrete_agent,
    observations,
    same_weights,
    saved,
    small_columns,
    trained,
)
from torch.optim.lr_scheduler import LRScheduler

from iql_torchrl import (
    PRESETS,
    DiscreteIQLLoss,
    OfflineTrainer,
    captured,
    compiled,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.agent import export
from iql_torchrl.agent.build import Agent
from iql_torchrl.agent.task import Task, space_from_state, space_state
from iql_torchrl.data import DeviceSampler, ObservationStatistics
from iql_torchrl.evaluation.acting import private_random_numbers
from iql_torchrl.files import CheckpointError, write_components
from iql_torchrl.losses import DDPGBC, FlowMatching
from iql_torchrl.networks import MLP, ResidualMLP
from iql_torchrl.policies import BestOf, FlowPolicy


def dataset(**columns):
    return load_dataset(small_columns(60, **columns), reward="raw")


def test_standardisation_is_the_first_layer_of_every_network():
    data = dataset()
    agent = make_agent(config(), data)
    mean = data.statistics["observation"].mean
    buffers = dict(agent.loss.named_buffers())
    stored = [b for n, b in buffers.items() if n.endswith("preprocess.mean")]
    assert stored
    assert all(torch.equal(b, mean.expand_as(b)) for b in stored)
    leaves = agent.loss.actor_network_params.values(True, True)  # the policy's are the same ones
    assert {b.data_ptr() for b in agent.policy.buffers()} <= {leaf.data_ptr() for leaf in leaves}
    plain = make_agent(config(standardise=False), data)
    assert not [n for n, _ in plain.loss.named_buffers() if "preprocess" in n]


@pytest.mark.parametrize("on_disk", [False, True])
def test_columns_of_any_unit_are_of_order_one_in_the_networks(tmp_path, on_disk):
    draw = np.random.default_rng(0)
    light, second = 550e-9 + 150e-9 * draw.normal(size=60), 1.7e9 + np.arange(60) % 10
    columns = np.stack([light, np.full(60, 3e-12), second], 1)
    place = tmp_path / "table" if on_disk else None
    data = load_dataset(small_columns(60, columns), reward="raw", dtype=torch.float64, memmap=place)
    first = make_agent(config(), data).actor.module[0].module.preprocess
    deviation = np.where([True, False, True], columns.std(0), 1)
    expected = (columns - columns.mean(0)) / deviation
    given = first(data.transitions["observation"]).numpy()
    np.testing.assert_allclose(given, expected, atol=1e-6)
    assert data.statistics["observation"].constant == (1,)


@pytest.mark.parametrize("policy", ["gaussian", "flow"])
def test_initial_weights_of_torch_in_every_network(policy):
    settings = config(policy=policy, hidden=(64, 64), initialisation="torch")
    loss = make_agent(settings, dataset()).loss
    named = [(name, p) for name, p in loss.named_parameters() if "target" not in name]
    weights = [p for name, p in named if name.endswith("weight")]
    matrices = [matrix for p in weights for matrix in (p if p.ndim == 3 else [p])]
    assert len(matrices) == 3 * (1 + 2 + 1)  # layers of the policy, both critics and V
    for matrix in matrices:
        bound = matrix.shape[1] ** -0.5  # of nn.Linear, by its number of inputs
        assert 0.9 * bound < matrix.abs().max() <= bound
    biases = [p for name, p in loss.named_parameters() if name.endswith("bias")]
    assert all((p != 0).any() for p in biases)
    first, second = loss.qvalue_network_params["module", "mlp", "2", "weight"]
    assert not torch.equal(first, second)


def test_the_seed_decides_and_the_callers_random_state_does_not_change():
    torch.manual_seed(5)
    state, data = torch.get_rng_state(), dataset()
    first, second, other = (make_agent(config(seed=seed), data) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(first, second)
    key = "actor_network_params.module.0.module.mlp.0.weight"
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    with pytest.raises(TypeError, match="train nothing"):  # a copy would
        copy.deepcopy(first)


@pytest.mark.gpu
def test_policy_and_loss_are_on_the_configured_device():
    data = dataset()
    agent = make_agent(config(device="cuda"), data)
    held = [*agent.policy.parameters(), *agent.policy.buffers(), *agent.loss.parameters()]
    assert {tensor.device.type for tensor in held} == {"cuda"}
    agent.step(data.replay_buffer(16, device="cuda", seed=0).sample())


def test_learning_rates_and_schedules():
    rates = {"actor_lr": 1e-3, "critic_lr": 2e-3, "value_lr": 3e-3}
    agent = make_agent(config(**rates), dataset())
    assert isinstance(agent.scheduler, LRScheduler)
    pickle.dumps(agent.scheduler.state_dict())
    assert rates_of(agent, 5)[::5].tolist() == [[1e-3, 2e-3, 3e-3]]
    np.testing.assert_allclose(rates_of(agent, 1), [[0.5e-3, 2e-3, 3e-3]])
    agent = make_agent(config(schedule="cosine", schedule_steps=2, value_lr=2e-3), dataset())
    # cos(0), cos(pi / 2) and, past the end, cos(pi): halves of (1 + cos) are 1, 1/2 and 0
    factor = np.array([1] * 5 + [0.5] * 5 + [0] * 6)
    expected = factor[:, None] * [3e-4, 3e-4, 2e-3]
    np.testing.assert_allclose(rates_of(agent, 16), expected, atol=1e-18)
    third = make_agent(replace(agent.config, updates=7, schedule_steps=3), dataset())
    rates = [third.scheduler.lr_lambdas[0](u) for u in range(8)]
    steps = np.array([0, 0, 0, 1, 1, 2, 2, 3])  # floor(3 u / 7)
    np.testing.assert_allclose(rates, (1 + np.cos(np.pi * steps / 3)) / 2)


def rates_of(agent, updates):
    """Learning rates before each of so many updates."""
    rates = []
    for _ in range(updates):
        rates.append([group["lr"] for group in agent.optimizer.param_groups])
        agent.step(dataset().replay_buffer(16, seed=0).sample())
    return np.array(rates)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "mixture", "num_critics": 1, "max_grad_norm": 2.0},
        {"hidden": (8, 4), "standardise": False, "optimizer": "adamw", "weight_decay": 1e-3},
        {"standardise": False, "weights": torch.float64},
    ],
)
def test_an_agent_comes_back_from_its_file(tmp_path, options):
    agent = trained(**options)
    path = saved(agent, tmp_path / "checkpoint-000000003.torchrl")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    outcome = Agent.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert outcome.config == agent.config
    settings = agent.description()["config"]
    assert json.loads(json.dumps(settings)) == settings
    assert outcome.task.action_space == agent.task.action_space
    assert same_weights(outcome, agent)
    fresh = box_agent(**options)
    assert not same_weights(fresh, agent)  # three updates did move the weights
    dtype = options.get("weights", torch.float32)
    assert {p.dtype for p in outcome.loss.parameters()} == {dtype}
    assert outcome.act(np.zeros(3)).dtype == agent.task.action_space.dtype
    np.testing.assert_array_equal(outcome.act(observations()), agent.act(observations()))
    fresh.load_state_dict(agent.state_dict())
    assert same_weights(fresh, agent)
    outcome.step(load_dataset(small_columns(), dtype=dtype).replay_buffer(16, seed=0).sample())
    assert not same_weights(outcome, agent)


def test_hyperparameters_of_the_last_update_come_back(tmp_path):
    """Pessimism ranks the samples of a policy with ``num_samples``, so that it changes its actions."""
    settings = {"policy": "flow", "num_samples": 8, "num_critics": 3, "pessimism": 0.0}
    data = load_dataset(small_columns())
    agent = make_agent(config(**settings), data)
    agent.loss.value_objective.pessimism, agent.loss.temperature = 50.0, 9.0
    OfflineTrainer(agent=agent, dataset=data, folder=tmp_path, progress_bar=False).train()
    outcome = Agent.load(tmp_path)
    assert float(outcome.loss.value_objective.pessimism) == 50.0
    assert float(outcome.loss.temperature) == 9.0
    found = [each.act(observations(), deterministic=False, seed=0) for each in (agent, outcome)]
    np.testing.assert_array_equal(*found)


def test_the_best_of_a_run_is_loaded_and_else_the_newest(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    agents = [make_agent(config(seed=seed), dataset()) for seed in (1, 2)]
    for agent, name in zip(agents, ("000000010", "000000100"), strict=True):
        saved(agent, tmp_path / "checkpoints" / f"checkpoint-{name}.torchrl")
    assert same_weights(Agent.load(tmp_path), agents[1])
    saved(agents[0], tmp_path / "best.torchrl")
    assert same_weights(Agent.load(str(tmp_path)), agents[0])


def test_the_error_names_what_cannot_be_loaded(tmp_path):
    agent, path = box_agent(), tmp_path / "a.torchrl"
    description = agent.description()
    for missing in ("there is no such folder", tmp_path), ("no such file", path):
        with pytest.raises(CheckpointError, match=missing[0]):
            Agent.load(missing[1])
    write_components(path, {"loss_module": agent.state_dict()})
    with pytest.raises(CheckpointError, match=r"parts made by hand.*through the trainer"):
        Agent.load(path)
    for part, name, value, message in (
        ("config", "colour", 1, f"{path}.*unknown: colour.*version"),
        ("task", "colour", 1, rf"{path}.*with \['colour'\].*version"),
        ("config", "expectile", 3.0, "expectile is 3"),
        ("config", "hidden", [4], "weights do not fit"),
    ):
        saved(agent, path, {**description, part: {**description[part], name: value}})
        with pytest.raises(CheckpointError, match=message):
            Agent.load(path)
    settings = description["config"]
    older = {k: v for k, v in settings.items() if k != "schedule_steps"}
    for readable in (older, settings | {"device": "cuda:99"}):  # which is not here
        saved(agent, path, {**description, "config": readable})
        assert Agent.load(path).config == agent.config
        assert same_weights(Agent.load(path, device="cpu"), agent)


@pytest.mark.parametrize("devices", [(), ("cuda:1",)])
def test_only_generators_of_the_devices_that_are_used_are_kept(monkeypatch, devices):
    calls, given = [], [torch.device(device) for device in devices]
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: calls.append(devices) or nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "device", lambda each: calls.append(each) or nullcontext())
    monkeypatch.setattr(torch.cuda, "manual_seed", calls.append)
    state = torch.get_rng_state()
    with private_random_numbers(7, torch.device("cpu"), *devices):
        assert torch.initial_seed() == 7
    torch.set_rng_state(state)
    assert calls == [given, *given, *([7] if devices else [])]


def test_returns_of_a_discrete_agent_by_hand():
    data = dataset(action=np.arange(60) % 4, observation=np.arange(60) % 5)
    agent = make_agent(config(), data)
    assert isinstance(agent.loss, DiscreteIQLLoss)
    agent.step(data.replay_buffer(16, seed=0).sample())

    class FiveStates(gymnasium.Env):
        observation_space = gymnasium.spaces.Discrete(5)
        action_space = gymnasium.spaces.Discrete(4)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.left = 2 + (seed or 0) % 3
            return 1, {}

        def step(self, action):
            self.left -= 1
            return 2, 1.0, self.left == 0, False, {}

    result = evaluate(agent.policy, FiveStates, episodes=3, num_envs=2, seed=0)
    assert result.returns.tolist() == [2.0, 3.0, 4.0]
    assert evaluate(agent.policy, FiveStates, episodes=1, seed=0).returns.tolist() == [2.0]


# -- Task: the description of the data for networks, and that a file restores it exactly


def stored(state):
    """What comes back from a file that may hold plain data only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SPACES = [
    spaces.Box(-np.inf, np.inf, (3,), np.float32),
    spaces.Box(-0.1, 1 / 3, (2, 2), np.float64),
    spaces.Box(np.array([-np.inf, 0.1]), np.array([1 / 3, np.inf]), dtype=np.float64),
    spaces.Box(-1, 1, (), np.float32),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.Box(0, 2**64 - 1, (1,), np.uint64),
    spaces.Discrete(5),
    spaces.Discrete(5, start=-3),
    spaces.MultiDiscrete([3, 4], dtype=np.int32, start=[1, -2]),
    spaces.MultiDiscrete([[3, 4], [5, 6]]),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
    spaces.Dict({"b": spaces.Box(-1, 1, (2,)), "a": spaces.Dict({"c": spaces.Discrete(3)})}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_come_back_exactly(space):
    result = space_from_state(stored(space_state(space)))
    assert result == space
    assert result.dtype == space.dtype
    if isinstance(space, spaces.Box):
        for one, other in ((result.low, space.low), (result.high, space.high)):
            assert one.tobytes() == other.tobytes()
    if isinstance(space, spaces.Dict):
        assert list(result.spaces) == list(space.spaces)


def test_a_task_has_what_networks_need_and_is_restored_from_its_state():
    data = replace(load_dataset(small_columns()), name="log", reference_scores=(-1.5, 1 / 3))
    task = Task.of(data)
    np.testing.assert_array_equal(task.episodes, np.sort(data.episode_digests()))
    state = task.state_dict()
    result = Task.from_state_dict(stored(state))
    for name in ("observation_space", "action_space", "observation_spec", "action_spec"):
        assert getattr(result, name) == getattr(data, name)
    assert (result.masked, result.dtype, result.name) == (False, torch.float32, "log")
    assert result.reference_scores == (-1.5, 1 / 3)
    ((key, actual),) = result.statistics.items()
    expected = data.statistics[key]
    assert torch.equal(actual.mean, expected.mean)
    assert torch.equal(actual.std, expected.std)
    assert (actual.constant, actual.count) == (expected.constant, 40)
    np.testing.assert_array_equal(result.episodes, task.episodes)
    assert result.episodes.dtype == np.int64
    old = {k: v for k, v in state.items() if k != "episodes"}
    for without in (old, Task(*SPACES[:2]).state_dict()):
        assert Task.from_state_dict(stored(without)).episodes is None
    with pytest.raises(ValueError, match=r"stored with \['colour'\]"):
        Task.from_state_dict({**state, "colour": 1})
    with pytest.raises(ValueError, match=r"without \['masked'\]"):
        Task.from_state_dict({k: v for k, v in state.items() if k != "masked"})


def test_specs_count_from_zero():
    inner = spaces.Dict({"kind": spaces.Discrete(3, start=2), "x": spaces.Box(-1, 1, (2,))})
    task = Task(inner, spaces.Discrete(4, start=1))
    assert task.action_spec.space.n == 4
    assert task.observation_spec["observation", "kind"].space.n == 3
    assert task.observation_spec["observation", "x"].shape == (2,)


def test_a_statistic_of_a_wide_log_does_not_carry_the_log():
    mean = torch.arange(1000.0)[:3]
    statistics = {"observation": ObservationStatistics(mean, mean + 1, (), 9)}
    task = Task(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), statistics)
    stored_mean = task.state_dict()["statistics"][0]["mean"]
    assert stored_mean.untyped_storage().nbytes() == 12


def test_a_space_without_a_stored_form_is_refused():
    with pytest.raises(ValueError, match="Text space cannot be stored; expected Box"):
        space_state(spaces.Text(3))
    with pytest.raises(ValueError, match="type 'Blob'"):
        space_from_state({"type": "Blob"})


# -- ``polyak`` of a config reaches the targets; an export is compared on every action


def test_targets_move_by_the_configs_share():
    agent = box_agent(polyak=0.25)
    target = agent.loss.target_qvalue_network_params.data.clone()
    agent.step(load_dataset(small_columns()).replay_buffer(16, seed=0).sample())
    online, moved = agent.loss.qvalue_network_params, agent.loss.target_qvalue_network_params
    for key, before in target.items(True, True):
        expected = 0.75 * before + 0.25 * online.get(key).data
        torch.testing.assert_close(moved.get(key).data, expected)


def test_one_action_that_differs_refuses_an_export():
    action = torch.zeros(3, 2)
    other = action.clone()
    other[2, 1] = 0.5
    one = torch.ones(())
    export._compare(lambda x: x, [[action]], [action], 1e-6, one, "the program")
    with pytest.raises(RuntimeError, match=r"the program acts differently, by 0.5 in a batch of 3"):
        export._compare(lambda x: x, [[other]], [action], 1e-6, one, "the program")


# -- Agents with every policy, the best of several actions, DDPG+BC, and residual blocks


BEST = {"policy": "flow", "num_samples": 5, "flow_steps": 4}
KINDS = {
    "auto": {},
    "mixture": {"policy": "mixture"},
    "tanh_normal": {"policy": "tanh_normal"},
    "deterministic": {"policy": "deterministic"},
    "flow": {"policy": "flow"},
    "best of flow": BEST,
    "best of mixture": {"policy": "mixture", "num_samples": 3},
    "best of tanh_normal": {"policy": "tanh_normal", "num_samples": 3, "num_critics": 1},
    "ddpg_bc": {"actor_objective": "ddpg_bc", "bc_weight": 0.1},
    **{
        f"preset {name}": {**PRESETS[name].to_dict(), "hidden": (8,), "batch_size": 16}
        for name in ("ogbench", "ifql")
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_agents_train_and_act_inside_the_bounds(kind):
    agent = trained(**KINDS[kind])
    assert isinstance(agent.policy, BestOf) is (agent.config.num_samples > 1)
    assert isinstance(agent.actor, FlowPolicy) is (KINDS[kind].get("policy") == "flow")
    drawn = [agent.act(observations(), deterministic=False, seed=s) for s in (4, 4, 5)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    if kind not in ("ddpg_bc", "deterministic"):
        assert (drawn[0] != drawn[2]).any()
    still = agent.act(observations())
    np.testing.assert_array_equal(still, agent.act(observations()))
    for actions in (*drawn, still):
        assert actions.shape == (9, 2)
        assert ((actions >= LOW) & (actions <= HIGH)).all()


def test_the_best_action_by_hand():
    agent = trained(**BEST)
    x = torch.from_numpy(observations(1))
    noise = agent.policy.fixed_noise
    candidates = []
    for row in noise:  # the Euler steps of the flow, written out
        head, a = agent.actor.head, row
        features = head.preprocess(x)[0]
        for k in range(4):
            time = torch.tensor([k / 4])
            a = a + head.mlp(torch.cat([features, a, time])) / 4
        candidates.append(head.centre + head.half_range * a.clamp(-1, 1))
    candidates = torch.stack(candidates).detach()
    values = []
    for params in agent.loss.qvalue_network_params.unbind(0):
        with params.to_module(agent.loss.qvalue_network, preserve_module_state=False):
            values.append(agent.loss.qvalue_network.module(x.expand(5, 3), candidates))
    best = int(torch.stack(values).amin(0).argmax())
    np.testing.assert_allclose(
        agent.act(observations(1))[0], candidates[best], rtol=1e-5, atol=1e-6
    )


def bodies(agent):
    """The layers' module of the actor, the critics and V."""
    loss = agent.loss
    for network in (loss.actor_network, loss.qvalue_network, loss.value_network):
        (body,) = (m for m in network.modules() if isinstance(m, MLP | ResidualMLP))
        yield body


def layers(module):
    return [type(layer).__name__ for layer in module]


def test_settings_reach_the_networks():
    agent = box_agent(**KINDS["preset ifql"])
    actor, critic, _ = bodies(agent)
    assert layers(critic) == ["Linear", "GELU", "LayerNorm", "Linear"]
    assert layers(actor) == ["Linear", "GELU", "Linear"]
    assert (agent.actor.num_steps, agent.policy.num_samples) == (10, 32)
    assert type(agent.loss.actor_objective) is FlowMatching
    assert agent.loss.temperature == 0.0
    loss = box_agent(**KINDS["ddpg_bc"]).loss
    assert type(loss.actor_objective) is DDPGBC
    assert loss.actor_objective.bc_weight == 0.1
    agent = box_agent(residual="all", hidden=(4, 4, 4), dropout=0.2, activation="mish")
    actor, critic, _ = bodies(agent)
    assert layers(actor.blocks[2]) == ["Dropout", "LayerNorm", "Linear", "Mish", "Linear"]
    assert "Dropout" not in layers(critic.modules())


def test_which_networks_have_blocks():
    discrete = discrete_agent(residual="all")
    assert isinstance(discrete.loss, DiscreteIQLLoss)
    for agent, kinds in (
        (box_agent(), ["MLP"] * 3),
        (box_agent(residual="policy"), ["ResidualMLP", "MLP", "MLP"]),
        (box_agent(residual="all"), ["ResidualMLP"] * 3),
        (discrete, ["ResidualMLP"] * 3),
    ):
        assert layers(bodies(agent)) == kinds


UNEQUAL = {"residual": "policy", "hidden": (8, 4)}
RESIDUAL = {
    "policy": {"residual": "policy", "layer_norm": True},
    "all": {"residual": "all"},
    "flow": {"residual": "policy", "policy": "flow", "num_samples": 3, "flow_steps": 2},
}


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", RESIDUAL)
def test_every_form_of_the_update_and_export(name, tmp_path):
    torch._dynamo.reset()
    dataset = load_dataset(small_columns(), dtype=torch.float64)
    agents = [make_agent(config(**RESIDUAL[name], schedule="constant"), dataset) for _ in range(3)]
    if name == "flow":  # captured updates would draw noise from their own generator
        for key, shape in (("flow_noise", (2,)), ("flow_time", ())):
            dataset.transitions[key] = torch.rand(40, *shape, dtype=torch.float64)
    sampler, other = (DeviceSampler(dataset.transitions, 8, seed=3) for _ in range(2))
    fast = compiled(agents[1].step)
    captured(agents[2].step, other, updates=2)()
    seen = observations().astype(np.float64)
    before = agents[0].act(seen)
    for _ in range(2):
        rows = sampler.sample()
        agents[0].step(rows.clone())
        fast(rows.clone())
    for agent in agents[1:]:
        for key, value in agents[0].state_dict().items():
            torch.testing.assert_close(agent.state_dict()[key], value, rtol=1e-8, atol=1e-9)
    actions = agents[0].act(seen)
    assert (actions != before).any()
    program = torch.export.load(agents[0].export(tmp_path / "policy.pt2")).module()
    exported = program(torch.from_numpy(seen)).numpy()
    np.testing.assert_allclose(exported, actions, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: discrete_agent(num_samples=4), "num_samples is 4 and the actions are Discrete"),
        (lambda: discrete_agent(policy="flow"), "policy is 'flow' and the actions are Discrete"),
        (lambda: discrete_agent(policy="gaussian"), "policy is 'gaussian'"),
        (lambda: discrete_agent(actor_objective="ddpg_bc"), "needs continuous actions"),
        (lambda: box_agent(policy="categorical"), "policy is 'categorical'"),
        (lambda: config(**UNEQUAL), r"residual is 'policy' and hidden is \(8, 4\)"),
        (lambda: config(residual="all", layer_norm=True), "'all' and layer_norm is True"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
