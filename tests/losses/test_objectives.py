"""IQLLoss and DiscreteIQLLoss against NumPy, against TorchRL where it is right, and as a contract."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import ACT, OBS, make_batch, make_networks
from one_device import OneDevice
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.modules import (
    LSTMModule,
    OneHotCategorical,
    ProbabilisticActor,
    ValueOperator,
)
from torchrl.objectives import DiscreteIQLLoss as TorchRLDiscreteIQLLoss
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.objectives import IQLLoss as TorchRLIQLLoss
from torchrl.objectives.utils import ValueEstimators
from torchrl.objectives.value import TD0Estimator

from iql_torchrl import DiscreteIQLLoss, IQLLoss, IQLStep, networks, policies
from iql_torchrl.losses import DIAGNOSTICS

LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")


def two_critics():
    """Actor, two critics that differ, V."""
    actor, critic, value = make_networks()
    return actor, [critic, make_networks()[1]], value


def perturb_targets(loss) -> None:
    """Move targets off the live critics, so that confusing the two cannot go unseen."""
    for leaf in loss.target_qvalue_network_params.values(True, True):
        leaf.data.add_(0.1 * torch.randn(leaf.shape, dtype=leaf.dtype))


def gradients(loss, batch) -> dict[str, torch.Tensor]:
    return gradients_of(loss(batch), loss)


def gradients_of(out, loss) -> dict[str, torch.Tensor]:
    loss.zero_grad(set_to_none=True)
    sum(out[name] for name in LOSSES).backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def numpy_losses(loss, batch, gamma=0.99):
    """The three losses in NumPy from the networks' outputs alone."""
    with torch.no_grad():
        q, target_q = (
            np.stack(
                [
                    run(loss.qvalue_network, params[k], batch, "state_action_value")
                    for k in range(loss.num_qvalue_nets)
                ]
            )
            for params in (loss.qvalue_network_params, loss.target_qvalue_network_params)
        )
        v = run(loss.value_network, loss.value_network_params, batch, "state_value")
        next_v = run(loss.value_network, loss.value_network_params, batch["next"], "state_value")
        dist = loss.actor_network.get_dist(batch.clone())
        log_prob = dist.log_prob(batch["action"]).numpy()
    reward = batch["next", "reward"].squeeze(-1).numpy()
    going_on = 1.0 - batch["next", "terminated"].squeeze(-1).numpy()
    target = reward + gamma * going_on * next_v
    advantage = target_q.min(0) - v
    weight = np.minimum(np.exp(loss.temperature * advantage), loss.max_weight)
    tail = np.where(advantage > 0, loss.expectile, 1 - loss.expectile)
    return {
        "loss_value": (tail * advantage**2).mean(),
        "loss_qvalue": ((q - target) ** 2).sum(0).mean(),
        "loss_actor": -(weight * log_prob).mean(),
        "td_error": ((q - target) ** 2).max(0),
        "advantage": advantage,
        "weight": weight,
        "q": q,
        "v": v,
    }


def run(network, params, batch, key):
    with params.to_module(network):
        return network(batch.select(*network.in_keys)).get(key).squeeze(-1).numpy()


