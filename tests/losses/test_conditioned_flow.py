"""``losses.ConditionedFlow`` and guidance: exact fields, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ACT, OBS, make_batch, make_networks
from scipy import stats
from scipy.integrate import solve_ivp
from small_agents import box_agent, observations, saved, trained
from small_losses import SPEC, flow_loss, with_draws
from small_populations import CONDITIONED
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded

from iql_torchrl import IQLConfig, IQLLoss, policies
from iql_torchrl import functional as F
from iql_torchrl.agent import Agent
from iql_torchrl.losses import ConditionedFlow

# -- a bandit with known advantages: three arms, each a Gaussian around its action -----------------

SHARE = np.array([0.5, 0.3, 0.2])  # how often the dataset takes an arm
ACTION, WIDTH = np.array([-0.55, 0.0, 0.55]), 0.12
ADVANTAGE = np.array([-1.0, 0.4, 0.6])
POSITIVE = np.where(ADVANTAGE > 0, SHARE, 0) / SHARE[ADVANTAGE > 0].sum()


def drawn(share, count, seed=0):
    """Actions of arms taken with probabilities ``share``, and the arms."""
    draw = np.random.default_rng(seed)
    arm = draw.choice(len(share), count, p=share)
    return ACTION[arm] + WIDTH * draw.normal(size=count), arm


def exact_velocity(x: np.ndarray, t: float, share: np.ndarray) -> np.ndarray:
    """E[a - noise | x_t = x] for an action ``a`` of the arms: Bayes' rule, and a Gaussian for each."""
    variance = (1 - t) ** 2 + (t * WIDTH) ** 2
    error = x[:, None] - t * ACTION
    likelihood = share * np.exp(-(error**2) / (2 * variance))
    velocity = ACTION + (t * WIDTH**2 - (1 - t)) / variance * error
    return (likelihood * velocity).sum(1) / likelihood.sum(1)


def guided_velocity(x, t, w):
    return (1 - w) * exact_velocity(x, t, SHARE) + w * exact_velocity(x, t, POSITIVE)


def integrated(noise, w):
    """Where the guided field leads from ``noise``, by SciPy's adaptive Runge-Kutta method."""
    solved = solve_ivp(
        lambda t, x: guided_velocity(x, t, w), (0, 1), noise, rtol=1e-8, atol=1e-8, method="DOP853"
    )
    return solved.y[:, -1]


class Exact(nn.Module):
    """The perceptron of a conditioned flow with those velocities: reads (s, x, t, known, c)."""

    def forward(self, joined):
        x, t, known, c = joined[..., 1:].double().unbind(-1)
        assert set(known.flatten().tolist()) <= {0.0, 1.0}
        assert torch.equal(known, c)  # acting asks for no known c but 1
        t = float(t.flatten()[0])
        without, given = (
            exact_velocity(x.flatten().numpy(), t, share) for share in (SHARE, POSITIVE)
        )
        chosen = np.where(known.flatten().numpy() == 1, given, without)
        return torch.from_numpy(chosen).view(*x.shape, 1)


def bandit_flow(**options):
    spec = Bounded(-3 * torch.ones(1), torch.ones(1), (1,))  # units of the action: (a + 1) / 2
    return policies.flow(1, spec, conditioned=True, **options).double()


def act(policy, noise):
    """Actions of ``policy`` in its units."""
    noise = torch.as_tensor(noise, dtype=torch.float64)[:, None]
    data = TensorDict({"observation": torch.zeros(len(noise), 1).double()}, [len(noise)])
    with torch.no_grad():
        return policy.normalise(policy(data.set("noise", noise))["action"]).numpy()[:, 0]


def are_alike(first, second) -> bool:
    """Whether the two-sample test of Kolmogorov and Smirnov lets them be of one distribution."""
    return bool(stats.ks_2samp(first, second).pvalue > 0.01)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_exact_fields_are_followed(w):
    policy = bandit_flow(num_steps=100, hidden=(4,), guidance=w)
    policy.head.mlp = Exact()
    noise = np.random.default_rng(1).normal(size=2_000)
    actions, x = act(policy, noise), noise.copy()
    for k in range(100):
        x = x + guided_velocity(x, k / 100, w) / 100
    np.testing.assert_allclose(actions, np.clip(x, -1, 1), atol=1e-12)
    exact = integrated(noise, w).clip(-1, 1)
    assert np.median(np.abs(actions - exact)) < 0.01  # of Euler's method
    other = np.random.default_rng(2).normal(size=2_000)
    assert are_alike(actions, integrated(other, w).clip(-1, 1))
    dataset, positive = (drawn(share, 2_000)[0] for share in (SHARE, POSITIVE))
    assert are_alike(actions, dataset) is (w == 0)
    assert are_alike(actions, positive) is (w == 1)
    if w > 1:  # not the exact product of densities, p(a) (p(a | c) / p(a))**w: that of the arms is
        product = SHARE * (POSITIVE / SHARE) ** w
        assert not are_alike(actions, drawn(product / product.sum(), 2_000)[0])


