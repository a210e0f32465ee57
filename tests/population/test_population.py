"""IQLPopulation: every member is the same run trained alone; saving, members, refusals."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from small_losses import assert_same_metrics
from small_populations import (
    ADAMW,
    BASE,
    CASES,
    MEMBERS,
    OBJECTIVES,
    Beside,
    assert_close,
    configs,
    dataset,
    double,
    extras,
    of_members,
)

from iql_torchrl import IQLPopulation, evaluate, make_agent
from iql_torchrl import population as population_module
from iql_torchrl.data import DeviceSampler
from iql_torchrl.data.replay import MemberSampler
from iql_torchrl.files import CheckpointError, read_components, write_components

SETTINGS = (
    {"seed": 5},
    {"expectile": 0.95},
    {"temperature": 0.0},
    {"max_weight": 1.01},
    {"discount": 0.3},
    {"actor_lr": 1e-2},
    {"critic_lr": 1e-2},
    {"value_lr": 1e-2},
)


@pytest.mark.parametrize("case", CASES | OBJECTIVES)
def test_a_member_equals_the_run_trained_alone(case):
    kind, options, batches, change = (CASES | OBJECTIVES)[case]
    with double():
        beside = Beside(configs(**options), dataset(kind), batches)
        beside.assert_equal(beside.train(10, change))


@pytest.mark.parametrize(
    ("case", "setting", "values"),
    [
        ("ddpg_bc", lambda p: p.loss.actor_objective.bc_weight, [0.1, 2.0, 0.3]),
        ("sparse", lambda p: p.loss.value_objective.alpha, [0.05, 0.4, 5.0]),
        ("conditioned flow", lambda p: torch.tensor(p.member(1).actor.guidance), 2.0),
    ],
)
def test_hyperparameters_of_objectives_are_the_members(case, setting, values):
    population = IQLPopulation(configs(**OBJECTIVES[case][1]), dataset())
    assert setting(population).tolist() == pytest.approx(values)


def test_assigned_hyperparameters_are_those_of_the_members():
    population = IQLPopulation(configs(), dataset())
    population.loss.temperature = [1.0, 2.0, 9.0, 0.5]
    population.loss.expectile = 0.6
    members = [population.member(number).loss for number in range(4)]
    assert [float(loss.temperature) for loss in members] == [1.0, 2.0, 9.0, 0.5]
    assert [float(loss.expectile) for loss in members] == pytest.approx([0.6] * 4)
    with pytest.raises(ValueError, match="temperature has 2 values; expected 4"):
        population.loss.temperature = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="temperature is -1"):
        population.loss.temperature = torch.tensor([1.0, -1.0, 2.0, 1.0])


def test_each_setting_reaches_its_member_and_no_other():
    beside = Beside(configs(({}, *SETTINGS)), dataset())
    beside.assert_equal(beside.train(10, extras))
    state = beside.population.loss.state_dict()
    moved = {n: v for n, v in state.items() if "mlp" in n and not n.startswith("target")}
    for number in range(1, len(SETTINGS) + 1):
        assert any(not torch.equal(v[number], v[0]) for v in moved.values()), SETTINGS[number - 1]


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_clipping_bites_where_a_members_own_gradient_is_large(order):
    settings, data = configs(), dataset()
    outcome = Beside(settings, data)
    outcome.population.step(outcome.population.sampler.sample())
    stacked = [
        p.grad.flatten(1)
        for n, p in outcome.population.loss.named_parameters()
        if n.startswith("qvalue") and p.grad is not None
    ]
    norms = torch.cat(stacked, 1).norm(dim=1)
    limit = float(norms.median()) * 1.01
    assert 0 < int((norms > limit).sum()) < len(settings)
    beside = Beside(configs(max_grad_norm=limit, order=order), data)
    beside.assert_equal(beside.train(10))
    free = Beside(settings, data)
    free.train(10)
    assert not same(free.population.loss.state_dict(), beside.population.loss.state_dict())


def test_one_member_is_a_single_run_with_its_own_batches():
    config, data = replace(BASE, seed=4), dataset(dtype=torch.float32)
    population, agent = IQLPopulation([config], data), make_agent(config, data)
    sampler = DeviceSampler(data.transitions, config.batch_size, seed=config.seed)
    (event,) = population.train(5)
    step_metrics = torch.stack([agent.step(sampler.sample()) for _ in range(5)])
    assert_close(population.member(0).loss.state_dict(), agent.loss.state_dict(), 1e-5)
    assert_close(
        {k: v[0] for k, v in event.metrics.items()},
        {k: v.mean() for k, v in step_metrics.items()},
        1e-5,
    )


def test_runs_may_differ_in_their_initial_weights():
    members = [{}, {"initialisation": "torch"}]
    beside = Beside(configs(members), dataset())
    beside.assert_equal(beside.train(3))
    one, other = (beside.agents[i].loss.value_network_params["module", "mlp", "2"] for i in (0, 1))
    assert one["weight"].abs().max() > 0.5
    assert other["weight"].abs().max() < 0.5


def same(first, second) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(v, second[k]) for k, v in first.items() if torch.is_tensor(v))


def test_a_member_is_an_ordinary_agent():
    data = dataset()
    beside = Beside(configs(), data, "own")
    beside.train(3)
    observations = data.transitions["observation"].numpy()
    for number, alone in enumerate(beside.agents):
        member = beside.population.member(number)
        assert member.config == alone.config
        np.testing.assert_allclose(member.act(observations), alone.act(observations), rtol=1e-9)
        before = beside.population.loss.state_dict()
        before = {k: v.clone() for k, v in before.items() if torch.is_tensor(v)}
        member.step(data.replay_buffer(16, seed=0).sample())
        after = beside.population.loss.state_dict()
        assert same(before, {k: after[k] for k in before})  # a copy, not a view
    with pytest.raises(IndexError):
        beside.population.member(len(MEMBERS))


def test_members_with_dropout_differ_and_agree_without_it():
    data = dataset()
    population = IQLPopulation(configs([{}, {}, {}], dropout=0.5), data)
    alone = make_agent(population.configs[0], data)
    batch = population.sampler.sample()
    first = population.step(batch)["loss_actor"]
    assert len(set(first.tolist())) == 3  # the same weights, other masks
    population.loss.load_state_dict(IQLPopulation(population.configs, data).loss.state_dict())
    for loss in (population.loss, alone.loss):
        loss.actor_network.eval()
    expected = alone.loss.actor_loss(batch.clone())[0]
    lift = population.step.lift
    actual = of_members(lift, "actor_loss", batch)
    assert_close({"loss": actual}, {"loss": expected.expand(3)}, 1e-12)
    population.loss.actor_network.train()
    drawn = torch.stack([of_members(lift, "actor_loss", batch).detach() for _ in range(200)])
    assert drawn.std(0).min() > 0
    alone.loss.actor_network.train()
    singly = torch.stack([alone.loss.actor_loss(batch.clone())[0].detach() for _ in range(600)])
    spread = singly.std() / 200**0.5
    assert (drawn.mean(0) - singly.mean()).abs().max() < 5 * spread


@pytest.mark.parametrize(
    ("batches", "options"),
    [("shared", {}), ("own", {}), ("shared", {"policy": "flow"}), ("own", {"actor_ema": 0.75})],
    ids=str,
)
def test_training_continues_from_a_file_with_the_same_bits(tmp_path, batches, options):
    data = dataset(dtype=torch.float32)
    settings = configs(max_grad_norm=1.0, schedule="cosine", **ADAMW, **options)
    population = IQLPopulation(settings, data, batches=batches)
    for event in population.train(7, every=3):
        last = event.updates
    assert (last, population.updates) == (7, 7)
    path = population.save(tmp_path / "p.torchrl")
    outcome = IQLPopulation.load(path, data)
    assert (outcome.updates, outcome.configs, outcome.batches) == (7, population.configs, batches)
    events = [list(p.train(5, every=2)) for p in (population, outcome)]
    for actual, reference in zip(*events, strict=True):
        assert actual.updates == reference.updates
        assert same(dict(actual.metrics.items()), dict(reference.metrics.items()))
    assert same(population.loss.state_dict(), outcome.loss.state_dict())
    optimizers = [p.optimizer.state_dict() for p in (population, outcome)]
    for number, state in optimizers[0]["state"].items():
        assert same(state, optimizers[1]["state"][number])


def test_training_that_stops_between_events_can_continue():
    data = dataset()
    population, other = (IQLPopulation(configs(), data) for _ in range(2))
    for event in population.train(every=3):
        if event.updates == 6:
            break
    assert (population.updates, population.scheduler.last_epoch) == (6, 6)
    list(other.train(6))
    assert same(population.loss.state_dict(), other.loss.state_dict())
    sample, left = population.sampler.sample, 2

    def interrupted():
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return sample()

    population.sampler.sample = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(population.train(10, every=5))
    assert (population.updates, population.scheduler.last_epoch) == (8, 8)
    del population.sampler.sample
    *_, last = population.train()
    assert last.updates == population.updates == BASE.updates
    assert list(population.train()) == []
    with pytest.raises(ValueError, match="every is 0"):
        next(population.train(every=0))


def test_events_tell_the_mean_of_each_members_metrics():
    data = dataset()
    population, other = (IQLPopulation(configs(), data) for _ in range(2))
    events = list(population.train(5, every=3))
    step_metrics = torch.stack([other.step(other.sampler.sample()) for _ in range(5)])
    assert [event.updates for event in events] == [3, 5]
    for event, part in zip(events, (step_metrics[:3], step_metrics[3:]), strict=True):
        assert event.metrics.batch_size == (len(MEMBERS),)
        assert_same_metrics(event.metrics, part.mean(0))


class Line(gymnasium.Env):
    """Three observations and a return that tells the actions apart."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 3
        return self.np_random.normal(size=3), {}

    def step(self, action):
        self.left -= 1
        return self.np_random.normal(size=3), float(action.sum()), self.left == 0, False, {}


