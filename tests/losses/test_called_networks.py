"""Networks are called as modules: K critics equal K modules, and what you do to a module is used."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import partial

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch, make_networks
from small_losses import assert_same_metrics, discrete_networks, make_step, perturb_targets
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, ValueEstimators

from iql_torchrl import DiscreteIQLLoss, IQLLoss, compiled, networks
from iql_torchrl.losses.networks import TARGET_CRITICS

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
    "first layer with hidden layers": lambda: of_package(preprocess=networks.MLP(OBS, OBS))(),
    "batch norm before": lambda: of_package(preprocess=nn.BatchNorm1d(OBS, affine=False))(),
    "batch norm": NormedCritic,
    "torchrl": lambda: TorchRLMLP(OBS + ACT, 1, num_cells=[8, 8], activation_class=nn.Tanh),
    "foreign": lambda: Foreign(OBS + ACT),
}


def loss_of(critic="relu", count=3, **options) -> IQLLoss:
    actor, _, value = make_networks(hidden=(8,))

    def make():
        return ValueOperator(CRITICS[critic](), in_keys=["observation", "action"])

    loss = IQLLoss(actor, make, value, num_qvalue_nets=count, **options).double()
    perturb_targets(loss)
    if critic in ("residual", "batch norm before"):  # dropout draws other numbers for each critic
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
    shape = (24,) if critic.startswith("batch norm") else (4, 6)
    loss, batch = loss_of(critic, count), make_batch(*shape, dtype=torch.float64)
    check_critics(loss, batch)
    loss.load_state_dict(loss.state_dict())
    check_critics(loss, batch)


def test_k_discrete_critics_equal_k_modules():
    loss = DiscreteIQLLoss(*discrete_networks(), num_qvalue_nets=3).double()
    batch = make_batch(16, dtype=torch.float64)
    batch["action"] = torch.randint(4, (16,))
    check_critics(loss, batch)


def test_a_loop_over_critics_gives_the_same_losses():
    for critic in ("relu", "foreign"):
        loss, batch = loss_of(critic), make_batch(16, dtype=torch.float64)
        expected = loss(batch.clone())
        loss.deactivate_vmap = True
        assert_same_metrics(loss(batch.clone()), expected, **EXACT)


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
    module = loss.value_network.module.mlp[0]
    return module.register_forward_hook(lambda m, x, out: out - 1.0)


def change_slope(loss):
    loss.value_network.module.mlp[1].negative_slope = 0.5


def global_hook(loss):
    def shift(module, inputs, out):
        return out - 1.0 if isinstance(module, nn.LeakyReLU) else None

    return register_module_forward_hook(shift)


INTERVENTIONS = [patch_forward, replace_activation, change_slope, hook_of_module, global_hook]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("changes", "form"),
    [
        *(([change], form) for change in INTERVENTIONS for form in ("simultaneous", "sequential")),
        ([patch_forward], "compiled"),
        ([replace_activation, hook_of_module], "compiled"),
        ([change_slope, global_hook], "compiled"),
    ],
)
def test_an_update_evaluates_the_modules_as_the_loss_does(changes, form):
    """The changes come before an update is compiled, and after an eager one."""
    loss, batch = loss_of(count=2), make_batch(dtype=torch.float64)
    loss.value_network.module.mlp[1] = nn.LeakyReLU()
    update = make_step(loss, order="sequential" if form == "sequential" else "simultaneous")
    if form == "compiled":
        update = compiled(update)
    else:
        update(batch.clone())
    before = loss(batch.clone()).detach()
    handles = [change(loss) for change in changes]
    try:
        expected = loss(batch.clone()).detach()
        metrics = update(batch.clone())
    finally:
        for handle in filter(None, handles):
            handle.remove()
    assert not torch.equal(expected["loss_value"], before["loss_value"])
    # a step has more metrics, and in the sequential order the other losses read V after its step
    for name in ["loss_value"] if form == "sequential" else expected.keys():
        torch.testing.assert_close(metrics[name], expected[name], **EXACT)


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
    assert len(above) == 1
    assert LossModule in above[0].__bases__


@pytest.mark.parametrize("network", ["package", "foreign"])
def test_v_of_both_states_equals_two_calls(network):
    """A network of this package is called once for s and s', one of yours twice."""
    module, calls = None if network == "package" else Foreign(OBS), []
    loss = IQLLoss(*make_networks(hidden=(8,), value=module)).double()
    loss.value_network.module.register_forward_hook(lambda *_: calls.append(1))
    batch = loss.prepare_batch(make_batch(6).double())
    value, next_value = loss.state_and_next_value(batch)
    assert len(calls) == (1 if network == "package" else 2)
    torch.testing.assert_close(value, loss.state_value(batch), **EXACT)
    torch.testing.assert_close(next_value, loss.state_value(batch.next), **EXACT)
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.5)
    assert loss.state_and_next_value(batch)[1] is None


def test_v_behind_a_first_layer_that_flattens():
    """One call for both states has as many dimensions as the batch."""
    value = networks.StateValue(OBS, preprocess=nn.Flatten(), hidden=(8,))
    loss = IQLLoss(*make_networks(hidden=(8,), value=value))
    make_step(loss)(make_batch(6))
    one, other = loss.state_and_next_value(loss.prepare_batch(make_batch(6)))
    assert one.shape == other.shape == (6,)
