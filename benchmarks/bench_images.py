"""Milliseconds of one IQL update whose observations are images: TorchRL's loop and this package.

    python benchmarks/bench_images.py
    python benchmarks/bench_images.py --shape 84 84 3 --batch 64 --device cuda

All have the same networks: ``networks.ImageEncoder`` and two hidden layers, sampling from uint8
images included. In TorchRL's loss actor, critics and V hold one encoder together, whose gradient comes
from all losses (its ``separate_losses=True`` would leave the encoder to the actor alone). This
package evaluates its encoder once for each image and each of the two sets of weights. Blocks of all
competitors alternate, as in ``bench_step.py``. Writes benchmarks/results/images_DEVICE[_NAME].json.
"""

from __future__ import annotations

import argparse
import warnings
from functools import lru_cache, partial
from typing import Any

from bench_step import REFERENCE, machine_of, measure, show, summarise
from iql_torchrl import IQLLoss, IQLStep, networks, policies
from record import RESULTS, save
from step_rivals import FORMS, Made, Sizes, in_form, trained_as_torchrl_does

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import IQLLoss as TorchRLLoss
from torchrl.objectives import SoftUpdate

ACTIONS = 2
Shape = tuple[int, ...]


class WithEncoder(nn.Module):
    """A network of this package behind an encoder that others hold too."""

    def __init__(self, encoder: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.encoder, self.network = encoder, network

    def forward(self, image: Tensor, *rest: Tensor) -> Any:
        return self.network(self.encoder(image), *rest)


@lru_cache(maxsize=1)
def pictures(shape: Shape, rows: int, device: str) -> TensorDict:
    generator = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        return torch.randint(0, 256, (rows, *shape), dtype=torch.uint8, generator=generator)

    terminated = torch.rand(rows, 1, generator=generator) < 0.02
    following = {
        "observation": images(),
        "reward": torch.randn(rows, 1, generator=generator),
        "terminated": terminated,
        "done": terminated.clone(),
    }
    action = torch.rand(rows, ACTIONS, generator=generator) * 2 - 1
    columns = {"observation": images(), "action": action, "next": following}
    return TensorDict(columns, batch_size=[rows]).to(device)


def torchrl(shape: Shape, _: TensorDict, sizes: Sizes, device: str) -> Made:
    hidden = (sizes.width, sizes.width)
    encoder = networks.ImageEncoder(shape)
    spec = Bounded(-torch.ones(ACTIONS), torch.ones(ACTIONS))
    actor = policies.gaussian(64, spec, hidden=hidden, preprocess=encoder)
    critic = WithEncoder(encoder, networks.Critic(64, ACTIONS, hidden=hidden))
    value = WithEncoder(encoder, networks.StateValue(64, hidden=hidden))
    loss = TorchRLLoss(
        actor,
        ValueOperator(critic, in_keys=["observation", "action"]),
        ValueOperator(value, in_keys=["observation"]),
        num_qvalue_nets=2,
        loss_function="l2",
        temperature=3.0,
        expectile=0.7,
    ).to(device)
    rows = pictures(shape, sizes.rows, device)
    return trained_as_torchrl_does(loss, rows, sizes, device, False, lr=3e-4, tau=0.005)


def ours(shape: Shape, form: str, gradient: str, _: TensorDict, sizes: Sizes, device: str) -> Made:
    hidden, keys = (sizes.width, sizes.width), ["features"]
    module = networks.JoinedEncoders([networks.ImageEncoder(shape)])
    spec = Bounded(-torch.ones(ACTIONS), torch.ones(ACTIONS))
    critic = networks.Critic(64, ACTIONS, hidden=hidden)
    loss = IQLLoss(
        policies.gaussian(64, spec, in_keys=keys, hidden=hidden),
        ValueOperator(critic, in_keys=[*keys, "action"]),
        ValueOperator(networks.StateValue(64, hidden=hidden), in_keys=keys),
        encoder_network=TensorDictModule(module, in_keys=["observation"], out_keys=keys),
        encoder_gradient=gradient,
    ).to(device)
    loss.make_value_estimator(gamma=0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4, fused=True)
    step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.005), order="simultaneous")
    return in_form(step, form, pictures(shape, sizes.rows, device), sizes, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--shape", type=int, nargs=3, default=(32, 32, 3), help="of one image")
    add("--batch", type=int, default=128)
    add("--width", type=int, default=256, help="of the hidden layers")
    add("--rows", type=int, default=4096)
    add("--rounds", type=int, default=7)
    add("--block", type=float, default=3.0, help="seconds of a block")
    add("--device", default="cpu")
    add("--result", default="", help="name in the file of results")
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    shape = tuple(o.shape)
    sizes = Sizes(width=o.width, batch=o.batch, rows=o.rows)
    rivals = {REFERENCE: partial(torchrl, shape)} | {
        f"{form}, {gradient}": partial(ours, shape, form, gradient)
        for gradient in ("critics", "all")
        for form in FORMS
    }
    results, _ = measure(rivals, sizes, o.device, o.rounds, o.block, 0)
    summarise(results)
    show(sizes, results)
    ending = f"_{o.result}" if o.result else ""
    content = {"machine": machine_of(o.device), "shape": shape, "batch": o.batch}
    path = RESULTS / f"images_{o.device.split(':')[0]}{ending}.json"
    save(path, content | {"results": results})


if __name__ == "__main__":
    main()
