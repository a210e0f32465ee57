"""Lower limits of the time of one update: its matrix products; its bytes and kernels.

``floor``: the products of every network by itself, one after the other. ``floor_of_ours``: the
products that our update has, which evaluates the critics together. ``limit_of_bytes``: a
computed time in which every byte is moved once and every kernel is launched.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from measuring import median_seconds
from step_rivals import Made, Sizes, Update, make_step, transitions

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, ...]
Layout = tuple[Shape, Shape]  # sizes and strides
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def products(sizes: Sizes) -> list[tuple[Shape, Shape]]:
    """Shapes of one update's matrix products where no network is evaluated together with another.

    Forward: V at s and s', actor, critics, targets (V at s once more in sequential order is left
    out). Backward: both products of what learns; first layers need none towards the data.
    """
    batch, width, observation = sizes.batch, sizes.width, sizes.observation
    value, actor = (observation, width, width, 1), (observation, width, width, sizes.action)
    critic = (observation + sizes.action, width, width, 1)
    learning = [value, actor] + [critic] * sizes.critics
    results: list[tuple[Shape, Shape]] = []
    for net in [*learning, value] + [critic] * sizes.critics:
        results += [((batch, a), (a, b)) for a, b in pairwise(net)]
    for net in learning:
        layers = list(pairwise(net))
        results += [((a, batch), (batch, b)) for a, b in layers]
        results += [((batch, b), (b, a)) for a, b in layers[1:]]
    return results


class Products(TorchDispatchMode):
    """Layouts of the operands of every matrix product; one batched product counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Layout, Layout]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operator.overloadpacket.__name__
        if name in PRODUCTS:
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.operands.append(((tuple(a.shape), a.stride()), (tuple(b.shape), b.stride())))
        return operator(*args, **(kwargs or {}))


def our_products(sizes: Sizes, order: str = "sequential") -> list[tuple[Layout, Layout]]:
    """Layouts of the products of our update that are kernels of their own.

    A product in which a dimension is 1 (V's and the critics' last layers) is a sum, which Inductor
    writes into the kernels around it; these are left out.
    """
    step, batch = make_step(sizes, "cpu", order), transitions(replace(sizes, rows=sizes.batch))
    with Products() as recorded:
        step(batch)
    return [(a, b) for a, b in recorded.operands if 1 not in (*a[0][-2:], *b[0][-2:])]


def floor(rows: TensorDict, sizes: Sizes, device: str, graph: bool = False) -> Made:
    """The products of one update and nothing else; ``graph``: replayed as a CUDA graph."""
    how = {"device": device, "dtype": getattr(torch, sizes.dtype)}
    work = [(torch.randn(a, **how), torch.randn(b, **how)) for a, b in products(sizes)]
    return timed_products(work, graph)


def floor_of_ours(rows: TensorDict, sizes: Sizes, device: str, graph: bool = False) -> Made:
    """As :func:`floor`, of the products that our sequential update has."""
    how = {"device": device, "dtype": getattr(torch, sizes.dtype)}
    work = [(random_of(*a, **how), random_of(*b, **how)) for a, b in our_products(sizes)]
    return timed_products(work, graph)


def random_of(shape: Shape, strides: Shape, **how: Any) -> Tensor:
    """Random numbers in this layout, whose entries may share memory."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.randn(last + 1, **how).as_strided(shape, strides)


def timed_products(work: list[tuple[Tensor, Tensor]], graph: bool) -> Made:
    results = [torch.matmul(a, b) for a, b in work]

    def update() -> None:
        for (a, b), out in zip(work, results, strict=True):
            (torch.bmm if a.ndim == 3 else torch.mm)(a, b, out=out)

    return (replayed(update, (work, results)) if graph else update), 1


def replayed(update: Update, kept: object) -> Update:
    """``update`` as a CUDA graph; ``kept`` are the tensors in it, which must live on."""
    update()
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        update()
    return lambda: (recorded.replay(), kept)[0]


def update_bytes(sizes: Sizes) -> dict[str, int]:
    """Bytes that one update moves at least once, in float32; activations are left out.

    Parameters and both moments are read and written; a gradient is written and read; targets are
    read and written; a row of the batch is read.
    """
    step = make_step(sizes, "cpu", "sequential")
    live = sum(p.numel() for p in step.loss.parameters() if p.requires_grad)
    targets = sum(target.numel() for target in step.followed.targets)
    row = 2 * sizes.observation + sizes.action + 1  # floats; and two flags of one byte
    return {
        "parameters": 4 * 2 * live,
        "moments": 4 * 4 * live,
        "gradients": 4 * 2 * live,
        "targets": 4 * 2 * targets,
        "batch": sizes.batch * (4 * row + 2),
    }


def least_kernels(sizes: Sizes) -> int:
    """Kernels that an update needs at least: its products, drawing the indices, gathering floats
    and flags, and two optimizer steps (V's, then actor's and critics')."""
    return len(our_products(sizes)) + 1 + 2 + 2


def launch_seconds(sizes: Sizes, device: str, kernels: int = 100) -> float:
    """Time of a kernel that does almost nothing, one of ``kernels`` that wait for one another.

    On CUDA within a graph, as in a captured update.
    """
    number = torch.zeros(1, device=device)

    def update() -> None:
        for _ in range(kernels):
            number.add_(1)

    once = replayed(update, number) if device.startswith("cuda") else update
    return median_seconds(once, 20, sizes, device) / kernels


def bandwidth(sizes: Sizes, device: str, count: int, kernels: int = 20) -> float:
    """Bytes per second, read and written, of copies of ``count`` bytes."""
    source = torch.zeros(max(1, count // 8), device=device)  # 4 bytes read, 4 written
    target = torch.empty_like(source)

    def update() -> None:
        for _ in range(kernels):
            target.copy_(source)

    once = replayed(update, (source, target)) if device.startswith("cuda") else update
    moved = 2 * source.numel() * source.element_size()
    return moved * kernels / median_seconds(once, 2, sizes, device)


def limit_of_bytes(sizes: Sizes, device: str) -> dict[str, Any]:
    """``ms = bytes / bandwidth + kernels * launch``, with what the device does now.

    The bandwidth is the larger of two: copies of 256 MiB (32 on a CPU), and copies that move as many
    bytes as the update, which stay in a cache where they fit.
    """
    parts = update_bytes(sizes)
    count, kernels = sum(parts.values()), least_kernels(sizes)
    large = (256 if device.startswith("cuda") else 32) * 2**20
    speeds = {
        "of_memory": bandwidth(sizes, device, 2 * large),
        "of_the_updates_bytes": bandwidth(sizes, device, count),
    }
    launch = launch_seconds(sizes, device)
    return {
        "bytes": parts | {"all": count},
        "bandwidth_gb_per_s": {name: speed / 1e9 for name, speed in speeds.items()},
        "kernels": kernels,
        "launch_us": 1e6 * launch,
        "ms": 1e3 * (count / max(speeds.values()) + kernels * launch),
    }
