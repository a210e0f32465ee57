"""``actor_objective="ddpg_bc"``: by hand, its gradient, masks, and every form of the update."""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import ACT, OBS, make_batch, make_networks
from small_populations import Beside, configs, dataset, extras
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn, optim
from torchrl.data import Bounded
from torchrl.modules import TanhNormal, ValueOperator
from torchrl.objectives import SoftUpdate

from iql_torchrl import DiscreteIQLLoss, IQLLoss, IQLStep, captured, compiled, networks, policies
from iql_torchrl.data import DeviceSampler
from iql_torchrl.losses.parameters import TARGET_CRITICS
from iql_torchrl.private_apis import children_of

SPEC = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))
BOTH = ["observation", "action"]
ACTORS = {
    "gaussian": policies.gaussian,
    "tanh_normal": policies.tanh_normal,
    "mixture": policies.mixture,
    "deterministic": policies.deterministic,
}


def make_loss(policy=policies.gaussian, critic=None, activation=nn.Tanh, **options) -> IQLLoss:
    mlp = {"hidden": (8, 8), "activation": activation}
    critic = critic or (lambda: ValueOperator(networks.Critic(OBS, ACT, **mlp), in_keys=BOTH))
    value = ValueOperator(networks.StateValue(OBS, **mlp), in_keys=["observation"])
    actor = policy if isinstance(policy, nn.Module) else policy(OBS, SPEC, **mlp)
    options = {"actor_objective": "ddpg_bc", "bc_weight": 0.7} | options
    loss = IQLLoss(actor, critic, value, **options).double()
    for key, live in loss.qvalue_network_params.items(True, True):
        target = children_of(loss)[TARGET_CRITICS].get(key).data
        target.add_(0.3 * torch.randn_like(live))
    return loss


def batch(*shape):
    return make_batch(*shape, dtype=torch.float64)


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


