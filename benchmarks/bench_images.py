"""Milliseconds of one IQL update whose observations are images: TorchRL's loop and this package.

    python benchmarks/bench_images.py
    python benchmarks/bench_images.py --shape 84 84 3 --batch 64 --device cuda

All have the same networks: ``networks.ImageEncoder`` and two hidden layers, sampling from uint8
images included. In TorchRL's loss actor, critics and V hold one encoder together, whose gradient comes
from all losses (its ``separate_losses=True`` would leave the encoder to the actor alone). This
package evaluates its encoder once for each image and each of the two sets of weights. Blocks of all
competitors alternate; medians of the blocks, and medians of ratios within a round, are reported.
Writes benchmarks/results/images_DEVICE[_NAME].json.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import warnings
from typing import Any

from bench_learning import RESULTS
from bench_step import calls_for, machine_of, timed, write
from iql_torchrl import IQLLoss, IQLStep, captured, compiled, networks, policies
from iql_torchrl.data import DeviceSampler, replay_buffer
from step_rivals import Sizes, Update, trained_as_torchrl_does

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import IQLLoss as TorchRLLoss
from torchrl.objectives import SoftUpdate

ACTIONS, UPDATES, REFERENCE = 2, 8, "TorchRL eager"
FORMS = ("eager", "compiled", "captured")


class WithEncoder(nn.Module):
    """A network of this package behind an encoder that others hold too."""

    def __init__(self, encoder: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.encoder, self.network = encoder, network

    def forward(self, image: Tensor, *rest: Tensor) -> Any:
        return self.network(self.encoder(image), *rest)


def transitions(shape: tuple[int, ...], rows: int, device: str) -> TensorDict:
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


def torchrl(rows: TensorDict, shape: tuple[int, ...], sizes: Sizes, device: str) -> Update:
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
    update, _ = trained_as_torchrl_does(loss, rows, sizes, device, False, lr=3e-4, tau=0.005)
    return update


def ours(
    rows: TensorDict, shape: tuple[int, ...], sizes: Sizes, device: str, form: str, gradient: str
) -> Update:
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
    if form == "eager":
        buffer = replay_buffer(rows, sizes.batch, seed=0, device=device)
        return lambda: step(buffer.sample())
    sampler = DeviceSampler(rows, sizes.batch, seed=0, device=device)
    if form == "compiled":
        fast = compiled(step)
        return lambda: fast(sampler.sample())
    return captured(step, sampler, updates=UPDATES)


def main() -> int:
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
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    shape, device = tuple(options.shape), options.device
    sizes = Sizes(width=options.width, batch=options.batch, rows=options.rows)
    rows = transitions(shape, options.rows, device)
    gc.disable()
    updates: dict[str, tuple[Update, int]] = {REFERENCE: (torchrl(rows, shape, sizes, device), 1)}
    for gradient in ("critics", "all"):
        for form in FORMS:
            update = ours(rows, shape, sizes, device, form, gradient)
            count = UPDATES if form == "captured" else 1
            updates[f"ours {form}, gradient of {gradient}"] = (update, count)
    calls = {}
    for name, (update, _) in updates.items():
        timed(update, 3, sizes, device)
        calls[name] = calls_for(options.block, update, sizes, device)
    blocks: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(options.rounds):
        gc.collect()
        for name, (update, count) in updates.items():
            seconds = timed(update, calls[name], sizes, device)
            blocks[name].append(1000 * seconds / calls[name] / count)
    print(f"images {shape}, batch {sizes.batch}, width {sizes.width}")
    print(f"{'':34}{'ms':>9}{'of TorchRL':>12}{'in a round':>16}")
    results = {}
    for name, times in blocks.items():
        ratios = [t / r for t, r in zip(times, blocks[REFERENCE], strict=True)]
        ms, ratio = statistics.median(times), statistics.median(ratios)
        print(f"{name:34}{ms:9.2f}{ratio:12.2f}{f'{min(ratios):.2f}..{max(ratios):.2f}':>16}")
        results[name] = {"ms": times, "median_ms": ms, "median_ratio": ratio}
    suffix = f"_{options.result}" if options.result else ""
    command = " ".join(["python", *sys.argv])
    content = {
        "command": command,
        "machine": machine_of(device),
        "shape": shape,
        "batch": sizes.batch,
    }
    write(RESULTS / f"images_{device.split(':')[0]}{suffix}.json", content | {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
