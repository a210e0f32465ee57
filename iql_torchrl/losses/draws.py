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
    """A random tensor of shape ``(*batch, *entries)``: standard normal, or uniform on [0, 1).

    ``entries``: the shape of a sample's numbers; empty: one number, without a dimension.
    ``among``: (first, count) for a part of a population of ``count`` runs, the first dimension being
    this part's: numbers are drawn for all runs, so that each run gets those that it gets in the whole.
    """

    batch: tuple[int, ...]
    entries: tuple[int, ...] = ()
    normal: bool = False
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
        return torch.zeros((*self.batch, *self.entries), dtype=like.dtype, device=like.device)

    def fit(self, given: Tensor, size: torch.Size, key: str, like: Tensor) -> Tensor:
        """The entry ``key`` of a batch of shape ``size`` in place of the draw.

        Runs of a population that share a batch share it. Raises ``ValueError`` on another shape.
        """
        if not self.entries:
            given = per_sample(given, size, key)
        if given.shape != (*size, *self.entries):
            raise ValueError(
                f"{key!r} has shape {tuple(given.shape)} in a batch of shape {tuple(size)}; "
                f"expected {(*size, *self.entries)}: it replaces "
                f"{'standard normal' if self.normal else 'uniform'} numbers that the loss draws."
            )
        return given.to(like.dtype).expand(*self.batch, *self.entries)
