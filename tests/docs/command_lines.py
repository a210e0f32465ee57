"""The command lines of a Markdown page, read by the parsers of the scripts that they call."""

import argparse
import functools
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import tyro
from torch.distributed.run import get_args_parser

from iql_torchrl.config import cli

ROOT = Path(__file__).resolve().parents[2]
OWN = ("examples/", "benchmarks/", "docs/")


class _Parsed(BaseException):
    """The command line was read; the script shall do nothing with it."""


def commands(text: str) -> list[list[str]]:
    """The words of each command in the ``bash`` blocks; a line that ends in a backslash continues."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines: list[list[str]] = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        lines.append([])
        for word in shlex.split(line, comments=True):
            if word in ("&&", "||", ";", "|"):
                lines.append([])
            else:
                lines[-1].append(word)
    return [words for words in lines if words]


def check(words: list[str]) -> None:
    """Read one command if it calls one of our scripts or modules, pip or torchrun.

    Raises ``SystemExit`` (with the parser's message on stderr) or ``ValueError`` on a command line
    that would be refused.
    """
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, words = Path(words[0]).name, words[1:]
    if program.startswith("python") and words[0] == "-m":
        program, words = words[1], words[2:]
    calls = {"pip": _pip, "torchrun": _torchrun, "torch.distributed.run": _torchrun}
    if program.startswith("python"):
        _script(words[0], words[1:])
    elif program.startswith("iql_torchrl"):
        _module(program, words)
    elif program in calls:
        calls[program](words)


def _torchrun(words: list[str]) -> None:
    line = get_args_parser().parse_args(words)
    _script(line.training_script, line.training_script_args)


def _pip(words: list[str]) -> None:
    """An extra that is installed must exist."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for names in re.findall(r"(?:^|[ /])(?:\.|iql_torchrl)\[([\w,-]+)\]", " ".join(words)):
        for name in names.split(","):
            if not re.search(rf"^{name} = ", extras, re.MULTILINE):
                raise ValueError(f"pip install: there is no extra {name}")


def _module(name: str, words: list[str]) -> None:
    sys.modules.pop(f"{name}.__main__", None)  # runpy warns where a test has imported it
    _parse([name, *words], functools.partial(runpy.run_module, name, run_name="__main__"))


def _script(name: str, words: list[str]) -> None:
    if not name.startswith(OWN):
        return
    path = ROOT / name
    if not re.search(r"\b(?:tyro|argparse|cli)\b", path.read_text()):
        if words:
            raise ValueError(f"{name} has no options; {words} are given")
        return
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        _parse(
            [str(path), *words], functools.partial(runpy.run_path, str(path), run_name="__main__")
        )


def _parse(argv: list[str], start: Callable[[], object]) -> None:
    """Call ``start`` with the command line ``argv`` until its parser has read it."""
    read_line, read_tyro, read_argparse = cli.parse, tyro.cli, argparse.ArgumentParser.parse_args

    def by_line(*args: Any, **kwargs: Any) -> NoReturn:
        with mock.patch.object(tyro, "cli", read_tyro):
            read_line(*args, **kwargs)
        raise _Parsed

    def by_tyro(call: Any, **kwargs: Any) -> NoReturn:
        def stop(*_: object, **__: object) -> NoReturn:
            raise _Parsed

        read_tyro(functools.wraps(call)(stop) if inspect.isfunction(call) else call, **kwargs)
        raise _Parsed

    def by_argparse(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        read_argparse(parser, *args, **kwargs)
        raise _Parsed

    if "--resume" in argv:  # the arguments of the run to continue are in its folder
        folder = Path(argv[argv.index("--resume") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "arguments.json").write_text("[]")
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(tyro, "cli", by_tyro),
        mock.patch.object(cli, "parse", by_line),
        mock.patch.object(cli, "check_usable"),  # of another machine
        mock.patch.object(argparse.ArgumentParser, "parse_args", by_argparse),
    ):
        try:
            start()
        except _Parsed:
            return
    raise ValueError(f"{argv[0]} has read no command line")
