"""Networks are called as modules: K critics equal K modules, and what you do to a module is used."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import partial

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch
from small_losses import SPEC, make_step, perturb_targets
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torchrl.data import Categorical
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, ValueEstimators

from iql_torchrl import DiscreteIQLLoss, IQLLoss, compiled, networks, policies
from iql_torchrl.losses.networks import NetworkLoss
from iql_torchrl.losses.parameters import TARGET_CRITICS, ParameterLoss

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
BOTH = ["observation", "action"]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Foreign(nn.Module):
    """A network that is not of this package."""

    def __init__(self, inputs):
        super().__init__()
        self.layers = networks.MLP(inputs, 1, hidden=(8,))

    def forward(self, *inputs):
        return self.layers(torch.cat(inputs, -1)).sin()


class Doubled(nn.Linear):
    """An encoder with parameters."""

    def forward(self, observation):
        return 2 * super().forward(observation)


def of_package(**mlp):
    return lambda: networks.Critic(OBS, ACT, **{"hidden": (8, 8)} | mlp)


def standardise():
    return networks.Standardise(torch.randn(OBS), torch.rand(OBS) + 0.5)


CRITICS = {
    "relu": of_package(),
    "no hidden layer": of_package(hidden=()),
    "gelu and layer norm": of_package(activation=nn.GELU, layer_norm=True),
    "norm after activation": of_package(layer_norm=True, norm_after_activation=True),
    "residual": of_package(residual=True, dropout=0.1),
    "standardised, own statistics": lambda: of_package(preprocess=standardise())(),
    "encoder with parameters": lambda: of_package(preprocess=Doubled(OBS, OBS))(),
    "batch norm": NormedCritic,
    "torchrl": lambda: TorchRLMLP(OBS + ACT, 1, num_cells=[8, 8], activation_class=nn.Tanh),
    "foreign": lambda: Foreign(OBS + ACT),
}


def loss_of(critic="relu", count=3, **options) -> IQLLoss:
    def make():
        return ValueOperator(CRITICS[critic](), in_keys=BOTH)

    loss = IQLLoss(
        policies.gaussian(OBS, SPEC, hidden=(8,)),
        make,
        ValueOperator(networks.StateValue(OBS, hidden=(8,)), in_keys=["observation"]),
        num_qvalue_nets=count,
        **options,
    ).double()
    perturb_targets(loss)
    if critic == "residual":  # whose dropout draws other numbers for each critic
        loss.qvalue_network.eval()
    return loss


def alone(loss, name):
    """The K critics with parameters ``name``, as separate modules."""
    params = loss._modules[name]
    tables = [params] if loss.num_qvalue_nets == 1 else params.data.unbind(0)
    modules = [copy.deepcopy(loss.qvalue_network) for _ in tables]
    for module, table in zip(modules, tables, strict=True):
        for key, leaf in table.items(True, True):
            *path, last = key
            owner, own = module.get_submodule(".".join(path)), leaf.detach().clone()
            is_buffer = last in owner._buffers
            delattr(owner, last)
            owner.register_buffer(last, own) if is_buffer else setattr(
                owner, last, nn.Parameter(own)
            )
    return modules


def check_critics(loss, batch) -> None:
    """Values of both kinds of critics, and gradients, are those of separate modules."""
    for name, source in (("qvalue_network_params", "online"), (TARGET_CRITICS, "target")):
        modules = alone(loss, name)
        expected = torch.stack([m(batch.clone())["state_action_value"] for m in modules])
        if isinstance(loss, DiscreteIQLLoss):
            expected = expected.gather(-1, batch["action"].expand(len(modules), -1).unsqueeze(-1))
        expected = expected.squeeze(-1)
        found = loss.qvalues(loss.prepare_batch(batch.clone()), source)
        torch.testing.assert_close(found, expected, **EXACT)
        if source == "target":
            assert not found.requires_grad
            continue
        weight = torch.randn_like(found)
        loss.zero_grad(set_to_none=True)
        (weight * found).sum().backward()
        (weight * expected).sum().backward()
        for key, leaf in loss.qvalue_network_params.items(True, True):
            if isinstance(leaf, nn.Parameter):
                apart = [m.get_parameter(".".join(key)).grad for m in modules]
                apart = torch.stack(apart) if len(apart) > 1 else apart[0]
                torch.testing.assert_close(leaf.grad, apart, **EXACT)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("critic", CRITICS)
def test_k_critics_equal_k_modules(critic, count):
    shape = (24,) if critic == "batch norm" else (4, 6)
    check_critics(loss_of(critic, count), make_batch(*shape, dtype=torch.float64))


def test_k_discrete_critics_equal_k_modules():
    actor = policies.categorical(OBS, Categorical(4), hidden=(8,))
    critic = networks.DiscreteCritic(OBS, 4, hidden=(8,))
    critic = TensorDictModule(critic, ["observation"], ["state_action_value"])
    value = ValueOperator(networks.StateValue(OBS), in_keys=["observation"])
    loss = DiscreteIQLLoss(actor, critic, value, num_qvalue_nets=3).double()
    batch = make_batch(16, dtype=torch.float64)
    batch["action"] = torch.randint(4, (16,))
    check_critics(loss, batch)


def test_a_loop_over_critics_gives_the_same_losses():
    for critic in ("relu", "foreign"):
        loss, batch = loss_of(critic), make_batch(16, dtype=torch.float64)
        expected = loss(batch.clone())
        loss.deactivate_vmap = True
        for name, value in loss(batch.clone()).items():
            torch.testing.assert_close(value, expected[name], **EXACT)


def load_another_state(loss, assign=False):
    other = copy.deepcopy(loss)
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point() and tensor.ndim:
            tensor.data.add_(0.1 * torch.rand_like(tensor))
    loss.load_state_dict(other.state_dict(), assign=assign)


def let_statistics_differ(loss):
    """Those of the critics, which one module cannot share then."""
    state = loss.state_dict()
    for key, value in state.items():
        if "mean" in key:
            state[key] = value + torch.arange(len(value)).unsqueeze(-1)
    loss.load_state_dict(state)


def write_into(loss):
    for params in (loss.qvalue_network_params, loss._modules[TARGET_CRITICS]):
        for leaf in params.values(True, True):
            leaf.data.mul_(1.5)


CHANGES = {
    "loaded": load_another_state,
    "loaded and assigned": partial(load_another_state, assign=True),
    "statistics that differ": let_statistics_differ,
    "written into": write_into,
    "cast": lambda loss: loss.float().double(),
    "copied": copy.deepcopy,
    "pickled": lambda loss: pickle.loads(pickle.dumps(loss)),
}


@pytest.mark.parametrize("critic", ["relu", "standardised, own statistics", "foreign"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_tensors_is_used(change, critic):
    loss, batch = loss_of(critic), make_batch(8, dtype=torch.float64)
    loss(batch.clone())
    changed = CHANGES[change](loss) or loss
    check_critics(changed, batch)
    with torch.no_grad():
        for leaf in changed.parameters():
            leaf.add_(0.1)
    check_critics(changed, batch)


# -- what you do to a module ------------------------------------------------------------------------


def patch_forward(loss):
    """V is 7 everywhere, and it still has parameters."""
    module = loss.value_network.module
    module.forward = lambda observation: 7.0 + 0 * type(module).forward(module, observation)


def replace_activation(loss):
    for network in (loss.value_network.module, loss.qvalue_network.module):
        network.mlp[1] = nn.Tanh()


def hook_of_module(loss):
    loss.value_network.module.mlp[0].register_forward_hook(lambda m, x, out: out - 1.0)


def global_hook(loss):
    def shift(module, inputs, out):
        return out - 1.0 if isinstance(module, nn.ReLU) else None

    return register_module_forward_hook(shift)


INTERVENTIONS = [patch_forward, replace_activation, hook_of_module, global_hook]


def other_after(change, loss, update, batch):
    """Metrics of an update after ``change``, which are those of the loss, and those without it."""
    before = {k: v.detach() for k, v in loss(batch.clone()).items()}
    handle = change(loss)
    try:
        expected = {k: v.detach() for k, v in loss(batch.clone()).items()}
        metrics = update(batch.clone())
    finally:
        if handle is not None:
            handle.remove()
    assert not torch.equal(expected["loss_value"], before["loss_value"])
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, **EXACT)


@pytest.mark.parametrize("change", INTERVENTIONS)
def test_an_update_evaluates_the_modules_as_the_loss_does(change):
    loss = loss_of(count=2)
    step, batch = make_step(loss, order="simultaneous"), make_batch(dtype=torch.float64)
    step(batch.clone())
    other_after(change, loss, step, batch)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("change", INTERVENTIONS)
def test_a_compiled_update_evaluates_the_modules_as_the_loss_does(change):
    """Changes that come before the update is compiled."""
    torch._dynamo.reset()
    loss = loss_of(count=2)
    step = compiled(make_step(loss, order="simultaneous"))
    other_after(change, loss, step, make_batch(dtype=torch.float64))


# -- the structure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["relu", "foreign"])
def test_few_frames_lead_to_the_critics(critic, monkeypatch):
    """Of this package, from ``target_qvalue`` to ``forward`` of the critics' module."""
    loss, batch = loss_of(critic), make_batch(dtype=torch.float64)
    read, found = loss.prepare_batch(batch), []
    kind = type(loss.qvalue_network.module)
    forward = kind.forward

    def counted(self, *inputs):
        frame, names = sys._getframe(1), []
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("iql_torchrl"):
                names.append(frame.f_code.co_name)
            if names and names[-1] == "target_qvalue":
                break
            frame = frame.f_back
        found.append(names)
        return forward(self, *inputs)

    monkeypatch.setattr(kind, "forward", counted)
    loss.target_qvalue(read)
    assert found
    for names in found:
        assert names[-1] == "target_qvalue"
        assert len(names) <= 5, names


def test_classes_of_the_package_above_the_loss():
    above = [kind for kind in IQLLoss.__mro__[1:] if kind.__module__.startswith("iql_torchrl")]
    assert above == [NetworkLoss, ParameterLoss]
    assert LossModule in ParameterLoss.__bases__


@pytest.mark.parametrize("network", ["package", "foreign"])
def test_v_of_both_states_equals_two_calls(network):
    """A network of this package is called once for s and s', one of yours twice."""
    module = networks.StateValue(OBS, hidden=(8,)) if network == "package" else Foreign(OBS)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    loss = IQLLoss(
        policies.gaussian(OBS, SPEC, hidden=(8,)),
        ValueOperator(networks.Critic(OBS, ACT, hidden=(8,)), in_keys=BOTH),
        ValueOperator(module, in_keys=["observation"]),
    ).double()
    batch = loss.prepare_batch(make_batch(6).double())
    value, next_value = loss.state_and_next_value(batch)
    assert len(calls) == (1 if network == "package" else 2)
    torch.testing.assert_close(value, loss.state_value(batch), **EXACT)
    torch.testing.assert_close(next_value, loss.state_value(batch.next), **EXACT)
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.5)
    assert loss.state_and_next_value(batch)[1] is None
