"""torch on this machine: devices on which a run can train, and settings on which rounding depends."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import torch

Products = Literal["mkl", "onednn"]

PRECISIONS = (
    "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul", "cudnn.conv", "cudnn.rnn",
)  # fmt: skip
chosen: Products | None = None
LAUNCHING = ("cuda",)  # count_kernels.py adds the CPU, where it traces a program for a GPU
DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")  # where torch's fused Adam runs


def choose_products(name: Products | Literal["auto"]) -> None:
    """Choose the library of large float32 matrix products of updates on a CPU, in this process.

    ``"mkl"`` is torch's own; ``"onednn"`` is faster on some processors. ``"auto"``, the default: an
    update of wide networks measures both before its first product. The choice is part of a step's
    state, so that a resumed run has the same bits. Raises ``ValueError`` on another name.
    """
    global chosen
    if name not in ("auto", "mkl", "onednn"):
        raise ValueError(f"products is {name!r}; choose 'auto', 'mkl' or 'onednn'.")
    chosen = None if name == "auto" else name


def chosen_products() -> Products | None:
    """What was chosen or measured; None where nothing was needed yet."""
    return chosen


@dataclass(frozen=True)
class Arithmetic:
    """The settings on which rounding depends: torch's, and the library of products."""

    threads: int
    dtype: torch.dtype
    determinism: int
    precisions: tuple[str, ...]
    products: Products | None

    @classmethod
    def current(cls) -> Arithmetic:
        return cls(
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_deterministic_debug_mode(),
            tuple(attrgetter(name)(torch.backends).fp32_precision for name in PRECISIONS),
            chosen,
        )

    def adopt(self) -> None:
        """Set them in this process."""
        choose_products(self.products or "auto")
        current = Arithmetic.current()
        if current.threads != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_deterministic_debug_mode(self.determinism)
        for name, old, new in zip(PRECISIONS, current.precisions, self.precisions, strict=True):
            if new != old:
                attrgetter(name)(torch.backends).fp32_precision = new


def check_device(device: str) -> None:
    """Raise ``ValueError`` unless ``device`` names a torch device of a type in ``DEVICES``."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in DEVICES:
        raise ValueError(
            f"device is {device!r}; give a torch device of type {', '.join(DEVICES)}, "
            "such as 'cuda' or 'cuda:1'."
        )


def check_usable(device: str) -> None:
    """Raise ``ValueError`` with torch's reason unless this machine can use ``device``."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device is {device!r}, which this machine cannot use: {reason}"
        ) from error


def launches_kernels(device: torch.device) -> bool:
    """Whether every operation is a kernel that is launched: a program should have few of them there."""
    return device.type in LAUNCHING
