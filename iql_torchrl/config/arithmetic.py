"""torch's settings of this process on which rounding depends."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch

__all__ = ["Arithmetic"]

PRECISIONS = (
    "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul", "cudnn.conv", "cudnn.rnn",
)  # fmt: skip


@dataclass(frozen=True)
class Arithmetic:
    """The torch settings on which rounding depends."""

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
