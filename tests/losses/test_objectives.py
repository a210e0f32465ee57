"""IQLLoss and DiscreteIQLLoss against NumPy, against TorchRL where it is right, and as a contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import ACT, OBS, make_batch, make_networks
from one_device import OneDevice
from small_losses import (
    LOSSES,
    Head,
    NormalActor,
    ScaledSquare,
    assert_losses,
    assert_same_metrics,
    discrete_networks,
    make_loss,
    make_step,
    perturb_targets,
)
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictSequential,
)
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torch.distributions import Normal
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.envs.utils import ExplorationType
from torchrl.modules import LSTMModule, OneHotCategorical, ProbabilisticActor
from torchrl.objectives import DiscreteIQLLoss as TorchRLDiscreteIQLLoss
from torchrl.objectives import IQLLoss as TorchRLIQLLoss
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import ValueEstimators
from torchrl.objectives.value import TD0Estimator

from iql_torchrl import DiscreteIQLLoss, IQLConfig, IQLLoss, networks, policies
from iql_torchrl.losses import DDPGBC, DIAGNOSTICS, AdvantageWeighted, Expectile, Gumbel, Sparse


def gradients(loss, out) -> dict[str, torch.Tensor]:
    loss.zero_grad(set_to_none=True)
    sum(out[name].sum() for name in LOSSES).backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def numpy_losses(loss, batch, gamma=0.99):
    """The three losses in NumPy from the networks' outputs alone."""
    with torch.no_grad():
        params = loss.qvalue_network_params, loss.target_qvalue_network_params
        q, target_q = (
            np.stack([run(loss.qvalue_network, p, batch, "state_action_value") for p in each])
            for each in (each.unbind(0) for each in params)
        )
        v, next_v = (
            run(loss.value_network, loss.value_network_params, part, "state_value")
            for part in (batch, batch["next"])
        )
        dist = loss.actor_network.get_dist(batch.clone())
        log_prob = dist.log_prob(batch["action"]).numpy()
    reward = batch["next", "reward"].squeeze(-1).numpy()
    going_on = 1.0 - batch["next", "terminated"].squeeze(-1).numpy()
    target = reward + gamma * going_on * next_v
    advantage = target_q.min(0) - v
    weight = np.minimum(np.exp(float(loss.temperature) * advantage), float(loss.max_weight))
    expectile = float(loss.expectile)
    tail = np.where(advantage > 0, expectile, 1 - expectile)
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
    ("temperature", "expectile", "max_weight"),
    [(3, 0.7, 100), (10, 0.9, 2.0), (0, 0.5, 100), (1, 1, 5)],
)
def test_losses_and_diagnostics_equal_numpy(temperature, expectile, max_weight):
    options = {"temperature": temperature, "expectile": expectile, "max_weight": max_weight}
    loss = IQLLoss(*make_networks(critics=2), diagnostics=True, **options)
    perturb_targets(loss)
    batch = make_batch(64)
    expected = numpy_losses(loss, batch)
    before = batch.clone()
    out = loss(batch)
    assert set(batch.keys()) - set(before.keys()) == {"td_error", "_log_prob"}
    assert (batch.select(*before.keys()) == before).all()  # the batch is left as it was
    for name in LOSSES:
        np.testing.assert_allclose(out[name].item(), expected[name], rtol=1e-5)
    np.testing.assert_allclose(
        batch["td_error"].numpy(), expected["td_error"], rtol=1e-4, atol=1e-6
    )
    weight = expected["weight"]
    for name, value in {
        "advantage_mean": expected["advantage"].mean(),
        "weight_mean": weight.mean(),
        "clip_fraction": (weight >= max_weight * (1 - 1e-6)).mean(),
        "effective_sample_size": weight.sum() ** 2 / (weight**2).sum(),
        "qvalue_mean": expected["q"].mean(),
        "value_mean": expected["v"].mean(),
        "td_error_mean": expected["loss_qvalue"] / 2,
    }.items():
        np.testing.assert_allclose(out[name].item(), value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert list(out.keys()) == loss.out_keys
    assert set(DIAGNOSTICS) < set(loss.out_keys)


def compare(classes, parts, batch, **options) -> None:
    """Losses, what they write, and gradients of our class and of TorchRL's, of one state."""
    options |= {"temperature": 2.0, "expectile": 0.8}
    ours, theirs = (cls(*parts, **options).double() for cls in classes)
    batch = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    perturb_targets(ours)
    theirs.load_state_dict(ours.state_dict())  # the layout is the same
    mine, other = batch.clone(), batch.clone()
    out, expected = ours(mine), theirs(other)
    assert_same_metrics(out, expected, rtol=1e-6, atol=1e-6)
    for name in ("td_error", "_log_prob"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-6, atol=1e-6)
    found, right = gradients(ours, out), gradients(theirs, expected)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_function", ["l2", "l1", "smooth_l1"])
@pytest.mark.parametrize("shape", [(32,), (8, 4)])
def test_equals_torchrl_where_it_is_right(reduction, loss_function, shape):
    scalars = "exclude" if reduction == "none" else None
    options = {"reduction": reduction, "scalar_output_mode": scalars}
    classes, parts = (IQLLoss, TorchRLIQLLoss), make_networks(critics=2)
    compare(classes, parts, make_batch(*shape), loss_function=loss_function, **options)


@pytest.mark.parametrize("num_critics", [1, 2, 5])
def test_discrete_equals_torchrl_where_it_is_right(num_critics):
    batch = make_batch(32)
    batch["action"] = nn.functional.one_hot(torch.randint(4, (32,)), 4)
    options = {"loss_function": "l2", "action_space": "one-hot", "num_qvalue_nets": num_critics}
    classes = DiscreteIQLLoss, TorchRLDiscreteIQLLoss
    compare(classes, discrete_networks(spec=OneHot(4)), batch, **options)


@pytest.mark.parametrize("separate", [False, True])
def test_state_dict_layout_is_torchrls(separate):
    parts = make_networks()
    ours = IQLLoss(*parts, separate_losses=separate).state_dict()
    theirs = TorchRLIQLLoss(*parts, separate_losses=separate).state_dict()
    assert list(ours) == list(theirs)
    tensors = [k for k, v in theirs.items() if isinstance(v, torch.Tensor)]
    assert tensors
    assert all(ours[k].shape == theirs[k].shape for k in tensors)


def test_each_loss_alone_equals_that_of_forward_and_reaches_its_own_network():
    loss = IQLLoss(*make_networks(critics=2))
    perturb_targets(loss)
    batch = make_batch()
    out = loss(batch.clone())
    for name in LOSSES:
        loss.zero_grad(set_to_none=True)
        network = name.removeprefix("loss_")
        alone, metadata = getattr(loss, f"{network}_loss")(batch.clone())
        torch.testing.assert_close(alone, out[name])
        assert isinstance(metadata, dict)
        for term in (alone, out[name]):
            term.backward()
            reached = {n for n, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
            names = [n for n, _ in loss.named_parameters()]
            assert reached == {n for n in names if n.startswith(f"{network}_network_params")}
    assert all(leaf.grad is None for leaf in loss.target_qvalue_network_params.values(True, True))


def test_nested_keys():
    spec, state = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,)), ("agent", "observation")
    actor = policies.gaussian(OBS, spec, in_keys=[state], hidden=(8,))
    critic = Mod(Head(OBS + ACT), in_keys=[state, ("agent", "action")], out_keys=[("agent", "q")])
    value = Mod(Head(OBS), in_keys=[state], out_keys=[("agent", "v")])
    loss = IQLLoss(actor, critic, value)
    names = ("action", "reward", "terminated", "done", "priority")
    keys = {name: ("agent", name) for name in names}
    loss.set_keys(**keys, value=("agent", "v"), state_action_value=("agent", "q"))
    flat = make_batch()
    agent = {"observation": flat["observation"], "action": flat["action"]}
    batch = TensorDict({"agent": agent, "next": {"agent": flat["next"]}}, batch_size=[32])
    out = loss(batch)
    assert all(out[name].isfinite() for name in LOSSES)
    assert batch["agent", "priority"].shape == (32,)


