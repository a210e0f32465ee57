"""Settings of a run: one description for each, ``IQLConfig`` and named presets."""

from iql_torchrl.config.arithmetic import (
    Arithmetic,
    check_device,
    check_usable,
    launches_kernels,
    number_dtype,
)
from iql_torchrl.config.iql_config import PRESETS, IQLConfig
from iql_torchrl.config.knobs import Knob, check_choice, check_whole, knob, knobs

__all__ = [
    "PRESETS",
    "Arithmetic",
    "IQLConfig",
    "Knob",
    "check_choice",
    "check_device",
    "check_usable",
    "check_whole",
    "knob",
    "knobs",
    "launches_kernels",
    "number_dtype",
]
