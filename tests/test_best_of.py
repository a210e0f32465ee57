"""``policies.best_of`` against brute force; the same seed gives the same bits; the loss's critics."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from conftest import make_batch, make_networks
from scipy import stats
from small_agents import box_agent, log
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SoftUpdate

from iql_torchrl import (
    IQLLoss,
    IQLStep,
    fitted_q_evaluation,
    importance_sampling,
    load_dataset,
    networks,
    policies,
)
from iql_torchrl.losses import LossCritics
from iql_torchrl.policies import ClippedGaussian, ClippedMixture, SquashedGaussian, generative

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 0.5])
SPEC = Bounded(LOW, HIGH, (2,))
RANDOM, DETERMINISTIC = ExplorationType.RANDOM, ExplorationType.DETERMINISTIC


def foreign():
    """TorchRL's own actor, whose samples cannot be made from given noise."""
    net = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": LOW, "high": HIGH},
    )


ACTORS = {
    "flow": lambda: policies.flow(3, SPEC, hidden=(8,), num_steps=3),
    "mixture": lambda: policies.mixture(3, SPEC, hidden=(8,)),
    "gaussian": lambda: policies.gaussian(3, SPEC, hidden=(8,)),
    "tanh_normal": lambda: policies.tanh_normal(3, SPEC, hidden=(8,)),
    "foreign": foreign,
}


def critic():
    net = networks.Critic(3, 2, hidden=(8,))
    return ValueOperator(net, in_keys=["observation", "action"])


def data(*shape):
    return TensorDict({"observation": torch.randn(*shape, 3)}, shape)


@pytest.mark.parametrize("shape", [(), (7,), (4, 3)])
@pytest.mark.parametrize("kind", [RANDOM, DETERMINISTIC])
@pytest.mark.parametrize("name", ACTORS)
def test_the_best_of_all_candidates(name, kind, shape):
    critics = [critic(), critic()]
    policy = policies.best_of(ACTORS[name](), critics, 6)
    states = data(*shape)
    with set_exploration_type(kind), torch.no_grad():
        torch.manual_seed(3)
        found = policy(states.clone())["action"]
        torch.manual_seed(3)
        candidates = policy.candidates(states.clone())
        torch.manual_seed(3)
        again = policy(states.clone())["action"]
    assert torch.equal(found, again)
    assert candidates.shape == (*shape, 6, 2)
    expected = []
    flat = states["observation"].reshape(-1, 3)
    for state, options in zip(flat, candidates.reshape(-1, 6, 2), strict=True):
        values = [c.module(state.expand(6, 3), options).squeeze(-1).tolist() for c in critics]
        expected.append(options[int(np.argmax(np.min(values, 0)))])
    torch.testing.assert_close(found, torch.stack(expected).view(*shape, 2))
    assert SPEC.is_in(found)
    assert policy.in_keys == ["observation"]


@pytest.mark.parametrize("name", ["flow", "mixture", "gaussian", "tanh_normal"])
def test_candidates_are_samples_of_the_actor(name):
    """Moments of candidates against those of the actor's own samples."""
    actor = ACTORS[name]()
    policy = policies.best_of(actor, critic(), 20_000)
    state = data(1)
    with set_exploration_type(RANDOM), torch.no_grad():
        candidates = policy.candidates(state)[0]
        own = actor(data(1).set("observation", state["observation"]).expand(20_000).clone())
    for moment in (torch.mean, torch.std):
        a, b = moment(candidates, 0), moment(own["action"], 0)
        torch.testing.assert_close(a, b, atol=0.03, rtol=0.03)


def test_noise_makes_the_samples_of_a_distribution():
    loc, scale = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.5, 0.2]])
    bounds = {"low": LOW, "high": HIGH}
    noise = torch.tensor([[[1.0, -0.25]], [[9.0, 0.5]]])
    found = ClippedGaussian(loc, scale, **bounds).from_noise(noise)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.05]], [[2.0, 0.2]]]))
    x = loc + scale * noise
    found = SquashedGaussian(loc, scale, **bounds).from_noise(noise)
    limit = 1 - torch.finfo(torch.float32).resolution
    torch.testing.assert_close(
        found, (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * x.tanh().clamp(max=limit)
    )
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
    means = torch.tensor([[[-1.0, 0.1], [0.0, 0.2], [1.0, 0.3]]])
    dist = ClippedMixture(logits, means, torch.zeros(1, 3, 2), **bounds)
    for quantile, component in ((0.1, 0), (0.21, 1), (0.49, 1), (0.51, 2), (0.99, 2)):
        last = stats.norm.ppf(quantile)
        found = dist.from_noise(torch.tensor([[[0.0, 0.0, last]]], dtype=torch.float32))
        torch.testing.assert_close(found[0, 0], means[0, component])


def test_softmax_draws_by_value():
    policy = policies.best_of(ACTORS["gaussian"](), critic(), 4, select="softmax", temperature=3.0)
    state = data(1)
    noise = torch.randn(1, 4, 2)
    rows = state.expand(40_000).clone().set("noise", noise.expand(40_000, 4, 2))
    candidates = policy.candidates(rows[:1])[0]
    with set_exploration_type(RANDOM), torch.no_grad():
        values = policy.values(rows[:1], candidates[None])[0]
        drawn = policy(rows.clone())["action"]
    nearest = (drawn[:, None] - candidates).abs().sum(-1).argmin(-1)  # equal but for rounding
    counts = torch.bincount(nearest, minlength=4).double() / len(drawn)
    expected = torch.softmax(3.0 * values.double(), 0)
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)
    with set_exploration_type(DETERMINISTIC), torch.no_grad():
        best = policy(rows[:3].clone())["action"]
    torch.testing.assert_close(best, candidates[values.argmax()].expand(3, 2))


