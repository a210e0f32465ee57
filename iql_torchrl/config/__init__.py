"""Settings of a run: one description for each, ``IQLConfig`` and named presets."""

from iql_torchrl.config.arithmetic import Arithmetic, choose_products, chosen_products
from iql_torchrl.config.devices import check_device, check_usable, launches_kernels
from iql_torchrl.config.iql_config import IQLConfig
from iql_torchrl.config.knobs import Knob, check_choice, knob, knobs, loss_knobs
from iql_torchrl.config.presets import PRESETS

__all__ = [
    "PRESETS",
    "Arithmetic",
    "IQLConfig",
    "Knob",
    "check_choice",
    "check_device",
    "check_usable",
    "choose_products",
    "chosen_products",
    "knob",
    "knobs",
    "launches_kernels",
    "loss_knobs",
]
