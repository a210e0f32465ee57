"""Direct evaluation: the same losses, gradients and statistics as the general way, never stale."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_sharing import build as build_shared
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ValueEstimators

from iql_torchrl import DiscreteIQLLoss, IQLLoss, networks, policies
from iql_torchrl.networks.evaluation import DirectCritics

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
SPEC = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))
OBSERVATION = ["observation"]
BOTH = ["observation", "action"]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def continuous(policy=policies.gaussian, count=2, preprocess=lambda: None, mlp=None, **options):
    """An IQLLoss of the package's networks."""
    mlp = {"hidden": (8, 8)} | (mlp or {})

    def critic():
        return ValueOperator(
            networks.Critic(OBS, ACT, preprocess=preprocess(), **mlp), in_keys=BOTH
        )

    value = networks.StateValue(OBS, preprocess=preprocess(), **mlp)
    return IQLLoss(
        policy(OBS, SPEC, preprocess=preprocess(), **mlp),
        critic,
        ValueOperator(value, in_keys=OBSERVATION),
        num_qvalue_nets=count,
        **options,
    )


def discrete(spec=None, count=2, features=OBS, preprocess=lambda: None, mask_key=None, **options):
    mlp = {"hidden": (8, 8)}
    actor = policies.categorical(
        features, spec or Categorical(4), mask_key=mask_key, preprocess=preprocess(), **mlp
    )
    critic = networks.DiscreteCritic(features, 4, preprocess=preprocess(), **mlp)
    value = networks.StateValue(features, preprocess=preprocess(), **mlp)
    return DiscreteIQLLoss(
        actor,
        TensorDictModule(critic, in_keys=OBSERVATION, out_keys=["state_action_value"]),
        ValueOperator(value, in_keys=OBSERVATION),
        num_qvalue_nets=count,
        **options,
    )


