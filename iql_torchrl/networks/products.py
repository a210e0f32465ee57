"""Matrix products of networks on a CPU: by oneDNN where torch's own, which is MKL's, is slower."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from timeit import timeit
from typing import Any

import torch
from torch import Tensor

from iql_torchrl.config import choose_products, chosen_products, launches_kernels
from iql_torchrl.private_apis import has_onednn_linear, onednn_linear

# Where oneDNN is faster than MKL, it is so from these sizes on (rows and columns, and multiplications):
# measured with 1,500 random shapes on a Zen 5 by benchmarks/bench_products.py of commit 297e1c5.
SHORTEST, LARGE = 64, 2**22
# For at most FEW networks a program has one product each: Inductor then fuses what follows them. For
# more, one operation computes all products.
FEW = 2
# oneDNN is used where it takes at most this share of MKL's time: an update has other costs with it.
WORTHWHILE = 0.75
ROUNDS = 6


def is_wide(parameters: Iterable[Tensor]) -> bool:
    """Whether an update of these parameters has products that oneDNN may compute."""
    return any(
        p.ndim > 1
        and min(p.shape[-2:]) >= SHORTEST
        and p.dtype == torch.float32
        and p.device.type == "cpu"
        for p in parameters
    )


def settle_products() -> None:
    """Choose the faster library by a measurement, unless one is chosen; takes about 10 ms once.

    Every process decides alone: ranks that must agree take rank 0's choice.
    """
    if chosen_products() is None:
        choose_products("onednn" if _share_of_time() <= WORTHWHILE else "mkl")


def _share_of_time() -> float:
    """oneDNN's time of a layer's products, forwards and backwards, as a share of MKL's."""
    if not has_onednn_linear():
        return math.inf
    x, weight, bias = (torch.full(shape, 0.5) for shape in ((256, 256), (256, 256), (256,)))

    def by_mkl() -> None:
        torch.addmm(bias, x, weight.mT)
        _ = x.mT @ weight

    def by_onednn() -> None:
        onednn_linear(x, weight, bias)
        onednn_linear(x.mT, weight.mT, None)

    turns = [(timeit(by_onednn, number=1), timeit(by_mkl, number=1)) for _ in range(ROUNDS)]
    onednn, mkl = map(min, zip(*turns, strict=True))
    return onednn / mkl


def matmul(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second``, differentiable and traceable."""
    if not uses_onednn(first, second):
        return first @ second
    op = torch.ops.iql_torchrl.product.default
    first = first.contiguous()  # as oneDNN needs it: here Inductor joins the copy with other work
    networks = _networks(first, second)
    if len(networks) == 1 and networks[0] <= FEW:
        a, b = (x.expand(*networks, *x.shape[-2:]) for x in (first, second))
        return torch.stack([op(*pair) for pair in zip(a, b, strict=True)])
    out: Tensor = op(first, second)
    return out


def uses_onednn(first: Tensor, second: Tensor) -> bool:
    """Whether ``first @ second`` is for oneDNN: chosen, and large enough."""
    # launches_kernels is true of the CPU where count_kernels.py traces a program for a GPU there
    if chosen_products() != "onednn" or launches_kernels(first.device):
        return False
    floats = first.dtype == second.dtype == torch.float32 and first.device.type == "cpu"
    rows, inner, columns = *first.shape[-2:], second.shape[-1]
    small = min(rows, inner, columns) < SHORTEST or rows * inner * columns < LARGE
    return floats and not small and not torch.is_autocast_enabled("cpu")


def _networks(first: Tensor, second: Tensor) -> torch.Size:
    return torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])


def by_pairs(first: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``first @ weight.mT + bias`` without autograd, one matrix after the other."""
    networks = _networks(first, weight)
    if not networks:
        return onednn_linear(first, weight, bias)
    out = first.new_empty(*networks, first.shape[-2], weight.shape[-2])
    first, weight = (x.expand(*networks, *x.shape[-2:]) for x in (first, weight))
    for index in itertools.product(*map(range, networks)):
        one = None if bias is None else bias[index]
        out[index] = onednn_linear(first[index], weight[index], one)
    return out


def _product(first: Tensor, second: Tensor) -> Tensor:
    return by_pairs(first, second.mT, None)


def _product_shape(first: Tensor, second: Tensor) -> Tensor:
    return first.new_empty(*_networks(first, second), first.shape[-2], second.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    first, second = ctx.saved_tensors
    of_first = of_second = None
    if ctx.needs_input_grad[0]:
        of_first = matmul(gradient, second.mT).sum_to_size(first.shape)
    if ctx.needs_input_grad[1]:
        of_second = matmul(first.mT, gradient).sum_to_size(second.shape)
    return of_first, of_second


# An operation of its own, because Inductor accepts torch's only for weights that never change. torch
# keeps it when this module is imported again (importlib.reload, autoreload of a notebook).
if not hasattr(torch.ops.iql_torchrl, "product"):
    torch.library.define("iql_torchrl::product", "(Tensor first, Tensor second) -> Tensor")
    torch.library.impl("iql_torchrl::product", "CPU")(_product)
    torch.library.register_fake("iql_torchrl::product")(_product_shape)
    torch.library.register_autograd("iql_torchrl::product", _gradients, setup_context=_keep)
