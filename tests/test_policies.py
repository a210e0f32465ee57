"""Policies: densities against torch and SciPy, actions inside the spec, both interaction types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl import policies

LOW, HIGH = torch.tensor([-2.0, 0.0, -1.0]), torch.tensor([2.0, 0.5, 5.0])
SPEC = Bounded(LOW, HIGH, (3,))
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
@pytest.mark.parametrize("kind", [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM])
def test_actions_stay_inside_the_spec(name, shape, kind):
    actor = CONTINUOUS[name]()
    with set_exploration_type(kind), torch.no_grad():
        action = actor(observations(*shape))["action"]
    assert action.shape == (*shape, 3)
    assert SPEC.is_in(action)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_deterministic_actions_repeat_and_random_ones_do_not(name):
    actor = CONTINUOUS[name]()
    data = observations(8)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(actor(data.clone())["action"], actor(data.clone())["action"])
    if name != "deterministic":
        with set_exploration_type(ExplorationType.RANDOM):
            assert not torch.equal(actor(data.clone())["action"], actor(data.clone())["action"])


def test_gaussian_density_is_the_papers():
    actor = policies.gaussian(5, SPEC, hidden=(8,))
    head = actor.module[0].module
    head.log_std.data.copy_(torch.tensor([-9.0, 0.3, 7.0]))  # clipped to [-5, 2]
    data = observations(16)
    action = LOW + (HIGH - LOW) * torch.rand(16, 3)
    dist = actor.get_dist(data.clone())
    half = ((HIGH - LOW) / 2).numpy()
    mean = ((HIGH + LOW) / 2).numpy() + half * np.tanh(
        head.mlp(data["observation"]).detach().numpy()
    )
    std = np.exp([-5.0, 0.3, 2.0]) * half
    expected = stats.norm(mean, std).logpdf(action.numpy()).sum(-1)
    np.testing.assert_allclose(dist.log_prob(action).detach(), expected, rtol=1e-4)
    at_bound = dist.log_prob(HIGH.expand(16, 3))
    assert at_bound.isfinite().all()
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


@pytest.mark.parametrize("spec", [Categorical(4), OneHot(4)], ids=["index", "one_hot"])
@pytest.mark.parametrize("kind", [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM])
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
    with pytest.raises(ValueError, match="Bounded"):
        policies.gaussian(5, Unbounded((3,)))
    with pytest.raises(ValueError, match="Bounded"):
        policies.gaussian(5, Categorical(3))
    infinite = Bounded(torch.tensor([-float("inf")]), torch.tensor([1.0]), (1,))
    with pytest.raises(ValueError, match="finite"):
        policies.tanh_normal(5, infinite)
    with pytest.raises(TypeError, match="Categorical or OneHot"):
        policies.categorical(5, SPEC)
    with pytest.raises(ValueError, match="num_components is 0"):
        policies.mixture(5, SPEC, num_components=0)