def test_evaluation_is_each_members_own():
    data = replace(dataset(), action_space=Line.action_space)
    population = IQLPopulation(configs(), data)
    list(population.train(3))
    outcome = population.evaluate(Line, episodes=3, seed=7, reference_scores=(0.0, 2.0))
    assert len(outcome) == len(population) == len(MEMBERS)
    for number, result in enumerate(outcome):
        expected = evaluate(population.member(number).policy, Line, episodes=3, seed=7)
        np.testing.assert_array_equal(result.returns, expected.returns)
        np.testing.assert_allclose(result.scores, 50 * expected.returns)
    assert len({tuple(result.returns) for result in outcome}) == len(MEMBERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (8,)}, r"hidden is \(8,\) in configs\[1\] and \(8, 8\) in configs\[0\]"),
        ({"polyak": 0.1}, r"polyak is 0.1 .*Train one population"),
        ({"batch_size": 8}, "batch_size is 8"),
        ({"policy": "mixture"}, "policy is mixture"),
        ({"updates": 3}, "updates is 3"),
    ],
)
def test_configs_that_differ_elsewhere_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IQLPopulation([BASE, replace(BASE, **options)], dataset())


def test_what_is_no_population_is_refused():
    data = dataset()
    with pytest.raises(ValueError, match="batches is 'each'; choose one of 'shared', 'own'"):
        IQLPopulation([BASE], data, batches="each")
    with pytest.raises(ValueError, match="configs is empty"):
        IQLPopulation([], data)
    with pytest.raises(TypeError, match="configs is IQLConfig; expected a sequence"):
        IQLPopulation(BASE, data)
    with pytest.raises(IndexError, match="there is no run 4: the runs are 0 to 3"):
        IQLPopulation(configs(), data).member(4)
    with pytest.raises(ValueError, match=r"is -1; .*an integer"):
        next(IQLPopulation([BASE], data).train(-1))
    with pytest.raises(ValueError, match="members is 0; expected an integer >= 1"):
        MemberSampler(data.transitions, 4, members=0)