def torchrl_networks(count=2, norm=None, **options):
    """As TorchRL's documentation builds them."""
    cells = {"num_cells": [8, 8], "activation_class": nn.Tanh}
    if norm is not None:
        cells |= {"norm_class": norm, "norm_kwargs": {"num_features": 8}}
    head = nn.Sequential(TorchRLMLP(OBS, 2 * ACT, **cells), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(head, in_keys=OBSERVATION, out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=SPEC,
        distribution_class=TanhNormal,
    )
    critic = ValueOperator(TorchRLMLP(OBS + ACT, 1, **cells), in_keys=BOTH)
    value = ValueOperator(TorchRLMLP(OBS, 1, **cells), in_keys=OBSERVATION)
    return IQLLoss(actor, critic, value, num_qvalue_nets=count, **options)


class Foreign(nn.Module):
    """A network that nobody knows."""

    def __init__(self, inputs, scale=1.0):
        super().__init__()
        self.layers, self.scale = networks.MLP(inputs, 1, hidden=(8,)), scale

    def forward(self, *inputs):
        return self.layers(torch.cat(inputs, -1)).sin() * self.scale


class Doubled(nn.Module):
    def forward(self, observation):
        return observation * 2


def foreign():
    return IQLLoss(
        policies.gaussian(OBS, SPEC, hidden=(8,), preprocess=Doubled()),
        lambda: ValueOperator(Foreign(OBS + ACT), in_keys=BOTH),
        ValueOperator(Foreign(OBS), in_keys=OBSERVATION),
    )


def with_critics(critics, **options):
    """The package's actor and V with critics of another kind."""
    actor = policies.gaussian(OBS, SPEC, hidden=(8, 8))
    value = ValueOperator(networks.StateValue(OBS, hidden=(8, 8)), in_keys=OBSERVATION)
    return IQLLoss(actor, critics, value, **options)


def siamese():
    """One encoder, used twice by the actor."""
    encoder = nn.Sequential(nn.Linear(OBS, 6), nn.ReLU(), nn.Linear(6, 4))
    first = TensorDictModule(encoder, in_keys=["observation"], out_keys=["here"])
    second = TensorDictModule(encoder, in_keys=["goal"], out_keys=["there"])
    head = TensorDictModule(
        policies.gaussian(8, SPEC, hidden=(8,))[0].module,
        in_keys=["here", "there"],
        out_keys=["loc", "scale"],
    )
    last = policies.gaussian(8, SPEC, hidden=(8,))[1]
    actor = ProbabilisticActor(
        TensorDictSequential(first, second, head),
        in_keys=["loc", "scale"],
        spec=SPEC,
        distribution_class=last.distribution_class,
        distribution_kwargs=last.distribution_kwargs,
    )
    critic = ValueOperator(networks.Critic(OBS, ACT, hidden=(8,)), in_keys=BOTH)
    value = ValueOperator(networks.StateValue(2 * OBS), in_keys=["observation", "goal"])
    return IQLLoss(actor, critic, value)


def standardise():
    return networks.Standardise(torch.randn(OBS), torch.rand(OBS) + 0.5)


def one_mean():
    return networks.Standardise(torch.arange(OBS) * 0.1, torch.full((OBS,), 0.5))


def logged(*shape):
    batch = make_batch(*shape, dtype=torch.float64)
    for part in (batch, batch["next"]):
        part["goal"] = torch.randn(*batch.batch_size, OBS)
    return batch


def chosen(one_hot=False, integers=False, masked=False):
    """Logged steps with one of four actions."""
    batch = logged(32)
    action = torch.randint(4, (32,))
    batch["action"] = nn.functional.one_hot(action, 4).bool() if one_hot else action
    for part in (batch, batch["next"]):
        if integers:
            part["observation"] = torch.randint(6, (32,))
        if masked:
            mask = torch.rand(32, 4) < 0.5
            part["action_mask"] = mask.scatter(-1, action.unsqueeze(-1), True)
    return batch


def weighted(actor, batch):
    """An objective of the user's own."""
    return (actor.get_dist(batch).mean - batch["action"]).abs().sum(-1)


def smooth(actor, batch):
    """One that takes the network apart and differentiates twice."""
    observation = batch["observation"].requires_grad_()
    loc, _ = actor[0].module(observation)
    (slope,) = torch.autograd.grad(loc.square().sum(), observation, create_graph=True)
    return slope.square().sum(-1)


ALL = ("actor", "value", "critics")
CASES = {
    "gaussian": (continuous, logged, ALL),
    "one critic": (lambda: continuous(count=1), logged, ALL),
    "five critics": (lambda: continuous(count=5), logged, ALL),
    "sequences": (lambda: continuous(count=5), lambda: logged(4, 6), ALL),
    "state-dependent std": (
        lambda: continuous(
            lambda *a, **k: policies.gaussian(*a, **k, state_dependent_std=True), diagnostics=True
        ),
        logged,
        ALL,
    ),
    "tanh normal": (lambda: continuous(policies.tanh_normal), logged, ALL),
    "mixture": (lambda: continuous(policies.mixture), logged, ALL),
    "deterministic": (
        lambda: continuous(policies.deterministic, actor_objective="mse"),
        logged,
        ALL,
    ),
    "tanh layers": (lambda: continuous(mlp={"activation": nn.Tanh}), logged, ALL),
    "other activation": (
        lambda: continuous(mlp={"activation": nn.GELU}),
        logged,
        (),
    ),
    "layer norm": (lambda: continuous(mlp={"layer_norm": True}), logged, ()),
    "no hidden layer": (lambda: continuous(mlp={"hidden": ()}), logged, ALL),
    "dropout": (lambda: continuous(mlp={"dropout": 0.5}), logged, ()),
    "standardised": (lambda: continuous(preprocess=one_mean), logged, ALL),
    "standardised, five": (lambda: continuous(preprocess=one_mean, count=5), logged, ALL),
    "standardised differently": (
        lambda: continuous(preprocess=standardise),
        logged,
        ("actor", "value"),
    ),
    "quantile": (lambda: continuous(value_objective="quantile"), logged, ALL),
    "sarsa": (lambda: continuous(value_objective="sarsa_expectile"), logged, ALL),
    "own objective": (lambda: continuous(actor_objective=weighted), logged, ("value", "critics")),
    "objective differentiated twice": (
        lambda: continuous(mlp={"activation": nn.Tanh}, actor_objective=smooth),
        logged,
        ("value", "critics"),
    ),
    "categorical": (discrete, chosen, ALL),
    "categorical, one critic": (lambda: discrete(count=1), chosen, ALL),
    "categorical, masked": (
        lambda: discrete(mask_key="action_mask"),
        lambda: chosen(masked=True),
        ALL,
    ),
    "one-hot actions": (
        lambda: discrete(OneHot(4), action_space="one-hot"),
        lambda: chosen(one_hot=True),
        ALL,
    ),
    "one-hot states": (
        lambda: discrete(features=6, preprocess=lambda: networks.OneHot(6), count=5),
        lambda: chosen(integers=True),
        ALL,
    ),
    "torchrl": (torchrl_networks, logged, ("value", "critics")),
    "torchrl, one critic": (lambda: torchrl_networks(count=1), logged, ("value", "critics")),
    "batch norm": (lambda: torchrl_networks(norm=nn.BatchNorm1d), logged, ()),
    "batch norm, one critic": (
        lambda: torchrl_networks(count=1, norm=nn.BatchNorm1d),
        logged,
        (),
    ),
    "batch norm in the critics": (
        lambda: with_critics(lambda: ValueOperator(NormedCritic(), in_keys=BOTH)),
        logged,
        ("actor", "value"),
    ),
    "unknown networks": (foreign, logged, ("actor",)),
    "one encoder twice": (siamese, logged, ("value", "critics")),
}


def perturb_targets(loss) -> None:
    """Move targets off the live critics; buffers are the live ones'."""
    for key, live in loss.qvalue_network_params.items(True, True):
        if isinstance(live, nn.Parameter):
            target = loss.target_qvalue_network_params.get(key)
            target.data.add_(0.1 * torch.randn(target.shape))


def fast_parts(loss) -> set[str]:
    """Networks whose perceptron is evaluated over parameters of choice."""
    with loss.evaluated_directly():
        kept = loss.networks
    parts = {"actor": kept.head, "value": kept.value}
    names = {name for name, part in parts.items() if getattr(part, "body", None) is not None}
    own = callable(loss.actor_objective)  # its function gets the loss's own actor
    names -= {"actor"} if own else set()
    critics = all(isinstance(each, DirectCritics) for each in kept.critics.values())
    return names | ({"critics"} if critics else set())


def everything(loss, batch) -> dict[str, torch.Tensor]:
    """Losses and what they tell, of both orders; gradients; buffers afterwards."""
    loss.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    read = loss.read(batch)
    losses, metadata = loss.terms(read)
    found = {**losses, **metadata, **loss.summary(read, metadata)}
    sum(losses.values()).backward()
    value, next_value = loss.state_values(read)
    found["value again"] = value
    found["target"] = loss.td_target(read, next_value)
    loss_actor, _ = loss.actor_term(read, loss.target_qvalue(read) - value)
    loss_actor.backward()
    found |= {f"gradient of {n}": p.grad for n, p in loss.named_parameters()}
    return found | {f"buffer {n}": b.clone() for n, b in loss.named_buffers()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(
                found[name], value, **EXACT, equal_nan=True, msg=lambda m, n=name: n + m
            )


def check(loss, batch) -> None:
    """Inside ``evaluated_directly`` all is as outside, for a loss that was used so before or not."""
    _ = loss.value_estimator  # holds a buffer
    buffers = [buffer.clone() for buffer in loss.buffers()]
    expected = everything(loss, batch.clone())
    for buffer, before in zip(loss.buffers(), buffers, strict=True):
        buffer.data.copy_(before)
    with loss.evaluated_directly():
        found = everything(loss, batch.clone())
    assert_same(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_general_path(case):
    make_loss, make, parts = CASES[case]
    loss = make_loss().double()
    perturb_targets(loss)
    assert fast_parts(loss) == set(parts)
    check(loss, make())
    for network in (loss.actor_network, loss.qvalue_network, loss.value_network):
        network.eval()
    check(loss, make())
    loss.value_network.train()
    check(loss, make())


def trunk_in_all(form, separate, count):
    """Actor, critics and V over one encoder, of modules that are known."""
    trunk = nn.Sequential(nn.Linear(OBS, 4), nn.ReLU())

    def critic():
        net = networks.Critic(4, ACT, hidden=(6,), preprocess=trunk)
        return ValueOperator(net, in_keys=BOTH)

    critics = {
        "single": critic,
        "list": lambda: [critic() for _ in range(count)],
        "factory": lambda: critic,
    }[form]()
    value = networks.StateValue(4, hidden=(6,), preprocess=trunk)
    return IQLLoss(
        policies.gaussian(4, SPEC, hidden=(6,), preprocess=trunk),
        critics,
        ValueOperator(value, in_keys=OBSERVATION),
        num_qvalue_nets=count,
        separate_losses=separate,
    )


@pytest.mark.parametrize(
    "make", [trunk_in_all, lambda *a: build_shared(a[0], a[1], "all", a[2])[1]]
)
@pytest.mark.parametrize("form", ["single", "list", "factory"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_shared_trunks(make, form, separate, count):
    loss = make(form, separate, count).double()
    perturb_targets(loss)
    check(loss, logged())
    with torch.no_grad():
        next(loss.actor_network_params.parameters()).add_(1.0)
    check(loss, logged())


def other_state(loss, assign=False):
    other = copy.deepcopy(loss)
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(torch.rand(tensor.shape, dtype=tensor.dtype).mean())
    loss.load_state_dict(other.state_dict(), assign=assign)


def critics_drift_apart(loss):
    state = loss.state_dict()
    key = "qvalue_network_params.module.preprocess.mean"
    state[key] = state[key] + torch.arange(len(state[key])).unsqueeze(-1)
    loss.load_state_dict(state)


def write_into(loss):
    for params in (loss.qvalue_network_params, loss.value_network_params):
        for leaf in params.values(True, True):
            leaf.data.mul_(1.5)


def part_by_part(loss):
    for name in ("actor", "qvalue", "value", "target_qvalue"):
        params = loss._modules[f"{name}_network_params"]
        params.load_state_dict({k: v * 0.9 for k, v in params.state_dict().items()})


def renamed(loss):
    loss.set_keys(reward="other_reward", value="other_value")
    loss.value_network.out_keys = ["other_value"]


def with_(name, value):
    return lambda loss: setattr(loss, name, value)


CHANGES = {
    "load_state_dict": other_state,
    "load_state_dict, assigned": lambda loss: other_state(loss, assign=True),
    "statistics that differ between critics": critics_drift_apart,
    "written into": write_into,
    "part by part": part_by_part,
    "cast": lambda loss: loss.to(torch.float64).to(torch.float32).double(),
    "a part cast": lambda loss: loss.value_network_params.float().double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "reset": lambda loss: loss.reset_parameters_recursive(),
    "frozen": lambda loss: [loss.value_network_params.requires_grad_(False)],
    "eval": lambda loss: [loss.eval(), loss.actor_network.eval(), loss.value_network.eval()],
    "estimator": lambda loss: loss.make_value_estimator(ValueEstimators.TD1, gamma=0.5) and None,
    "objective": with_("actor_objective", weighted),
    "temperature": with_("temperature", 0.5),
}


@pytest.mark.parametrize("case", ["gaussian", "standardised, five", "one critic", "dropout"])
@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change, case):
    if change.startswith("statistics") and "standardised" not in case:
        pytest.skip("only critics with statistics")
    make_loss, make, _ = CASES[case]
    loss = make_loss().double()
    if change == "reset":  # which Standardise lacks
        loss = loss if "standard" not in case else continuous(count=5).double()
    check(loss, make())
    changed = CHANGES[change](loss)
    check(loss, make())
    if isinstance(changed, IQLLoss) and changed is not loss:
        with torch.no_grad():
            for leaf in loss.parameters():
                leaf.add_(1.0)
        check(changed, make())


def test_renamed_keys():
    value = ValueOperator(networks.StateValue(OBS), in_keys=OBSERVATION, out_keys=["other_value"])
    critic = ValueOperator(
        networks.Critic(OBS, ACT),
        in_keys=["observation", ("log", "act")],
        out_keys=["state_action_value"],
    )
    actor = policies.gaussian(OBS, SPEC)
    loss = IQLLoss(actor, critic, value)
    loss.set_keys(value="other_value", action=("log", "act"), reward="pay")
    batch = logged()
    batch["log", "act"] = batch.pop("action")
    batch["next", "pay"] = batch["next"].pop("reward")
    check(loss, batch)
    batch["next", "prize"] = batch["next", "pay"] + 1
    loss.set_keys(reward="prize")
    check(loss, batch)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_outputs_under_other_names_are_refused_on_every_way(activation):
    net = {"hidden": (8,), "activation": activation}
    critic = ValueOperator(networks.Critic(OBS, ACT, **net), in_keys=["observation", "action"])
    other = ValueOperator(
        networks.Critic(OBS, ACT, **net), in_keys=["observation", "action"], out_keys=["q"]
    )
    value = ValueOperator(networks.StateValue(OBS, **net), in_keys=["observation"])
    elsewhere = ValueOperator(
        networks.StateValue(OBS, **net), in_keys=["observation"], out_keys=["v"]
    )
    batch = make_batch(8).double()
    for critics, state in ((other, value), (critic, elsewhere)):
        loss = IQLLoss(policies.gaussian(OBS, SPEC, hidden=(8,)), critics, state).double()
        for short in (False, True):
            with (
                loss.evaluated_directly() if short else nullcontext(),
                pytest.raises(KeyError, match=r"'state_(action_)?value'"),
            ):
                loss(batch.clone())
    loss = IQLLoss(policies.gaussian(OBS, SPEC, hidden=(8,)), other, value).double()
    with (
        pytest.raises(KeyError, match="qvalue_network writes no"),
        loss.evaluated_directly(),
    ):
        loss(batch.clone())
    loss.set_keys(state_action_value="q")
    check(loss, batch)


def test_two_statistics_are_told_apart():
    """Two critics with statistics of their own cannot share a first layer."""
    loss = continuous(preprocess=one_mean).double()
    assert "critics" in fast_parts(loss)
    critics_drift_apart(loss)
    assert "critics" not in fast_parts(loss)
    check(loss, logged())


def test_the_direct_evaluation_is_used(monkeypatch):
    loss = continuous().double()
    monkeypatch.setattr(torch, "vmap", None)
    with loss.evaluated_directly():
        everything(loss, logged())
    assert loss.direct is None
    with pytest.raises(TypeError):
        everything(loss, logged())


def test_the_tensors_are_those_of_the_loss():
    """Two tensors on one memory, one read and one written, are copied by a compiled update."""
    loss = continuous()
    targets = {id(leaf) for leaf in loss.target_qvalue_network_params.values(True, True)}
    trained = {id(leaf) for leaf in loss.parameters()}
    with loss.evaluated_directly():
        critics = {name: each.critics.body for name, each in loss.networks.critics.items()}
    assert {id(x) for x in critics["target_qvalue_network_params"].leaves} <= targets
    assert {id(x) for x in critics["qvalue_network_params"].leaves} <= trained


def test_modes_are_followed():
    loss = continuous(mlp={"dropout": 0.5}).double()
    batch = logged()

    def value():
        with loss.evaluated_directly():
            return loss.state_value(loss.read(batch))

    assert not torch.equal(value(), value())
    loss.value_network.eval()
    torch.testing.assert_close(value(), value(), rtol=0, atol=0)
    loss.value_network.train()
    assert not torch.equal(value(), value())


def test_hooks_put_on_before_are_called():
    loss = continuous().double()
    seen = []
    loss.value_network.module.mlp[0].register_forward_hook(lambda *_: seen.append(1))
    assert fast_parts(loss) == {"actor", "critics"}
    check(loss, logged())
    assert seen


def test_an_error_inside_restores_the_general_way():
    loss = continuous().double()
    with pytest.raises(KeyError, match="reward"), loss.evaluated_directly():
        loss.read(logged().exclude(("next", "reward")))
    assert loss.direct is None


def test_gradients_can_be_differentiated_again_outside():
    loss = continuous(mlp={"activation": nn.Tanh}).double()
    parameters = list(loss.value_network_params.parameters())

    def penalty():
        out = loss(logged())["loss_value"]
        found = torch.autograd.grad(out, parameters, create_graph=True)
        return sum(g.square().sum() for g in found)

    assert any(bool(g.any()) for g in torch.autograd.grad(penalty(), parameters))
    with loss.evaluated_directly(), pytest.raises(RuntimeError, match="once_differentiable"):
        penalty().backward()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_batches_of_one_and_without_a_dimension(shape):
    loss = continuous().double()
    check(loss, logged(32)[0] if shape == () else logged(32)[: shape[0]])
