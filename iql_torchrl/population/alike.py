"""Whether configs are those of one population."""

from __future__ import annotations

from collections.abc import Sequence

from iql_torchrl.config import IQLConfig, knobs


def check_configs(configs: Sequence[IQLConfig]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``configs`` are those of one population."""
    if isinstance(configs, IQLConfig):
        raise TypeError("configs is one IQLConfig; expected a sequence of them, one per run.")
    if not isinstance(configs, Sequence) and configs is not None:
        raise TypeError(f"configs is {type(configs).__name__}; expected a sequence of IQLConfigs.")
    if not configs:
        raise ValueError("configs is empty; a population has at least one run.")
    for number, config in enumerate(configs):
        if not isinstance(config, IQLConfig):
            raise TypeError(f"configs[{number}] is {type(config).__name__}; expected an IQLConfig.")
        if type(config) is not type(configs[0]):
            raise TypeError(
                f"configs[{number}] is {type(config).__name__} and configs[0] is "
                f"{type(configs[0]).__name__}; the configs of a population have one class."
            )
        described = knobs(type(config))
        for name, knob in described.items():
            first, other = getattr(configs[0], name), getattr(config, name)
            if not knob.per_run and first != other:
                may_differ = [name for name, each in described.items() if each.per_run]
                raise ValueError(
                    f"{name} is {other} in configs[{number}] and {first} in configs[0]; runs of a "
                    f"population may differ in {', '.join(may_differ)}. Train one population for "
                    "each."
                )