def test_bfloat16_autocast_computes_the_losses_in_float32():
    loss = IQLLoss(*make_networks())
    batch = make_batch(256)
    expected = loss(batch.clone())
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(batch)
    assert all(out[name].dtype == torch.float32 for name in LOSSES)
    assert_losses(out, expected, rtol=0.05, atol=0.02)


def without_trailing_dimension(batch):
    flat = batch.clone()
    for key in ("reward", "terminated", "done"):
        flat["next", key] = flat["next", key].squeeze(-1)
    return flat


@pytest.mark.parametrize(
    "form",
    [
        without_trailing_dimension,
        lambda batch: TensorDict.lazy_stack(list(batch.unbind(0))),
        lambda batch: TensorDict(
            batch.to_dict(), batch_size=[6]
        ),  # agents beyond the batch's shape
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_other_forms_of_a_batch_have_the_same_losses(form, masked):
    loss, batch = IQLLoss(*make_networks()), make_batch(6, 3)
    other, expected = form(batch), loss(batch.clone())
    if masked:
        whole = other.batch_size == batch.batch_size
        other["collector", "mask"] = (torch.arange(6) < 4).view(6, *[1] * whole).expand(other.shape)
        expected = loss(batch[:4])
    assert_losses(loss(other), expected)


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
def test_value_estimators_and_masked_steps(estimator):
    """Padding must not flow back through multi-step returns either."""
    loss = IQLLoss(*make_networks())
    loss.make_value_estimator(getattr(ValueEstimators, estimator), gamma=0.9)
    batch = make_batch(6, 5).refine_names(None, "time")
    batch["next", "done"] = batch["next", "terminated"].clone()
    batch["collector", "mask"] = (torch.arange(5) < 3).expand(6, 5)
    spoiled = batch.clone()
    spoiled["next", "reward"][:, 3:] = float("nan")
    spoiled["next", "observation"][:, 3:] = float("inf")
    spoiled["action"][:, 3:] = float("nan")
    grads, spoiled_grads = (gradients(loss, loss(each)) for each in (batch, spoiled))
    assert all(g.isfinite().all() for g in grads.values())
    torch.testing.assert_close(spoiled_grads, grads)


def test_td0_by_hand_equals_torchrls_estimator_which_reads_its_own_keys():
    loss = IQLLoss(*make_networks())
    loss.make_value_estimator(gamma=0.9)
    batch = make_batch()
    batch["steps_to_next_obs"] = torch.randint(1, 4, (32, 1))
    batch["next", "bonus"] = batch["next", "reward"] + 10
    ours = loss.td_target(loss.prepare_batch(batch))
    estimator = TD0Estimator(gamma=0.9, value_network=loss.value_network)

    def theirs():
        with torch.no_grad():
            return estimator.value_estimate(batch.clone()).squeeze(-1)

    torch.testing.assert_close(ours, theirs())
    for reward in ("reward", "bonus"):
        estimator.set_keys(reward=reward)
        loss.make_value_estimator(estimator)
        torch.testing.assert_close(loss.td_target(loss.prepare_batch(batch)), theirs())


def meta_loss() -> IQLLoss:
    actor, critics, value = make_networks(critics=2)
    return IQLLoss(actor.to("meta"), [net.to("meta") for net in critics], value.to("meta"))


@pytest.mark.parametrize("estimator", [None, "TD0", "TD1", "TDLambda"])
def test_the_estimators_numbers_are_on_the_losss_device_and_move_with_it(estimator):
    kind = estimator and getattr(ValueEstimators, estimator)
    loss = meta_loss()
    if kind is not None:
        loss.make_value_estimator(kind, gamma=0.9)
    numbers = dict(loss.value_estimator.named_buffers())
    assert "gamma" in numbers
    assert {number.device.type for number in numbers.values()} == {"meta"}
    loss = IQLLoss(*make_networks())
    loss.make_value_estimator(kind)
    moved = []
    loss._apply(lambda tensor: moved.append(id(tensor)) or tensor)
    assert {id(number) for number in loss.value_estimator.buffers()} <= set(moved)


def test_a_td_target_copies_nothing_between_devices():
    loss = meta_loss()
    loss.make_value_estimator(gamma=0.9)
    batch = make_batch().to("meta")
    with OneDevice("meta") as mode:
        target = loss.td_target(loss.prepare_batch(batch))
    assert target.is_meta
    assert mode.operations > 0


@pytest.mark.parametrize("objective", ["sarsa_expectile", "quantile"])
def test_value_objectives_by_hand(objective):
    loss = IQLLoss(*make_networks(), value_objective=objective, expectile=0.8)
    batch = make_batch()
    read = loss.prepare_batch(batch)
    with torch.no_grad():
        target = loss.target_qvalue(read) if objective == "quantile" else loss.td_target(read)
        error = target - loss.state_value(read)
    expected = torch.maximum(0.8 * error, -0.2 * error)
    if objective == "sarsa_expectile":
        expected = (0.8 - (error < 0).float()).abs() * error**2
    torch.testing.assert_close(loss(batch)["loss_value"].detach(), expected.mean())
    torch.testing.assert_close(loss.value_loss(batch)[0].detach(), expected.mean())


def test_mse_actor_objective():
    actor, critic, value = make_networks(policy=policies.deterministic, hidden=(8,))
    loss = IQLLoss(actor, critic, value, actor_objective="mse")
    batch = make_batch()
    out = loss(batch)
    assert "entropy" not in out
    assert "_log_prob" not in batch
    read = loss.prepare_batch(batch)
    advantage = (loss.target_qvalue(read) - loss.state_value(read)).detach()
    weight = (loss.temperature * advantage).exp().clamp(max=loss.max_weight)
    action = actor(batch.select("observation"))["action"]
    expected = weight * ((action - batch["action"]) ** 2).sum(-1)
    torch.testing.assert_close(out["loss_actor"], expected.mean())
    out["loss_actor"].backward()
    assert all(p.grad.any() for p in actor.parameters())


def test_mse_takes_the_action_that_a_random_actor_writes():
    """Also what a module after the distribution makes of it, in the loss's mode of exploration."""
    head = TensorDictSequential(
        Mod(nn.Linear(OBS, ACT), in_keys=["observation"], out_keys=["loc"]),
        Mod(torch.ones_like, in_keys=["loc"], out_keys=["scale"]),
    )
    drawn = ProbabilisticTensorDictModule(["loc", "scale"], ["raw"], distribution_class=Normal)
    halved = Mod(lambda raw: raw / 2, in_keys=["raw"], out_keys=["action"])
    _, critic, value = make_networks()
    actor = ProbabilisticTensorDictSequential(head, drawn, halved)
    loss = IQLLoss(actor, critic, value, actor_objective="mse", temperature=0.0)
    batch = make_batch(5)
    mean = head(batch.clone())["loc"].detach()
    expected = (mean / 2 - batch["action"]).square().sum(-1).mean()
    torch.testing.assert_close(loss(batch)["loss_actor"].detach(), expected)
    loss.deterministic_sampling_mode = ExplorationType.RANDOM
    torch.manual_seed(0)
    noise = torch.randn(5, ACT)
    expected = ((mean + noise) / 2 - batch["action"]).square().sum(-1).mean()
    torch.manual_seed(0)
    torch.testing.assert_close(loss(batch)["loss_actor"].detach(), expected)


def test_ddpg_bc_of_one_step_without_a_batch_dimension():
    loss = IQLLoss(*make_networks(), actor_objective="ddpg_bc")
    batch = make_batch(1)
    torch.testing.assert_close(loss(batch[0])["loss_actor"], loss(batch)["loss_actor"])


def test_parameters_of_a_users_function_follow_those_of_the_networks():
    """An optimizer's state and the tensors that a loss makes go by the order of parameters."""
    plain, loss = make_loss(), make_loss(value_objective=ScaledSquare())
    names, known = ([name for name, _ in each.named_parameters()] for each in (loss, plain))
    assert names == [*known, "value_objective.function.scale"]
    assert list(loss.state_dict()) == [*plain.state_dict(), "value_objective.function.scale"]


def test_mse_with_actions_of_one_number():
    class OneNumber(Head):
        def forward(self, observation, *action):
            out = super().forward(observation, *(a.unsqueeze(-1) for a in action))
            return out if action else out.squeeze(-1)

    actor = Mod(OneNumber(OBS), in_keys=["observation"], out_keys=["action"])
    parts = make_networks(policy=actor, critic=OneNumber(OBS + 1))
    loss = IQLLoss(*parts, actor_objective="mse", temperature=0.0)
    batch = make_batch(5)
    batch["action"] = torch.randn(5)
    expected = (actor(batch.clone())["action"] - batch["action"]).square().mean()
    torch.testing.assert_close(loss(batch)["loss_actor"], expected)


@pytest.mark.parametrize(
    ("objective", "policy"),
    [
        ("log_prob", policies.gaussian),
        ("log_prob", policies.mixture),
        ("mse", policies.deterministic),
        ("ddpg_bc", policies.gaussian),
        ("ddpg_bc", policies.deterministic),
    ],
)
def test_an_action_without_the_dimension_of_the_policys_is_refused(objective, policy):
    """Actions ``(B,)`` and a policy's ``(B, 1)`` would broadcast to ``(B, B)``."""

    class AnyShape(networks.Critic):
        def forward(self, observation, action):
            return super().forward(observation, action.reshape(len(observation), 1))

    parts = make_networks(act=1, policy=policy, critic=AnyShape(OBS, 1))
    batch = make_batch(8, act=1)
    batch["action"] = batch["action"].squeeze(-1)
    words = r"'action' has shape \(8,\) and the policy's actions have shape \(8, 1\)"
    with pytest.raises(ValueError, match=words):
        IQLLoss(*parts, actor_objective=objective)(batch)
    with pytest.raises(ValueError, match=r"the action has shape \(8,\) .* expected an action \("):
        IQLLoss(*make_networks(act=1))(batch)


def test_callable_actor_objective_gives_its_own_per_sample_loss():
    parts = make_networks()

    def minus_log_prob(actor, batch):
        return -actor.get_dist(batch).log_prob(batch["action"])

    ours, usual = IQLLoss(*parts, actor_objective=minus_log_prob), IQLLoss(*parts)
    usual.load_state_dict(ours.state_dict())
    batch = make_batch()
    assert_losses(ours(batch.clone()), usual(batch.clone()))
    bad = IQLLoss(*parts, actor_objective=lambda actor, batch: batch["action"])
    with pytest.raises(ValueError, match=r"policy_error has shape \(32, 3\)"):
        bad(batch)


def test_reduction_none_warns_about_scalars_and_can_keep_them():
    with pytest.warns(UserWarning, match="left out"):
        loss = IQLLoss(*make_networks(), reduction="none")
    assert set(loss(make_batch()).keys()) == set(LOSSES)
    loss = IQLLoss(*make_networks(), reduction="none", scalar_output_mode="non_tensor")
    out = loss(make_batch(4, 2))
    assert out["loss_actor"].shape == (4, 2)
    assert "entropy" in out.keys()  # noqa: SIM118


def discrete(policy=policies.gaussian, **options):
    return DiscreteIQLLoss(*make_networks(policy=policy), **options)


EXPECTILE, UNREAD = {"expectile": 0.9}, r"is .*does not read"
NAMES = "value_objective is 'xql'; .*'sparse', 'exponential', 'gumbel'"
TWICE = "alpha is 0.0; it must be > 0 and finite"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_loss, {"expectile": 0.0}, "expectile is 0.0"),
        (make_loss, {"expectile": 1.2}, "expectile is 1.2"),
        (make_loss, {"expectile": math.nan}, "expectile is nan"),
        (make_loss, {"temperature": -1.0}, "temperature is -1.0"),
        (make_loss, {"temperature": math.inf}, "temperature is inf; .* finite"),
        (make_loss, {"max_weight": 0.0}, "max_weight is 0.0"),
        (make_loss, {"num_qvalue_nets": 0}, "num_qvalue_nets is 0"),
        (make_loss, {"loss_function": "huber"}, "loss_function is 'huber'"),
        (make_loss, {"value_objective": "huber"}, "is 'huber'; choose one of 'expectile'"),
        (make_loss, {"value_objective": "xql"}, NAMES),
        (IQLConfig, {"value_objective": "xql"}, NAMES),
        (make_loss, {"actor_objective": "ddpg"}, "actor_objective is 'ddpg'"),
        (make_loss, {"reduction": "median"}, "reduction is 'median'"),
        (make_loss, {"reduction": "none", "scalar_output_mode": "drop"}, "is 'drop'; choose 'excl"),
        (make_loss, {"value_objective": Expectile(0.8)} | EXPECTILE, f"expectile {UNREAD}"),
        (make_loss, {"value_objective": Gumbel()} | EXPECTILE, f"expectile {UNREAD}"),
        (make_loss, {"actor_objective": AdvantageWeighted(), "temperature": 9.0}, f"ure {UNREAD}"),
        (make_loss, {"actor_objective": DDPGBC(), "max_weight": 5.0}, f"max_weight {UNREAD}"),
        (DDPGBC, {"bc_weight": -1}, "bc_weight is -1; it must lie in"),
        (DDPGBC, {"q_reduction": "max"}, "q_reduction is 'max'; choose one of 'min', 'mean'"),
        (DDPGBC, {"q_source": "old"}, "q_source is 'old'; choose one of 'online', 'target'"),
        (Sparse, {"alpha": 0.0}, TWICE),
        (IQLConfig, {"alpha": 0.0}, TWICE),
        (Sparse, {"alpha": math.nan}, "alpha is nan"),
        (IQLConfig, {"alpha": math.nan}, "alpha is nan"),
        (Sparse, {"pessimism": -0.5}, "pessimism is -0.5; it must be >= 0 and finite"),
        (IQLConfig, {"pessimism": -0.5}, "pessimism is -0.5; it must be >= 0 and finite"),
        (
            AdvantageWeighted,
            {"weight": "lin"},
            "weight is 'lin'; choose one of 'exponential', 'pos",
        ),
        (IQLConfig, {"advantage_weight": "lin"}, "weight is 'lin'; choose one of 'auto', 'expon"),
        (discrete, {"action_space": "binary"}, "binary"),
        (discrete, {"actor_objective": "mse"}, "WeightedSquaredError needs"),
        (
            discrete,
            {"actor_objective": "ddpg_bc"},
            "DDPGBC needs continuous actions; these are dis",
        ),
        (discrete, {"actor_objective": "flow", "policy": policies.flow}, "FlowMatching needs cont"),
    ],
)
def test_arguments_out_of_range_show_the_value(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_loss, {"expectile": "0.7"}, "expectile is '0.7'; expected a number"),
        (make_loss, {"max_weight": True}, "max_weight is True; expected a number"),
        (make_loss, {"num_qvalue_nets": 2.5}, "num_qvalue_nets is 2.5; it must be an integer"),
        (make_loss, {"num_qvalue_nets": True}, "num_qvalue_nets is True"),
        *(
            (make_loss, {"temperature": value}, r"temperature is .*; expected a number")
            for value in (True, "3", torch.ones(2), None)
        ),
        (make_loss, {"gamma": 0.9}, r"make_value_estimator\(gamma=0\.9\)"),  # as in TorchRL
        (Expectile, {"pessimism": True}, "pessimism is True; expected a number"),
        (Sparse, {"alpha": None}, "alpha is None; expected a number"),
    ],
)
def test_arguments_of_another_kind_show_the_value(make, options, message):
    with pytest.raises(TypeError, match=message):
        make(**options)


