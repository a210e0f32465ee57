"""Settings of a run: one description for each, ``IQLConfig`` and named presets."""

from iql_torchrl.config.arithmetic import (
    Arithmetic,
    check_device,
    check_usable,
    launches_kernels,
    number_dtype,
)
from iql_torchrl.config.iql_config import PRESETS, IQLConfig
from iql_torchrl.config.settings import Setting, check_choice, check_whole, config_settings, setting

__all__ = [
    "PRESETS",
    "Arithmetic",
    "IQLConfig",
    "Setting",
    "check_choice",
    "check_device",
    "check_usable",
    "check_whole",
    "config_settings",
    "launches_kernels",
    "number_dtype",
    "setting",
]
