"""An encoder that actor, critics and V share: losses, gradients, targets, every form of the step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import ACT, make_batch
from losses.test_sharing import build as build_shared
from small_losses import LOSSES, SPEC, Forms, make_step
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ValueOperator

from iql_torchrl import IQLLoss, captured, compiled, networks, policies
from iql_torchrl.data import DeviceSampler
from iql_torchrl.losses import DDPGBC, AdvantageWeighted, SharedEncoder

IMAGE, ROWS, B = (9, 10, 3), 40, 16
# the loss keeps its discount in float32: one that float32 holds exactly leaves float64 exact
GAMMA, EXPECTILE, TEMPERATURE, POLYAK = 0.875, 0.8, 2.0, 0.1


def steps(rows: int = ROWS) -> TensorDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = make_batch(rows)
        for part in (data, data["next"]):
            images = torch.randint(0, 256, (rows, *IMAGE), dtype=torch.uint8)
            part["observation"] = {"camera": images, "speed": torch.randn(rows, 2)}
    for key in ("done", "truncated"):
        data["next", key] = torch.zeros(rows, 1, dtype=torch.bool)
    return data


KEYS = [("observation", "camera"), ("observation", "speed")]


def build(gradient="critics", random_shift=0) -> IQLLoss:
    torch.manual_seed(1)
    parts = [networks.ImageEncoder(IMAGE, 5), networks.Standardise(torch.ones(2), torch.ones(2))]
    encoder = TensorDictModule(networks.JoinedEncoders(parts), in_keys=KEYS, out_keys=["features"])
    mlp = {"hidden": (8,)}
    keys = ["features"]
    loss = IQLLoss(
        policies.gaussian(7, SPEC, in_keys=keys, **mlp),
        lambda: ValueOperator(networks.Critic(7, ACT, **mlp), in_keys=[*keys, "action"]),
        ValueOperator(networks.StateValue(7, **mlp), in_keys=keys),
        encoder_network=SharedEncoder(encoder, gradient, random_shift),
        expectile=EXPECTILE,
        temperature=TEMPERATURE,
    )
    loss.make_value_estimator(gamma=GAMMA)
    return loss


class Plain(nn.Module):
    """The same update in plain torch: modules, and their targets as copies."""

    def __init__(self, loss: IQLLoss) -> None:
        super().__init__()

        def module(name, params):
            made = copy.deepcopy(getattr(loss, f"{name}_network"))
            params.data.clone().to_module(made)
            return made.requires_grad_(True)

        def with_critics(prefix):
            encoder = module("encoder", getattr(loss, f"{prefix}encoder_network_params"))
            params = getattr(loss, f"{prefix}qvalue_network_params").data.unbind(0)
            return nn.ModuleList([encoder, *(module("qvalue", p).module for p in params)])

        self.online, self.target = with_critics(""), with_critics("target_")
        self.actor = module("actor", loss.actor_network_params)[0].module
        self.value = module("value", loss.value_network_params).module

    def trained(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("target")]

    def encode(self, encoder, observation):
        module = encoder.module
        image, speed = observation["camera"], observation["speed"]
        images = module.encoders[0]
        x = image.permute(0, 3, 1, 2).to(speed.dtype) / 255
        features = images.norm(images.linear(images.convolutions(x).flatten(1))).tanh()
        return torch.cat([features, speed - 1.0], -1)

    def losses(self, batch, gradient):
        """V's loss, and the sum of the other two, given which V weights the samples."""
        encoder, *critics = self.online
        target_encoder, *target_critics = self.target
        online = self.encode(encoder, batch["observation"])
        others = online if gradient == "all" else online.detach()
        with torch.no_grad():
            following = self.encode(encoder, batch["next", "observation"])
            target_features = self.encode(target_encoder, batch["observation"])
            q = torch.stack([c(target_features, batch["action"]) for c in target_critics])
            q = q.amin(0).squeeze(-1)
            going = (~batch["next", "terminated"]).to(q).squeeze(-1)
        v = self.value(others).squeeze(-1)
        difference = q - v
        side = (EXPECTILE - (difference < 0).to(q.dtype)).abs()
        loss_value = (side * difference**2).mean()
        with torch.no_grad():
            weight = ((q - v) * TEMPERATURE).exp().clamp(max=100)
            bootstrap = self.value(following).squeeze(-1)
            target = batch["next", "reward"].squeeze(-1) + GAMMA * going * bootstrap
        loc, scale = self.actor(others)
        log_prob = torch.distributions.Normal(loc, scale).log_prob(batch["action"]).sum(-1)
        loss_actor = -(weight * log_prob).mean()
        loss_critics = sum(
            ((c(online, batch["action"]).squeeze(-1) - target) ** 2).mean() for c in critics
        )
        return loss_value, loss_actor + loss_critics

    def update(self, batch, order, gradient, optimizer) -> None:
        if order == "simultaneous":
            self.descend(sum(self.losses(batch, gradient)), optimizer)
        else:
            self.descend(self.losses(batch, gradient)[0], optimizer)
            self.descend(self.losses(batch, gradient)[1], optimizer)
        with torch.no_grad():
            for old, new in zip(self.target.parameters(), self.online.parameters(), strict=True):
                old.mul_(1 - POLYAK).add_(new, alpha=POLYAK)

    def descend(self, loss, optimizer) -> None:
        """Parameters that the loss does not reach stay, as with torch's own zero_grad."""
        parameters = self.trained()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


ORDERS = pytest.mark.parametrize("order", ["sequential", "simultaneous"])
GRADIENTS = pytest.mark.parametrize("gradient", ["critics", "all"])


