"""Arguments and updates that failed silently or without a useful message."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_networks
from small_losses import make_loss, make_step
from torch import nn, optim
from torchrl.objectives import SoftUpdate

import iql_torchrl
from iql_torchrl import DiscreteIQLLoss, IQLConfig, IQLLoss, IQLStep, compiled, losses
from iql_torchrl.config import number_dtype

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")


class Scaled(nn.Module):
    """A value objective with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, target, value):
        return 100.0 * self.scale * (target - value).square()


@pytest.mark.parametrize("max_grad_norm", [None, 0.25])
def test_the_parameters_of_an_objective_are_clipped_to_the_norm(max_grad_norm):
    """SGD with a rate of 1 moves each part by its gradient: of the objective 0.25 where clipped."""
    loss = make_loss(value_objective=Scaled())
    optimizer = optim.SGD(loss.parameters(), lr=1.0)
    batch, updater = make_batch(dtype=torch.float64), SoftUpdate(loss, tau=0.1)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    step = IQLStep(loss, optimizer, updater, order="simultaneous", max_grad_norm=max_grad_norm)
    gradient = float(step(batch)["loss_value"])  # of a scale of 1: the loss itself
    assert gradient > 1
    moved = {}
    for name, p in loss.named_parameters():
        part = name.partition(".")[0]
        moved[part] = moved.get(part, 0.0) + float((p.detach() - before[name]).square().sum())
    expected = gradient if max_grad_norm is None else max_grad_norm
    assert moved["value_objective"] ** 0.5 == pytest.approx(expected, rel=1e-5)
    if max_grad_norm is not None:
        assert all(total**0.5 <= 0.25 * (1 + 1e-6) for total in moved.values())
        assert moved["value_network_params"] ** 0.5 == pytest.approx(0.25, rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_parameters_unfrozen_later_that_the_optimizer_lacks_are_named(form):
    loss = make_loss()
    loss.value_network_params.requires_grad_(False)
    trained = [p for p in loss.parameters() if p.requires_grad]
    step = IQLStep(loss, optim.Adam(trained, lr=1e-2), SoftUpdate(loss, tau=0.1))
    update = compiled(step) if form == "compiled" else step
    batch = make_batch(dtype=torch.float64)
    for _ in range(2):
        update(batch.clone())
    loss.value_network_params.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks 6 of the loss's .* 'value_network_params\."):
        update(batch.clone())
    before = [p.detach().clone() for p in loss.value_network_params.parameters()]
    optimizer = step.optimizer
    optimizer.add_param_group({"params": list(loss.value_network_params.parameters())})
    update(batch.clone())
    for parameter, old in zip(loss.value_network_params.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)


def test_parameters_unfrozen_later_are_trained():
    loss = make_loss()
    loss.value_network_params.requires_grad_(False)
    step, batch = make_step(loss, max_grad_norm=1.0), make_batch(dtype=torch.float64)
    parameters = list(loss.value_network_params.parameters())
    before = [p.detach().clone() for p in parameters]
    step(batch.clone())
    assert all(map(torch.equal, parameters, before))
    loss.value_network_params.requires_grad_(True)
    step(batch.clone())
    assert not any(map(torch.equal, parameters, before))


def test_a_step_without_v_in_the_optimizer_is_refused():
    loss = make_loss()
    own = [p for name, p in loss.named_parameters() if not name.startswith("value_network")]
    with pytest.raises(ValueError, match=r"lacks 6 of the loss's .* 'value_network_params\."):
        IQLStep(loss, optim.Adam(own), SoftUpdate(loss, tau=0.1))


@pytest.mark.parametrize(
    "make",
    [
        lambda f: IQLLoss(*make_networks(), temperature=f),
        lambda f: IQLLoss(*make_networks(), expectile=f),
        lambda f: IQLLoss(*make_networks(), max_weight=f),
        lambda f: IQLLoss(*make_networks(), num_qvalue_nets=f),
        lambda f: IQLLoss(*make_networks(), loss_function=f),
        lambda f: IQLLoss(*make_networks()).average_actor(f),
        lambda f: setattr(IQLLoss(*make_networks()), "temperature", f),
        lambda f: make_step(IQLLoss(*make_networks()), max_grad_norm=f),
        losses.Sparse,
        losses.DDPGBC,
        losses.ConditionedFlow,
        lambda f: losses.DDPGBC(q_source=f),
        lambda f: losses.Expectile(pessimism=f),
        lambda f: losses.AdvantageWeighted(max_weight=f),
        lambda f: losses.Gumbel(clip=f),
        lambda f: losses.SharedEncoder(nn.Identity(), random_shift=f),
    ],
)
def test_a_function_is_not_a_number(make):
    with pytest.raises((TypeError, ValueError), match=r" is <function"):
        make(lambda advantage: advantage)


def test_numbers_of_mps_are_float32():
    """It has no float64, so no tensor of the losses and of the update names that dtype alone."""
    assert number_dtype(torch.device("mps")) == torch.float32
    assert number_dtype(torch.device("cpu")) == number_dtype(torch.device("cuda")) == torch.float64
    root, named = Path(iql_torchrl.__file__).parent, []
    for folder in ("losses", "update"):
        for path in sorted((root / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("float64", "double"):
                    named.append(path.name)
    assert named == ["objective.py"]  # on the CPU, until the loss is moved


def test_hyperparameters_move_in_the_dtype_of_their_device(monkeypatch):
    loss = IQLLoss(*make_networks(), temperature=0.1)
    assert {value.dtype for value in loss.hyperparameters.values()} == {torch.float64}
    loss.to(torch.bfloat16)
    assert loss.temperature == 0.1
    monkeypatch.setattr(losses.objective, "number_dtype", lambda device: torch.float32)
    loss.to("cpu")
    assert {value.dtype for value in loss.hyperparameters.values()} == {torch.float32}
    assert float(loss.temperature) == pytest.approx(0.1, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gamma", "discount"),
        ("lr", "actor_lr, critic_lr and value_lr"),
        ("beta", "temperature"),
        ("hidden_sizes", "hidden"),
        ("tau", "expectile .* or polyak"),
        ("temprature", "temperature"),
        ("batchsize", "batch_size"),
    ],
)
def test_a_config_says_which_setting_was_meant(name, meant):
    with pytest.raises(
        TypeError, match=rf"^IQLConfig has no setting '{name}'; did you mean {meant}"
    ):
        IQLConfig(**{name: 1})


def test_a_config_lists_its_settings_where_none_is_close():
    with pytest.raises(TypeError, match=r"no setting 'xyz'; the settings are seed, updates, "):
        IQLConfig(xyz=1)


@pytest.mark.parametrize("kind", [IQLLoss, DiscreteIQLLoss])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("tau", r"the expectile is expectile=, and the averaging rate .* SoftUpdate\(loss, tau"),
        ("beta", "temperature="),
        ("bc_weight", r"give it to losses\.DDPGBC\(bc_weight=\.\.\.\)"),
        ("random_shift", r"give it to losses\.SharedEncoder\(random_shift=\.\.\.\)"),
        ("temprature", "did you mean temperature"),
        ("xyz", r"see help\(IQLLoss\)"),
    ],
)
def test_a_loss_says_where_an_argument_belongs(kind, name, advice):
    with pytest.raises(TypeError, match=rf"^{kind.__name__} has no argument '{name}'; .*{advice}"):
        kind(*make_networks(), **{name: 0.1})


def test_what_public_methods_take_is_on_the_page_of_the_api():
    page = Path(iql_torchrl.__file__).parents[1] / "docs" / "api.md"
    assert "\n   losses.Batch\n" in page.read_text(encoding="utf-8")
    loss = IQLLoss(*make_networks())
    batch = loss.prepare_batch(make_batch())
    assert isinstance(batch, losses.Batch)
    assert loss.td_target(batch).shape == (32,)
