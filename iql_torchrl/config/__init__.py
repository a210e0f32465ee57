"""Settings of a run: one description for each, ``IQLConfig`` and named presets."""

from iql_torchrl.config.arithmetic import (
    Arithmetic,
    check_device,
    check_usable,
    choose_products,
    chosen_products,
    launches_kernels,
)
from iql_torchrl.config.iql_config import PRESETS, IQLConfig
from iql_torchrl.config.knobs import Knob, check_choice, check_whole, knob, knobs, loss_knobs

__all__ = [
    "PRESETS",
    "Arithmetic",
    "IQLConfig",
    "Knob",
    "check_choice",
    "check_device",
    "check_usable",
    "check_whole",
    "choose_products",
    "chosen_products",
    "knob",
    "knobs",
    "launches_kernels",
    "loss_knobs",
]
