"""Checks at each call for an update that would train nothing, or each rank on its own."""

from __future__ import annotations

import torch

__all__ = ["check_update_trains"]


def check_update_trains(*, independent_ranks: bool, data_parallel: bool = False) -> None:
    """Raise ``RuntimeError`` where an update would compute losses and not train what was asked.

    That is: in ``torch.inference_mode()`` or ``torch.no_grad()``, where no gradient exists; and,
    unless ``independent_ranks`` or ``data_parallel``, in a ``torch.distributed`` process group of
    several ranks, because gradients are not reduced across ranks. It costs less than a microsecond.
    """
    tracing = torch.compiler.is_compiling()  # Dynamo cannot trace is_inference_mode_enabled
    if not tracing and torch.is_inference_mode_enabled():
        raise RuntimeError(_NO_GRADIENTS.format(mode="torch.inference_mode()"))
    if not torch.is_grad_enabled():
        raise RuntimeError(_NO_GRADIENTS.format(mode="torch.no_grad()"))
    distributed = torch.distributed
    if (
        independent_ranks
        or data_parallel
        or not (distributed.is_available() and distributed.is_initialized())
    ):
        return
    ranks = distributed.get_world_size()
    if ranks > 1:
        raise RuntimeError(
            f"the torch.distributed process group has {ranks} ranks, and this update does not "
            "reduce gradients across ranks: each rank would train a network of its own. To train one "
            "network on all ranks, write step = data_parallel(step, Ranks.from_environment()) with "
            "both names from iql_torchrl.distributed; to divide the runs of a population, give "
            "IQLPopulation ranks=Ranks.from_environment(). If the group serves something else, such as "
            "a distributed collector, and each rank is to train its own network, build "
            "IQLStep(..., independent_ranks=True) or set step.independent_ranks = True."
        )


_NO_GRADIENTS = (
    "the update was called under {mode}, where no gradients exist, so it would return losses and "
    "train nothing. Call it outside of that block or decorator; evaluation alone belongs inside."
)
