"""A check without a GPU that nothing inside leaves the device or waits for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iql_torchrl.config import arithmetic

# Operations whose result the host needs before it can go on: values, and shapes that follow values.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "item",
    "is_nonzero",
)


class OneDevice(TorchDispatchMode):
    """Raises ``AssertionError`` on an operation that has tensors on another device than ``device``.

    That is: inputs or outputs elsewhere, a CPU number of no dimensions among them, which torch itself
    would accept; copies between devices; and operations that wait for the device (``WAITING``). On
    ``meta`` nothing is computed, so it stands for a GPU. ``operations``: how many were seen.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = torch.device(device).type
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = func.overloadpacket.__name__
        self._check(f"{func} reads", (args, kwargs))
        masked = name == "index" and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )  # its shape follows values
        assert not masked, f"{func} with a mask waits for the device"
        assert not name.startswith(WAITING), f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self._check(f"{func} writes", out)
        return out

    def _check(self, does: str, values: Any) -> None:
        elsewhere = _kinds(values) - {self.device}
        assert not elsewhere, f"{does} tensors on {elsewhere}, not {self.device}"


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to ``meta``; any other operation on both raises ``AssertionError``.

    A copy back raises too, since it would wait for the device; so does :data:`WAITING` on ``meta``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = _kinds((args, kwargs))
        name = func.overloadpacket.__name__
        assert not ("meta" in read and name.startswith(WAITING)), f"{func} waits for the device"
        assert len(read) < 2 or name == "copy_", f"{func} reads tensors on {sorted(read)}"
        out = func(*args, **(kwargs or {}))
        assert read != {"meta"} or "cpu" not in _kinds(out), f"{func} copies to the CPU"
        self.count += len(read) > 1 or (read == {"cpu"} and _kinds(out) == {"meta"})
        return out


def _kinds(values: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


@contextmanager
def values_are_assumed() -> Iterator[None]:
    """Comparisons on ``meta`` are true and numbers 0.5, while networks are put together, once."""
    truth, number = Tensor.__bool__, Tensor.__float__
    Tensor.__bool__ = lambda t: t.is_meta or truth(t)  # type: ignore[method-assign]
    Tensor.__float__ = lambda t: 0.5 if t.is_meta else number(t)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.__bool__, Tensor.__float__ = truth, number  # type: ignore[method-assign]


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets agents be built and trained on ``meta``, in place of a GPU.

    What torch and TorchRL cannot do on ``meta``, though nothing on CUDA corresponds to it, is
    answered here: the devices of fused Adam, whether two tensors are one, autocast, generators.
    """
    optimizers = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(arithmetic, "DEVICES", (*arithmetic.DEVICES, "meta"))
    fused = ["cpu", "cuda", "meta"]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: fused)
    monkeypatch.setattr(Tensor, "is_set_to", _is_set_to)
    autocast = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind: kind != "meta" and autocast(kind)
    )
    monkeypatch.setattr(torch, "Generator", RecordedGenerator)
    randn = torch.randn

    def any_randn(*shape: Any, generator: Any = None, **options: Any) -> Tensor:
        real = {} if isinstance(generator, RecordedGenerator) else {"generator": generator}
        return randn(*shape, **options, **real)

    monkeypatch.setattr(torch, "randn", any_randn)


def _is_set_to(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class RecordedGenerator:
    """Stands in for ``torch.Generator``, which cannot be made on ``meta``."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = torch.device(device)

    def manual_seed(self, seed: int) -> RecordedGenerator:
        self.given = seed
        return self

    def seed(self) -> int:
        return 0