def test_a_priority_key_is_refused_as_in_torchrl():
    with pytest.raises(RuntimeError, match="priority"):
        make_loss(priority_key="p")


@pytest.mark.parametrize(
    "key", ["observation", "action", ("next", "reward"), ("next", "terminated")]
)
def test_a_missing_key_is_named(key):
    name = key if isinstance(key, str) else key[-1]
    with pytest.raises(KeyError, match=name):
        IQLLoss(*make_networks())(make_batch().exclude(key))


def test_a_value_with_more_than_one_number_is_named():
    with pytest.raises(ValueError, match=r"state_value has shape \(32, 2\)"):
        IQLLoss(*make_networks(value=nn.Linear(OBS, 2)))(make_batch())


def test_divisors_do_not_read_weights_of_padding():
    """Ranks that divide a batch divide by these."""
    batch = make_batch(4)
    batch["collector", "mask"] = torch.tensor([True, True, False, False])
    batch["priority_weight"] = torch.tensor([0.5, 2.0, math.nan, math.inf])
    read = IQLLoss(*make_networks()).prepare_batch(batch)
    assert [float(each) for each in read.divisors(torch.device("cpu"))] == [2.5, 2.0]


@pytest.mark.parametrize("shape", [(32, 3), (2, 2)])
def test_a_policy_without_independent_dimensions_is_explained(shape):
    """Two steps of two action dimensions would broadcast."""

    class Actor(NormalActor):
        def get_dist(self, td):
            return super().get_dist(td).base_dist

    steps, act = shape
    parts = make_networks(act=act, policy=Actor(OBS, act))
    with pytest.raises(ValueError, match="Independent"):
        IQLLoss(*parts)(make_batch(steps, act=act))