def train_bandit(seed: int, updates: int = 8_000):
    torch.manual_seed(seed)
    policy = bandit_flow(num_steps=100, hidden=(64, 64, 64))
    parts = make_networks(1, 1, hidden=(4,), policy=policy)
    loss = IQLLoss(*parts, actor_objective=ConditionedFlow(0.4)).double()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    actions, arms = drawn(SHARE, 512 * updates, seed=100 + seed)
    for action, arm in zip(actions.reshape(updates, 512), arms.reshape(updates, 512), strict=True):
        data = make_batch(512, obs=1, act=1, dtype=torch.float64)
        data["observation"].zero_()
        data["action"] = torch.from_numpy(2 * action - 1)[:, None]
        term, metadata = loss.actor_term(loss.prepare_batch(data), torch.from_numpy(ADVANTAGE[arm]))
        assert "weight" not in metadata
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        schedule.step()
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_trained_flow_equals_the_log_and_its_positive_part_by_a_two_sample_test(seed):
    """It is accepted as often as samples of the distribution itself, over 40 seeds of draws."""
    policy = train_bandit(seed)
    for w, share, other in ((0.0, SHARE, POSITIVE), (1.0, POSITIVE, SHARE)):
        policy.guidance = w
        trained, exact, wrong = 0, 0, 0
        for draws in range(40):
            actions = act(policy, np.random.default_rng(1_000 + draws).normal(size=400))
            samples = drawn(share, 400, seed=5_000 + draws)[0]
            trained += are_alike(actions, samples)
            exact += are_alike(drawn(share, 400, seed=9_000 + draws)[0], samples)
            wrong += are_alike(actions, drawn(other, 400, seed=5_000 + draws)[0])
        assert exact >= 38  # the test at 1 % refuses 0.4 of 40
        assert trained >= exact - 1
        assert wrong == 0
    # elsewhere the field multiplies the errors of the two velocities: compared point by point
    noise = np.random.default_rng(8).normal(size=4_000)
    exact = {w: integrated(noise, w).clip(-1, 1) for w in (1.0, 2.0)}
    policy.guidance = 2.0
    errors = {w: np.abs(act(policy, noise) - end).mean() for w, end in exact.items()}
    assert errors[2.0] < 0.03 < 0.1 < errors[1.0]


# -- the loss ----------------------------------------------------------------------------------------


def test_the_input_of_the_condition():
    entered = F.condition_input(
        torch.tensor([0.0, 1.0, 0.7, 1.0]), torch.tensor([1, 1, 1, 0]).bool()
    )
    assert torch.equal(entered, torch.tensor([[1, 0], [1, 1], [1, 0.7], [0, 0]]))


@pytest.mark.parametrize("condition", ["positive", torch.tanh])
def test_the_error_of_the_velocity_by_hand(condition):
    loss = flow_loss(condition, 0.4, diagnostics=True)
    data = with_draws()
    data["collector", "mask"] = keep = torch.rand(32) < 0.7
    batch = loss.prepare_batch(data.clone())
    advantage = torch.randn(32, dtype=torch.float64)
    term, metadata = loss.actor_term(batch, advantage)
    actor, known = loss.actor_network, data["flow_drop"] >= 0.4
    c = torch.tanh(advantage) if callable(condition) else (advantage > 0).double()
    action, t = actor.normalise(data["action"]), data["flow_time"]
    x = (1 - t) * data["flow_noise"] + t * action
    entered = torch.stack([known.double(), known * c], -1)
    velocity = actor.head.mlp(torch.cat([data["observation"], x, t, entered], -1))
    error = (velocity - (action - data["flow_noise"])).square().mean(-1)
    torch.testing.assert_close(term, error[keep].mean())
    assert 5 < int(known.sum()) < 30
    assert "weight" not in metadata
    term.backward()
    moved = [n for n, p in loss.named_parameters() if p.grad is not None and p.grad.any()]
    assert moved
    assert all(name.startswith("actor") for name in moved)
    metrics = loss(data.clone())
    share = loss.actor_objective.condition_of(loss.advantage(batch))
    torch.testing.assert_close(metrics["condition_mean"], share[keep].mean())
    assert metrics["weight_mean"] == 1
    assert metrics["clip_fraction"] == 0


