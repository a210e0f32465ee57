"""``policies.flow`` and ``actor_objective="flow"``: a known flow, its loss, and its random numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import ACT, OBS, make_batch, make_networks
from small_losses import BOX as SPEC
from small_losses import HIGH, LOW, Forms, assert_same_state, flow_loss, make_step, with_draws
from small_populations import configs, dataset
from tensordict import TensorDict
from torch import nn, optim
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl import IQLLoss, IQLPopulation, policies
from iql_torchrl import functional as F
from iql_torchrl.policies import generative

# A correlated Gaussian, in the policy's units: mean and covariance.
MEAN = np.array([0.3, -0.2])
COVARIANCE = np.array([[0.09, 0.03], [0.03, 0.04]])


def exact_velocity(x: np.ndarray, t: float) -> np.ndarray:
    """E[x_1 - x_0 | x_t = x] for x_0 of N(0, I) and x_1 of N(MEAN, COVARIANCE), by conditioning."""
    of_point = (1 - t) ** 2 * np.eye(2) + t**2 * COVARIANCE
    shared = t * COVARIANCE - (1 - t) * np.eye(2)
    return MEAN + (x - t * MEAN) @ np.linalg.solve(of_point, shared)


class Exact(nn.Module):
    """The perceptron of a flow with that velocity: reads (s, x, t)."""

    def forward(self, joined):
        x, t = joined[..., -3:-1].numpy(), float(joined.flatten()[-1])
        return torch.from_numpy(exact_velocity(x, t))


def euler_moments(num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance after the Euler steps of the velocity, which is linear in x."""
    shift, matrix = np.zeros(2), np.eye(2)
    for k in range(num_steps):
        base = exact_velocity(np.zeros(2), k / num_steps)
        slope = exact_velocity(np.eye(2), k / num_steps) - base
        shift = shift + (base + shift @ slope) / num_steps
        matrix = matrix + matrix @ slope / num_steps
    return shift, matrix.T @ matrix


def two_dimensional(**options):
    spec = Bounded(torch.tensor([-4.0, 1.0]), torch.tensor([0.0, 2.0]), (2,))
    return policies.flow(1, spec, **options).double()


def test_velocity_by_hand():
    time = torch.tensor([0.0, 0.25, 1.0])
    noise, action = torch.tensor([[2.0, -1.0]] * 3), torch.tensor([[0.0, 3.0]] * 3)
    point, velocity = F.flow_path(noise, action, time=time)
    assert point.tolist() == [[2.0, -1.0], [1.5, 0.0], [0.0, 3.0]]
    assert velocity.tolist() == [[-2.0, 4.0]] * 3


@pytest.mark.parametrize("num_steps", [1, 10])
def test_samples_are_the_euler_steps_of_the_velocity(num_steps):
    """The velocity is linear in x, so the samples are normal, with moments from matrix products."""
    policy = two_dimensional(num_steps=num_steps, hidden=(4,))
    policy.head.mlp = Exact()
    noise = torch.randn(20_000, 2, dtype=torch.float64)
    data = TensorDict({"observation": torch.zeros(20_000, 1).double(), "noise": noise}, [20_000])
    unit = policy.normalise(policy(data)["action"]).numpy()
    x = noise.numpy()
    for k in range(num_steps):
        x = x + exact_velocity(x, k / num_steps) / num_steps
    shift, covariance = euler_moments(num_steps)
    np.testing.assert_allclose(unit, np.clip(x, -1, 1), atol=1e-12)
    inside = np.abs(x).max(1) < 1
    if num_steps == 1:  # all mass at the mean
        np.testing.assert_allclose(shift, MEAN)
        np.testing.assert_allclose(covariance, 0, atol=1e-12)
        return
    assert inside.mean() > 0.99
    np.testing.assert_allclose(x.mean(0), shift, atol=0.01)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.002)
    np.testing.assert_allclose(shift, MEAN, atol=1e-12)
    # ten steps make the Gaussian narrower than it is, by less than a quarter of its deviations
    ratio = np.sqrt(np.diag(covariance) / np.diag(COVARIANCE))
    assert (ratio > 0.75).all()
    assert (ratio < 1).all()


