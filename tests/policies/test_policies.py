"""Policies: densities against torch and SciPy, actions inside the spec, both interaction types.

``policies.best_of`` against brute force, and the critics of a loss that it may use.
"""

from __future__ import annotations

import copy
import doctest
import io
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_batch, make_networks
from gymnasium import spaces
from one_device import OneDevice
from scipy import stats
from scipy.special import logsumexp
from small_agents import box_agent, config, saved, small_columns
from small_losses import BOX as SPEC
from small_losses import HIGH, LOW, make_step
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

from iql_torchrl import (
    Agent,
    IQLLoss,
    fitted_q_evaluation,
    importance_sampling,
    load_dataset,
    make_agent,
    networks,
    policies,
)
from iql_torchrl.losses import LossCritics
from iql_torchrl.policies import (
    ClippedGaussian,
    ClippedMixture,
    SquashedGaussian,
    actors,
    distributions,
    generative,
)

RANDOM, DETERMINISTIC = KINDS = [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC]
CHOICES = [Categorical(4), OneHot(4)]
CONTINUOUS = {
    "gaussian": lambda: policies.gaussian(5, SPEC, hidden=(8,)),
    "gaussian_std": lambda: policies.gaussian(5, SPEC, state_dependent_std=True, hidden=(8,)),
    "tanh_normal": lambda: policies.tanh_normal(5, SPEC, hidden=(8,)),
    "deterministic": lambda: policies.deterministic(5, SPEC, hidden=(8,)),
    "mixture": lambda: policies.mixture(5, SPEC, num_components=4, hidden=(8,)),
}


CHOOSING = {
    f"{type(spec).__name__}, {key}": partial(
        policies.categorical, 5, spec, mask_key=key, hidden=(8,)
    )
    for spec in CHOICES
    for key in (None, "action_mask")
}


def foreign():
    """TorchRL's own actor, whose samples cannot be made from given noise."""
    net = nn.Sequential(nn.Linear(5, 6), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": LOW, "high": HIGH},
    )


SAMPLED = {name: CONTINUOUS[name] for name in ("gaussian", "tanh_normal", "mixture")}
SAMPLED["flow"] = lambda: policies.flow(5, SPEC, hidden=(8,), num_steps=3)


def observations(*shape: int, scale: float = 5.0) -> TensorDict:
    return TensorDict({"observation": scale * torch.randn(*shape, 5)}, batch_size=shape)


def critic():
    return make_networks(5, 3, hidden=(8,))[1]


@pytest.mark.parametrize("module", [actors, distributions])
def test_examples_of_the_docstrings(module):
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("name", [*CONTINUOUS, "flow", "best of 4"])
@pytest.mark.parametrize("shape", [(), (50,), (4, 6)])
@pytest.mark.parametrize("kind", ExplorationType)
def test_actions_stay_inside_the_spec_and_all_but_random_ones_repeat(name, shape, kind):
    """Observations are so large that values before the squashing are far outside of the bounds."""
    makers = CONTINUOUS | SAMPLED
    makers["best of 4"] = lambda: policies.best_of(SAMPLED["gaussian"](), critic(), 4)
    actor, data = makers[name](), observations(*shape, scale=20.0)
    refused = None
    if kind == ExplorationType.MODE and name == "tanh_normal":
        refused = "closed form of its mean, mode"
    elif kind == ExplorationType.MEDIAN and name in CONTINUOUS:  # as TorchRL's distributions
        refused = "median is not implemented"
    with set_exploration_type(kind), torch.no_grad():
        if refused is not None:
            with pytest.raises(NotImplementedError, match=refused):
                actor(data)
            return
        action, again = (actor(data.clone())["action"] for _ in range(2))
    assert action.shape == (*shape, 3)
    assert SPEC.is_in(action)
    drawn = kind == RANDOM or (kind == ExplorationType.MEAN and name == "tanh_normal")
    repeats = name == "deterministic" or not drawn
    if repeats or shape:  # one random action may be clipped to the same corner twice
        assert torch.equal(action, again) is repeats


