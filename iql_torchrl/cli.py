"""Every field of IQLConfig as an option of a script's own ``argparse`` parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from iql_torchrl.config import CHOICES, PRESETS, IQLConfig, field_help

__all__ = ["add_settings", "reach", "settings"]

Value = TypeVar("Value")
_HIDDEN = "_settings_parser"  # where the namespace keeps what `settings` needs


def add_settings(
    parser: argparse.ArgumentParser, presets: Mapping[str, IQLConfig] = PRESETS
) -> None:
    """Give ``parser`` the option ``--preset`` and one per field of IQLConfig, for :func:`settings`.

    ``batch_size`` becomes ``--batch-size N``, a bool ``--compile`` and ``--no-compile``, a tuple
    ``--hidden 64 64``; ``none`` is a value of the numbers that may be None. The first preset is
    the default; ``--help`` shows its values. Raises ``ValueError`` without presets, and
    ``argparse.ArgumentError`` if the parser has an option of such a name.
    """
    if not presets:
        raise ValueError("presets is empty; give at least one named IQLConfig.")
    default = next(iter(presets))
    parser.set_defaults(**{_HIDDEN: (parser, presets)})
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--preset",
        default=default,
        choices=list(presets),
        help=_escape(f"the settings to start from; the options below change them ({default})"),
    )
    texts = field_help()
    for field in fields(IQLConfig):
        value = getattr(presets[default], field.name)
        text = f"{texts[field.name]} ({default}: {_shown(value)})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=argparse.SUPPRESS,
            help=_escape(text),
            **_reading(field.name, str(field.type)),
        )


def settings(options: argparse.Namespace) -> IQLConfig:
    """The preset with what was given in its place, from a parser with :func:`add_settings`.

    Exits through ``parser.error`` on a config that cannot work and on a device that this machine
    lacks, so call it before any data are read.
    """
    if not hasattr(options, _HIDDEN):
        raise TypeError("options come from a parser without settings; call add_settings(parser).")
    parser, presets = getattr(options, _HIDDEN)
    names = [field.name for field in fields(IQLConfig)]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    try:
        config: IQLConfig = replace(presets[options.preset], **given)
        reach(config.device)
    except ValueError as error:
        parser.error(str(error))
    return config


def reach(device: str) -> None:
    """Raise ``ValueError`` with torch's reason unless this machine can use ``device``."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device is {device!r}, which this machine cannot use: {reason}"
        ) from error


def _reading(name: str, kind: str) -> dict[str, Any]:
    """What ``add_argument`` needs to read a field annotated ``kind``."""
    if kind == "bool":
        return {"action": argparse.BooleanOptionalAction}
    if kind.startswith("tuple"):
        return {"nargs": "+", "type": _whole, "metavar": "N", "action": _AsTuple}
    if name in CHOICES:
        return {"choices": CHOICES[name]}
    convert, metavar = {"int": (_whole, "N"), "float": (_number, "X")}.get(
        kind.removesuffix(" | None"), (str, "S")
    )
    return {"type": _or_none(convert) if kind.endswith(" | None") else convert, "metavar": metavar}


class _AsTuple(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


def _or_none(convert: Callable[[str], Value]) -> Callable[[str], Value | None]:
    def read(text: str) -> Value | None:
        return None if text.lower() == "none" else convert(text)

    return read


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number; write all its digits, as in 100000"
        ) from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
