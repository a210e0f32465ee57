"""Direct evaluation: the same losses, gradients and statistics as the general way, never stale."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch
from small_losses import SPEC, perturb_targets
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from test_sharing import build as build_shared
from torch import nn
from torchrl.data import Categorical, OneHot
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ValueEstimators

from iql_torchrl import DiscreteIQLLoss, IQLLoss, networks, policies
from iql_torchrl.networks.evaluation import Direct

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
OBSERVATION = ["observation"]
BOTH = ["observation", "action"]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def critic_of(features=OBS, **mlp):
    return ValueOperator(networks.Critic(features, ACT, **mlp), in_keys=BOTH)


def value_of(features=OBS, keys=OBSERVATION, **mlp):
    return ValueOperator(networks.StateValue(features, **mlp), in_keys=keys)


def continuous(
    policy=policies.gaussian, count=2, preprocess=lambda: None, mlp=None, critic=None, **options
):
    """An IQLLoss of the package's networks, or with critics of another kind."""
    mlp = {"hidden": (8, 8)} | (mlp or {})
    actor = policy(OBS, SPEC, preprocess=preprocess(), **mlp)
    critic = critic or (lambda: critic_of(preprocess=preprocess(), **mlp))
    value = value_of(preprocess=preprocess(), **mlp)
    return IQLLoss(actor, critic, value, num_qvalue_nets=count, **options)


def discrete(spec=None, count=2, features=OBS, preprocess=lambda: None, mask_key=None, **options):
    mlp = {"hidden": (8, 8)}
    actor = policies.categorical(
        features, spec or Categorical(4), mask_key=mask_key, preprocess=preprocess(), **mlp
    )
    critic = networks.DiscreteCritic(features, 4, preprocess=preprocess(), **mlp)
    critic = TensorDictModule(critic, in_keys=OBSERVATION, out_keys=["state_action_value"])
    value = value_of(features, preprocess=preprocess(), **mlp)
    return DiscreteIQLLoss(actor, critic, value, num_qvalue_nets=count, **options)


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


def siamese():
    """One encoder, used twice by the actor."""
    encoder = nn.Sequential(nn.Linear(OBS, 6), nn.ReLU(), nn.Linear(6, 4))
    first = TensorDictModule(encoder, in_keys=["observation"], out_keys=["here"])
    second = TensorDictModule(encoder, in_keys=["goal"], out_keys=["there"])
    body, last = policies.gaussian(8, SPEC, hidden=(8,))
    head = TensorDictModule(body.module, in_keys=["here", "there"], out_keys=["loc", "scale"])
    actor = ProbabilisticTensorDictSequential(first, second, head, last)
    return IQLLoss(actor, critic_of(hidden=(8,)), value_of(2 * OBS, ["observation", "goal"]))


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
NOT_ACTOR = ("value", "critics")


def case(make=continuous, batch=logged, parts=ALL, **options):
    """A loss, a batch, and which networks are evaluated over parameters of choice."""
    return partial(make, **options), batch, parts


CASES = {
    "gaussian": case(),
    "one critic": case(count=1),
    "five critics": case(count=5),
    "sequences": case(batch=lambda: logged(4, 6), count=5),
    "state-dependent std": case(
        policy=partial(policies.gaussian, state_dependent_std=True), diagnostics=True
    ),
    "tanh normal": case(policy=policies.tanh_normal),
    "mixture": case(policy=policies.mixture),
    "deterministic": case(policy=policies.deterministic, actor_objective="mse"),
    "tanh layers": case(mlp={"activation": nn.Tanh}),
    "other activation": case(parts=(), mlp={"activation": nn.GELU}),
    "layer norm": case(parts=(), mlp={"layer_norm": True}),
    "no hidden layer": case(mlp={"hidden": ()}),
    "dropout": case(parts=(), mlp={"dropout": 0.5}),
    "standardised": case(preprocess=one_mean),
    "standardised, five": case(preprocess=one_mean, count=5),
    "standardised differently": case(parts=("actor", "value"), preprocess=standardise),
    "quantile": case(value_objective="quantile"),
    "sarsa": case(value_objective="sarsa_expectile"),
    "own objective": case(parts=NOT_ACTOR, actor_objective=weighted),
    "objective differentiated twice": case(
        parts=NOT_ACTOR, mlp={"activation": nn.Tanh}, actor_objective=smooth
    ),
    "categorical": case(discrete, chosen),
    "categorical, one critic": case(discrete, chosen, count=1),
    "categorical, masked": case(discrete, partial(chosen, masked=True), mask_key="action_mask"),
    "one-hot actions": case(
        discrete, partial(chosen, one_hot=True), spec=OneHot(4), action_space="one-hot"
    ),
    "one-hot states": case(
        discrete,
        partial(chosen, integers=True),
        features=6,
        preprocess=lambda: networks.OneHot(6),
        count=5,
    ),
    "torchrl": case(torchrl_networks, parts=NOT_ACTOR),
    "torchrl, one critic": case(torchrl_networks, parts=NOT_ACTOR, count=1),
    "batch norm": case(torchrl_networks, parts=(), norm=nn.BatchNorm1d),
    "batch norm, one critic": case(torchrl_networks, parts=(), count=1, norm=nn.BatchNorm1d),
    "batch norm in the critics": case(
        parts=("actor", "value"), critic=lambda: ValueOperator(NormedCritic(), in_keys=BOTH)
    ),
    "unknown networks": case(foreign, parts=("actor",)),
    "one encoder twice": case(siamese, parts=NOT_ACTOR),
}