def on_paper(**options) -> IQLLoss:
    """pi = (0.5, 0), Q_1 = 1 + 2 a_1 = 2 and Q_2 = -3 + a_1 + 4 a_2 = -2.5."""
    actor = TensorDictModule(Constant([0.5, 0.0]), in_keys=["observation"], out_keys=["action"])
    critics = [
        ValueOperator(Line(1.0, [2.0, 0.0]), in_keys=BOTH),
        ValueOperator(Line(-3.0, [1.0, 4.0]), in_keys=BOTH),
    ]
    value = ValueOperator(networks.StateValue(OBS, hidden=(4,)).double(), in_keys=["observation"])
    return IQLLoss(actor, critics, value, actor_objective="ddpg_bc", bc_weight=0.1, **options)


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
    assert metadata["weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("source", "gap"), [("live", -0.3), ("target", -3.0)])
def test_the_gap_by_hand(source, gap):
    loss = on_paper(q_source=source, q_reduction="mean", diagnostics=True)
    SoftUpdate(loss, tau=0.1)
    for leaf in children_of(loss)[TARGET_CRITICS].values(True, True):
        leaf.data.mul_(10.0)
    data = make_batch(3, act=2, dtype=torch.float64)
    # minimum over critics of the logged actions: -0.9 and -3.5; of the policy's action -2.5
    data["action"] = torch.tensor([[0.5, 0.4], [-0.5, 0.0], [9.0, 9.0]], dtype=torch.float64)
    data["collector", "mask"] = torch.tensor([True, True, False])
    out = loss(data)
    assert float(out["policy_value_gap"]) == pytest.approx(gap, rel=1e-6)
    assert set(out.keys()) == set(loss.out_keys)
    assert not out["policy_value_gap"].requires_grad


def test_only_ddpg_bc_has_the_gap():
    loss = make_loss(actor_objective="log_prob", diagnostics=True)
    assert "policy_value_gap" not in loss.out_keys
    assert "policy_value_gap" not in make_loss().out_keys


def test_the_targets_may_judge():
    live, target = on_paper(), on_paper(q_source="target")
    for loss in (live, target):
        for leaf in children_of(loss)[TARGET_CRITICS].values(True, True):
            leaf.data.mul_(10.0)
    data = make_batch(2, act=2, dtype=torch.float64)
    gradients = []
    for loss in (live, target):
        term, _ = loss.actor_loss(data.clone())
        term.backward()
        gradients.append(loss.actor_network_params["module", "action"].grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # Q / mean|Q| has no scale
    params = children_of(target)[TARGET_CRITICS]
    params["module", "slope"].data.zero_()
    term, _ = target.actor_loss(data)
    assert float(term.detach()) == pytest.approx(1.0 + 0.1 * float(cloning(target, data)), rel=1e-6)


def cloning(loss, data):
    error = torch.tensor([0.5, 0.0], dtype=torch.float64) - data["action"]
    return error.square().sum(-1).mean()


def numeric(loss, data, leaf, entries: int = 4, h: float = 1e-6):
    flat = leaf.data.view(-1)
    slopes = []
    for i in range(min(entries, flat.numel())):
        sides = []
        for sign in (1, -1):
            before = flat[i].clone()
            flat[i] += sign * h
            sides.append(float(unnormalised(loss, data).detach()))
            flat[i] = before
        slopes.append((sides[0] - sides[1]) / (2 * h))
    return torch.tensor(slopes, dtype=torch.float64)


SCALES: WeakKeyDictionary = WeakKeyDictionary()  # an id would come back with another loss


def unnormalised(loss, data):
    """The objective with the scale of the unchanged policy: the scale gets no gradient."""
    read = loss.read(data.clone())
    action, dist = loss.policy_output(read)
    values = []
    for critic in loss.qvalue_network_params.unbind(0):
        with critic.to_module(loss.qvalue_network, preserve_module_state=False):
            inputs = TensorDict(
                {"observation": read.data["observation"], "action": action}, data.batch_size
            )
            values.append(loss.qvalue_network(inputs)["state_action_value"].squeeze(-1))
    q = torch.stack(values).amin(0)
    scale = SCALES.setdefault(loss, float(q.detach().abs().mean()) + 1e-6)
    if loss.actor_network[-1].distribution_class.__name__ == "Delta":
        error = (action - data["action"]).square().sum(-1)
    else:
        error = -dist.log_prob(data["action"])
    return (loss.bc_weight * error - q / scale).mean()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ACTORS)
def test_gradient_against_finite_differences_and_none_for_the_critics(name, fast):

    loss, data = make_loss(ACTORS[name]), batch(16)
    if fast:
        with loss.evaluated_directly():
            term, _ = loss.actor_loss(data.clone())
    else:
        term, _ = loss.actor_loss(data.clone())
    torch.testing.assert_close(term, unnormalised(loss, data), rtol=1e-9, atol=1e-9)
    term.backward()
    actor = [p for n, p in loss.named_parameters() if n.startswith("actor") and p.grad is not None]
    assert len(actor) >= 6
    for leaf in actor:
        expected = numeric(loss, data, leaf)
        torch.testing.assert_close(leaf.grad.view(-1)[:4], expected, rtol=1e-5, atol=1e-7)
    others = [p for n, p in loss.named_parameters() if not n.startswith("actor")]
    assert all(p.grad is None or not p.grad.any() for p in others)


def test_torchrls_own_distribution():
    from tensordict.nn import NormalParamExtractor
    from torchrl.modules import ProbabilisticActor

    body = nn.Sequential(nn.Linear(OBS, 2 * ACT), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -torch.ones(ACT).double(), "high": torch.ones(ACT).double()},
    )
    loss = make_loss(actor)
    term, _ = loss.actor_loss(batch())
    term.backward()
    assert all(p.grad.any() for n, p in loss.named_parameters() if n.startswith("actor"))


def test_masks_and_importance_weights():
    loss, data = make_loss(), batch(6)
    keep = torch.tensor([True, False, True, True, False, True])
    weight = torch.rand(6, 1, dtype=torch.float64) + 0.1
    alone = data[keep].clone()
    padded = data.clone()
    padded["observation"][~keep] = torch.nan
    padded["collector", "mask"] = keep
    torch.testing.assert_close(loss.actor_loss(padded)[0], loss.actor_loss(alone)[0])
    padded["priority_weight"], alone["priority_weight"] = weight, weight[keep]
    torch.testing.assert_close(loss.actor_loss(padded)[0], loss.actor_loss(alone)[0])
    none = make_loss(reduction="none", scalar_output_mode="exclude")
    none.load_state_dict(loss.state_dict())
    each = none.actor_loss(data[keep].clone())[0]
    weights = weight[keep].squeeze(-1)
    expected = (each * weights).sum() / weights.sum()
    torch.testing.assert_close(loss.actor_loss(alone)[0], expected)