def of_categories(obs, spec, **network):
    return policies.categorical(obs, Categorical(4), **network)


@pytest.mark.parametrize(
    ("policy", "form", "advice"),
    [
        (of_categories, lambda index: index.unsqueeze(-1), r"\.squeeze\(-1\), or use DiscreteIQLL"),
        (
            of_categories,
            lambda index: nn.functional.one_hot(index, 4),
            r"one-hot.*argmax\(-1\), or",
        ),
        (policies.gaussian, lambda index: index.float(), r"'action'\]\.unsqueeze\(-1\)\.$"),
        (policies.gaussian, lambda index: torch.zeros(32, 3), r"dataset\.action_spec\.$"),
    ],
)
def test_actions_of_another_form_than_the_policys_are_explained(policy, form, advice):
    loss, batch = IQLLoss(*make_networks(act=1, policy=policy)), make_batch(act=1)
    batch["action"] = form(torch.randint(4, (32,)))
    with pytest.raises(ValueError, match=advice) as caught:
        loss.actor_term(loss.prepare_batch(batch), torch.zeros(32))
    assert policy is policies.gaussian or "unsqueeze" not in str(caught.value)


def test_a_reward_of_a_team_with_a_value_for_each_agent_is_explained():
    agents = 3
    parts = make_networks(critic=Head(OBS + ACT, agents), value=nn.Linear(OBS, agents))
    loss, batch = IQLLoss(*parts), make_batch()
    with pytest.raises(ValueError, match=r"^reward has shape \(32,\).*each agent too") as caught:
        loss.qvalue_loss(batch)
    assert "Independent" not in str(caught.value)
    for key in ("reward", "terminated", "done"):
        batch["next", key] = batch["next", key].expand(32, agents)
    assert loss.qvalue_loss(batch)[0].isfinite()


