"""The command line of a script: its own options and every setting of IQLConfig, read by tyro."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from iql_torchrl.config.arithmetic import check_usable
from iql_torchrl.config.iql_config import IQLConfig
from iql_torchrl.config.settings import config_settings

Options = TypeVar("Options")
Config = TypeVar("Config", bound=IQLConfig)
_rules = ConstructorRegistry()


@_rules.primitive_rule
def _none(described: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[None] | None:
    """None is written ``none`` on the command line and in ``--help``, in letters of any case."""
    if described.type is not type(None):
        return None

    def read(texts: list[str]) -> None:
        if texts[0].lower() != "none":
            raise ValueError(f"{texts[0]!r} is not none")

    return PrimitiveConstructorSpec(
        1, "none", read, lambda value: value is None, lambda _: ["none"]
    )


def parse(
    options: type[Options],
    arguments: Sequence[str] | None = None,
    *,
    presets: Mapping[str, Config],
    without: Collection[str] = (),
    least: Mapping[str, float] = MappingProxyType({}),
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
        least: the smallest value of each of the script's own numbers, by name; None is allowed.
        description: the first line of ``--help``.

    Exits with code 2 and a message on stderr on an unknown option, on a value that the options (by
    ``ValueError``), ``least`` or the config refuse, and on a device that this machine lacks. Raises
    ``ValueError`` without presets.
    """
    if not presets:
        raise ValueError("presets is empty; give at least one named IQLConfig.")
    arguments = sys.argv[1:] if arguments is None else arguments
    choices: Any = Literal[tuple(presets)]
    help_of_preset = tyro.conf.arg(help="settings to start from; the options below change them")
    choice = ("preset", Annotated[choices, help_of_preset], next(iter(presets)))
    shared: Any = {"prog": Path(sys.argv[0]).name, "args": list(arguments)}
    # Read first, because it changes the defaults of the other options.
    chosen: Any = make_dataclass("Preset", [choice])
    start, _ = tyro.cli(chosen, **shared, return_unknown_args=True, add_help=False)
    preset = presets[start.preset]
    settings: list[Any] = []
    for name, setting in config_settings(type(preset)).items():
        if name not in without:
            shown = tyro.conf.arg(help=setting.help_with_range)
            settings.append((name, Annotated[setting.kind, shown], getattr(preset, name)))
    every = make_dataclass("Settings", [(*choice[:2], start.preset), *settings])
    both: Any = make_dataclass("CommandLine", [("script", options), ("settings", every)])
    with _rules:
        prefixes = (tyro.conf.OmitArgPrefixes,)
        line = tyro.cli(both, **shared, description=description, config=prefixes)
    for name, smallest in least.items():
        value = getattr(line.script, name)
        if value is not None and value < smallest:
            refuse(f"--{name.replace('_', '-')} is {value}; expected at least {smallest}.")
    try:
        config = replace(preset, **{name: getattr(line.settings, name) for name, *_ in settings})
        check_usable(config.device)
    except ValueError as error:
        refuse(error)
    return line.script, config


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End a script with the first line of an error that its user can correct, and exit code 2.

    For a ``with`` block, or as the decorator of a script's ``main``. These are ``ImportError``,
    ``OSError``, ``RuntimeError``, ``ValueError`` and the ``AssertionError`` of environments; any other
    has its traceback, as usual. Warnings are shown as by :func:`warnings_in_one_line`.
    """
    try:
        with warnings_in_one_line():
            yield
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        refuse(str(error).partition("\n")[0])


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print each ``UserWarning`` on stderr as ``warning: ...``, without its source line."""

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **more)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        yield


def refuse(error: object) -> NoReturn:
    """Print ``error`` on stderr and exit with code 2, as for any wrong command line."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
