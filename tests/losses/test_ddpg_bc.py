"""``losses.DDPGBC``: by hand, its gradient, and masks."""

from __future__ import annotations

import pytest
import torch
from conftest import ACT, OBS, make_batch, make_networks
from small_losses import ddpg_loss
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

from iql_torchrl import IQLLoss, policies
from iql_torchrl.losses import DDPGBC
from iql_torchrl.losses.networks import TARGET_CRITICS

ACTORS = [policies.gaussian, policies.tanh_normal, policies.mixture, policies.deterministic]


def batch(*shape):
    return make_batch(*shape, dtype=torch.float64)


def targets_of(loss):
    return loss._modules[TARGET_CRITICS]


class Constant(nn.Module):
    """An actor that ignores the state, so that numbers can be computed on paper."""

    def __init__(self, action):
        super().__init__()
        self.action = nn.Parameter(torch.tensor(action, dtype=torch.float64))

    def forward(self, observation):
        return self.action.expand(len(observation), -1)


class Line(nn.Module):
    """Q(s, a) = offset + slope . a"""

    def __init__(self, offset, slope):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))

    def forward(self, observation, action):
        return self.offset + (action * self.slope).sum(-1, keepdim=True)


def on_paper(q_reduction="min", q_source="online", **options) -> IQLLoss:
    """pi = (0.5, 0), Q_1 = 1 + 2 a_1 = 2 and Q_2 = -3 + a_1 + 4 a_2 = -2.5."""
    actor = TensorDictModule(Constant([0.5, 0.0]), in_keys=["observation"], out_keys=["action"])
    value = make_networks(hidden=(4,))[2].double()
    critics = [
        ValueOperator(Line(*line), in_keys=["observation", "action"])
        for line in ((1.0, [2.0, 0.0]), (-3.0, [1.0, 4.0]))
    ]
    objective = DDPGBC(bc_weight=0.1, q_reduction=q_reduction, q_source=q_source)
    return IQLLoss(actor, critics, value, actor_objective=objective, **options)


@pytest.mark.parametrize(
    ("reduction", "value", "slope"), [("min", -2.5, (1.0, 4.0)), ("mean", -0.25, (1.5, 2.0))]
)
def test_by_hand(reduction, value, slope):
    loss = on_paper(q_reduction=reduction)
    data = make_batch(2, act=2, dtype=torch.float64)
    data["action"] = torch.tensor([[0.5, 0.4], [-0.5, 0.0]], dtype=torch.float64)
    term, metadata = loss.actor_loss(data)
    scale = abs(value) + 1e-6
    clone = (0.16 + 1.0) / 2  # mean over the batch of sums over action dimensions
    assert float(term.detach()) == pytest.approx(-value / scale + 0.1 * clone, rel=1e-7)
    term.backward()
    gradient = loss.actor_network_params["module", "action"].grad
    # d clone / d a = mean of 2 (pi - a)
    expected = [-slope[0] / scale + 0.1 * 1.0, -slope[1] / scale + 0.1 * -0.4]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-7)  # actions are made in float32
    assert "weight" not in metadata


@pytest.mark.parametrize(("source", "gap"), [("online", -0.3), ("target", -3.0)])
def test_the_gap_by_hand(source, gap):
    loss = on_paper(q_source=source, q_reduction="mean", diagnostics=True)
    for leaf in targets_of(loss).values(True, True):
        leaf.data.mul_(10.0)
    data = make_batch(3, act=2, dtype=torch.float64)
    # minimum over critics of the dataset actions: -0.9 and -3.5; of the policy's action -2.5
    data["action"] = torch.tensor([[0.5, 0.4], [-0.5, 0.0], [9.0, 9.0]], dtype=torch.float64)
    data["collector", "mask"] = torch.tensor([True, True, False])
    out = loss(data)
    assert float(out["policy_value_gap"]) == pytest.approx(gap, rel=1e-6)
    assert set(out.keys()) == set(loss.out_keys)
    assert not out["policy_value_gap"].requires_grad


def test_only_ddpg_bc_has_the_gap():
    for options in ({"actor_objective": "log_prob", "diagnostics": True}, {}):
        assert "policy_value_gap" not in ddpg_loss(**options).out_keys