class Call:
    """In place of captured updates: counts what each call makes."""

    made: list[int]

    def __init__(self, step, sampler, *, updates):
        self.step, self.sampler, self.updates = step, sampler, updates

    def __call__(self):
        self.made.append(self.updates)
        metrics = [self.step(self.sampler.sample()) for _ in range(self.updates)]
        return torch.stack(metrics).double().mean(0)


@pytest.fixture
def made(monkeypatch):
    Call.made = []
    monkeypatch.setattr(population_module, "captured", Call)
    return Call.made


def test_what_no_captured_call_divides_is_made_by_plain_updates(made):
    data = dataset()
    fast, plain = (IQLPopulation(configs(compile=c), data) for c in (True, False))
    for updates, every, calls in (
        (80, 40, [20] * 4),
        (37, 1000, [20]),
        (3, 7, []),
        (46, 23, [20] * 2),
    ):
        made.clear()
        events = zip(
            fast.train(updates, every=every), plain.train(updates, every=every), strict=True
        )
        for actual, reference in events:
            assert actual.updates == reference.updates
            torch.testing.assert_close(
                actual.metrics["loss_value"], reference.metrics["loss_value"]
            )
        assert made == calls
    assert same(fast.loss.state_dict(), plain.loss.state_dict())
    prime = IQLPopulation(configs(compile=True), data)
    next(prime.train(97, every=97))
    assert made[2:] == [32] * 3


