"""An encoder that actor, critics and V share: losses, gradients, targets, every form of the step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import ACT, make_batch
from losses.test_sharing import build as build_shared
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, captured, compiled, networks, policies
from iql_torchrl.data import DeviceSampler

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
IMAGE, ROWS, B = (9, 10, 3), 40, 16
GAMMA, EXPECTILE, TEMPERATURE, POLYAK = 0.9, 0.8, 2.0, 0.1


def steps(rows: int = ROWS) -> TensorDict:
    generator = torch.Generator().manual_seed(0)

    def observed():
        return {
            "camera": torch.randint(0, 256, (rows, *IMAGE), dtype=torch.uint8, generator=generator),
            "speed": torch.randn(rows, 2, generator=generator),
        }

    return TensorDict(
        {
            "observation": observed(),
            "action": torch.rand(rows, ACT, generator=generator) * 1.8 - 0.9,
            "next": {
                "observation": observed(),
                "reward": torch.randn(rows, 1, generator=generator),
                "terminated": torch.rand(rows, 1, generator=generator) < 0.2,
                "done": torch.zeros(rows, 1, dtype=torch.bool),
                "truncated": torch.zeros(rows, 1, dtype=torch.bool),
            },
        },
        batch_size=[rows],
    )


KEYS = [("observation", "camera"), ("observation", "speed")]


def build(**options) -> IQLLoss:
    torch.manual_seed(1)
    parts = [networks.ImageEncoder(IMAGE, 5), networks.Standardise(torch.ones(2), torch.ones(2))]
    encoder = TensorDictModule(networks.JoinedEncoders(parts), in_keys=KEYS, out_keys=["features"])
    mlp = {"hidden": (8,)}
    keys = ["features"]
    spec = Bounded(-torch.ones(ACT), torch.ones(ACT))
    loss = IQLLoss(
        policies.gaussian(7, spec, in_keys=keys, **mlp),
        lambda: ValueOperator(networks.Critic(7, ACT, **mlp), in_keys=[*keys, "action"]),
        ValueOperator(networks.StateValue(7, **mlp), in_keys=keys),
        encoder_network=encoder,
        expectile=EXPECTILE,
        temperature=TEMPERATURE,
        **options,
    )
    loss.make_value_estimator(gamma=GAMMA)
    return loss


def make_step(loss, order, **options) -> IQLStep:
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    return IQLStep(loss, optimizer, SoftUpdate(loss, tau=POLYAK), order=order, **options)


class Plain:
    """The same update in plain torch: modules, and their targets as copies."""

    def __init__(self, loss: IQLLoss) -> None:
        self.encoder = self.module(loss.encoder_network, loss.encoder_network_params)
        self.target_encoder = self.module(loss.encoder_network, loss.target_encoder_network_params)
        self.actor = self.module(loss.actor_network, loss.actor_network_params)[0].module
        self.value = self.module(loss.value_network, loss.value_network_params).module
        self.critics, self.target_critics = (
            [self.module(loss.qvalue_network, p).module for p in params.unbind(0)]
            for params in (
                loss.qvalue_network_params.data,
                loss.target_qvalue_network_params.data,
            )
        )

    @staticmethod
    def module(network, params):
        made = copy.deepcopy(network)
        params.data.clone().to_module(made)
        return made.requires_grad_(True)

    def trained(self) -> list[nn.Parameter]:
        modules = [self.encoder, self.actor, self.value, *self.critics]
        return [p for module in modules for p in module.parameters()]

    def encode(self, encoder, observation):
        module = encoder.module
        image, speed = observation["camera"], observation["speed"]
        images = module.encoders[0]
        x = image.permute(0, 3, 1, 2).to(speed.dtype) / 255
        features = images.norm(images.linear(images.convolutions(x).flatten(1))).tanh()
        return torch.cat([features, speed - 1.0], -1)

    def losses(self, batch, gradient, value=None):
        """V's loss, and the sum of the other two, given which V weights the samples."""
        live = self.encode(self.encoder, batch["observation"])
        others = live if gradient == "all" else live.detach()
        with torch.no_grad():
            following = self.encode(self.encoder, batch["next", "observation"])
            target_features = self.encode(self.target_encoder, batch["observation"])
            q = torch.stack([c(target_features, batch["action"]) for c in self.target_critics])
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
            ((c(live, batch["action"]).squeeze(-1) - target) ** 2).mean() for c in self.critics
        )
        return loss_value, loss_actor + loss_critics

    def update(self, batch, order, gradient, optimizer) -> None:
        if order == "simultaneous":
            self.descend(sum(self.losses(batch, gradient)), optimizer)
        else:
            self.descend(self.losses(batch, gradient)[0], optimizer)
            self.descend(self.losses(batch, gradient)[1], optimizer)
        pairs = [(self.target_encoder, self.encoder)]
        pairs += list(zip(self.target_critics, self.critics, strict=True))
        with torch.no_grad():
            for target, live in pairs:
                for old, new in zip(target.parameters(), live.parameters(), strict=True):
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
    loss = build(encoder_gradient=gradient).double()
    plain = Plain(loss)
    optimizer = torch.optim.Adam(plain.trained(), lr=1e-2)
    step = make_step(loss, order)
    data = steps().apply(as_double)
    sampler, reference = (DeviceSampler(data, B, seed=3) for _ in range(2))
    if form == "captured":
        captured(step, sampler, updates=3)()
    else:
        once = compiled(step) if form == "compiled" else step
        for _ in range(3):
            once(sampler.sample())
    for _ in range(3):
        plain.update(reference.sample(), order, gradient, optimizer)
    expected = Plain(loss)
    pairs = zip(
        (p for m in vars(expected).values() for p in parameters_in(m)),
        (p for m in vars(plain).values() for p in parameters_in(m)),
        strict=True,
    )
    for found, wanted in pairs:
        # Adam divides by the size of the gradient, so rounding moves an entry without gradient
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("gradient", ["critics", "all"])
def test_whose_loss_reaches_the_encoder(gradient):
    loss = build(encoder_gradient=gradient)
    batch = steps()[:B]
    for name in ("value_loss", "actor_loss", "qvalue_loss"):
        loss.zero_grad()
        getattr(loss, name)(batch.copy())[0].backward()
        reached = [
            n for n, p in loss.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        ]
        of_encoder = any(n.startswith("encoder_network") for n in reached)
        assert of_encoder is (gradient == "all" or name == "qvalue_loss"), name


