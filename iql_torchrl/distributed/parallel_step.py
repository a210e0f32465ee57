"""``data_parallel``: a step whose batches are divided over ranks."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from iql_torchrl.distributed.ranks import Ranks
from iql_torchrl.private_apis import keeps_batch_statistics
from iql_torchrl.update.step import IQLStep, Step, part_of

__all__ = ["data_parallel"]

S = TypeVar("S", bound=Step)


def data_parallel(step: S, ranks: Ranks) -> S:
    """Make ``step`` train one network on all ranks; returns the step itself.

    Call it on every rank. Parameters, buffers and targets, the states of optimizer and schedulers and
    the global random generators become those of rank 0. After that every rank calls the step with the
    same whole batch, drawn by equally seeded generators: a rank computes the losses of its own rows,
    ``rank * B // size`` to ``(rank + 1) * B // size``, and each descent sums the gradients over ranks
    once, before clipping. So all ranks keep the same state, which does not depend on their number.
    Means are those of the whole batch, also with masks and priority weights; the metrics, and the
    priority and log-probability written into the batch, are those of the whole batch on every rank.

    ``compiled`` and, on a CPU, ``captured`` accept the step: its sums are nodes of the one graph
    (functional all-reduces, each with a wait; ``private_apis.summed_in_graph``), in the sequential order
    three: V's gradients, those of actor and critics, and the metrics. On a GPU ``captured`` refuses it.

    Dropout draws on each rank for its own rows, so it does not give the numbers of one process. With
    one rank nothing is changed.

    Raises:
        TypeError: no ``IQLStep``, plain or compiled.
        ValueError: a network with layers that keep statistics of batches (BatchNorm): each rank would
            see those of its own rows; or a step with ``independent_ranks``.
    """
    plain: Any = part_of(step, "plain") if isinstance(step, Step) else None
    if not isinstance(plain, IQLStep):
        raise TypeError(
            f"step is {type(step).__name__}; expected an IQLStep, such as agent.step. Make it data "
            "parallel before captured(step, replay)."
        )
    if ranks.size == 1:
        return step
    if plain.independent_ranks:
        raise ValueError(
            "the step has independent_ranks=True, which lets each rank train its own network; leave "
            "it out to train one network on all ranks."
        )
    _check_normalisation(plain)
    for tensor in (*plain.loss.parameters(), *plain.loss.buffers()):
        ranks.broadcast(tensor)
    if ranks.is_main:  # whose choice of the library of products all take with the state
        plain.settle()
    plain.load_state_dict(ranks.from_main(plain.state_dict))
    ranks.share_random_state()
    plain.ranks = ranks
    return step


def _check_normalisation(step: IQLStep) -> None:
    for name in step.loss.network_names:
        network: nn.Module = getattr(step.loss, name)
        for path, module in network.named_modules():
            if keeps_batch_statistics(module):
                raise ValueError(
                    f"{name} has a {type(module).__name__} at {path!r}, which computes statistics of "
                    "a batch: each rank would use those of its own rows. Use LayerNorm or GroupNorm "
                    "instead, or train in one process."
                )
