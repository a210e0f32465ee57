"""Milliseconds of one update where an observation is a category or an image: TorchRL, this package.

    python benchmarks/bench_inputs.py categories
    python benchmarks/bench_inputs.py images
    python benchmarks/bench_inputs.py images --shape 84 84 3 --batch 64 --device cuda

``categories``: sizes of ICU-Sepsis (716 states, 25 treatments) and of examples/iql_sepsis.py (batch
2048, one layer of 64). TorchRL's networks read the one-hot form, as in its environments with
``OneHot`` specs; "ours one-hot" reads the same form.

``images``: all have ``networks.ImageEncoder`` and two hidden layers; sampling from uint8 images is
included. In TorchRL's loss actor, critics and V hold one encoder together, whose gradient comes from
all losses (its ``separate_losses=True`` would leave the encoder to the actor alone). This package
evaluates its encoder once for each image and each of the two sets of weights.

Rows are random and blocks of all competitors alternate, as in ``bench_step.py``. Writes
benchmarks/results/KIND_DEVICE[_NAME].json.
"""

from __future__ import annotations

import argparse
import warnings
from functools import lru_cache, partial
from typing import Any

from bench_step import REFERENCE
from iql_torchrl import DiscreteIQLLoss, IQLLoss, networks, policies
from iql_torchrl.losses import SharedEncoder
from measuring import add_options, measure, show, summarise
from record import place, save
from step_rivals import (
    FORMS,
    Made,
    Rival,
    Sizes,
    in_form,
    random_rows,
    step_of,
    torchrl_loss,
    trained_as_torchrl_does,
)

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Generator, Tensor, nn
from torchrl.data import Bounded, Categorical
from torchrl.modules import ValueOperator
from torchrl.objectives import DiscreteIQLLoss as TorchRLDiscreteLoss

STATES, TREATMENTS, CATEGORY_SIZES = 716, 25, Sizes(width=64, batch=2048, rows=100_000)
RATES = {"lr": 1e-2, "tau": 0.05}  # of examples/iql_sepsis.py
ACTIONS, FEATURES = 2, 64  # of images
Shape = tuple[int, ...]


def categories(one_hot: bool, device: str, rows: int = CATEGORY_SIZES.rows) -> TensorDict:
    def observe(draw: Generator) -> Tensor:
        state = torch.randint(STATES, (rows,), generator=draw)
        return nn.functional.one_hot(state, STATES).float() if one_hot else state

    def act(draw: Generator) -> Tensor:
        return torch.randint(TREATMENTS, (rows,), generator=draw)

    return random_rows(rows, observe, act, ended=0.1).to(device)


def category_parts(one_hot: bool) -> list[nn.Module]:
    options = {} if one_hot else {"preprocess": networks.OneHot(STATES)}
    options["hidden"] = (CATEGORY_SIZES.width,)
    critic = networks.DiscreteCritic(STATES, TREATMENTS, **options)
    return [
        policies.categorical(STATES, Categorical(TREATMENTS), **options),
        ValueOperator(critic, in_keys=["observation"], out_keys=["state_action_value"]),
        ValueOperator(networks.StateValue(STATES, **options), in_keys=["observation"]),
    ]


def category_torchrl(compile: bool, _: TensorDict, sizes: Sizes, device: str) -> Made:
    loss = TorchRLDiscreteLoss(
        *category_parts(True), action_space="categorical", loss_function="l2", expectile=0.7
    )
    rows = categories(True, device)
    return trained_as_torchrl_does(loss, rows, sizes, device, compile, **RATES)


def category_ours(form: str, one_hot: bool, _: TensorDict, sizes: Sizes, device: str) -> Made:
    loss = DiscreteIQLLoss(*category_parts(one_hot), action_space="categorical").to(device)
    step = step_of(loss, capturable=device.startswith("cuda"), **RATES)
    return in_form(step, form, categories(one_hot, device), sizes, device)


def category_rivals() -> dict[str, Rival]:
    rivals: dict[str, Rival] = {
        REFERENCE: partial(category_torchrl, False),
        "TorchRL compiled": partial(category_torchrl, True),
        "ours one-hot eager": partial(category_ours, "eager", True),
        "ours one-hot captured": partial(category_ours, "captured", True),
    }
    return rivals | {f"ours {form}": partial(category_ours, form, False) for form in FORMS}


