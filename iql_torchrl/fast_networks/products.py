"""Matrix products of networks on a CPU: by oneDNN where torch's own, which is MKL's, is slower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iql_torchrl.host import onednn_linear, slow_mkl

__all__ = ["affine", "matmul", "product"]

# On AMD's processors with AVX-512 MKL takes longer than oneDNN from these sizes on
# (benchmarks/bench_products.py): rows and columns, multiplications; and networks one after the other.
SHORTEST, LARGE, FEW = 64, 2**22, 8
BY_ONEDNN = slow_mkl()


def product(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second`` without autograd; both are matrices or stacks of equally many matrices."""
    if not _by_onednn(first, second):
        return first @ second
    if first.ndim == second.ndim == 2:
        return onednn_linear(first, second.mT, None)
    return torch.stack([onednn_linear(a, b.mT, None) for a, b in _pairs(first, second)])


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.mT + bias`` without autograd: ``(B, in)`` and ``(out, in)``, or stacks of them."""
    if _by_onednn(x, weight.mT):
        if weight.ndim == 2:
            return onednn_linear(x, weight, bias)
        pairs = zip(_pairs(x, weight), bias.unbind(), strict=True)
        return torch.stack([onednn_linear(a, b, c) for (a, b), c in pairs])
    if weight.ndim == 2:
        return torch.addmm(bias, x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(-2), x.expand(len(weight), *x.shape[-2:]), weight.mT)


def matmul(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second``, differentiable and traceable."""
    if not _by_onednn(first, second):
        return first @ second
    first = first.contiguous()  # as oneDNN needs it: here Inductor joins the copy with other work
    op = torch.ops.iql_torchrl.product.default
    if first.ndim == second.ndim == 2:
        out: Tensor = op(first, second)
        return out
    return torch.stack([op(a, b) for a, b in _pairs(first, second)])


def _by_onednn(first: Tensor, second: Tensor) -> bool:
    if not BY_ONEDNN or first.device.type != "cpu" or max(first.ndim, second.ndim) > 3:
        return False
    if first.dtype != torch.float32 or second.dtype != torch.float32:
        return False
    rows, inner, columns = *first.shape[-2:], second.shape[-1]
    if min(rows, inner, columns) < SHORTEST or rows * inner * columns < LARGE:
        return False
    networks = max(first.shape[:-2].numel(), second.shape[:-2].numel())
    return networks <= FEW and not torch.is_autocast_enabled("cpu")


def _pairs(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The matrices of two stacks; a single matrix is multiplied with each of the others."""
    count = max(len(x) for x in (first, second) if x.ndim == 3)
    a, b = (x.unbind() if x.ndim == 3 else (x,) * count for x in (first, second))
    return list(zip(a, b, strict=True))


# An operation of its own, because Inductor accepts torch's only for weights that never change.
torch.library.define("iql_torchrl::product", "(Tensor first, Tensor second) -> Tensor")


@torch.library.impl("iql_torchrl::product", "CPU")
def _product(first: Tensor, second: Tensor) -> Tensor:
    return onednn_linear(first, second.mT, None)


@torch.library.register_fake("iql_torchrl::product")
def _product_shape(first: Tensor, second: Tensor) -> Tensor:
    return first.new_empty(first.shape[0], second.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    first, second = ctx.saved_tensors
    of_first = matmul(gradient, second.mT) if ctx.needs_input_grad[0] else None
    of_second = matmul(first.mT, gradient) if ctx.needs_input_grad[1] else None
    return of_first, of_second


torch.library.register_autograd("iql_torchrl::product", _gradients, setup_context=_keep)