@pytest.mark.usefixtures("uncompiled")
def test_random_numbers_do_not_depend_on_which_updates_are_captured():
    """Flow policies read noise: seven captured updates a call, and twice that and six eager ones."""
    data, states = dataset(), []
    for settings, parts in ((True, (14, 6)), (False, (20,))):
        population = IQLPopulation(configs(MEMBERS[:2], policy="flow", compile=settings), data)
        for updates in parts:
            torch.rand(3)  # torch's own generator is not read
            population.train_now(updates)
        states.append(population.loss.state_dict())
    assert_close(*states, 1e-9)


def test_a_short_first_training_does_not_fix_the_captured_calls(made):
    population = IQLPopulation(configs(compile=True), dataset())
    for updates in (1, 64, 3):
        population.train_now(updates)
    assert made == [1, 32, 32]
    assert population.updates == 68
    for _ in population.train(150, every=10):  # which no call of 32 fits into
        pass
    assert made[3:] == [10] * 15


def test_train_now_trains_and_train_warns_where_nothing_reads_its_events():
    population = IQLPopulation(configs(), dataset())
    with pytest.warns(UserWarning, match="nothing was trained"):
        population.train(5)
    assert population.updates == 0
    assert [event.updates for event in population.train(4e0, every=2e0)] == [2, 4]
    assert [event.updates for event in population.train(5, every=2)] == [6, 8, 9]
    assert population.train_now(5).updates == population.updates == 14
    assert population.train_now(0) is None
    for name in ("updates", "every"):
        with pytest.raises(ValueError, match=f"{name} is 2.5; it counts updates"):
            population.train(**{name: 2.5})
        with pytest.raises(ValueError, match=f"{name} is '3'"):
            population.train(**{name: "3"})


def test_own_batches_are_one_stream_of_indices():
    data = dataset()
    sampler = MemberSampler(data.transitions, 5, members=3, seed=2)
    plain = DeviceSampler(data.transitions, 15, seed=2)
    batch = sampler.sample()
    assert batch.batch_size == (3, 5)
    assert torch.equal(batch["observation"].flatten(0, 1), plain.sample()["observation"])


def test_the_error_names_what_cannot_be_loaded(tmp_path):
    data = dataset()
    population = IQLPopulation(configs(), data)
    path = population.save(tmp_path / "p.torchrl")
    rewards = data.transitions.clone()
    rewards["next", "reward"][3] += 1
    with pytest.raises(CheckpointError, match=r"p\.torchrl: .*next.reward of the dataset was"):
        IQLPopulation.load(path, replace(data, transitions=rewards))
    with pytest.raises(CheckpointError, match="of the dataset was"):
        IQLPopulation.load(path, dataset("discrete"))
    mapped = type(data.reward_map)(2.0, 0.0)
    with pytest.raises(CheckpointError, match="of the dataset was"):
        IQLPopulation.load(path, replace(dataset("discrete"), reward_map=mapped))
    with pytest.raises(CheckpointError, match=r"the reward scaling .* was"):
        IQLPopulation.load(path, replace(data, reward_map=mapped))
    states = read_components(path)
    for config in states["population"]["configs"]:
        config["device"] = "cuda:99"
    far = write_components(tmp_path / "far.torchrl", states)
    with pytest.raises(CheckpointError, match=r"(?i)far\.torchrl: .*cuda"):
        IQLPopulation.load(far, data)
    near = IQLPopulation.load(far, data, device="cpu")
    assert same(near.loss.state_dict(), population.loss.state_dict())
    assert {config.device for config in near.configs} == {"cpu"}
    states["population"]["configs"][0]["colour"] = 1
    with pytest.raises(CheckpointError, match="unknown: colour"):
        IQLPopulation.load(write_components(tmp_path / "new.torchrl", states), data)
    with pytest.raises(CheckpointError, match="no such file"):
        IQLPopulation.load(tmp_path / "q.torchrl", data)
    agent = make_agent(BASE, data)
    write_components(tmp_path / "a.torchrl", {"agent": agent.description()})
    with pytest.raises(CheckpointError, match=r"has no part '\w+'; it holds \['agent'\]"):
        IQLPopulation.load(tmp_path / "a.torchrl", data)


def test_chunks_with_batches_of_their_own_are_refused():
    with pytest.raises(
        ValueError, match=r"batches is 'own' and action_chunk is 2.*batches='shared'"
    ):
        IQLPopulation(configs(action_chunk=2), dataset(), batches="own")