def test_each_image_is_encoded_once_for_each_weights_and_time(monkeypatch):
    loss = build()
    step = make_step(loss, "sequential")
    calls = []
    step(steps()[:B])
    step.loss.encoder_network.register_forward_hook(lambda *_: calls.append(1))
    step(steps()[:B])
    assert len(calls) == 3  # s by the live and by the target encoder, s' by the live one


def test_random_shift_moves_both_observations_by_their_own_numbers():
    """With offsets that leave the image where it is, the losses are those without shift."""
    still, moved = build(random_shift=3), build(random_shift=3)
    without = build()
    batch = steps()[:B]
    middle = torch.full((B, 2), 0.5)
    centred = batch.copy().update({"image_shift": middle, "next_image_shift": middle})
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        torch.testing.assert_close(still(centred.copy())[name], without(batch.copy())[name])
    shifted = batch.copy().update({"image_shift": middle * 0, "next_image_shift": middle * 0})
    by_hand = batch.copy()
    for side in (("observation", "camera"), ("next", "observation", "camera")):
        image = np.pad(batch[side].numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
        by_hand[side] = torch.from_numpy(image[:, : IMAGE[0], : IMAGE[1]].copy())
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        torch.testing.assert_close(moved(shifted.copy())[name], without(by_hand.copy())[name])
        assert not torch.equal(moved(shifted.copy())[name], still(centred.copy())[name])


def test_encoders_that_do_not_fit_are_refused():
    spec = Bounded(-torch.ones(ACT), torch.ones(ACT))

    def make(encoder, keys=("features",), **options):
        return IQLLoss(
            policies.gaussian(4, spec, in_keys=keys, hidden=(8,)),
            lambda: ValueOperator(networks.Critic(4, ACT), in_keys=[*keys, "action"]),
            ValueOperator(networks.StateValue(4), in_keys=keys),
            encoder_network=encoder,
            **options,
        )

    linear = TensorDictModule(nn.Linear(3, 4), in_keys=["observation"], out_keys=["features"])
    normed = TensorDictModule(nn.BatchNorm1d(4), in_keys=["observation"], out_keys=["features"])
    images = TensorDictModule(
        networks.JoinedEncoders([networks.ImageEncoder((8, 9, 3), features=4)]),
        in_keys=["observation"],
        out_keys=["features"],
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
        ({"encoder": None, "random_shift": 2}, ValueError, "there is no encoder_network"),
        ({"encoder": linear, "encoder_gradient": "none"}, ValueError, "encoder_gradient is 'none'"),
    ):
        with pytest.raises(error, match=message):
            make(**arguments)


def test_a_trunk_in_two_descents_is_counted_twice(uncompiled):
    """Adam's bias correction of parameters that V and the critics share, in the sequential order."""
    loss, other = (build_shared("single", False)[1] for _ in range(2))
    other.load_state_dict(loss.state_dict())
    eager, fast = make_step(loss, "sequential"), compiled(make_step(other, "sequential"))
    batch = make_batch(B)
    for _ in range(3):
        eager(batch.copy())
        fast(batch.copy())
    for found, wanted in zip(other.parameters(), loss.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def as_double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def parameters_in(modules) -> list[torch.Tensor]:
    listed = modules if isinstance(modules, list) else [modules]
    return [p.data for module in listed for p in module.parameters()]
