"""Inductor's options for programs of updates."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchrl import logger as torchrl_logger

from iql_torchrl.config import launches_kernels
from iql_torchrl.private_apis import inductor_settings, untiled_loops_only

__all__ = ["CUDA_GRAPHS", "correct_programs", "program_options"]

CUDA_GRAPHS = "triton.cudagraphs"  # off even where it was switched on globally
# On a GPU the launches take the time of an update of small networks. Independent kernels are then
# joined into one, without timing which ones; and a reduction of at most UNSPLIT numbers is one kernel
# and not two.
JOINED = {
    "combo_kernels": True,
    "combo_kernels_autotune": 0,
    "combo_kernels_pointwise_only": True,
    "combo_kernel_max_num_nodes": 32,  # torch 2.13; earlier versions have no limit of their own
}
UNSPLIT = 2**17


def program_options(device: torch.device, parameters: Iterable[Tensor]) -> dict[str, Any]:
    """Options of Inductor for an update of these parameters, of those that this torch knows.

    On a CPU the C++ wrapper; on a GPU joined kernels.
    """
    options: dict[str, Any] = {CUDA_GRAPHS: False, **correct_programs(device)}
    if device.type == "cpu":
        options["cpp_wrapper"] = True
    elif launches_kernels(device):
        options |= JOINED
        if max(parameter.numel() for parameter in parameters) <= UNSPLIT:
            options["split_reductions"] = False
    return _known(options)


def correct_programs(device: torch.device) -> dict[str, Any]:
    """Options that every program needs to compute the right numbers: on a CPU, a pass of Inductor.

    A torch without such passes is believed to have the repair (torch 2.15 has it); a log line says so,
    and ``tests/population/test_population_compiled.py`` compares such programs with eager updates.
    """
    if device.type != "cpu":
        return {}
    options = _known({"_post_fusion_custom_pass": untiled_loops_only()})
    if not any(options.values()):
        _say_once(
            f"torch {torch.__version__} lacks the Inductor pass that keeps tiled loops apart; programs "
            "are right only if it has the repair of pytorch issue 185702. Compare some compiled "
            "updates with eager ones, or train eagerly."
        )
        return {}
    return options


@functools.cache
def _say_once(message: str) -> None:
    torchrl_logger.warning(message)


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    known = inductor_settings()
    return {name: value for name, value in options.items() if name in known}