def test_training_finds_the_known_velocity_and_moments():
    torch.manual_seed(1)
    policy = two_dimensional(num_steps=20, hidden=(32, 32), activation=nn.SiLU)
    parts = make_networks(1, 2, hidden=(4,), policy=policy)
    loss = IQLLoss(*parts, actor_objective="flow", temperature=0.0).double()
    optimizer = optim.Adam(policy.parameters(), lr=1e-2)
    factor = torch.from_numpy(np.linalg.cholesky(COVARIANCE))
    updates = 300
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        data = make_batch(256, obs=1, act=2, dtype=torch.float64)
        data["observation"].zero_()
        unit = torch.from_numpy(MEAN) + torch.randn(256, 2).double() @ factor.T
        data["action"] = policy.head.centre + policy.head.half_range * unit
        term, _ = loss.actor_loss(data)
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        schedule.step()
    points = torch.randn(200, 2).double()
    for t in (0.0, 0.3, 0.7):
        width = np.sqrt((1 - t) ** 2 + t**2 * 0.06)  # points where x_t is likely to be
        x = t * torch.from_numpy(MEAN) + width * points
        velocity = policy.velocity(torch.zeros(200, 1).double(), x, torch.full((200,), t).double())
        error = velocity.detach().numpy() - exact_velocity(x.numpy(), t)
        assert np.sqrt((error**2).mean()) < 0.25  # of velocities around 1
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        drawn = policy(TensorDict({"observation": torch.zeros(20_000, 1).double()}, [20_000]))
    unit = policy.normalise(drawn["action"]).numpy()
    mean, covariance = euler_moments(20)
    np.testing.assert_allclose(unit.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(unit.T), covariance, atol=0.015)


# -- the policy ------------------------------------------------------------------------------------


def test_noise_may_be_given_and_is_fixed_where_actions_are_deterministic():
    policy = policies.flow(5, SPEC, hidden=(8,))
    data = TensorDict({"observation": torch.randn(7, 5)}, [7])
    noise = torch.randn(7, 3)
    given = policy(data.clone().set("noise", noise))["action"]
    with set_exploration_type(ExplorationType.RANDOM):
        torch.manual_seed(3)
        first = policy(data.clone())["action"]
        torch.manual_seed(3)
        same = data.clone().set("noise", torch.randn(7, 3))
        assert torch.equal(policy(same)["action"], first)
        assert not torch.equal(given, first)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        still = policy(data.clone())["action"]
        other = policies.flow(5, SPEC, hidden=(8,), deterministic_samples=1)
        other.load_state_dict(policy.state_dict())
        one = other(data.clone())["action"]
    assert torch.equal(other.fixed_noise, policy.fixed_noise)
    expected = policy(data.clone().set("noise", policy.fixed_noise.expand(7, 3)))["action"]
    assert torch.equal(one, expected)
    samples = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    each = [policy(data.clone().set("noise", x.expand(7, 3)))["action"] for x in samples]
    unit = policy.normalise(torch.stack(each, 1)).detach().numpy()
    for row, action in zip(unit, policy.normalise(still).detach().numpy(), strict=True):
        spread = [np.sort(((row - x) ** 2).sum(1))[:3].sum() for x in row]  # a quarter, and itself
        np.testing.assert_allclose(action, row[np.argmin(spread)], rtol=1e-5, atol=1e-6)
    assert policy.in_keys == ["observation"]  # the noise is optional
    with pytest.raises(ValueError, match="deterministic_samples is 0; expected an integer"):
        policy.deterministic_samples = 0
    named = policy(observation=data["observation"])  # TorchRL's keyword calls
    assert named.shape == (7, 3)


def test_the_deterministic_action_is_near_a_mode(monkeypatch):
    """Modes at -0.5 and 0.5: half of the samples lead to each, and some end between them."""

    class Modes(nn.Module):
        def forward(self, joined):
            x, t = joined[..., -2:].unbind(-1)
            end = 0.5 * torch.tanh(4 * x)
            return ((end - x) / (1 - t)).unsqueeze(-1)

    policy = policies.flow(1, Bounded(-torch.ones(1), torch.ones(1), (1,)), hidden=(4,))
    policy.head.mlp = Modes()
    data = TensorDict({"observation": torch.zeros(5, 1)}, [5])
    with set_exploration_type(ExplorationType.RANDOM):
        drawn = policy(TensorDict({"observation": torch.zeros(2000, 1)}, [2000]))["action"]
    assert 0.4 < float((drawn < 0).float().mean()) < 0.6
    assert float(((drawn.abs() - 0.5).abs() > 0.02).float().mean()) > 0.01
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = policy(data.clone())["action"]
        monkeypatch.setattr(generative, "ROWS_AT_ONCE", 16)  # two rows at a time
        assert torch.equal(policy(data.clone())["action"], action)
    assert ((action.abs() - 0.5).abs() < 0.02).all()


def test_refusals():
    with pytest.raises(ValueError, match="num_steps is 0; expected an integer >= 1"):
        policies.flow(5, SPEC, num_steps=0)
    actor, critic, value = make_networks()
    with pytest.raises(
        TypeError, match=r"no velocity; actor_objective=FlowMatching needs policies.flow"
    ):
        IQLLoss(actor, critic, value, actor_objective="flow")
    for objective in ("log_prob", "mse", "ddpg_bc"):
        with pytest.raises(TypeError, match="no density; train it with actor_objective='flow'"):
            IQLLoss(policies.flow(OBS, SPEC), critic, value, actor_objective=objective)
    loss = flow_loss()
    with pytest.raises(ValueError, match=r"'flow_noise' has shape \(32,\) .* expected \(32, 3\)"):
        loss(make_batch(dtype=torch.float64).set("flow_noise", torch.zeros(32)))


