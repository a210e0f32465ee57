"""Base of the objectives: a module whose hyperparameters are tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from iql_torchrl.config import IQLConfig, check_choice, config_settings, number_dtype


class Objective(nn.Module):
    """A part of the loss that you can replace; abstract.

    Each keyword is a hyperparameter: a 0-d float64 tensor (float32 on MPS) in a buffer that is not in
    the state dict. Assigning a number, ``objective.temperature = 5.0``, checks it and writes it into
    the tensor: a compiled step is not compiled again, and a captured one reads it in its next call. In
    a population it is for all runs; a sequence or tensor ``(P,)`` has one number for each.
    A name that is a setting of ``IQLConfig`` has the range of that setting.

    Raises ``TypeError`` on a value that is not a number, ``ValueError`` on one out of range.
    """

    def __init__(self, **hyperparameters: float) -> None:
        super().__init__()
        for name, value in hyperparameters.items():
            tensor = torch.tensor(checked_number(name, value), dtype=torch.float64)
            self.register_buffer(name, tensor, persistent=False)
        self.hyperparameter_names = tuple(hyperparameters)
        #: The values at first, which identify a run whose hyperparameters are annealed.
        self.initial = {name: float(value) for name, value in hyperparameters.items()}

    @property
    def hyperparameters(self) -> Mapping[str, Tensor]:
        """The hyperparameters by name."""
        return {name: self._buffers[name] for name in self.hyperparameter_names}  # type: ignore[misc]

    @property
    def description(self) -> dict[str, Any]:
        """What identifies it in a checkpoint: its choices, and the hyperparameters at first."""
        arguments = {
            name: getattr(self, name, None) for name in inspect.signature(type(self)).parameters
        }
        choices = {k: v for k, v in arguments.items() if isinstance(v, str | bool) or callable(v)}
        return choices | self.initial

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("hyperparameter_names", ()):
            held: Any = self._buffers[name]
            if held.ndim and isinstance(value, Tensor | Sequence) and not isinstance(value, str):
                values = [checked_number(name, float(each)) for each in value]
                if len(values) != len(held):
                    raise ValueError(f"{name} has {len(values)} values; expected {len(held)}.")
                held.copy_(torch.tensor(values))
            else:
                held.fill_(checked_number(name, value))
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Objective:
        """Move the hyperparameters without a cast: 0.7 in bfloat16 would be 0.699.

        Those of a population, ``(P,)``, are cast: they would make what they multiply float64.
        """
        kept = {name: value for name, value in self.hyperparameters.items() if value.ndim == 0}
        device = fn(torch.zeros(0)).device
        super()._apply(fn, *args, **kwargs)
        dtype = number_dtype(device)
        self._buffers.update({name: value.to(device, dtype) for name, value in kept.items()})
        return self

    def extra_repr(self) -> str:
        return ", ".join(
            f"{k}={float(v):g}" for k, v in self.hyperparameters.items() if v.ndim == 0
        )


def checked_number(name: str, value: Any) -> float:
    """``value`` as a float, inside the range of the setting ``name`` if there is one."""
    one = isinstance(value, Tensor) and value.ndim == 0
    if isinstance(value, bool) or not (one or isinstance(value, Real)):
        raise TypeError(f"{name} is {value!r}; expected a number.")
    if name in (described := config_settings(IQLConfig)):
        described[name].check_in_loss(value)
    return float(value)


def make_objective(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """The objective ``kind`` with those of ``values`` that its constructor names."""
    names = inspect.signature(kind).parameters
    return kind(**{name: values[name] for name in names if name in values})


def as_objective(
    argument: str,
    kind: type[Objective],
    kinds: Mapping[str, type[Objective]],
    of_function: type[Objective],
    given: Any,
    hyperparameters: Mapping[str, float],
    **choices: Any,
) -> Any:
    """``given`` if it is an objective of ``kind``; else that of its name, or one of a function.

    What is made here gets the hyperparameters and choices that it has. Raises ``TypeError`` on a class
    and on an objective of another kind, ``ValueError`` on an unknown name, and on a hyperparameter
    beside an object, which has its own.
    """
    if isinstance(given, kind):
        for name, value in hyperparameters.items():
            if float(value) not in (getattr(IQLConfig, name), given.initial.get(name)):
                raise ValueError(
                    f"{name} is {float(value):g}, which {type(given).__name__} does not read; give it "
                    "to the objective that you pass, or leave it out."
                )
        return given
    if isinstance(given, type):
        raise TypeError(
            f"{argument} is the class {given.__name__}; pass an object, {given.__name__}()."
        )
    if isinstance(given, Objective):
        raise TypeError(
            f"{argument} is {type(given).__name__}; expected a {kind.__name__}, a name or a function."
        )
    values = {**hyperparameters, **choices}
    if callable(given):
        return make_objective(of_function, {"function": given, **values})
    check_choice(argument, given, tuple(kinds))
    return make_objective(kinds[given], values)