@pytest.mark.parametrize(
    ("temperature", "expectile", "max_weight"), [(3, 0.7, 100), (10, 0.9, 2.0), (0, 0.5, 100)]
)
def test_losses_and_diagnostics_equal_numpy(temperature, expectile, max_weight):
    loss = IQLLoss(
        *two_critics(),
        temperature=temperature,
        expectile=expectile,
        max_weight=max_weight,
        diagnostics=True,
    )
    perturb_targets(loss)
    batch = make_batch(64)
    expected = numpy_losses(loss, batch)
    out = loss(batch)
    for name in LOSSES:
        np.testing.assert_allclose(out[name].item(), expected[name], rtol=1e-5)
    np.testing.assert_allclose(
        batch["td_error"].numpy(), expected["td_error"], rtol=1e-4, atol=1e-6
    )
    weight = expected["weight"]
    for name, value in {
        "advantage_mean": expected["advantage"].mean(),
        "weight_mean": weight.mean(),
        "weight_at_ceiling": (weight >= max_weight * (1 - 1e-6)).mean(),
        "effective_sample_size": weight.sum() ** 2 / (weight**2).sum(),
        "qvalue_mean": expected["q"].mean(),
        "value_mean": expected["v"].mean(),
        "td_error_mean": expected["loss_qvalue"] / 2,
    }.items():
        np.testing.assert_allclose(out[name].item(), value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert list(out.keys()) == loss.out_keys
    assert set(DIAGNOSTICS) < set(loss.out_keys)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_function", ["l2", "l1", "smooth_l1"])
@pytest.mark.parametrize("shape", [(32,), (8, 4)])
def test_equals_torchrl_where_it_is_right(reduction, loss_function, shape):
    actor, critics, value = two_critics()
    options = {
        "temperature": 2.0,
        "expectile": 0.8,
        "loss_function": loss_function,
        "reduction": reduction,
        "scalar_output_mode": "exclude" if reduction == "none" else None,
    }
    ours, theirs = (
        IQLLoss(actor, critics, value, **options),
        TorchRLIQLLoss(actor, critics, value, **options),
    )
    perturb_targets(ours)
    theirs.load_state_dict(ours.state_dict())  # the layout is the same
    batch = make_batch(*shape)
    compare(ours, theirs, batch)


@pytest.mark.parametrize("num_critics", [1, 2, 5])
def test_discrete_equals_torchrl_where_it_is_right(num_critics):
    actor = policies.categorical(OBS, OneHot(4), hidden=(8,))
    value = ValueOperator(networks.StateValue(OBS, hidden=(8,)), in_keys=["observation"])
    critic = Mod(
        networks.DiscreteCritic(OBS, 4, hidden=(8,)),
        in_keys=["observation"],
        out_keys=["state_action_value"],
    )
    options = {
        "temperature": 2.0,
        "expectile": 0.8,
        "loss_function": "l2",
        "action_space": "one-hot",
        "num_qvalue_nets": num_critics,
    }
    ours = DiscreteIQLLoss(actor, critic, value, **options)
    theirs = TorchRLDiscreteIQLLoss(actor, critic, value, **options)
    perturb_targets(ours)
    theirs.load_state_dict(ours.state_dict())
    batch = make_batch(32)
    batch["action"] = nn.functional.one_hot(torch.randint(4, (32,)), 4)
    compare(ours, theirs, batch)


def compare(ours, theirs, batch) -> None:
    mine, other = batch.clone(), batch.clone()
    out, expected = ours(mine), theirs(other)
    assert set(out.keys()) == set(expected.keys())
    for name in expected.keys():  # noqa: SIM118  (a TensorDict iterates over its batch)
        torch.testing.assert_close(out[name], expected[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine["td_error"], other["td_error"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine["_log_prob"], other["_log_prob"], rtol=1e-6, atol=1e-6)
    for module, data in ((ours, out), (theirs, expected)):
        module.zero_grad(set_to_none=True)
        sum(data[name].sum() for name in LOSSES).backward()
        module.found = {n: p.grad.clone() for n, p in module.named_parameters()}
    assert ours.found.keys() == theirs.found.keys()
    for name, grad in theirs.found.items():
        torch.testing.assert_close(ours.found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("separate", [False, True])
def test_state_dict_layout_is_torchrls(separate):
    parts = make_networks()
    ours = IQLLoss(*parts, separate_losses=separate).state_dict()
    theirs = TorchRLIQLLoss(*parts, separate_losses=separate).state_dict()
    assert list(ours) == list(theirs)
    tensors = [k for k, v in theirs.items() if isinstance(v, torch.Tensor)]
    assert tensors
    assert all(ours[k].shape == theirs[k].shape for k in tensors)


def test_each_loss_reaches_its_own_network_and_no_other():
    loss = IQLLoss(*make_networks())
    owner = {"loss_actor": "actor", "loss_qvalue": "qvalue", "loss_value": "value"}
    for name, network in owner.items():
        loss.zero_grad(set_to_none=True)
        loss(make_batch())[name].backward()
        reached = {n for n, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {
            n for n, _ in loss.named_parameters() if n.startswith(f"{network}_network_params")
        }
    assert all(leaf.grad is None for leaf in loss.target_qvalue_network_params.values(True, True))


def test_the_losses_alone_equal_those_of_forward():
    loss = IQLLoss(*two_critics())
    perturb_targets(loss)
    batch = make_batch()
    out = loss(batch.clone())
    for name in LOSSES:
        alone, metadata = getattr(loss, name.removeprefix("loss_") + "_loss")(batch.clone())
        torch.testing.assert_close(alone, out[name])
        assert isinstance(metadata, dict)


def test_the_batch_is_left_as_it_was_but_for_priority_and_log_prob():
    loss = IQLLoss(*make_networks(), diagnostics=True)
    batch = make_batch()
    before = batch.clone()
    loss(batch)
    assert set(batch.keys()) - set(before.keys()) == {"td_error", "_log_prob"}
    assert (batch.select(*before.keys()) == before).all()


def test_nested_keys():
    class Net(nn.Module):
        def __init__(self, features, out):
            super().__init__()
            self.linear = nn.Linear(features, out)

        def forward(self, *xs):
            return self.linear(torch.cat(xs, -1))

    spec = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))
    actor = policies.gaussian(OBS, spec, in_keys=[("agent", "observation")], hidden=(8,))
    critic = Mod(
        Net(OBS + ACT, 1),
        in_keys=[("agent", "observation"), ("agent", "action")],
        out_keys=[("agent", "q")],
    )
    value = Mod(Net(OBS, 1), in_keys=[("agent", "observation")], out_keys=[("agent", "v")])
    loss = IQLLoss(actor, critic, value)
    loss.set_keys(
        action=("agent", "action"),
        reward=("agent", "reward"),
        terminated=("agent", "terminated"),
        done=("agent", "done"),
        value=("agent", "v"),
        state_action_value=("agent", "q"),
        priority=("agent", "priority"),
    )
    flat = make_batch()
    batch = TensorDict(
        {
            "agent": {"observation": flat["observation"], "action": flat["action"]},
            "next": {"agent": flat["next"]},
        },
        batch_size=[32],
    )
    out = loss(batch)
    assert all(out[name].isfinite() for name in LOSSES)
    assert batch["agent", "priority"].shape == (32,)


def test_float64():
    loss = IQLLoss(*make_networks()).double()
    out = loss(make_batch(dtype=torch.float64))
    assert all(out[name].dtype == torch.float64 for name in LOSSES)


def test_bfloat16_autocast_computes_the_losses_in_float32():
    loss = IQLLoss(*make_networks())
    batch = make_batch(256)
    expected = loss(batch.clone())
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(batch)
    for name in LOSSES:
        assert out[name].dtype == torch.float32
        torch.testing.assert_close(out[name], expected[name], rtol=0.05, atol=0.02)


def test_rewards_and_flags_may_lack_the_trailing_dimension():
    loss = IQLLoss(*make_networks())
    batch = make_batch()
    flat = batch.clone()
    for key in ("reward", "terminated", "done"):
        flat["next", key] = flat["next", key].squeeze(-1)
    out, expected = loss(flat), loss(batch)
    for name in LOSSES:
        torch.testing.assert_close(out[name], expected[name])


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
def test_value_estimators_and_masked_steps(estimator):
    """Padding must not flow back through multi-step returns either."""
    loss = IQLLoss(*make_networks())
    loss.make_value_estimator(getattr(ValueEstimators, estimator), gamma=0.9)
    batch = make_batch(6, 5).refine_names(None, "time")
    batch["next", "done"] = batch["next", "terminated"].clone()
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:, 3:] = False
    batch["collector", "mask"] = mask
    spoiled = batch.clone()
    spoiled["next", "reward"][:, 3:] = float("nan")
    spoiled["next", "observation"][:, 3:] = float("inf")
    spoiled["action"][:, 3:] = float("nan")
    grads, spoiled_grads = gradients(loss, batch), gradients(loss, spoiled)
    assert all(g.isfinite().all() for g in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(spoiled_grads[name], grad, msg=name)


def test_td0_by_hand_equals_torchrls_estimator():
    loss = IQLLoss(*make_networks())
    loss.make_value_estimator(gamma=0.9)
    batch = make_batch()
    batch["steps_to_next_obs"] = torch.randint(1, 4, (32, 1))
    ours = loss.td_target(loss.read(batch))
    estimator = TD0Estimator(gamma=0.9, value_network=loss.value_network)
    with torch.no_grad():
        theirs = estimator.value_estimate(batch.clone()).squeeze(-1)
    torch.testing.assert_close(ours, theirs)
    loss.make_value_estimator(estimator)
    torch.testing.assert_close(loss.td_target(loss.read(batch)), theirs)


@pytest.mark.parametrize("estimator", [None, "TD0", "TD1", "TDLambda"])
def test_the_estimators_numbers_are_on_the_losss_device_and_move_with_it(estimator):
    parts = [[net.to("meta") for net in make_networks()] for _ in range(2)]
    loss = IQLLoss(parts[0][0], [parts[0][1], parts[1][1]], parts[0][2])
    if estimator is not None:
        loss.make_value_estimator(getattr(ValueEstimators, estimator), gamma=0.9)
    numbers = dict(loss.value_estimator.named_buffers())
    assert "gamma" in numbers
    assert {number.device.type for number in numbers.values()} == {"meta"}
    loss = IQLLoss(*make_networks())
    loss.make_value_estimator(None if estimator is None else getattr(ValueEstimators, estimator))
    moved = []
    loss._apply(lambda tensor: moved.append(id(tensor)) or tensor)
    assert {id(number) for number in loss.value_estimator.buffers()} <= set(moved)


def test_a_td_target_copies_nothing_between_devices():
    parts = [[net.to("meta") for net in make_networks()] for _ in range(2)]
    loss = IQLLoss(parts[0][0], [parts[0][1], parts[1][1]], parts[0][2])
    loss.make_value_estimator(gamma=0.9)
    batch = make_batch().to("meta")
    with OneDevice("meta") as mode:
        target = loss.td_target(loss.read(batch))
    assert target.is_meta
    assert mode.operations > 0


def test_sarsa_expectile_regresses_v_on_the_td_target():
    loss = IQLLoss(*make_networks(), value_objective="sarsa_expectile", expectile=0.8)
    batch = make_batch()
    read = loss.read(batch)
    with torch.no_grad():
        error = loss.td_target(read) - loss.state_value(read)
    expected = ((0.8 - (error < 0).float()).abs() * error**2).mean()
    torch.testing.assert_close(loss(batch)["loss_value"].detach(), expected)
    torch.testing.assert_close(loss.value_loss(batch)[0].detach(), expected)


def test_quantile_value_objective():
    loss = IQLLoss(*make_networks(), value_objective="quantile", expectile=0.8)
    batch = make_batch()
    read = loss.read(batch)
    with torch.no_grad():
        error = loss.target_qvalue(read) - loss.state_value(read)
    expected = torch.maximum(0.8 * error, -0.2 * error).mean()
    torch.testing.assert_close(loss(batch)["loss_value"].detach(), expected)


def test_mse_actor_objective():
    _, critic, value = make_networks()
    spec = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))
    actor = policies.deterministic(OBS, spec, hidden=(8,))
    loss = IQLLoss(actor, critic, value, actor_objective="mse")
    batch = make_batch()
    out = loss(batch)
    assert "entropy" not in out
    assert "_log_prob" not in batch
    expected = numpy_free_weight(loss, batch) * (
        (actor(batch.select("observation"))["action"] - batch["action"]) ** 2
    ).sum(-1)
    torch.testing.assert_close(out["loss_actor"], expected.mean())
    out["loss_actor"].backward()
    assert all(p.grad.any() for p in actor.parameters())


def test_callable_actor_objective_gives_its_own_per_sample_loss():
    parts = make_networks()

    def minus_log_prob(actor, batch):
        return -actor.get_dist(batch).log_prob(batch["action"])

    ours = IQLLoss(*parts, actor_objective=minus_log_prob)
    usual = IQLLoss(*parts)
    usual.load_state_dict(ours.state_dict())
    batch = make_batch()
    torch.testing.assert_close(
        ours(batch.clone())["loss_actor"], usual(batch.clone())["loss_actor"]
    )
    bad = IQLLoss(*parts, actor_objective=lambda actor, batch: batch["action"])
    with pytest.raises(ValueError, match=r"policy_error has shape \(32, 3\)"):
        bad(batch)


def numpy_free_weight(loss, batch):
    read = loss.read(batch)
    with torch.no_grad():
        advantage = loss.target_qvalue(read) - loss.state_value(read)
    return (loss.temperature * advantage).exp().clamp(max=loss.max_weight)


def test_reduction_none_warns_about_scalars_and_can_keep_them():
    with pytest.warns(UserWarning, match="left out"):
        loss = IQLLoss(*make_networks(), reduction="none")
    assert set(loss(make_batch()).keys()) == set(LOSSES)
    loss = IQLLoss(*make_networks(), reduction="none", scalar_output_mode="non_tensor")
    out = loss(make_batch(4, 2))
    assert out["loss_actor"].shape == (4, 2)
    assert "entropy" in out.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expectile": 0.0}, "expectile is 0.0"),
        ({"expectile": 1.2}, "expectile is 1.2"),
        ({"expectile": float("nan")}, "expectile is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"max_weight": 0.0}, "max_weight is 0.0"),
        ({"num_qvalue_nets": 0}, "num_qvalue_nets is 0"),
        ({"loss_function": "huber"}, "loss_function is 'huber'"),
        ({"value_objective": "max"}, "value_objective is 'max'"),
        ({"actor_objective": "ddpg"}, "actor_objective is 'ddpg'"),
        ({"reduction": "median"}, "reduction is 'median'"),
    ],
)
def test_arguments_out_of_range_show_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        IQLLoss(*make_networks(), **options)