# -- the loss --------------------------------------------------------------------------------------


def by_hand(loss, data):
    head = loss.actor_network.head
    params = loss.actor_network_params
    middle, half = (HIGH + LOW).double() / 2, (HIGH - LOW).double() / 2
    action = (data["action"] - middle) / half
    t = data["flow_time"]
    x = (1 - t) * data["flow_noise"] + t * action
    with params["head"].to_module(head, preserve_module_state=False):
        velocity = head.mlp(torch.cat([data["observation"], x, t], -1))
    return (velocity - (action - data["flow_noise"])).square().mean(-1)


def test_the_weighted_error_of_the_velocity():
    loss, data = flow_loss(temperature=2.0), with_draws()
    data["collector", "mask"] = torch.rand(32) < 0.7
    data["priority_weight"] = torch.rand(32, 1).double()
    term, metadata = loss.actor_loss(data.clone())
    error = metadata["weight"] * by_hand(loss, data)
    weight = data["priority_weight"].squeeze(-1) * data["collector", "mask"]
    torch.testing.assert_close(term, (weight * error).sum() / weight.sum())
    assert metadata["weight"].std() > 0
    plain = flow_loss(temperature=0.0)
    term, metadata = plain.actor_loss(data := with_draws())
    torch.testing.assert_close(term, by_hand(plain, data).mean())
    term.backward()
    moved = [n for n, p in plain.named_parameters() if p.grad is not None and p.grad.any()]
    assert moved
    assert all(name.startswith("actor") for name in moved)


def test_draws_come_from_torchs_generator_and_have_their_distributions():
    loss, data = flow_loss(), make_batch(4000, dtype=torch.float64)
    torch.manual_seed(5)
    draws = loss.prepare_batch(data).draws
    torch.manual_seed(5)
    assert torch.equal(draws["flow_noise"], torch.empty(4000, ACT).double().normal_())
    assert torch.equal(draws["flow_time"], torch.empty(4000).double().uniform_())
    assert abs(float(draws["flow_noise"].mean())) < 0.03
    assert abs(float(draws["flow_noise"].std()) - 1) < 0.03
    assert abs(float(draws["flow_time"].mean()) - 0.5) < 0.03
    other, batch = IQLLoss(*make_networks()), make_batch()
    before = torch.get_rng_state()
    assert not other.prepare_batch(batch).draws  # log_prob needs none and draws none
    assert torch.equal(torch.get_rng_state(), before)


def drawn(sampler, *shape):
    """A sampler's next rows, and the numbers that a captured update draws after them."""
    rows = sampler.sample()
    noise = torch.empty(shape).double().normal_(generator=sampler.generator)
    time = torch.empty(shape[:-1]).double().uniform_(generator=sampler.generator)
    return rows.set("flow_noise", noise).set("flow_time", time)


@pytest.mark.usefixtures("uncompiled")
def test_drawn_noise_is_the_same_in_every_form():
    """Plain and compiled from torch's generator; captured after the row numbers, from the sampler's."""
    forms = Forms(flow_loss(diagnostics=True), make_batch(50, dtype=torch.float64))
    sampler = forms.sampler
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for _ in range(2):
        forms.call()
        for _ in range(3):
            forms.plain(drawn(sampler, 8, ACT))
    assert torch.equal(torch.get_rng_state(), state)
    plain, fast, whole = forms.losses
    assert_same_state(plain, whole)
    again = make_step(copy.deepcopy(fast))
    rows = [sampler.sample() for _ in range(3)]
    for step in (again, forms.fast):
        torch.manual_seed(7)
        for each in rows:
            step(each.clone())
    assert_same_state(again.loss, fast)


@pytest.mark.slow
def test_the_loss_compiles_alone():
    torch._dynamo.reset()
    loss, data = flow_loss(), with_draws()
    loss.make_value_estimator()  # torch 2.11 cannot trace the making of the default one
    program = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(program(data.clone())["loss_actor"], loss(data)["loss_actor"])
    assert program(data.exclude("flow_noise", "flow_time"))["loss_actor"].isfinite()


# -- populations -----------------------------------------------------------------------------------


def test_each_run_has_its_own_noise_and_training_repeats():
    data = dataset()
    events = []
    for _ in range(2):
        torch.manual_seed(0)
        population = IQLPopulation(configs([{}] * 3, policy="flow"), data)
        events.append(list(population.train(4, every=2))[-1].metrics["loss_actor"])
    assert torch.equal(*events)
    assert len(set(events[0].tolist())) == 3  # the same weights and batches, other noise
    draws = population.step.lift.prepare_batch(population.sampler.sample()).draws
    assert draws["flow_noise"].shape == (3, 16, 2)
    assert draws["flow_time"].shape == (3, 16)