def test_gaussian_density_is_the_papers():
    actor = policies.gaussian(5, SPEC, hidden=(8,))
    head = actor.module[0].module
    head.log_std.data.copy_(torch.tensor([-9.0, 0.3, 7.0]))  # clipped to [-5, 2]
    data = observations(16)
    action = LOW + (HIGH - LOW) * torch.rand(16, 3)
    dist = actor.get_dist(data.clone())
    half, out = ((HIGH - LOW) / 2).numpy(), head.mlp(data["observation"]).detach().numpy()
    mean = ((HIGH + LOW) / 2).numpy() + half * np.tanh(out)
    std = np.exp([-5.0, 0.3, 2.0]) * half
    expected = stats.norm(mean, std).logpdf(action.numpy()).sum(-1)
    np.testing.assert_allclose(dist.log_prob(action).detach(), expected, rtol=1e-4)
    assert dist.log_prob(HIGH.expand(16, 3)).isfinite().all()
    torch.testing.assert_close(dist.deterministic_sample, torch.as_tensor(mean))


def test_mixture_density_and_mode():
    actor = policies.mixture(5, SPEC, num_components=4, hidden=(8,))
    head = actor.module[0].module
    head.log_std.data.normal_()
    data = observations(16)
    action = LOW + (HIGH - LOW) * torch.rand(16, 3)
    dist = actor.get_dist(data.clone())
    with torch.no_grad():
        logits, loc, std = head(data["observation"])
    std = std.numpy()
    log_weights = torch.log_softmax(logits, -1).numpy()
    each = stats.norm(loc.numpy(), std).logpdf(action[:, None].numpy()).sum(-1)
    expected = logsumexp(log_weights + each, axis=-1)
    np.testing.assert_allclose(dist.log_prob(action).detach(), expected, rtol=1e-4)
    at_own_mean = log_weights - np.log(std).sum(-1)
    expected_mode = loc[torch.arange(16), torch.as_tensor(at_own_mean.argmax(-1))]
    torch.testing.assert_close(dist.mode.detach(), expected_mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squashed_gaussian_is_torchrls_tanh_normal(dtype):
    low, high = LOW.to(dtype), HIGH.to(dtype)
    loc = (3 * torch.randn(50, 3, dtype=dtype)).requires_grad_()
    scale = torch.rand(50, 3, dtype=dtype).add(0.1).requires_grad_()
    action = low + (high - low) * torch.rand(50, 3, dtype=dtype)
    action[0], action[1] = low, high
    results = []
    for kind in (SquashedGaussian, TanhNormal):
        torch.manual_seed(1)
        dist = kind(loc, scale, low=low, high=high)
        density = dist.log_prob(action)
        gradients = torch.autograd.grad(density.sum(), (loc, scale))
        results.append([density, *gradients, dist.deterministic_sample, dist.sample((7,))])
    torch.testing.assert_close(*results)


def test_the_mean_under_exploration_type_mean_is_that_of_the_samples():
    data = observations(1, scale=1.0)
    for name in ("gaussian", "tanh_normal", "mixture"):
        actor = CONTINUOUS[name]()
        with torch.no_grad(), set_exploration_type(ExplorationType.MEAN):
            mean = actor(data.clone())["action"][0]
        drawn = actor.get_dist(data.clone()).sample((100_000,))
        unit = (HIGH - LOW) / 2
        torch.testing.assert_close(mean / unit, drawn.mean((0, 1)) / unit, atol=0.08, rtol=0)


@pytest.mark.parametrize("spec", CHOICES, ids=["index", "one_hot"])
def test_exploration_types_of_choices(spec):
    actor, data = policies.categorical(5, spec, hidden=(8,)), observations(9)
    with torch.no_grad(), set_exploration_type(ExplorationType.MODE):
        mode = actor(data.clone())["action"]
    with torch.no_grad(), set_exploration_type(DETERMINISTIC):
        assert torch.equal(actor(data.clone())["action"], mode)
    with torch.no_grad(), set_exploration_type(ExplorationType.MEAN):
        if isinstance(spec, OneHot):
            mean = actor(data.clone())["action"]
            torch.testing.assert_close(mean, actor.get_dist(data.clone()).probs)
        else:
            with pytest.raises(RuntimeError, match=r"no mean.*Use ExplorationType.MODE"):
                actor(data.clone())


@pytest.mark.parametrize("name", [*CONTINUOUS, *CHOOSING])
def test_bounds_move_with_the_policy_and_nothing_waits_for_a_device(name):
    actor = (CONTINUOUS | CHOOSING)[name]()
    assert not any("low" in key or "high" in key for key in actor.state_dict())
    moved = copy.deepcopy(actor).to("meta")
    data = observations(8).set("action_mask", torch.ones(8, 4, dtype=torch.bool)).to("meta")
    action = (SPEC if name in CONTINUOUS else CHOOSING[name].args[1]).rand((8,)).to("meta")
    with OneDevice("meta"), torch.no_grad():
        dist = moved.get_dist(data)
        assert dist.log_prob(action).is_meta
        assert dist.deterministic_sample.is_meta
        if name != "deterministic":  # whose distribution, TorchRL's Delta, draws nothing
            assert dist.sample().is_meta
            assert dist.expand((2, 8)).sample().is_meta
        for moment in ("mean", "variance") if name in ("gaussian", "mixture") else ():
            assert getattr(dist, moment).is_meta
    if name in CONTINUOUS:
        for module in actor.modules():
            for bound in getattr(module, "distribution_kwargs", {}).values():
                assert bound.device.type == "cpu"  # the one that was copied stays
        cast = actor.double()
        kinds = {b.dtype for m in cast.modules() for b in getattr(m, "limits", {}).values()}
        assert kinds == {torch.float64}


@pytest.mark.parametrize("name", ["gaussian", "tanh_normal", "mixture"])
def test_bounds_move_with_the_loss(name):
    _, critic, value = make_networks()
    loss = IQLLoss(CONTINUOUS[name](), critic, value)
    bounds = loss.actor_network[-1].distribution_kwargs
    moved = []
    loss._apply(lambda tensor: moved.append(id(tensor)) or tensor)
    assert {id(bounds["low"]), id(bounds["high"])} <= set(moved)
    loss.double()
    assert {bounds[key].dtype for key in ("low", "high")} == {torch.float64}


@pytest.mark.parametrize("spec", CHOICES, ids=["index", "one_hot"])
@pytest.mark.parametrize("kind", KINDS)
def test_categorical_respects_the_mask(spec, kind):
    actor = policies.categorical(5, spec, mask_key="action_mask", hidden=(8,))
    assert set(actor.in_keys) == {"observation", "action_mask"}
    allowed, every = torch.rand(300, 4) < 0.5, torch.arange(300)
    allowed[every, torch.randint(4, (300,))] = True
    with set_exploration_type(kind):
        action = actor(observations(300).set("action_mask", allowed))["action"]
    assert all(spec.is_in(a) for a in action)
    index = action.long().argmax(-1) if isinstance(spec, OneHot) else action
    assert allowed[every, index].all()


def test_categorical_density_without_mask():
    actor = policies.categorical(5, Categorical(4), hidden=(8,))
    data, action = observations(16), torch.randint(4, (16,))
    logits = actor.module[0].module(data["observation"]).detach()
    expected = torch.log_softmax(logits, -1)[torch.arange(16), action]
    torch.testing.assert_close(actor.get_dist(data).log_prob(action).detach(), expected)


@pytest.mark.parametrize("build", [policies.gaussian, policies.tanh_normal, policies.flow])
def test_specs_that_do_not_fit_are_refused(build):
    open_above = Bounded(-torch.ones(3), torch.tensor([1.0, torch.inf, 1.0]), (3,))
    floats = (Bounded(-1, 1, (2, 2)), Composite(action=SPEC), spaces.Box(-1, 1, (2,)))
    whole = (CHOICES[0], Bounded(0, 1, (3,), dtype=torch.int64), Unbounded((3,), dtype=torch.int64))
    kind = "action_spec is {}.*; expected a TorchRL Bounded spec of floats"
    for spec, words in (
        (open_above, r"high \[1, inf, 1\]; dimension 1: no finite upper bound"),
        (Unbounded((3,)), "dimensions 0, 1, 2: no finite bounds"),
        *((spec, kind.format(type(spec).__name__)) for spec in (*floats, *whole, 2, None)),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            build(5, spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="Categorical or OneHot"):
        policies.categorical(5, SPEC)
    for number in (0, 1.5):
        words = f"num_components is {number}; expected an integer"
        with pytest.raises(ValueError, match=words):
            policies.mixture(5, SPEC, num_components=number)


@pytest.mark.parametrize("shape", [(), (7,), (4, 3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [*SAMPLED.values(), foreign])
def test_the_best_of_all_candidates(make, kind, shape):
    critics = [critic(), critic()]
    policy = policies.best_of(make(), critics, 6)
    states = observations(*shape, scale=1.0)
    with set_exploration_type(kind), torch.no_grad():
        torch.manual_seed(3)
        found = policy(states.clone())["action"]
        torch.manual_seed(3)
        candidates = policy.candidates(states.clone())
        torch.manual_seed(3)
        again = policy(states.clone())["action"]
    assert torch.equal(found, again)
    assert candidates.shape == (*shape, 6, 3)
    expected = []
    flat = states["observation"].reshape(-1, 5)
    for state, options in zip(flat, candidates.reshape(-1, 6, 3), strict=True):
        values = [c.module(state.expand(6, 5), options).squeeze(-1).tolist() for c in critics]
        expected.append(options[int(np.argmax(np.min(values, 0)))])
    torch.testing.assert_close(found, torch.stack(expected).view(*shape, 3))
    assert SPEC.is_in(found)
    assert policy.in_keys == ["observation"]


@pytest.mark.parametrize("name", SAMPLED)
def test_candidates_are_samples_of_the_actor(name):
    """Moments of candidates against those of the actor's own samples."""
    actor = SAMPLED[name]()
    policy = policies.best_of(actor, critic(), 20_000)
    state = observations(1, scale=1.0)
    with set_exploration_type(RANDOM), torch.no_grad():
        candidates = policy.candidates(state)[0]
        own = actor(state.expand(20_000).clone())
    for moment in (torch.mean, torch.std):
        a, b = moment(candidates, 0), moment(own["action"], 0)
        torch.testing.assert_close(a, b, atol=0.03, rtol=0.03)


def test_noise_makes_the_samples_of_a_distribution():
    loc, scale = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.5, 0.2]])
    low, high = LOW[:2], HIGH[:2]
    bounds = {"low": low, "high": high}
    noise = torch.tensor([[[1.0, -0.25]], [[9.0, 0.5]]])
    found = ClippedGaussian(loc, scale, **bounds).from_noise(noise)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.05]], [[2.0, 0.2]]]))
    x = loc + scale * noise
    found = SquashedGaussian(loc, scale, **bounds).from_noise(noise)
    limit = 1 - torch.finfo(torch.float32).resolution
    torch.testing.assert_close(
        found, (low + high) / 2 + (high - low) / 2 * x.tanh().clamp(max=limit)
    )
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
    means = torch.tensor([[[-1.0, 0.1], [0.0, 0.2], [1.0, 0.3]]])
    dist = ClippedMixture(logits, means, torch.zeros(1, 3, 2), **bounds)
    for quantile, component in ((0.1, 0), (0.21, 1), (0.49, 1), (0.51, 2), (0.99, 2)):
        last = stats.norm.ppf(quantile)
        found = dist.from_noise(torch.tensor([[[0.0, 0.0, last]]], dtype=torch.float32))
        torch.testing.assert_close(found[0, 0], means[0, component])