def test_temperature_is_unused():
    data = batch()
    terms = []
    for temperature in (0.0, 10.0):
        torch.manual_seed(0)
        terms.append(make_loss(temperature=temperature).actor_loss(data.clone())[0])
    assert torch.equal(*terms)


FORMS = {
    "known": {},
    "one critic": {"num_qvalue_nets": 1},
    "targets, mean": {"q_source": "target", "q_reduction": "mean"},
    "other networks": {"activation": nn.GELU, "policy": policies.mixture},
    "deterministic": {"policy": policies.deterministic},
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("form", "order"),
    [
        ("targets, mean", "simultaneous"),
        pytest.param("known", "sequential", marks=pytest.mark.slow),
        pytest.param("deterministic", "sequential", marks=pytest.mark.slow),
        pytest.param("one critic", "simultaneous", marks=pytest.mark.slow),
        pytest.param("other networks", "sequential", marks=pytest.mark.slow),
    ],
)
def test_compiled_and_captured_equal_eager(form, order):
    compare_forms(FORMS[form], order)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiled_by_inductor(form):
    compare_forms(FORMS[form], "sequential")


def compare_forms(options, order):
    torch._dynamo.reset()
    loss = make_loss(**options, diagnostics=True)
    steps = []
    for each in (loss, copy.deepcopy(loss), copy.deepcopy(loss)):
        optimizer = optim.Adam(each.parameters(), lr=1e-2)
        steps.append(IQLStep(each, optimizer, SoftUpdate(each, tau=0.1), order=order))
    table = batch(50)
    sampler, other = (DeviceSampler(table, 8, seed=3) for _ in range(2))
    fast, call = compiled(steps[1]), captured(steps[2], other, updates=3)
    for _ in range(2):
        call()
        for _ in range(3):
            rows = sampler.sample()
            metrics = steps[0](rows.clone()), fast(rows.clone())
    for name, value in metrics[0].items():
        torch.testing.assert_close(metrics[1][name], value, rtol=1e-8, atol=1e-9, msg=name)
    assert float(metrics[0]["weight_mean"]) == 1.0
    for step in steps[1:]:
        for (name, mine), other in zip(
            steps[0].loss.named_parameters(), step.loss.parameters(), strict=True
        ):
            torch.testing.assert_close(other, mine, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.slow
def test_the_loss_compiles_alone():
    torch._dynamo.reset()
    loss, data = make_loss(), batch()
    SoftUpdate(loss, tau=0.1)
    loss.make_value_estimator()  # torch 2.11 cannot trace the making of the default one
    program = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(program(data.clone())["loss_actor"], loss(data)["loss_actor"])


def test_bfloat16():
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        loss = make_loss().float()
        optimizer = optim.Adam(loss.parameters())
        step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.1), precision=precision)
        torch.manual_seed(1)
        losses.append(step(make_batch(64))["loss_actor"])
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
    assert not torch.equal(*losses)


BC = ({"bc_weight": 0.1}, {"seed": 1, "bc_weight": 2.0}, {"seed": 2, "expectile": 0.9})


@pytest.mark.parametrize("policy", ["gaussian", "deterministic"])
@pytest.mark.parametrize("batches", ["shared", "own"])
@pytest.mark.parametrize("change", [None, extras], ids=["plain", "extras"])
def test_populations(policy, batches, change):
    settings = configs(BC, policy=policy, actor_objective="ddpg_bc")
    beside = Beside(settings, dataset(), batches)
    beside.assert_equal(beside.train(20, change))
    assert beside.population.loss.bc_weight.flatten().tolist() == [0.1, 2.0, 0.3]


def test_refusals():
    with pytest.raises(ValueError, match=r"bc_weight is -1; it must lie in"):
        make_loss(bc_weight=-1)
    with pytest.raises(ValueError, match="q_reduction is 'max'; choose one of 'min', 'mean'"):
        make_loss(q_reduction="max")
    with pytest.raises(ValueError, match="q_source is 'old'; choose one of 'live', 'target'"):
        make_loss(q_source="old")
    _, critic, value = make_networks()
    with pytest.raises(ValueError, match="'ddpg_bc' needs continuous actions; these are discrete"):
        DiscreteIQLLoss(None, critic, value, actor_objective="ddpg_bc")
