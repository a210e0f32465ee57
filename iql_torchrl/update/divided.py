"""One rank's part of an update whose batch several ranks divide."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from iql_torchrl.distributed import Ranks
from iql_torchrl.losses import IQLLoss
from iql_torchrl.losses.batch import Batch

OF_CRITICS = ("td_error", "qvalue")  # metadata (K, *B)
ALWAYS_READ = ("td_error", "log_prob")  # what a summary without diagnostics reads


class Part:
    """The rows of a batch that one rank computes the losses of.

    Every rank holds the whole batch, so it knows by itself what all means are divided by: with D the
    sum of all valid steps' weights and d that of a rank's, the loss of the batch is the sum over ranks
    of ``d / D`` times the mean over the rank's rows. Before its descent a rank communicates only where
    an objective reads ``Batch.mean`` or ``Batch.largest``.

    Raises ``ValueError`` where the batch has fewer rows than there are ranks.
    """

    def __init__(self, loss: IQLLoss, batch: Batch, ranks: Ranks) -> None:
        self._loss, self._whole, self._ranks = loss, batch, ranks
        self._rows = batch.data.batch_size[0]
        if len(batch.data.batch_size) == 1 and not loss.bootstraps_once():
            raise ValueError(
                f"the batch has shape {tuple(batch.data.batch_size)} and the value estimator is a "
                f"{type(loss.value_estimator).__name__}, which reads a trajectory; ranks divide the "
                "first dimension, which is time here. Give batches of several trajectories, (B, T)."
            )
        if self._rows < ranks.size:
            raise ValueError(
                f"the batch has {self._rows} rows and there are {ranks.size} ranks; give a "
                "batch_size of at least one row for each rank."
            )
        own = ranks.part(self._rows)
        self._before, self._after = own.start, self._rows - own.stop
        part = batch.rows(own.start, own.stop)
        where = next(loss.parameters()).device
        divisors = zip(part.divisors(where), batch.divisors(where), strict=True)
        # 0 where the whole is 0, as the mean is there
        self._of_weights, self._of_steps = (torch.where(d == 0, 0.0, n / d) for n, d in divisors)
        self.batch = replace(
            part, all_reduce_mean=self._all_reduce_mean, all_reduce_max=self._all_reduce_max
        )

    def share_of(self, loss: Tensor) -> Tensor:
        """What the loss of this rank's rows adds to that of the batch."""
        return loss * self._of_weights.to(loss) if self._loss.reduction == "mean" else loss

    def _all_reduce_mean(self, mean: Tensor) -> Tensor:
        return self._ranks.sum(mean * self._of_steps.to(mean))

    def _all_reduce_max(self, largest: Tensor) -> Tensor:
        """The largest over ranks: each rank's among zeros in a sum, so that it needs no other call."""
        before, after = self._ranks.rank, self._ranks.size - self._ranks.rank - 1
        padding = (0, 0) * largest.ndim + (before, after)
        return self._ranks.sum(nn.functional.pad(largest.unsqueeze(0), padding)).amax(0)

    def joined(
        self, losses: dict[str, Tensor], metadata: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and summary of the batch, from those of all ranks' rows: one sum over ranks."""
        read = [k for k in metadata if self._loss.diagnostics or k in ALWAYS_READ]
        parts = [self.share_of(loss.detach()) for loss in losses.values()]
        parts += [self._among_zeros(name, metadata[name].detach()) for name in read]
        totals = self._ranks.sum_each(parts)
        of_batch = dict(zip(read, totals[len(losses) :], strict=True))
        return dict(zip(losses, totals, strict=False)), self._loss.summary(self._whole, of_batch)

    def _among_zeros(self, name: str, values: Tensor) -> Tensor:
        """Values of this rank's rows among zeros for the other ranks' rows."""
        dim = int(name in OF_CRITICS)
        padding = (0, 0) * (values.ndim - 1 - dim) + (self._before, self._after)
        return nn.functional.pad(values, padding)
