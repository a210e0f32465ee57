"""Random tensors that a loss asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iql_torchrl.losses.batch import per_sample

# Keys of a batch that replace draws.
FLOW_NOISE, FLOW_TIME, FLOW_DROP = "flow_noise", "flow_time", "flow_drop"
IMAGE_SHIFT, NEXT_IMAGE_SHIFT = "image_shift", "next_image_shift"


@dataclass(frozen=True)
class Draw:
    """A random tensor of shape ``shape``: standard normal, or uniform on [0, 1).

    ``entries``: how many numbers a sample has, in the last dimension; None: one, without a dimension.
    ``among``: (first, count) for a part of a population of ``count`` runs, the first dimension being
    this part's: numbers are drawn for all runs, so that each run gets those that it gets in the whole.
    """

    shape: tuple[int, ...]
    normal: bool
    entries: int | None = None
    among: tuple[int, int] | None = None

    def fill(self, out: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw into ``out``; by default from the generator of torch on its device."""
        if self.among is not None:
            first, count = self.among
            every = out.new_empty((count, *out.shape[1:]))
            replace(self, among=None).fill(every, generator)
            return out.copy_(every[first : first + len(out)])
        fill = out.normal_ if self.normal else out.uniform_
        return fill(generator=generator)

    def empty(self, like: Tensor) -> Tensor:
        return torch.zeros(self.shape, dtype=like.dtype, device=like.device)

    def fit(self, given: Tensor, size: torch.Size, key: str, like: Tensor) -> Tensor:
        """The entry ``key`` of a batch of shape ``size`` in place of the draw.

        Runs of a population that share a batch share it. Raises ``ValueError`` on another shape.
        """
        ends = () if self.entries is None else (self.entries,)
        if self.entries is None:
            given = per_sample(given, size, key)
        if given.shape != (*size, *ends):
            raise ValueError(
                f"{key!r} has shape {tuple(given.shape)} in a batch of shape {tuple(size)}; "
                f"expected {(*size, *ends)}: it replaces "
                f"{'standard normal' if self.normal else 'uniform'} numbers that the loss draws."
            )
        return given.to(like.dtype).expand(self.shape)