def test_dispatch_with_keywords():
    loss = IQLLoss(*make_networks(), diagnostics=True)
    batch = make_batch()
    expected = loss(batch.clone())
    keys = {"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in loss.in_keys}
    out = loss(**keys)
    torch.testing.assert_close(list(out), [expected[name] for name in loss.out_keys])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case", ["continuous", "masked", pytest.param("ddpg_bc", marks=pytest.mark.slow)]
)
def test_one_graph_and_no_recompilation(case, backend):
    """Continuous actions, and discrete ones with masks of actions and of steps."""
    torch._dynamo.reset()
    objective = "ddpg_bc" if case == "ddpg_bc" else "log_prob"
    loss = IQLLoss(*make_networks(), actor_objective=objective, diagnostics=True).double()
    if case == "masked":
        loss = DiscreteIQLLoss(*discrete_networks(mask_key="action_mask")).double()
    SoftUpdate(loss, tau=0.5)
    fast = torch.compile(loss, fullgraph=True, backend=backend)
    for i in range(5):
        batch = make_batch(dtype=torch.float64)
        if case == "masked":
            batch["action"] = torch.randint(4, (32,))
            batch["action_mask"] = torch.rand(32, 4) < 0.5
            batch["action_mask"][torch.arange(32), batch["action"]] = True
            batch["collector", "mask"] = torch.rand(32) < 0.7
        expected = loss(batch.clone())
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            out = fast(batch)
        assert_losses(out, expected, rtol=1e-9, atol=1e-10)