def test_expectile_one_is_allowed():
    assert IQLLoss(*make_networks(), expectile=1.0)(make_batch())["loss_value"].isfinite()


def test_gamma_and_priority_key_are_refused_as_in_torchrl():
    with pytest.raises(TypeError):
        IQLLoss(*make_networks(), gamma=0.9)
    with pytest.raises(RuntimeError, match="priority"):
        IQLLoss(*make_networks(), priority_key="p")


@pytest.mark.parametrize(
    "key", ["observation", "action", ("next", "reward"), ("next", "terminated")]
)
def test_a_missing_key_is_named(key):
    loss = IQLLoss(*make_networks())
    name = key if isinstance(key, str) else key[-1]
    with pytest.raises(KeyError, match=name):
        loss(make_batch().exclude(key))


def test_a_value_with_more_than_one_number_is_named():
    actor, critic, _ = make_networks()
    value = ValueOperator(nn.Linear(OBS, 2), in_keys=["observation"])
    with pytest.raises(ValueError, match=r"state_value has shape \(32, 2\)"):
        IQLLoss(actor, critic, value)(make_batch())


def test_a_policy_without_independent_dimensions_is_explained():
    _, critic, value = make_networks()

    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(OBS, ACT)

        def get_dist(self, td):
            return torch.distributions.Normal(self.linear(td["observation"]), 1.0)

    actor = Actor()
    actor.in_keys = ["observation"]
    with pytest.raises(ValueError, match="Independent"):
        IQLLoss(actor, critic, value)(make_batch())


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_survives_deepcopy_pickle_and_casts(updater):
    from test_rival_faults import shared_trunk

    _, actor, qvalue, value = shared_trunk()
    actor.module[-1].distribution_kwargs = {}
    loss = IQLLoss(actor, qvalue, value, separate_losses=True)
    loss = loss.double().float()
    for made in (loss, copy.deepcopy(loss)):
        key = ("module", "0", "module", "weight")
        owner = made.actor_network_params[key]
        mirror = made.qvalue_network_params[key]
        assert mirror.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()
        with torch.no_grad():
            owner.add_(1.0)
        torch.testing.assert_close(mirror[1], owner)
        assert all(p is not mirror for p in made.parameters())