def test_softmax_draws_by_value():
    policy = policies.best_of(SAMPLED["gaussian"](), critic(), 4, select="softmax", temperature=3.0)
    state = observations(1, scale=1.0)
    noise = torch.randn(1, 4, 3)
    rows = state.expand(40_000).clone().set("noise", noise.expand(40_000, 4, 3))
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
    torch.testing.assert_close(best, candidates[values.argmax()].expand(3, 3))


def test_many_states_are_evaluated_in_parts(monkeypatch):
    policy = policies.best_of(SAMPLED["flow"](), critic(), 8)
    states = observations(50, scale=1.0)
    with set_exploration_type(DETERMINISTIC), torch.no_grad():
        whole = policy(states.clone())["action"]
        monkeypatch.setattr(generative, "ROWS_AT_ONCE", 60)
        parts = policy(states.clone())["action"]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_samples": 0}, ValueError, "num_samples is 0; expected an integer >= 1"),
        ({"select": "min"}, ValueError, "select is 'min'; choose one of 'max', 'softmax'"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0; expected a finite number >= 0"),
        ({"critics": []}, ValueError, "critics is empty"),
        ({"critics": [networks.Critic(3, 2)]}, TypeError, "critics hold Critic; expected Tens"),
        ({"actor": policies.deterministic(5, SPEC)}, TypeError, "without randomness"),
        ({"actor": nn.Linear(3, 2)}, TypeError, "actor is Linear; expected a TensorDict module"),
    ],
)
def test_refusals_of_best_of(change, error, words):
    arguments = {"actor": SAMPLED["gaussian"](), "critics": critic()} | change
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
    critics, step = LossCritics(loss), make_step(loss)
    assert not any(p.requires_grad for p in critics.parameters())

    def expected(batch):
        loss.qvalue_network.eval()
        found = loss.qvalues(loss.prepare_batch(batch)).amin(0)
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
    agent, dataset = box_agent(), load_dataset(small_columns())
    policy = policies.best_of(agent.actor, LossCritics(agent.loss), 4)
    candidates = {"best of 4": policy, "flow": box_agent(policy="flow").policy}
    options = {"discount": 0.9, "updates": 20, "hidden": (8,)}
    first, second = (fitted_q_evaluation(candidates, dataset, dataset, **options) for _ in range(2))
    assert np.isfinite(first.values).all()
    np.testing.assert_array_equal(first.values, second.values)
    for (name, candidate), kind in zip(candidates.items(), ("BestOf", "FlowPolicy"), strict=True):
        words = (
            f"candidate '{name}', a {kind}, has no density: importance sampling needs the log-prob"
        )
        with pytest.raises(ValueError, match=words):
            importance_sampling({name: candidate}, dataset, behaviour=agent, discount=0.9)