def fast_parts(loss) -> set[str]:
    """Networks whose perceptron is evaluated over parameters of choice."""
    with loss.evaluated_directly():
        kept = loss.networks
    parts = {"actor": kept.head, "value": kept.value}
    names = {name for name, part in parts.items() if getattr(part, "body", None) is not None}
    own = callable(loss.actor_objective)  # its function gets the loss's own actor
    names -= {"actor"} if own else set()
    critics = all(isinstance(each, Direct) for each in kept.critics.values())
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
    mlp = {"preprocess": nn.Sequential(nn.Linear(OBS, 4), nn.ReLU()), "hidden": (6,)}
    critics = {
        "single": lambda: critic_of(4, **mlp),
        "list": lambda: [critic_of(4, **mlp) for _ in range(count)],
        "factory": lambda: lambda: critic_of(4, **mlp),
    }[form]()
    options = {"num_qvalue_nets": count, "separate_losses": separate}
    return IQLLoss(policies.gaussian(4, SPEC, **mlp), critics, value_of(4, **mlp), **options)


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


@pytest.mark.parametrize(
    ("change", "case"),
    [
        (change, case)
        for change in CHANGES
        for case in ("gaussian", "standardised, five", "one critic", "dropout")
        if case == "standardised, five" or not change.startswith("statistics")
    ],
)
def test_never_stale(change, case):
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
    keys = {"in_keys": ["observation", ("log", "act")], "out_keys": ["state_action_value"]}
    critic = ValueOperator(networks.Critic(OBS, ACT), **keys)
    loss = IQLLoss(policies.gaussian(OBS, SPEC), critic, value)
    loss.set_keys(value="other_value", action=("log", "act"), reward="pay")
    batch = logged()
    batch["log", "act"] = batch.pop("action")
    batch["next", "pay"] = batch["next"].pop("reward")
    check(loss, batch)
    batch["next", "prize"] = batch["next", "pay"] + 1
    loss.set_keys(reward="prize")
    check(loss, batch)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("network", ["qvalue", "value"])
def test_outputs_under_other_names_are_refused_on_every_way(network, activation):
    mlp = {"hidden": (8,), "activation": activation}
    critic, value = critic_of(**mlp), value_of(**mlp)
    if network == "qvalue":
        critic = ValueOperator(critic.module, in_keys=BOTH, out_keys=["q"])
    else:
        value = ValueOperator(value.module, in_keys=OBSERVATION, out_keys=["v"])
    loss = IQLLoss(policies.gaussian(OBS, SPEC, hidden=(8,)), critic, value).double()
    batch = make_batch(8).double()
    for short in (False, True):
        with (
            loss.evaluated_directly() if short else nullcontext(),
            pytest.raises(KeyError, match=r"'state_(action_)?value'"),
        ):
            loss(batch.clone())
    if network == "qvalue":
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
        critics = {name: each.body for name, each in loss.networks.critics.items()}
    assert {id(x) for x in critics["target_qvalue_network_params"].leaves} <= targets
    assert {id(x) for x in critics["qvalue_network_params"].leaves} <= trained


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
