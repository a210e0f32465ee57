"""The command line of a script: its own options and every setting of IQLConfig, read by tyro."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from iql_torchrl.config.devices import check_usable
from iql_torchrl.config.iql_config import IQLConfig
from iql_torchrl.config.knobs import Knob, knobs

__all__ = ["parse", "parse_options", "refuse"]

Options = TypeVar("Options")
Config = TypeVar("Config", bound=IQLConfig)


def parse_options(
    options: Callable[..., Options],
    arguments: Sequence[str] | None = None,
    *,
    description: str = "",
) -> Options:
    """``options``, a dataclass, from the command line: ``tyro.cli`` without prefixes of nested names.

    ``arguments``: by default those of the process. ``description`` is the first line of ``--help``.
    Exits with code 2 and a message on stderr where tyro or the class (by ``ValueError``) refuses an
    argument.
    """
    return tyro.cli(
        options,
        prog=Path(sys.argv[0]).name,
        args=None if arguments is None else list(arguments),
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def parse(
    options: type[Options],
    arguments: Sequence[str] | None = None,
    *,
    presets: Mapping[str, Config],
    without: Collection[str] = (),
    description: str = "",
) -> tuple[Options, Config]:
    """A script's own options and a config from the command line.

    ``options`` is a dataclass; the string under a field is its help. Each setting of the config is
    an option too: ``--batch-size 64``, ``--compile`` or ``--no-compile``, ``--hidden 64 64``, and
    ``none`` for a number that may be None. ``--preset NAME`` chooses the values that are not given.

    Args:
        options: the script's own options.
        arguments: by default those of the process.
        presets: configs by name, such as ``PRESETS``; the first is the default.
        without: settings that are not options; they keep the preset's value.
        description: the first line of ``--help``.

    Exits with code 2 and a message on stderr on an unknown option, on a value that the options (by
    ``ValueError``) or the config refuse, and on a device that this machine lacks. Raises
    ``ValueError`` without presets.
    """
    if not presets:
        raise ValueError("presets is empty; give at least one named IQLConfig.")
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = _settings(presets, _preset(presets, arguments), without)
    both: Any = make_dataclass("CommandLine", [("script", options), ("settings", settings)])
    line = parse_options(both, arguments, description=description)
    return line.script, line.settings.config


def refuse(error: object) -> NoReturn:
    """Print ``error`` on stderr and exit with code 2, as for any wrong command line."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def _preset(presets: Mapping[str, Config], arguments: Sequence[str]) -> str:
    """The name after ``--preset``, or the first one; read before the options that it changes."""
    kind: Any = Literal[tuple(presets)]
    only: Any = make_dataclass("Preset", [("preset", kind, next(iter(presets)))])
    words = [word for word in arguments if word not in ("-h", "--help")]
    return tyro.cli(
        only, prog=Path(sys.argv[0]).name, args=words, return_unknown_args=True, add_help=False
    )[0].preset


def _settings(presets: Mapping[str, Config], name: str, without: Collection[str]) -> Any:
    """A dataclass with ``--preset`` and a field per setting; its ``config`` has these values."""
    preset = presets[name]
    described = {n: each for n, each in knobs(type(preset)).items() if n not in without}

    def make_config(self: Any) -> None:
        try:
            self.config = replace(preset, **{each: getattr(self, each) for each in described})
            check_usable(self.config.device)
        except ValueError as error:
            refuse(error)

    kind: Any = Literal[tuple(presets)]
    text = tyro.conf.arg(help="settings to start from; the options below change them")
    fields: Any = [("preset", Annotated[kind, text], name)]
    fields += [(each, _type(knob), getattr(preset, each)) for each, knob in described.items()]
    return make_dataclass("Settings", fields, namespace={"__post_init__": make_config})


def _type(knob: Knob) -> Any:
    """The annotation by which tyro reads ``knob`` and explains it."""
    text = tyro.conf.arg(help=knob.help_with_range)
    if knob.choices or knob.plain_kind is bool:
        return Annotated[knob.kind, text]
    return Annotated[knob.kind, text, _reader(knob)]


def _reader(knob: Knob) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads ``knob``, with errors in words."""
    several = knob.plain_kind == tuple[int, ...]
    read, metavar = _READERS[int if several else knob.plain_kind]

    def from_text(texts: list[str]) -> Any:
        if several:
            return tuple(read(text) for text in texts)
        return None if knob.optional and texts[0].lower() == "none" else read(texts[0])

    def to_text(value: Any) -> list[str]:
        if several:
            return [str(entry) for entry in value]
        return ["none" if value is None else str(value)]

    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=f"{metavar} ..." if several else f"{metavar}|none" if knob.optional else metavar,
        instance_from_str=from_text,
        is_instance=lambda value: True,  # a config has checked it
        str_from_instance=to_text,
    )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no whole number; write all its digits, as in 100000"
        ) from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (_whole, "INT"),
    float: (_number, "FLOAT"),
    str: (str, "STR"),
}