def test_pickle_round_trip():
    loss = IQLLoss(*make_networks())
    again = pickle.loads(pickle.dumps(loss))
    batch = make_batch()
    torch.testing.assert_close(
        loss(batch.clone())["loss_actor"], again(batch.clone())["loss_actor"]
    )


def test_dispatch_with_keywords():
    loss = IQLLoss(*make_networks(), diagnostics=True)
    batch = make_batch()
    expected = loss(batch.clone())
    keys = {"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in loss.in_keys}
    out = loss(**keys)
    assert len(out) == len(loss.out_keys)
    for name, value in zip(loss.out_keys, out, strict=True):
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
class TestCompile:
    def test_one_graph_and_no_recompilation(self, backend):
        torch._dynamo.reset()
        loss = IQLLoss(*make_networks(), diagnostics=True)
        SoftUpdate(loss, tau=0.5)
        fast = torch.compile(loss, fullgraph=True, backend=backend)
        for i in range(5):
            batch = make_batch()
            expected = loss(batch.clone())
            with torch._dynamo.config.patch(error_on_recompile=i >= 2):
                out = fast(batch)
            for name in LOSSES:
                torch.testing.assert_close(out[name], expected[name], rtol=1e-5, atol=1e-6)

    def test_discrete_with_mask(self, backend):
        torch._dynamo.reset()
        actor = policies.categorical(OBS, Categorical(4), mask_key="action_mask", hidden=(8,))
        critic = Mod(
            networks.DiscreteCritic(OBS, 4, hidden=(8,)),
            in_keys=["observation"],
            out_keys=["state_action_value"],
        )
        value = ValueOperator(networks.StateValue(OBS, hidden=(8,)), in_keys=["observation"])
        loss = DiscreteIQLLoss(actor, critic, value)
        SoftUpdate(loss, tau=0.5)
        batch = make_batch()
        batch["action"] = torch.randint(4, (32,))
        batch["action_mask"] = torch.rand(32, 4) < 0.5
        batch["action_mask"][torch.arange(32), batch["action"]] = True
        batch["collector", "mask"] = torch.rand(32) < 0.7
        expected = loss(batch.clone())
        out = torch.compile(loss, fullgraph=True, backend=backend)(batch)
        for name in LOSSES:
            torch.testing.assert_close(out[name], expected[name], rtol=1e-5, atol=1e-6)


def test_discrete_refuses_other_spaces():
    parts = make_networks()
    with pytest.raises(ValueError, match="binary"):
        DiscreteIQLLoss(*parts, action_space="binary")
    with pytest.raises(ValueError, match="mse"):
        DiscreteIQLLoss(*parts, actor_objective="mse")


class TestOddBatches:
    @pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 5)])
    def test_a_batch_without_steps_is_refused(self, shape):
        loss = IQLLoss(*make_networks())
        batch = make_batch(4, 5)
        empty = batch.reshape(-1)[:0].reshape(shape)
        for call in (loss, loss.value_loss, loss.actor_loss, loss.qvalue_loss):
            with pytest.raises(ValueError, match=rf"shape \({shape[0]},.*holds no steps.*replay"):
                call(empty.clone())
        with pytest.raises(ValueError, match=r"has shape \(0, .*the batch holds no steps"):
            loss(TensorDict(batch[:0].to_dict()))

    def test_a_discrete_batch_without_steps_is_refused(self):
        actor = policies.categorical(OBS, Categorical(4), hidden=(8,))
        critic = Mod(nn.Linear(OBS, 4), in_keys=["observation"], out_keys=["state_action_value"])
        loss = DiscreteIQLLoss(actor, critic, make_networks()[2])
        batch = make_batch(6)
        batch["action"] = torch.randint(4, (6,))
        with pytest.raises(ValueError, match="holds no steps"):
            loss(batch[:0])
        batch["collector", "mask"] = torch.zeros(6, dtype=torch.bool)
        with pytest.raises(ValueError, match="none of the batch's 6 steps"):
            loss(batch)

    def test_everything_masked_is_refused(self):
        loss = IQLLoss(*make_networks())
        batch = make_batch(4, 5)
        before = [p.clone() for p in loss.parameters()]
        step = IQLStep(loss, torch.optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.5))
        batch["collector", "mask"] = torch.zeros(4, 5, 1, dtype=torch.bool)
        for call in (loss, loss.value_loss, loss.actor_loss, loss.qvalue_loss, step):
            with pytest.raises(
                ValueError, match=r"'mask'\) mark none of the batch's 20 steps as val"
            ):
                call(batch)
        assert all(map(torch.equal, loss.parameters(), before))

    @pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
    def test_where_values_cannot_be_asked_everything_masked_gives_zero_gradients(self):
        loss = IQLLoss(*make_networks())
        loss.make_value_estimator()  # torch 2.11 cannot trace that it is made
        SoftUpdate(loss, tau=0.5)
        batch = make_batch(4, 5)
        batch["observation"][:] = float("nan")
        mask = torch.zeros(4, 5, 1, dtype=torch.bool)
        batch["collector", "mask"] = mask
        torch._dynamo.reset()
        # torch 2.11 maps no Linear over shapes that vary
        whole = torch.compile(loss, fullgraph=True, backend="eager", dynamic=False)
        assert all((grad == 0).all() for grad in gradients_of(whole(batch), loss).values())

        def masked(rows):
            data = batch.clone()
            data["collector", "mask"] = rows
            return loss(data)["loss_value"]

        assert torch.vmap(masked)(torch.stack([mask, mask])).tolist() == [0, 0]

    def test_flat_padding_does_not_flow_into_multi_step_targets(self):
        loss = IQLLoss(*make_networks())
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9)
        batch = make_batch(6)
        batch["next", "done"] = torch.zeros(6, 1, dtype=torch.bool)
        batch["next", "terminated"] = torch.zeros(6, 1, dtype=torch.bool)
        batch["collector", "mask"] = torch.arange(6) < 4
        short = batch[:4].exclude("collector")
        short["next", "done"] = torch.tensor([[False]] * 3 + [[True]])
        torch.testing.assert_close(loss(batch)["loss_qvalue"], loss(short)["loss_qvalue"])

    def test_a_lazy_stack_with_a_mask(self):
        loss = IQLLoss(*make_networks())
        rows = [make_batch(5) for _ in range(3)]
        for row in rows:
            row["collector", "mask"] = torch.arange(5) < 3
        lazy = TensorDict.lazy_stack(rows)
        out = loss(lazy)
        torch.testing.assert_close(out["loss_value"], loss(torch.stack(rows))["loss_value"])

    def test_agents_beyond_the_batch_shape(self):
        """Batch (B,) of n agents each: the mean over both, as if the batch were (B, n)."""
        loss = IQLLoss(*make_networks())
        wide = make_batch(6, 3)
        inner = TensorDict(wide.to_dict(), batch_size=[6])
        out, expected = loss(inner), loss(wide.clone())
        for name in LOSSES:
            torch.testing.assert_close(out[name], expected[name])
        inner["collector", "mask"] = torch.arange(6) < 4
        torch.testing.assert_close(loss(inner)["loss_actor"], loss(wide[:4])["loss_actor"])

    @pytest.mark.parametrize("num_actions", [2, 4])
    def test_a_single_step_with_a_one_hot_action(self, num_actions):
        critic = Mod(
            networks.DiscreteCritic(OBS, num_actions, hidden=(8,)),
            in_keys=["observation"],
            out_keys=["state_action_value"],
        )
        actor = policies.categorical(OBS, OneHot(num_actions), hidden=(8,))
        value = ValueOperator(networks.StateValue(OBS, hidden=(8,)), in_keys=["observation"])
        loss = DiscreteIQLLoss(actor, critic, value)
        batch = make_batch(1)
        batch["action"] = nn.functional.one_hot(torch.tensor([1]), num_actions)
        single = batch[0]
        for name in LOSSES:
            torch.testing.assert_close(loss(single)[name], loss(batch)[name])

    def test_bool_one_hot_actions_with_torchrls_distributions(self):
        critic = Mod(
            networks.DiscreteCritic(OBS, 4, hidden=(8,)),
            in_keys=["observation"],
            out_keys=["state_action_value"],
        )
        actor = ProbabilisticActor(
            Mod(nn.Linear(OBS, 4), in_keys=["observation"], out_keys=["logits"]),
            in_keys=["logits"],
            spec=OneHot(4),
            distribution_class=OneHotCategorical,
        )
        value = ValueOperator(networks.StateValue(OBS, hidden=(8,)), in_keys=["observation"])
        loss = DiscreteIQLLoss(actor, critic, value)
        batch = make_batch(8)
        batch["action"] = OneHot(4).rand((8,))
        as_int = batch.clone()
        as_int["action"] = batch["action"].long()
        torch.testing.assert_close(loss(batch)["loss_actor"], loss(as_int)["loss_actor"])

    def test_mse_with_actions_of_one_number(self):
        value = ValueOperator(networks.StateValue(OBS, hidden=(8,)), in_keys=["observation"])

        class Critic(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(OBS + 1, 1)

            def forward(self, observation, action):
                return self.linear(torch.cat([observation, action.unsqueeze(-1)], -1))

        class Actor(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(OBS, 1)

            def forward(self, observation):
                return self.linear(observation).squeeze(-1)

        actor = Mod(Actor(), in_keys=["observation"], out_keys=["action"])
        critic = ValueOperator(Critic(), in_keys=["observation", "action"])
        loss = IQLLoss(actor, critic, value, actor_objective="mse", temperature=0.0)
        batch = make_batch(5)
        batch["action"] = torch.randn(5)
        expected = (actor(batch.clone())["action"] - batch["action"]).square().mean()
        torch.testing.assert_close(loss(batch)["loss_actor"], expected)

    def test_two_steps_of_two_action_dimensions_do_not_broadcast(self):
        _, critic, value = make_networks(act=2)

        class Actor(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(OBS, 2)
                self.in_keys = ["observation"]

            def get_dist(self, td):
                return torch.distributions.Normal(self.linear(td["observation"]), 1.0)

        with pytest.raises(ValueError, match="Independent"):
            IQLLoss(Actor(), critic, value)(make_batch(2, act=2))


def test_an_estimators_own_keys_are_read():
    loss = IQLLoss(*make_networks())
    estimator = TD0Estimator(gamma=0.5, value_network=loss.value_network)
    estimator.set_keys(reward="bonus")
    loss.make_value_estimator(estimator)
    batch = make_batch()
    batch["next", "bonus"] = batch["next", "reward"] + 10
    with torch.no_grad():
        expected = estimator.value_estimate(batch.clone()).squeeze(-1)
    torch.testing.assert_close(loss.td_target(loss.read(batch)), expected)


def test_recurrent_networks_start_without_hidden_states():
    lstm = LSTMModule(input_size=OBS, hidden_size=4, in_key="observation", out_key="features")
    head = Mod(nn.Linear(4, 1), in_keys=["features"], out_keys=["state_value"])
    actor, critic, _ = make_networks()
    loss = IQLLoss(actor, critic, TensorDictSequential(lstm, head))
    batch = make_batch(3, 4).refine_names(None, "time")
    start = torch.zeros(3, 4, 1, dtype=torch.bool)
    start[:, 0] = True
    batch["is_init"] = start
    batch["next", "is_init"] = start
    assert all(loss(batch)[name].isfinite() for name in LOSSES)
