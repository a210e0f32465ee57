"""Policies: densities against torch and SciPy, actions inside the spec, both interaction types."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import make_networks
from one_device import OneDevice
from scipy import stats
from scipy.special import logsumexp
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import TanhNormal

from iql_torchrl import IQLLoss, policies
from iql_torchrl.policies import SquashedGaussian

LOW, HIGH = torch.tensor([-2.0, 0.0, -1.0]), torch.tensor([2.0, 0.5, 5.0])
SPEC = Bounded(LOW, HIGH, (3,))
KINDS = [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM]
CHOICES = [Categorical(4), OneHot(4)]
CONTINUOUS = {
    "gaussian": lambda: policies.gaussian(5, SPEC, hidden=(8,)),
    "gaussian_std": lambda: policies.gaussian(5, SPEC, state_dependent_std=True, hidden=(8,)),
    "tanh_normal": lambda: policies.tanh_normal(5, SPEC, hidden=(8,)),
    "deterministic": lambda: policies.deterministic(5, SPEC, hidden=(8,)),
    "mixture": lambda: policies.mixture(5, SPEC, num_components=4, hidden=(8,)),
}


def observations(*shape: int) -> TensorDict:
    return TensorDict({"observation": 5 * torch.randn(*shape, 5)}, batch_size=shape)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("shape", [(), (200,), (4, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_actions_stay_inside_the_spec_and_deterministic_ones_repeat(name, shape, kind):
    actor, data = CONTINUOUS[name](), observations(*shape)
    with set_exploration_type(kind), torch.no_grad():
        action, again = (actor(data.clone())["action"] for _ in range(2))
    assert action.shape == (*shape, 3)
    assert SPEC.is_in(action)
    fixed = name == "deterministic" or kind == ExplorationType.DETERMINISTIC
    if fixed or shape:  # one random action may be clipped to the same corner twice
        assert torch.equal(action, again) is fixed


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
    torch.manual_seed(0)
    low, high = LOW.to(dtype), HIGH.to(dtype)
    loc = (3 * torch.randn(50, 3, dtype=dtype)).requires_grad_()
    scale = torch.rand(50, 3, dtype=dtype).add(0.1).requires_grad_()
    action = low + (high - low) * torch.rand(50, 3, dtype=dtype)
    action[0], action[1] = low, high
    ours = SquashedGaussian(loc, scale, low=low, high=high)
    theirs = TanhNormal(loc, scale, low=low, high=high)
    results = []
    for dist in (ours, theirs):
        torch.manual_seed(1)
        density = dist.log_prob(action)
        gradients = torch.autograd.grad(density.sum(), (loc, scale))
        results.append([density, *gradients, dist.deterministic_sample, dist.sample((7,))])
    torch.testing.assert_close(*results)
    assert ours.expand((2, 50)).log_prob(action).shape == (2, 50)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_bounds_move_with_the_policy(name):
    actor = CONTINUOUS[name]()
    assert not any("low" in key or "high" in key for key in actor.state_dict())
    moved = copy.deepcopy(actor).to("meta")
    data = observations(8).to("meta")
    action = torch.rand(8, 3, device="meta")
    with OneDevice("meta"), torch.no_grad():
        dist = moved.get_dist(data)
        dist.log_prob(action)
        assert dist.deterministic_sample.is_meta
        if name != "deterministic":  # whose distribution, TorchRL's Delta, draws nothing
            assert dist.sample().is_meta
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spec", CHOICES, ids=["index", "one_hot"])
def test_a_choice_waits_for_no_device(spec, masked):
    key = "action_mask" if masked else None
    actor = policies.categorical(5, spec, mask_key=key, hidden=(8,)).to("meta")
    data = observations(8)
    data["action_mask"] = torch.ones(8, 4, dtype=torch.bool)
    data = data.to("meta")
    action = spec.rand((8,)).to("meta")
    with OneDevice("meta"), torch.no_grad():
        dist = actor.get_dist(data)
        assert dist.log_prob(action).is_meta
        assert dist.deterministic_sample.is_meta
        assert dist.sample().is_meta


@pytest.mark.parametrize("spec", CHOICES, ids=["index", "one_hot"])
@pytest.mark.parametrize("kind", KINDS)
def test_categorical_respects_the_mask(spec, kind):
    actor = policies.categorical(5, spec, mask_key="action_mask", hidden=(8,))
    assert set(actor.in_keys) == {"observation", "action_mask"}
    data = observations(300)
    data["action_mask"] = torch.rand(300, 4) < 0.5
    data["action_mask"][torch.arange(300), torch.randint(4, (300,))] = True
    with set_exploration_type(kind):
        action = actor(data)["action"]
    assert all(spec.is_in(a) for a in action)
    index = action.long().argmax(-1) if isinstance(spec, OneHot) else action
    assert data["action_mask"][torch.arange(300), index].all()


def test_categorical_density_without_mask():
    actor = policies.categorical(5, Categorical(4), hidden=(8,))
    data = observations(16)
    action = torch.randint(4, (16,))
    dist = actor.get_dist(data.clone())
    logits = actor.module[0].module(data["observation"]).detach()
    expected = torch.log_softmax(logits, -1)[torch.arange(16), action]
    torch.testing.assert_close(dist.log_prob(action).detach(), expected)


def test_specs_that_do_not_fit_are_refused():
    infinite = Bounded(torch.tensor([-float("inf")]), torch.tensor([1.0]), (1,))
    for spec, words in (
        (Unbounded((3,)), "Bounded"),
        (CHOICES[0], "Bounded"),
        (infinite, "finite"),
    ):
        for build in (policies.gaussian, policies.tanh_normal, policies.deterministic):
            with pytest.raises(ValueError, match=words):
                build(5, spec)
    with pytest.raises(TypeError, match="Categorical or OneHot"):
        policies.categorical(5, SPEC)
    with pytest.raises(ValueError, match="num_components is 0"):
        policies.mixture(5, SPEC, num_components=0)
