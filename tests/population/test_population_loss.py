"""Stacked losses: values and gradients of P losses; copies, states and targets; what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch, make_networks
from small_losses import assert_same_metrics
from small_populations import assert_close, extras, of_members
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import HardUpdate, SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, networks, policies
from iql_torchrl.update.adam import StackedAdam
from iql_torchrl.update.lifted import Lift, stack_losses, write_member

SETTINGS = (
    {},
    {"expectile": 0.95, "temperature": 0.0},
    {"expectile": 0.3, "temperature": 20.0, "max_weight": 1.5},
)
RUNS = len(SETTINGS)


def make_loss(gamma: float = 0.9, critics: int = 2, value=None, **options) -> IQLLoss:
    options = {"diagnostics": True, "num_qvalue_nets": critics} | options
    loss = IQLLoss(*make_networks(critics=critics, value=value and value()), **options)
    return loss.make_value_estimator(gamma=gamma).double()


def make_losses(**options) -> list[IQLLoss]:
    settings = zip(SETTINGS, (0.9, 0.5, 0.0), strict=True)
    return [make_loss(gamma, **{**options, **own}) for own, gamma in settings]


TERMS = ("actor_loss", "value_loss", "qvalue_loss")


def lifted(losses) -> Lift:
    return Lift(stack_losses(losses), RUNS)


def batches(shape, change=None):
    batch = make_batch(*shape, dtype=torch.float64)
    batch = batch if change is None else change(batch)
    return batch, [batch] * RUNS if len(shape) == 1 else list(batch.unbind(0))


@pytest.mark.parametrize("shape", [(9,), (RUNS, 9), (RUNS,), (1,), (RUNS, 1), (RUNS, RUNS)])
@pytest.mark.parametrize("change", [None, extras], ids=["plain", "extras"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_outputs_and_gradients_are_those_of_each_loss(shape, change, reduction):
    check_outputs(make_losses(reduction=reduction), shape, change)


def check_outputs(losses, shape, change=None) -> None:
    population = lifted(losses)
    batch, each = batches(shape, change)
    keys = set(batch.keys(True, True))
    result = population(batch)
    assert set(batch.keys(True, True)) == keys  # nothing is written into it
    expected = torch.stack([loss(b.clone()) for loss, b in zip(losses, each, strict=True)])
    assert result.batch_size == (RUNS,)
    assert_close(dict(result.items()), dict(expected.items()), 1e-12)
    names = [key for key in population.loss.out_keys if key.startswith("loss")]
    sum(result[name].sum() for name in names).backward()
    sum(expected[name].sum() for name in names).backward()
    for name, parameter in population.loss.named_parameters():
        alone = torch.stack([dict(loss.named_parameters())[name].grad for loss in losses])
        assert_close({name: parameter.grad}, {name: alone}, 1e-11)
    for term in TERMS:
        actual = of_members(population, term, batch)
        alone = [getattr(loss, term)(b.clone())[0] for loss, b in zip(losses, each, strict=True)]
        assert_close({term: actual}, {term: torch.stack(alone)}, 1e-12)
        assert set(batch.keys(True, True)) == keys


def several_modules() -> TensorDictSequential:
    first = TensorDictModule(nn.Linear(OBS, 4), ["observation"], ["hidden"])
    return TensorDictSequential(first, ValueOperator(nn.Linear(4, 1), in_keys=["hidden"]))


class Scaled(nn.Module):
    """A layer of the user's, with a parameter that torch's layers do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(OBS))

    def forward(self, observation):
        return (self.scale * observation).sin().sum(-1, keepdim=True)


ACCEPTED = {
    "PReLU": lambda: nn.Sequential(nn.Linear(OBS, 4), nn.PReLU(), nn.Linear(4, 1)),
    "layer of the user's": Scaled,
    "residual": lambda: networks.ResidualMLP(OBS, 1, hidden=(4, 4)),
    "several modules": several_modules,
}


@pytest.mark.parametrize("shape", [(9,), (RUNS, 9)], ids=["shared", "own"])
@pytest.mark.parametrize("case", ACCEPTED)
def test_any_layers_are_evaluated_member_by_member(case, shape):
    check_outputs(make_losses(value=ACCEPTED[case]), shape)