def test_many_states_are_evaluated_in_parts(monkeypatch):
    policy = policies.best_of(ACTORS["flow"](), critic(), 8)
    states = data(50)
    with set_exploration_type(DETERMINISTIC), torch.no_grad():
        whole = policy(states.clone())["action"]
        monkeypatch.setattr(generative, "ROWS_AT_ONCE", 60)
        parts = policy(states.clone())["action"]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_samples": 0}, ValueError, "num_samples is 0; expected a whole number >= 1"),
        ({"select": "min"}, ValueError, "select is 'min'; choose one of 'max', 'softmax'"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0; expected a finite number >= 0"),
        ({"critics": []}, ValueError, "critics is empty"),
        ({"critics": [networks.Critic(3, 2)]}, TypeError, "critics hold Critic; expected Tens"),
        ({"actor": policies.deterministic(3, SPEC)}, TypeError, "without randomness"),
        ({"actor": nn.Linear(3, 2)}, TypeError, "actor is Linear; expected a TensorDict module"),
    ],
)
def test_refusals(change, error, words):
    arguments = {"actor": ACTORS["gaussian"](), "critics": critic()} | change
    with pytest.raises(error, match=words):
        policies.best_of(**arguments)


@pytest.mark.parametrize("count", [1, 3])
def test_critics_of_a_loss_follow_it_and_copies_do_not(count):
    def normed():
        statistics = networks.Standardise(torch.ones(5), torch.full((5,), 2.0))
        net = networks.Critic(5, 3, hidden=(8,), preprocess=statistics, dropout=0.5)
        return ValueOperator(net, in_keys=["observation", "action"])

    actor, _, value = make_networks()
    loss = IQLLoss(actor, normed, value, num_qvalue_nets=count)
    critics = LossCritics(loss)
    assert not any(p.requires_grad for p in critics.parameters())
    step = IQLStep(loss, torch.optim.Adam(loss.parameters(), lr=1e-2), SoftUpdate(loss, tau=0.1))

    def expected(batch):
        loss.qvalue_network.eval()
        found = loss.action_values(loss.read(batch), "qvalue_network_params").amin(0)
        loss.qvalue_network.train()
        return found.detach().unsqueeze(-1)

    @torch.no_grad()
    def values(which, batch):
        return which(batch.clone())["state_action_value"]

    batch = make_batch()
    torch.testing.assert_close(values(critics, batch), expected(batch))
    buffer = io.BytesIO()
    torch.save(critics, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(critics), torch.load(buffer, weights_only=False)]
    before = values(critics, batch)
    step(make_batch())
    torch.testing.assert_close(values(critics, batch), expected(batch))
    assert not torch.equal(values(critics, batch), before)
    for other in copies:
        assert torch.equal(values(other, batch), before)
    for leaf in loss.qvalue_network_params.values(True, True):  # storage of its own again
        leaf.data = leaf.data.clone() * 2
    torch.testing.assert_close(values(critics, batch), expected(batch))
    loss.double()
    wide = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(values(critics, wide), expected(wide))


def test_fitted_q_accepts_it_and_importance_sampling_refuses_it_in_one_sentence():
    agent = box_agent()
    dataset = load_dataset(log())
    policy = policies.best_of(agent.actor, LossCritics(agent.loss), 4)
    members = {"best of 4": policy, "flow": box_agent(policy="flow").policy}
    options = {"discount": 0.9, "updates": 20, "hidden": (8,)}
    first, second = (fitted_q_evaluation(members, dataset, dataset, **options) for _ in range(2))
    assert np.isfinite(first.values).all()
    np.testing.assert_array_equal(first.values, second.values)
    for name, kind in (("best of 4", "BestOf"), ("flow", "FlowPolicy")):
        words = f"member '{name}', a {kind}, has no density: importance sampling needs the log-prob"
        with pytest.raises(ValueError, match=words):
            importance_sampling({name: members[name]}, dataset, behaviour=agent, discount=0.9)