def test_draws_follow_those_of_a_flow_and_drop_their_share():
    loss, data = flow_loss("positive"), make_batch(4000, dtype=torch.float64)
    torch.manual_seed(5)
    draws = loss.prepare_batch(data).draws
    torch.manual_seed(5)
    for name, shape in (("flow_noise", (4000, ACT)), ("flow_time", 4000), ("flow_drop", 4000)):
        out = torch.empty(shape).double()
        assert torch.equal(draws[name], out.normal_() if "noise" in name else out.uniform_()), name
    assert abs(float((draws["flow_drop"] < 0.1).double().mean()) - 0.1) < 0.02


# -- guidance of an agent ------------------------------------------------------------------------------


def test_guidance_is_set_kept_loaded_and_exported(tmp_path):
    agent = trained(**CONDITIONED, guidance=2.0, actor_ema=0.5, num_samples=2)
    seen = observations()
    at = {}
    for w in (0.0, 2.0, 5.0):
        agent.actor.guidance = w
        at[w] = agent.act(seen)
        np.testing.assert_array_equal(
            at[w], replace(agent, policy=policies.guided(agent.policy, w)).act(seen)
        )
    assert agent.policy.actor.guidance == 5.0  # that of the averaged weights
    assert len({values.tobytes() for values in at.values()}) == 3
    again = Agent.load(saved(agent, tmp_path / "agent.torchrl"))
    assert (again.config.guidance, again.actor.guidance) == (2.0, 5.0)
    np.testing.assert_array_equal(again.act(seen), at[5.0])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_an_export_has_the_guidance_of_its_policy(tmp_path, suffix):
    agent, seen = trained(**CONDITIONED, num_samples=2), observations()
    paths = {}
    for w in (0.0, 3.0):
        other = replace(agent, policy=policies.guided(agent.policy, w))
        paths[w] = other.export(tmp_path / f"{w:.0f}{suffix}"), other.act(seen)
    for path, expected in paths.values():
        if suffix == ".onnx":
            session = pytest.importorskip("onnxruntime").InferenceSession(path)
            found = session.run(None, {session.get_inputs()[0].name: seen})[0]
        else:
            found = torch.export.load(path).module()(torch.from_numpy(seen))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (paths[0.0][1] != paths[3.0][1]).any()


PLAIN, ON_ADVANTAGE = policies.flow(OBS, SPEC), policies.flow(OBS, SPEC, conditioned=True)


def loss_of(policy, **options):
    return IQLLoss(*make_networks(policy=policy), **options)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"guidance is 2 and this flow has no condition", lambda: guide(PLAIN, 2)),
        (ValueError, r"guidance is 2.0 and this flow has no condition",
         lambda: policies.flow(OBS, SPEC, guidance=2.0)),
        *((ValueError, f"guidance is {wrong!r}", lambda wrong=wrong: guide(ON_ADVANTAGE, wrong))
          for wrong in (-0.5, float("nan"), "2", True)),
        (ValueError, "a ProbabilisticActor, contains no flow",
         lambda: policies.guided(box_agent().policy, 1.0)),
        (TypeError, "conditioned=False; this objective needs",
         lambda: loss_of(PLAIN, actor_objective="conditioned_flow")),
        (TypeError, "conditioned=True; this objective needs",
         lambda: loss_of(ON_ADVANTAGE, actor_objective="flow")),
        (TypeError, "no density; train it with actor_objective='conditioned_fl",
         lambda: loss_of(ON_ADVANTAGE)),
        (ValueError, "condition is 'sign'; choose one of 'positive'",
         lambda: ConditionedFlow(condition="sign")),
        (TypeError, r"condition's result.? is None; expected a tensor",
         lambda: flow_loss(lambda advantage: None)(with_draws(4))),
        (ValueError, "condition's result",
         lambda: flow_loss(lambda advantage: advantage[:3])(with_draws())),
        (ValueError, r"condition_dropout is 0; it must lie in \(0, 1\)",
         lambda: ConditionedFlow(condition_dropout=0)),
        (ValueError, r"guidance is 2\.0 and actor_objective is 'auto'",
         lambda: IQLConfig(policy="flow", guidance=2.0)),
    ],
)  # fmt: skip
def test_refusals(error, message, call):
    with pytest.raises(error, match=message):
        call()


def guide(flow, guidance):
    flow.guidance = guidance


def test_a_flow_without_condition_has_no_guidance():
    assert (PLAIN.guidance, ON_ADVANTAGE.guidance) == (None, 1.0)