# -- a dimension of the action that is constant


@pytest.mark.parametrize("gap", [0.0, 2e-8])  # equal bounds, and bounds that differ by rounding
@pytest.mark.parametrize("policy", ["gaussian", "tanh_normal", "deterministic", "mixture", "flow"])
def test_a_constant_dimension_of_the_action_stays_constant(policy, gap, tmp_path):
    fixed = np.float32(0.3)
    space = spaces.Box(np.array([-1, fixed], "f4"), np.array([1, fixed + gap], "f4"))
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 2)).astype(np.float32)
    actions[:, 1] = fixed
    data = load_dataset(small_columns(action=actions), action_space=space)
    agent = make_agent(config(policy=policy), data)
    buffer = data.replay_buffer(16, seed=0)
    for _ in range(20):
        metrics = agent.step(buffer.sample())
    assert all(torch.isfinite(metrics[name]) for name in ("loss_actor", "loss_qvalue"))
    seen = data.transitions["observation"].numpy()
    for deterministic in (True, False):
        chosen = agent.act(seen, deterministic=deterministic)
        np.testing.assert_allclose(chosen[:, 1], fixed, rtol=0, atol=2 * gap)
        assert len(np.unique(chosen[:, 0])) > 20
        assert space.contains(chosen[0])
    again = Agent.load(saved(agent, tmp_path / "agent.torchrl"))
    np.testing.assert_array_equal(again.act(seen), agent.act(seen))


@pytest.mark.parametrize("policy", ["gaussian", "tanh_normal", "mixture"])
def test_a_constant_dimension_does_not_change_the_others_density(policy):
    spec = Bounded(torch.tensor([-1.0, 0.3]), torch.tensor([1.0, 0.3]), (2,))
    actor = getattr(policies, policy)(5, spec, hidden=(8,))
    dist = actor.get_dist(observations(6))
    action = torch.tensor([0.5, 0.3]).expand(6, 2)
    value = dist.log_prob(action)
    assert value.isfinite().all()
    varying, still = (torch.tensor(mask).expand(6, 2) for mask in ([True, False], [False, True]))
    assert torch.equal(value, dist.masked_log_prob(action, varying))
    torch.testing.assert_close(dist.masked_log_prob(action, still), torch.zeros(6))
    if policy == "gaussian":  # SciPy's density of the first dimension
        loc, scale = (x[:, 0].detach() for x in (dist.base_dist.loc, dist.base_dist.scale))
        np.testing.assert_allclose(value.detach(), stats.norm.logpdf(0.5, loc, scale), rtol=1e-5)
