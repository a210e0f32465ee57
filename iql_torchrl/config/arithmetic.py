"""torch on this machine: devices on which a run can train, and settings on which rounding depends."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch

PRECISIONS = (
    "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul", "cudnn.conv", "cudnn.rnn",
)  # fmt: skip
LAUNCHING = ("cuda",)  # count_kernels.py adds the CPU, where it traces a program for a GPU
DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")  # where torch's fused Adam runs


@dataclass(frozen=True)
class Arithmetic:
    """The settings of torch on which rounding depends."""

    threads: int
    dtype: torch.dtype
    determinism: int
    precisions: tuple[str, ...]

    @classmethod
    def current(cls) -> Arithmetic:
        return cls(
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_deterministic_debug_mode(),
            tuple(attrgetter(name)(torch.backends).fp32_precision for name in PRECISIONS),
        )

    def adopt(self) -> None:
        """Set them in this process."""
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
    """Return whether each operation launches a kernel: a program should have few of them there."""
    return device.type in LAUNCHING


def number_dtype(device: torch.device) -> torch.dtype:
    """Dtype of Python's numbers, in which torch's optimizers compute; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
