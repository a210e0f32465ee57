"""The description of one setting: its type, its allowed values, and which parts read it.

A setting is described once, where its field is declared (:func:`knob`). The checks of a config and
of a loss, ``--help``, ``make_agent``, ``IQLPopulation``, ``captured`` and the comparison with a
checkpoint read these descriptions, so that a new setting needs no other entry.
"""

from __future__ import annotations

import numbers
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

__all__ = ["Knob", "check_choice", "knob", "knobs", "loss_knobs"]


def never(_: Mapping[str, Any]) -> bool:
    return False


def always(_: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Knob:
    """The complete description of one setting of a run.

    Attributes:
        name: of the field.
        kind: the field's type: int, float, bool, str, tuple[int, ...] or Literal[...] (a choice of
            strings), or one of these or None.
        default: value of the field where none is given.
        help: text of the command line; the allowed range is added to it.
        interval: allowed numbers, such as ``"[0, 1)"``; of a tuple, allowed entries. Infinity is
            allowed by ``"inf]"``. Empty where every number is allowed.
        meaning: added to the error about a number outside the interval: what the ends mean.
        per_run: the runs of one ``IQLPopulation`` may differ in it.
        in_loss: an argument and attribute of the losses, which read it at every evaluation.
            ``make_agent`` passes it; ``captured`` compares it before every call.
        loss_interval: what the losses accept, where that is more than ``interval``.
        may_change: whether a run may be resumed with another value, given the config as a dict.
    """

    help: str
    name: str = ""
    kind: Any = None
    default: Any = None
    interval: str = ""
    meaning: str = ""
    per_run: bool = False
    in_loss: bool = False
    loss_interval: str = ""
    may_change: Callable[[Mapping[str, Any]], bool] = never

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return type(None) in get_args(self.kind)

    @property
    def plain_kind(self) -> Any:
        """``kind`` without ``None``; str for a choice."""
        kind = self.kind
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = (part for part in get_args(kind) if part is not type(None))
        return str if get_origin(kind) is Literal else kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The strings that are allowed; empty where the kind is not ``Literal``."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def help_with_range(self) -> str:
        """``help`` and the interval, on one line."""
        words = f" ({_words(self.interval, self.plain_kind)})" if self.interval else ""
        return " ".join(self.help.split()) + words

    def plain(self, value: Any) -> Any:
        """``value`` as plain Python: int, float, bool, str, tuple of int, or None.

        Raises ``ValueError`` for a value of another type, such as a bool for a number or ``1e4``
        for an int.
        """
        if value is None and self.optional:
            return None
        convert, expected = _CONVERSIONS[self.plain_kind]
        try:
            return convert(value)
        except (TypeError, OverflowError):
            or_none = ", or None" if self.optional else ""
            raise ValueError(f"{self.name} is {value!r}; expected {expected}{or_none}.") from None

    def check(self, value: Any) -> None:
        """Raise ``ValueError`` for a plain value that is not one of the choices or in the interval."""
        if self.choices:
            check_choice(self.name, value, self.choices)
        elif value is not None:
            wider = f" IQLLoss itself accepts {self.loss_interval}." if self.loss_interval else ""
            self._check_interval(value, self.interval, wider)

    def check_in_loss(self, value: Any) -> None:
        """:meth:`check` for an argument of a loss, which may also be a tensor with one number.

        Raises ``TypeError`` for anything else.
        """
        if self.choices:
            check_choice(self.name, value, self.choices)
            return
        one = isinstance(value, Tensor) and value.ndim == 0
        if isinstance(value, bool) or not (one or isinstance(value, numbers.Real)):
            raise TypeError(f"{self.name} is {value!r}; expected a number.")
        self._check_interval(value, self.loss_interval or self.interval)

    def _check_interval(self, value: Any, interval: str, note: str = "") -> None:
        if not interval:
            return
        words = _words(interval, self.plain_kind)
        meaning = f": {self.meaning}" if self.meaning else ""
        if isinstance(value, tuple):
            if not value or not all(_is_inside(entry, interval) for entry in value):
                raise ValueError(
                    f"{self.name} is {value}; give at least one number, each {words}{meaning}."
                )
        elif not _is_inside(value, interval):
            must = "be" if words[0] == ">" else "lie"
            raise ValueError(f"{self.name} is {value}; it must {must} {words}{meaning}.{note}")


def knob(default: Any, help: str, **description: Any) -> Any:
    """A dataclass field with this default; the keywords are :class:`Knob`'s attributes."""
    described = Knob(default=default, help=help, **description)
    return field(default=default, metadata={"knob": described})


def knobs(config: type) -> Mapping[str, Knob]:
    """The described fields of a config class, by name, in the order of the fields."""
    return _described(config)


@cache
def _described(config: Any) -> Mapping[str, Knob]:
    kinds = get_type_hints(config)
    return types.MappingProxyType(
        {
            each.name: replace(each.metadata["knob"], name=each.name, kind=kinds[each.name])
            for each in fields(config)
            if "knob" in each.metadata
        }
    )


def loss_knobs(config: type) -> Mapping[str, Knob]:
    """The knobs of a config class that are arguments and attributes of the losses."""
    described = knobs(config)
    return types.MappingProxyType({n: each for n, each in described.items() if each.in_loss})


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming the choices unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _only(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return check


def _whole_numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise TypeError
    return tuple(_whole(number) for number in value)


_CONVERSIONS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    int: (_whole, "a whole number, written without a point"),
    float: (_number, "a number"),
    bool: (_only(bool), "True or False"),
    str: (_only(str), "a string"),
    tuple[int, ...]: (_whole_numbers, "a tuple of whole numbers"),
}


def _is_inside(value: Any, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(", "))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return bool(above) and bool(below)  # false for nan


def _words(interval: str, kind: Any) -> str:
    """``"[1, inf)"`` as ``">= 1"``, with "and finite" for floats; ``"(0, 1]"`` as "in (0, 1]"."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    finite = " and finite" if kind is float and interval[-1] == ")" else ""
    return f"{'>' if interval[0] == '(' else '>='} {low}{finite}"