@pytest.mark.parametrize("policy", ["gaussian", "tanh_normal", "deterministic"])
def test_squared_distance_to_any_policys_own_action(policy):
    spec = Bounded(-torch.ones(ACT) / 2, torch.ones(ACT), (ACT,))
    actors = [getattr(policies, policy)(OBS, spec, hidden=(8,)) for _ in range(RUNS)]
    losses = [
        IQLLoss(*make_networks(policy=actor), actor_objective="mse").double() for actor in actors
    ]
    population = lifted(losses)
    batch, _ = batches((7,))
    for loss in losses:
        loss.actor_loss(batch)
    expected = torch.stack([loss.actor_loss(batch)[0] for loss in losses])
    assert_close({"": of_members(population, "actor_loss", batch)}, {"": expected}, 1e-12)
    assert "entropy" not in population(batch)


def test_keys_of_the_batch_are_the_losses():
    losses = make_losses()
    for loss in losses:
        loss.set_keys(reward="r", terminated="end", action="a", priority_weight="w")
        loss.value_estimator.set_keys(steps_to_next_obs="n")
        loss.loss_mask_key = "real"
    population = lifted(losses)
    batch = extras(make_batch(6, dtype=torch.float64))
    batch.rename_key_("priority_weight", "w").rename_key_("steps_to_next_obs", "n")
    batch["a"] = batch["action"] / 2  # the policy's; critics have in_keys of their own
    batch["real"] = batch.pop("collector")["mask"]
    batch.rename_key_(("next", "reward"), ("next", "r"))
    batch.rename_key_(("next", "terminated"), ("next", "end"))
    for term in TERMS:
        expected = torch.stack([getattr(loss, term)(batch.clone())[0] for loss in losses])
        assert_close({term: of_members(population, term, batch)}, {term: expected}, 1e-12)
    population.loss.set_keys(reward="other")
    assert losses[0].tensor_keys.reward == "r"  # a copy


def test_priority_weights_may_be_left_out():
    losses = make_losses()
    for loss in losses:
        loss.use_prioritized_weights = False
    batch = extras(make_batch(6, dtype=torch.float64))
    expected = torch.stack([loss.value_loss(batch.clone())[0] for loss in losses])
    result = of_members(lifted(losses), "value_loss", batch)
    assert_close({"": result}, {"": expected}, 1e-12)


def test_the_losses_are_copied_and_can_be_written_back():
    losses = make_losses(critics=1)
    before = [copy.deepcopy(loss.state_dict()) for loss in losses]
    population = stack_losses(losses)
    state = population.state_dict()
    assert state.keys() == before[0].keys()
    with torch.no_grad():
        for name, parameter in population.named_parameters():
            parameter.add_(torch.arange(1.0, 4.0).view(-1, *(1,) * (parameter.ndim - 1)))
            assert name in state
    for number, loss in enumerate(losses):
        assert_close(loss.state_dict(), before[number], 0)
        write_member(population, number, loss)
        trained = dict(loss.named_parameters())
        for name, value in loss.state_dict().items():
            moved = number + 1 if name in trained else 0
            torch.testing.assert_close(value, before[number][name] + moved)


def make_step(population, updater=SoftUpdate, **options) -> IQLStep:
    rates = torch.tensor([1e-2, 1e-3, 3e-2])
    optimizer = StackedAdam(population.parameters(), rates=rates)
    interval = {"tau": 0.1} if updater is SoftUpdate else {"value_network_update_interval": 2}
    step = IQLStep(population, optimizer, updater(population, **interval), **options)
    step.lift = Lift(population, RUNS)
    return step


def test_targets_may_be_copied_at_intervals():
    population = stack_losses(make_losses())
    step = make_step(population, HardUpdate)
    key = ("module", "mlp", "0", "weight")
    online, target = (
        population._modules[f"{name}qvalue_network_params"].get(key) for name in ("", "target_")
    )
    equal = []
    for _ in range(3):
        step(make_batch(dtype=torch.float64))
        equal.append(torch.equal(online, target))
    assert equal == [False, False, True]


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_a_run_that_diverges_does_not_change_the_others(own):
    first, second = (stack_losses(make_losses()) for _ in range(2))
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        next(second.parameters())[1] = torch.nan
        second.qvalue_network_params["module", "mlp", "0", "weight"][1] = torch.inf
    steps = [make_step(loss, max_grad_norm=0.5) for loss in (first, second)]
    for _ in range(5):
        batch = make_batch(*((RUNS,) if own else ()), 8, dtype=torch.float64)
        metrics = [step(batch.clone()) for step in steps]
    assert metrics[1]["loss_qvalue"].isfinite().tolist() == [True, False, True]
    for number in (0, 2):
        states = [loss.state_dict() for loss in (first, second)]
        actual, reference = ({k: v[number] for k, v in state.items() if v.ndim} for state in states)
        assert_close(actual, reference, 1e-12)


