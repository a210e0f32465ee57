"""Random tensors that a loss reads: drawn outside of compiled programs, or given in the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iql_torchrl.objectives.batch import Batch, per_sample

__all__ = ["FLOW_NOISE", "FLOW_TIME", "IMAGE_SHIFT", "NEXT_IMAGE_SHIFT", "Draw", "with_draws"]

# Keys of a batch that replace draws.
FLOW_NOISE, FLOW_TIME = "flow_noise", "flow_time"
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
        if self.normal:
            return out.normal_(generator=generator)
        return out.uniform_(generator=generator)

    def empty(self, like: Tensor) -> Tensor:
        return torch.zeros(self.shape, dtype=like.dtype, device=like.device)

    def fit(self, given: Tensor, batch_size: torch.Size, key: str, like: Tensor) -> Tensor:
        """The entry ``key`` of a batch in place of the draw.

        Runs of a population that share a batch share it. Raises ``ValueError`` on another shape.
        """
        ends = () if self.entries is None else (self.entries,)
        if self.entries is None:
            given = per_sample(given, batch_size, key)
        if given.shape != (*batch_size, *ends):
            raise ValueError(
                f"{key!r} has shape {tuple(given.shape)} in a batch of shape {tuple(batch_size)}; "
                f"expected {(*batch_size, *ends)}: it replaces "
                f"{'standard normal' if self.normal else 'uniform'} numbers that the loss draws."
            )
        return given.to(like.dtype).expand(self.shape)


def with_draws(loss: Any, batch: Batch, given: Mapping[str, Tensor] | None) -> Batch:
    """``batch`` with what ``loss.random_inputs`` asks for.

    From the batch where it has such a key, else from ``given``, else drawn from torch's default
    generator.
    """
    size = batch.data.batch_size
    needed: Mapping[str, Draw] = loss.random_inputs(size)
    if not needed:
        return batch
    # not loss.parameters(), which torch 2.11 cannot trace, nor next(iter(...)), as torch 2.15
    like, *_ = loss.actor_network_params.values(True, True)
    draws = {}
    for key, draw in needed.items():
        own = batch.data.get(key, None)
        if own is not None:
            draws[key] = draw.fit(own, size, key, like)
        elif given is not None and key in given:
            draws[key] = given[key]
        else:
            draws[key] = draw.fill(draw.empty(like))
    return replace(batch, draws=draws)