class WithEncoder(nn.Module):
    """A network of this package behind an encoder that others hold too."""

    def __init__(self, encoder: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.encoder, self.network = encoder, network

    def forward(self, image: Tensor, *rest: Tensor) -> Any:
        return self.network(self.encoder(image), *rest)


@lru_cache(maxsize=1)
def images(shape: Shape, rows: int, device: str) -> TensorDict:
    def observe(draw: Generator) -> Tensor:
        return torch.randint(0, 256, (rows, *shape), dtype=torch.uint8, generator=draw)

    def act(draw: Generator) -> Tensor:
        return torch.rand(rows, ACTIONS, generator=draw) * 2 - 1

    return random_rows(rows, observe, act).to(device)


def image_torchrl(shape: Shape, _: TensorDict, sizes: Sizes, device: str) -> Made:
    hidden, encoder = (sizes.width, sizes.width), networks.ImageEncoder(shape)
    spec = Bounded(-torch.ones(ACTIONS), torch.ones(ACTIONS))
    critic = WithEncoder(encoder, networks.Critic(FEATURES, ACTIONS, hidden=hidden))
    value = WithEncoder(encoder, networks.StateValue(FEATURES, hidden=hidden))
    loss = torchrl_loss(
        policies.gaussian(FEATURES, spec, hidden=hidden, preprocess=encoder),
        ValueOperator(critic, in_keys=["observation", "action"]),
        ValueOperator(value, in_keys=["observation"]),
    )
    return trained_as_torchrl_does(loss, images(shape, sizes.rows, device), sizes, device)


def image_ours(
    shape: Shape, form: str, gradient: str, _: TensorDict, sizes: Sizes, device: str
) -> Made:
    hidden, keys = (sizes.width, sizes.width), ["features"]
    module = networks.JoinedEncoders([networks.ImageEncoder(shape)])
    spec = Bounded(-torch.ones(ACTIONS), torch.ones(ACTIONS))
    critic = networks.Critic(FEATURES, ACTIONS, hidden=hidden)
    value = networks.StateValue(FEATURES, hidden=hidden)
    encoder = TensorDictModule(module, in_keys=["observation"], out_keys=keys)
    loss = IQLLoss(
        policies.gaussian(FEATURES, spec, in_keys=keys, hidden=hidden),
        ValueOperator(critic, in_keys=[*keys, "action"]),
        ValueOperator(value, in_keys=keys),
        encoder_network=SharedEncoder(encoder, gradient),
    ).to(device)
    loss.make_value_estimator(gamma=0.99)
    step = step_of(loss, order="simultaneous")
    return in_form(step, form, images(shape, sizes.rows, device), sizes, device)


def image_rivals(shape: Shape) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {REFERENCE: partial(image_torchrl, shape)}
    for gradient in ("critics", "all"):
        for form in FORMS:
            rivals[f"{form}, {gradient}"] = partial(image_ours, shape, form, gradient)
    return rivals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser, rounds=15, block=1.0)
    add = parser.add_argument
    add("kind", choices=("categories", "images"))
    add("--shape", type=int, nargs=3, default=(32, 32, 3), help="of one image")
    add("--batch", type=int, default=128, help="of images")
    add("--width", type=int, default=256, help="of the hidden layers behind an encoder")
    add("--rows", type=int, default=4096, help="of images")
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    if o.kind == "categories":
        sizes, rivals = CATEGORY_SIZES, category_rivals()
    else:
        sizes = Sizes(width=o.width, batch=o.batch, rows=o.rows)
        rivals = image_rivals(tuple(o.shape))
    results, _ = measure(rivals, sizes, o.device, rounds=o.rounds, block=o.block)
    summarise(results, REFERENCE)
    show(f"{o.kind}, width {sizes.width}, batch {sizes.batch}", results)
    content = {"batch": sizes.batch, "width": sizes.width, "competitors": results}
    content |= {"shape": o.shape} if o.kind == "images" else {"states": STATES}
    save(place(o.kind, o.device, o.result, folder=o.output), content, device=o.device)


if __name__ == "__main__":
    main()