def test_a_frozen_network_rests():
    losses = make_losses()
    for loss in losses:
        loss.value_network_params.requires_grad_(False)
    population = stack_losses(losses)
    before = copy.deepcopy(population.state_dict())
    step = make_step(population)
    step(make_batch(dtype=torch.float64))
    after = population.state_dict()
    moved = {k.split("_")[0] for k, v in after.items() if not torch.equal(v, before[k])}
    assert moved == {"actor", "qvalue", "target"}


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same_from_memory_of_its_own(way):
    population = stack_losses(make_losses())
    step, batch = make_step(population), make_batch(dtype=torch.float64)
    step(batch)
    other = (
        copy.deepcopy(population) if way == "deepcopy" else pickle.loads(pickle.dumps(population))
    )
    first, second = (Lift(loss, RUNS) for loss in (population, other))
    expected = first(batch)
    assert_close(dict(second(batch).items()), dict(expected.items()), 0)
    make_step(other)(batch)
    assert_close(dict(first(batch).items()), dict(expected.items()), 0)
    assert not torch.equal(second(batch)["loss_qvalue"], expected["loss_qvalue"])


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_what_is_evaluated(assign):
    first, second = (lifted(make_losses()) for _ in range(2))
    batch = make_batch(dtype=torch.float64)
    second(batch)
    expected = first(batch)
    second.loss.load_state_dict(copy.deepcopy(first.loss.state_dict()), assign=assign)
    assert_close(dict(second(batch).items()), dict(expected.items()), 0)


def test_a_cast_is_what_is_evaluated():
    losses = make_losses()
    population = lifted(losses)
    batch = make_batch(dtype=torch.float64)
    expected = population(batch)
    population.loss.float()
    result = population(batch.float())
    assert {value.dtype for value in result.values()} == {torch.float32}
    assert_same_metrics(result.double(), expected, rtol=1e-4, atol=1e-5)


def test_batches_of_other_shapes_are_refused():
    population = lifted(make_losses())
    for shape in ((), (2, 9), (RUNS, 3, 3)):
        batch = make_batch(*(shape or (4,)), dtype=torch.float64)
        batch = batch if shape else batch[0]
        with pytest.raises(ValueError, match=r"expected \(B,\) for all 3 members or \(3, B\)"):
            population(batch)
    with pytest.raises(KeyError, match="'terminated'"):
        population(make_batch(dtype=torch.float64).exclude(("next", "terminated")))
    for shape in ((4, 2), (RUNS, RUNS)):
        batch = make_batch(shape[0], dtype=torch.float64)
        batch["next", "reward"] = torch.ones(shape)
        with pytest.raises(ValueError, match=r"reward has shape .*one number per sample"):
            population(batch)


def test_weights_are_drawn_member_by_member():
    with pytest.raises(NotImplementedError, match="before they are stacked"):
        stack_losses(make_losses()).reset_parameters_recursive()


def shared_trunk() -> IQLLoss:
    trunk = nn.Linear(OBS, 8)
    value = nn.Sequential(trunk, nn.ReLU(), nn.Linear(8, 1))
    spec = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))
    actor = policies.gaussian(8, spec, preprocess=nn.Sequential(trunk, nn.ReLU()))
    return IQLLoss(*make_networks(policy=actor, value=value), separate_losses=True)


def hooked() -> IQLLoss:
    loss = make_loss()
    loss.value_network.module.register_forward_hook(lambda *_: None)
    return loss


def normed() -> IQLLoss:
    return IQLLoss(*make_networks(critic=NormedCritic()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (shared_trunk, "value_network shares its parameter .*use an encoder_network"),
        (normed, "qvalue_network has a BatchNorm1d at .*statistics of batches"),
        (hooked, "value_network has a StateValue at 'module', which has hooks"),
    ],
)
def test_what_cannot_be_stacked_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        stack_losses([make()])