def discrete_case(*shape):
    batch = make_batch(*shape)
    batch["action"] = torch.randint(4, shape)
    return DiscreteIQLLoss(*discrete_networks()), batch


def continuous_case(*shape):
    return IQLLoss(*make_networks()), make_batch(*shape)


class TestOddBatches:
    @pytest.mark.parametrize("make", [continuous_case, discrete_case])
    @pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 5)])
    def test_a_batch_without_steps_is_refused(self, shape, make):
        loss, batch = make(4, 5)
        empty = batch.reshape(-1)[:0].reshape(shape)
        for call in (loss, loss.value_loss, loss.actor_loss, loss.qvalue_loss):
            with pytest.raises(ValueError, match=rf"shape \({shape[0]},.*holds no steps.*replay"):
                call(empty.clone())
        with pytest.raises(ValueError, match=r"has shape \(0, .*the batch holds no steps"):
            loss(TensorDict(batch[:0].to_dict()))

    @pytest.mark.parametrize("make", [continuous_case, discrete_case])
    def test_everything_masked_is_refused(self, make):
        loss, batch = make(4, 5)
        before = [p.clone() for p in loss.parameters()]
        batch["collector", "mask"] = torch.zeros(4, 5, 1, dtype=torch.bool)
        for call in (loss, loss.value_loss, loss.actor_loss, loss.qvalue_loss, make_step(loss)):
            with pytest.raises(
                ValueError, match=r"'mask'\) mark none of the batch's 20 steps as val"
            ):
                call(batch)
        assert all(map(torch.equal, loss.parameters(), before))

    @pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
    def test_where_values_cannot_be_asked_everything_masked_gives_zero_gradients(self):
        loss, batch = continuous_case(4, 5)
        loss.make_value_estimator()  # torch 2.11 cannot trace that it is made
        SoftUpdate(loss, tau=0.5)
        batch["observation"][:] = float("nan")
        mask = torch.zeros(4, 5, 1, dtype=torch.bool)
        batch["collector", "mask"] = mask
        torch._dynamo.reset()
        # torch 2.11 maps no Linear over shapes that vary
        whole = torch.compile(loss, fullgraph=True, backend="eager", dynamic=False)
        assert all((grad == 0).all() for grad in gradients(loss, whole(batch)).values())

        def masked(rows):
            data = batch.clone()
            data["collector", "mask"] = rows
            return loss(data)["loss_value"]

        assert torch.vmap(masked)(torch.stack([mask, mask])).tolist() == [0, 0]

    def test_flat_padding_does_not_flow_into_multi_step_targets(self):
        loss, batch = continuous_case(6)
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9)
        batch["next", "done"] = torch.zeros(6, 1, dtype=torch.bool)
        batch["next", "terminated"] = torch.zeros(6, 1, dtype=torch.bool)
        batch["collector", "mask"] = torch.arange(6) < 4
        short = batch[:4].exclude("collector")
        short["next", "done"] = torch.tensor([[False]] * 3 + [[True]])
        torch.testing.assert_close(loss(batch)["loss_qvalue"], loss(short)["loss_qvalue"])

    @pytest.mark.parametrize("num_actions", [2, 4])
    def test_a_single_step_with_a_one_hot_action(self, num_actions):
        loss = DiscreteIQLLoss(*discrete_networks(num_actions, OneHot(num_actions)))
        batch = make_batch(1)
        batch["action"] = nn.functional.one_hot(torch.tensor([1]), num_actions)
        single = batch[0]
        assert_losses(loss(single), loss(batch))

    def test_bool_one_hot_actions_with_torchrls_distributions(self):
        actor = ProbabilisticActor(
            Mod(nn.Linear(OBS, 4), in_keys=["observation"], out_keys=["logits"]),
            in_keys=["logits"],
            spec=OneHot(4),
            distribution_class=OneHotCategorical,
        )
        loss = DiscreteIQLLoss(actor, *discrete_networks()[1:])
        batch = make_batch(8)
        batch["action"] = OneHot(4).rand((8,))
        as_int = batch.clone()
        as_int["action"] = batch["action"].long()
        torch.testing.assert_close(loss(batch)["loss_actor"], loss(as_int)["loss_actor"])


def test_recurrent_networks_start_without_hidden_states():
    lstm = LSTMModule(input_size=OBS, hidden_size=4, in_key="observation", out_key="features")
    head = Mod(nn.Linear(4, 1), in_keys=["features"], out_keys=["state_value"])
    actor, critic, _ = make_networks()
    loss = IQLLoss(actor, critic, TensorDictSequential(lstm, head))
    batch = make_batch(3, 4).refine_names(None, "time")
    start = (torch.arange(4) == 0).expand(3, 4).unsqueeze(-1).clone()
    batch["is_init"], batch["next", "is_init"] = start, start
    assert all(loss(batch)[name].isfinite() for name in LOSSES)
