"""The description of one setting: its type, its allowed values, and which parts read it.

A setting is described once, where its field is declared (:func:`setting`). The checks of a config and
of a loss, ``--help``, ``make_agent``, ``IQLPopulation``, ``captured`` and the comparison with a
checkpoint read these descriptions, so that a new setting needs no other entry.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

# By kind of a setting, the types of its values, and these in words.
KINDS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "an integer, written without a point"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a string"),
    tuple[int, ...]: (tuple, "a tuple of integers"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The complete description of one setting of a run.

    Attributes:
        name: of the field.
        kind: the field's type: int, float, bool, str, tuple[int, ...] or Literal[...] (a choice of
            strings), or one of these or None.
        default: value of the field where none is given.
        help: what it does, and what the ends of its range mean: the text of the command line and of
            the error about a value out of range; both add the range.
        interval: allowed numbers, such as ``"[0, 1)"``; of a tuple, allowed entries. Infinity is
            allowed by ``"inf]"``. Empty where every number is allowed.
        per_run: the runs of one ``IQLPopulation`` may differ in it.
        loss_interval: what the losses accept, where that is more than ``interval``.
        may_change: whether a run may be resumed with another value, given the config as a dict.
    """

    help: str
    name: str = ""
    kind: Any = None
    default: Any = None
    interval: str = ""
    per_run: bool = False
    loss_interval: str = ""
    may_change: Callable[[Mapping[str, Any]], bool] = lambda config: False

    @property
    def optional(self) -> bool:
        """True if None is a value."""
        return type(None) in get_args(self.kind)

    @property
    def plain_kind(self) -> Any:
        """``kind`` without ``None``; str for a choice."""
        kind = get_args(self.kind)[0] if self.optional else self.kind
        return str if get_origin(kind) is Literal else kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The strings that are allowed; empty where the kind is not ``Literal``."""
        kind = get_args(self.kind)[0] if self.optional else self.kind
        return get_args(kind) if get_origin(kind) is Literal else ()

    @property
    def help_with_range(self) -> str:
        """``help`` and the interval, on one line."""
        words = f" ({_words(self.interval, self.plain_kind)})" if self.interval else ""
        return f"{self.help}{words}"

    def plain(self, value: Any) -> Any:
        """``value`` as plain Python: int, float, bool, str, tuple of int, or None.

        Raises ``ValueError`` for a value of another type, such as a bool for a number or ``1e4``
        for an int, for one that is not among the choices, and for a number outside the interval.
        """
        if value is None and self.optional:
            return None
        kind = self.plain_kind
        try:
            value = _convert(kind, value)
        except (TypeError, OverflowError):
            or_none = ", or None" if self.optional else ""
            raise ValueError(
                f"{self.name} is {value!r}; expected {KINDS[kind][1]}{or_none}."
            ) from None
        if self.choices:
            check_choice(self.name, value, self.choices)
        note = f" IQLLoss itself accepts {self.loss_interval}." if self.loss_interval else ""
        self._check_interval(value, self.interval, note)
        return value

    def check_in_loss(self, value: Any) -> None:
        """Raise as :meth:`plain` for an argument of a loss or network, also a tensor with one number.

        Raises ``TypeError`` for anything that is not a number.
        """
        if self.choices:
            check_choice(self.name, value, self.choices)
            return
        if value is None and self.optional:
            return
        one = isinstance(value, Tensor) and value.ndim == 0
        if isinstance(value, bool) or not (one or isinstance(value, numbers.Real)):
            raise TypeError(
                f"{self.name} is {value!r}; expected a number{', or None' * self.optional}."
            )
        self._check_interval(value, self.loss_interval or self.interval)

    def _check_interval(self, value: Any, interval: str, note: str = "") -> None:
        several = isinstance(value, tuple)
        entries = value if several else (value,)
        if not interval or (entries and all(_is_inside(entry, interval) for entry in entries)):
            return
        words = _words(interval, self.plain_kind)
        must = "hold at least one number, each" if several else "be" if words[0] == ">" else "lie"
        raise ValueError(f"{self.name} is {value}; it must {must} {words}: {self.help}.{note}")


def setting(default: Any, help: str, **description: Any) -> Any:
    """A dataclass field with this default; the keywords are :class:`Setting`'s attributes."""
    described = Setting(default=default, help=help, **description)
    return field(default=default, metadata={"setting": described})


def _described(config: Any) -> Mapping[str, Setting]:
    """The described fields of a config class, by name, in the order of the fields."""
    kinds = get_type_hints(config)
    return MappingProxyType(
        {
            each.name: replace(each.metadata["setting"], name=each.name, kind=kinds[each.name])
            for each in fields(config)
            if "setting" in each.metadata
        }
    )


config_settings: Callable[[type], Mapping[str, Setting]] = cache(_described)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming the choices unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def check_whole(**values: object) -> None:
    """Raise ``ValueError`` naming the first that is not an integer >= 1; a bool is not one."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected an integer >= 1.")


def _convert(kind: Any, value: Any) -> Any:
    """``value`` as a plain ``kind``; raises ``TypeError`` where it is of another type."""
    accepted: Any = KINDS[kind][0]
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, accepted):
        raise TypeError
    return tuple(_convert(int, each) for each in value) if accepted is tuple else kind(value)


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
