"""One update of a batch that several ranks divide: shares of means, sums of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from iql_torchrl.losses.batch import Batch

__all__ = ["Exchange", "Part", "part_of_rank", "summed_gradients"]

OF_CRITICS = ("td_error", "qvalue")  # metadata (K, *B)
ALWAYS_READ = ("td_error", "log_prob")  # what a summary without diagnostics reads


class Exchange(Protocol):
    """What an update needs of a group of ranks."""

    rank: int
    size: int

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; inside a graph too."""
        ...


def part_of_rank(count: int, rank: int, size: int) -> range:
    """Which of ``count`` things, numbered from 0, belong to ``rank``: consecutive, and all once."""
    return range(count * rank // size, count * (rank + 1) // size)


class Part:
    """The rows of a batch that one rank computes the losses of.

    Every rank holds the whole batch, so it knows by itself what all means are divided by: with D the
    sum of all valid steps' weights and d that of a rank's, the loss of the batch is the sum over ranks
    of ``d / D`` times the mean over the rank's rows. No rank has to communicate before its descent.

    Raises ``ValueError`` where the batch has fewer rows than there are ranks.
    """

    def __init__(self, loss: Any, batch: Batch, ranks: Exchange) -> None:
        self._loss, self._whole, self._ranks = loss, batch, ranks
        self._runs = 0 if loss.members is None else 1
        self._rows = batch.data.batch_size[self._runs]
        if self._rows < ranks.size:
            raise ValueError(
                f"the batch has {self._rows} rows and there are {ranks.size} ranks; give a "
                "batch_size of at least one row for each rank."
            )
        own = part_of_rank(self._rows, ranks.rank, ranks.size)
        self._first, self._end = own.start, own.stop
        part = batch.rows(self._first, self._end, runs=bool(self._runs))
        all_weights, all_steps = loss.divisors(batch)
        weights, steps = loss.divisors(part)
        self._of_weights = _ratio(weights, all_weights)
        self._of_steps = _ratio(steps, all_steps)
        self.batch = replace(part, mean_of_all=self._mean_of_all)

    def share_of(self, loss: Tensor) -> Tensor:
        """What the loss of this rank's rows adds to that of the batch; ``()`` or ``(P,)``."""
        return loss * self._of_weights.to(loss) if self._loss.reduction == "mean" else loss

    def _mean_of_all(self, mean: Tensor) -> Tensor:
        return self._ranks.sum(mean * self._of_steps.to(mean))

    def joined(
        self, losses: dict[str, Tensor], metadata: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and summary of the batch, from those of all ranks' rows: one sum over ranks."""
        read = (
            list(metadata) if self._loss.diagnostics else [k for k in ALWAYS_READ if k in metadata]
        )
        parts = [self.share_of(loss.detach()) for loss in losses.values()]
        parts += [self._in_place(name, metadata[name].detach()) for name in read]
        totals = iter(_summed(parts, self._ranks))
        joined = {name: next(totals) for name in losses}
        return joined, self._loss.summary(self._whole, {name: next(totals) for name in read})

    def _in_place(self, name: str, values: Tensor) -> Tensor:
        """Values of this rank's rows among zeros for the other ranks' rows."""
        dim = self._runs + (name in OF_CRITICS)
        before, after = list(values.shape), list(values.shape)
        before[dim], after[dim] = self._first, self._rows - self._end
        return torch.cat([values.new_zeros(before), values, values.new_zeros(after)], dim)


def summed_gradients(gradients: Sequence[Tensor | None], ranks: Exchange) -> list[Tensor | None]:
    """Sums over ranks of the gradients that exist, which are the same on all ranks; one exchange."""
    totals = iter(_summed([gradient for gradient in gradients if gradient is not None], ranks))
    return [None if gradient is None else next(totals) for gradient in gradients]


def _summed(tensors: Sequence[Tensor], ranks: Exchange) -> list[Tensor]:
    """Sums over ranks of tensors of any shapes, as one flat sum in the widest of their dtypes."""
    if not tensors:
        return []
    flat = ranks.sum(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [
        piece.view(tensor.shape).to(tensor.dtype)
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, 0 where the whole is 0, as the mean is there."""
    return part / torch.where(whole == 0, torch.ones_like(whole), whole)