def check_updates(order, gradient, form) -> None:
    """Three updates of a form against plain torch, in float64."""
    loss = build(gradient).double()
    plain = Plain(loss)
    optimizer = torch.optim.Adam(plain.trained(), lr=1e-2)
    step = make_step(loss, order=order)
    data = steps().apply(lambda x: x.double() if x.is_floating_point() else x)
    sampler, reference = (DeviceSampler(data, B, seed=3) for _ in range(2))
    if form == "captured":
        captured(step, sampler, updates=3)()
    else:
        once = compiled(step) if form == "compiled" else step
        for _ in range(3):
            once(sampler.sample())
    for _ in range(3):
        plain.update(reference.sample(), order, gradient, optimizer)
    found, expected = (list(each.parameters()) for each in (Plain(loss), plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@ORDERS
@GRADIENTS
def test_eager_updates_equal_plain_torch(order, gradient):
    check_updates(order, gradient, "eager")


@pytest.mark.parametrize(
    ("order", "gradient", "form"),
    [
        ("sequential", "all", "compiled"),
        ("simultaneous", "all", "captured"),
        pytest.param("sequential", "critics", "captured", marks=pytest.mark.slow),
    ],
)
def test_traced_updates_equal_plain_torch(order, gradient, form, uncompiled):
    check_updates(order, gradient, form)


@pytest.mark.slow
@ORDERS
@GRADIENTS
@pytest.mark.parametrize("form", ["compiled", "captured"])
def test_programs_equal_plain_torch(order, gradient, form):
    check_updates(order, gradient, form)


@GRADIENTS
@pytest.mark.parametrize("objective", [AdvantageWeighted, DDPGBC])  # also by critics of its action
def test_whose_loss_reaches_the_encoder(gradient, objective):
    loss = build(gradient)
    loss.actor_objective = objective()
    batch = steps()[:B]
    for name in ("value_loss", "actor_loss", "qvalue_loss"):
        loss.zero_grad()
        getattr(loss, name)(batch.copy())[0].backward()
        reached = [
            n for n, p in loss.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        ]
        of_encoder = any(n.startswith("encoder_network") for n in reached)
        assert of_encoder is (gradient == "all" or name == "qvalue_loss"), name


def test_each_image_is_encoded_once_for_each_weights_and_time():
    loss = build()
    step, calls = make_step(loss), []
    step(steps()[:B])
    loss.encoder_network.register_forward_hook(lambda *_: calls.append(1))
    step(steps()[:B])
    assert len(calls) == 3  # s by the online and by the target encoder, s' by the online one


def test_random_shift_moves_both_observations_by_their_own_numbers():
    """With offsets that leave the image where it is, the losses are those without shift."""
    shifting, without = build(random_shift=3), build()
    batch = steps()[:B]
    middle = torch.full((B, 2), 0.5)
    centred = batch.copy().update({"image_shift": middle, "next_image_shift": middle})
    for name in LOSSES:
        torch.testing.assert_close(shifting(centred.copy())[name], without(batch.copy())[name])
    shifted = batch.copy().update({"image_shift": middle * 0, "next_image_shift": middle * 0})
    by_hand = batch.copy()
    for side in (("observation", "camera"), ("next", "observation", "camera")):
        image = np.pad(batch[side].numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
        by_hand[side] = torch.from_numpy(image[:, : IMAGE[0], : IMAGE[1]].copy())
    for name in LOSSES:
        torch.testing.assert_close(shifting(shifted.copy())[name], without(by_hand.copy())[name])
        assert not torch.equal(shifting(shifted.copy())[name], shifting(centred.copy())[name])


def test_encoders_that_do_not_fit_are_refused():
    def make(encoder, keys=("features",), **settings):
        return IQLLoss(
            policies.gaussian(4, SPEC, in_keys=keys, hidden=(8,)),
            lambda: ValueOperator(networks.Critic(4, ACT), in_keys=[*keys, "action"]),
            ValueOperator(networks.StateValue(4), in_keys=keys),
            encoder_network=SharedEncoder(encoder, **settings) if settings else encoder,
        )

    images = networks.JoinedEncoders([networks.ImageEncoder((8, 9, 3), features=4)])
    linear, normed, images = (
        TensorDictModule(module, in_keys=["observation"], out_keys=["features"])
        for module in (nn.Linear(3, 4), nn.BatchNorm1d(4), images)
    )
    for arguments, error, message in (
        ({"encoder": nn.Linear(3, 4)}, TypeError, "encoder_network is Linear; it must be"),
        ({"encoder": normed}, ValueError, "BatchNorm1d, which keeps statistics"),
        ({"encoder": linear, "keys": ("observation",)}, ValueError, "which no other network reads"),
        ({"encoder": linear, "random_shift": 2}, ValueError, "has no images to move"),
        (
            {"encoder": images, "random_shift": 8},
            ValueError,
            "8 pixels and an image has a side of 8",
        ),
        ({"encoder": linear, "gradient": "none"}, ValueError, "gradient is 'none'"),
        ({"encoder": linear, "random_shift": 0.5}, ValueError, "random_shift is 0.5"),
    ):
        with pytest.raises(error, match=message):
            make(**arguments)


@pytest.mark.usefixtures("uncompiled")
def test_a_trunk_in_two_descents_is_counted_twice():
    """Adam's bias correction of parameters that V and the critics share, in the sequential order."""
    table = make_batch(ROWS, dtype=torch.float64)
    forms = Forms(build_shared("single", False)[1].double(), table, ["compiled"])
    forms.run()
    forms.assert_equal()
