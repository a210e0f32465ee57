"""A check without a GPU that nothing inside leaves the device or waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        kwargs = kwargs or {}
        self.operations += 1
        name = func.overloadpacket.__name__
        self._check(func, "reads", (args, kwargs))
        if name.startswith(WAITING):
            raise AssertionError(f"{func} waits for the device")
        if name == "index" and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            raise AssertionError(
                f"{func} with a mask waits for the device: its shape follows values"
            )
        out = func(*args, **kwargs)
        self._check(func, "writes", out)
        return out

    def _check(self, func: Any, does: str, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.device.type != self.device:
                raise AssertionError(
                    f"{func} {does} a tensor {tuple(value.shape)} on {value.device}, not {self.device}"
                )
