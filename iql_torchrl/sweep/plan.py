"""Names of the runs of a sweep, and their division into tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from iql_torchrl.agent.build import make_agent
from iql_torchrl.config import IQLConfig, knobs
from iql_torchrl.data import OfflineDataset
from iql_torchrl.population.runs import IQLPopulation
from iql_torchrl.sweep.task import first_line

__all__ = ["Plan", "differing", "make_plan", "named", "settings_of"]

Configs = Mapping[str, IQLConfig]


def named(configs: Mapping[str, IQLConfig] | Sequence[IQLConfig]) -> dict[str, IQLConfig]:
    """The configs by name; those of a sequence are named by the settings in which they differ.

    ``expectile 0.9, temperature 3 #1``: the seed follows ``#``. Raises ``TypeError`` for other
    values, and ``ValueError`` where there is none or two are equal.
    """
    if isinstance(configs, IQLConfig) or not isinstance(configs, Mapping | Sequence):
        raise TypeError(
            f"configs is {type(configs).__name__}; expected a dict of name to IQLConfig, or a list."
        )
    values = list(configs.values()) if isinstance(configs, Mapping) else list(configs)
    for number, config in enumerate(values):
        if not isinstance(config, IQLConfig):
            raise TypeError(f"configs[{number}] is {type(config).__name__}; expected an IQLConfig.")
    if not values:
        raise ValueError("configs is empty; a sweep has at least one run.")
    if isinstance(configs, Mapping):
        if len({str(name) for name in configs}) < len(configs):
            raise ValueError("configs has two names of the same text; each run needs its own name.")
        return {str(name): config for name, config in configs.items()}
    names: dict[str, IQLConfig] = {}
    different = [name for name in differing(values) if name != "seed"]
    for number, config in enumerate(values):
        words = [f"{name} {_word(getattr(config, name))}" for name in different]
        name = f"{', '.join(words) or 'run'} #{config.seed}"
        if name in names:
            raise ValueError(
                f"configs[{number}] is given twice ({name}); each run of a sweep once."
            )
        names[name] = config
    return names


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def differing(configs: Sequence[IQLConfig]) -> list[str]:
    """The settings in which the configs differ, in the order of ``IQLConfig``."""
    return [
        name
        for name in knobs(type(configs[0]))
        if any(getattr(config, name, None) != getattr(configs[0], name) for config in configs)
    ]


def settings_of(name: str, config: IQLConfig) -> str:
    """The name without its seed: equal for the seeds of one setting."""
    return name.removesuffix(f" #{config.seed}")


@dataclass(frozen=True)
class Plan:
    """``groups``: names of the configs of each task, and whether they are one population.

    ``failed``: a sentence for each config that cannot be built.
    """

    groups: tuple[tuple[tuple[str, ...], bool], ...]
    failed: Mapping[str, str]


def make_plan(configs: Configs, dataset: OfflineDataset, members_per_task: int) -> Plan:
    """At most ``members_per_task`` configs that can be one population are one task.

    Configs that populations refuse (a history, encoders of images, residual networks) are one task
    each. To find out, the first config of each group is built on the CPU.
    """
    groups: list[tuple[tuple[str, ...], bool]] = []
    failed: dict[str, str] = {}
    for names in _alike(configs):
        try:
            stacked = _stacks(configs[names[0]], dataset)
        except Exception as error:  # the other configs are trained
            failed |= {name: f"cannot be built: {first_line(error)}" for name in names}
            continue
        size = members_per_task if stacked else 1
        groups += [(names[at : at + size], stacked) for at in range(0, len(names), size)]
    return Plan(tuple(groups), failed)


def _alike(configs: Configs) -> Iterator[tuple[str, ...]]:
    """Names of the configs that are equal in all settings in which members may not differ."""
    names = list(configs)

    def place(name: str) -> int:
        key = _shared(configs[name])
        return next(i for i, other in enumerate(names) if _shared(configs[other]) == key)

    for _, group in groupby(sorted(names, key=place), place):
        yield tuple(group)


def _shared(config: IQLConfig) -> tuple[Any, ...]:
    described = knobs(type(config))
    return type(config), *(
        getattr(config, name) for name, knob in described.items() if not knob.per_run
    )


def _stacks(config: IQLConfig, dataset: OfflineDataset) -> bool:
    """Whether a population accepts the config; raises what prevents that it is built at all."""
    here = replace(
        config, device="cpu", compile=False
    )  # workers may have devices that this has not
    try:
        IQLPopulation([here], dataset)
    except (ValueError, TypeError, NotImplementedError):
        make_agent(here, dataset)
        return False
    return True