def test_target_critics_may_be_the_source():
    online, target = on_paper(), on_paper(q_source="target")
    for loss in (online, target):
        for leaf in targets_of(loss).values(True, True):
            leaf.data.mul_(10.0)
    data = make_batch(2, act=2, dtype=torch.float64)
    gradients = []
    for loss in (online, target):
        term, _ = loss.actor_loss(data.clone())
        term.backward()
        gradients.append(loss.actor_network_params["module", "action"].grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # Q / mean|Q| has no scale
    targets_of(target)["module", "slope"].data.zero_()
    term, _ = target.actor_loss(data)
    clone = (torch.tensor([0.5, 0.0]) - data["action"]).square().sum(-1).mean()
    assert float(term.detach()) == pytest.approx(1.0 + 0.1 * float(clone), rel=1e-6)


def numeric(loss, data, leaf, scale, entries: int = 4, h: float = 1e-6):
    """Central differences of the first entries of ``leaf``."""
    flat, slopes = leaf.data.view(-1), []
    for i in range(min(entries, flat.numel())):
        before, sides = flat[i].clone(), []
        for sign in (1, -1):
            flat[i] = before + sign * h
            sides.append(float(objective(loss, data, scale)[0].detach()))
        flat[i] = before
        slopes.append((sides[0] - sides[1]) / (2 * h))
    return torch.tensor(slopes, dtype=torch.float64)


def objective(loss, data, scale=None):
    """The objective, and its scale, which gets no gradient: that of the policy where it is None."""
    read = loss.prepare_batch(data.clone())
    action, dist = loss.policy_output(read)
    values = []
    for critic in loss.qvalue_network_params.unbind(0):
        with critic.to_module(loss.qvalue_network, preserve_module_state=False):
            inputs = {"observation": read.data["observation"], "action": action}
            out = loss.qvalue_network(TensorDict(inputs, data.batch_size))
            values.append(out["state_action_value"].squeeze(-1))
    q = torch.stack(values).amin(0)
    scale = float(q.detach().abs().mean()) + 1e-6 if scale is None else scale
    if loss.actor_network[-1].distribution_class.__name__ == "Delta":
        error = (action - data["action"]).square().sum(-1)
    else:
        error = -dist.log_prob(data["action"])
    return (loss.actor_objective.bc_weight * error - q / scale).mean(), scale


@pytest.mark.parametrize("policy", ACTORS)
def test_gradient_against_finite_differences_and_none_for_the_critics(policy):
    loss, data = ddpg_loss(policy=policy), batch(16)
    term, _ = loss.actor_loss(data.clone())
    expected, scale = objective(loss, data)
    torch.testing.assert_close(term, expected, rtol=1e-9, atol=1e-9)
    term.backward()
    actor = [p for n, p in loss.named_parameters() if n.startswith("actor") and p.grad is not None]
    assert len(actor) >= 6
    for leaf in actor:
        expected = numeric(loss, data, leaf, scale)
        torch.testing.assert_close(leaf.grad.view(-1)[:4], expected, rtol=1e-5, atol=1e-7)
    others = [p for n, p in loss.named_parameters() if not n.startswith("actor")]
    assert all(p.grad is None or not p.grad.any() for p in others)


def test_torchrls_own_distribution():
    body = nn.Sequential(nn.Linear(OBS, 2 * ACT), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -torch.ones(ACT).double(), "high": torch.ones(ACT).double()},
    )
    loss = ddpg_loss(policy=actor)
    term, _ = loss.actor_loss(batch())
    term.backward()
    assert all(p.grad.any() for n, p in loss.named_parameters() if n.startswith("actor"))


def test_masks_and_importance_weights():
    loss, data = ddpg_loss(), batch(6)
    keep = torch.tensor([True, False, True, True, False, True])
    weight = torch.rand(6, 1, dtype=torch.float64) + 0.1
    alone = data[keep].clone()
    padded = data.clone()
    padded["observation"][~keep] = torch.nan
    padded["collector", "mask"] = keep
    torch.testing.assert_close(loss.actor_loss(padded)[0], loss.actor_loss(alone)[0])
    padded["priority_weight"], alone["priority_weight"] = weight, weight[keep]
    torch.testing.assert_close(loss.actor_loss(padded)[0], loss.actor_loss(alone)[0])
    none = ddpg_loss(reduction="none", scalar_output_mode="exclude")
    none.load_state_dict(loss.state_dict())
    each = none.actor_loss(data[keep].clone())[0]
    weights = weight[keep].squeeze(-1)
    expected = (each * weights).sum() / weights.sum()
    torch.testing.assert_close(loss.actor_loss(alone)[0], expected)
