"""``python -m iql_torchrl.data list | make | describe | build | verify``: see ``--help``."""

import re
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg, subcommand

from iql_torchrl.config import cli
from iql_torchrl.data import (
    DatasetSummary,
    DatasetWarning,
    OfflineDataset,
    build_shards,
    load_dataset,
)
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset, ensure_source, make_dataset
from iql_torchrl.data.codec import leaf_spaces
from iql_torchrl.data.picture import check_picture_path, draw
from iql_torchrl.data.replay import leaf_keys
from iql_torchrl.data.saved import verify
from iql_torchrl.data.schema import ACTION, REWARD
from iql_torchrl.descriptions import describe_space

NAME_WIDTH = 26


@dataclass(frozen=True)
class List:
    """List the datasets that can be made on this machine."""

    def run(self) -> None:
        for name, recipe in BUILTIN.items():
            print(f"{name} ({recipe.episodes} episodes)")
            print(textwrap.indent(textwrap.fill(recipe.description, 92), "    "))


@dataclass(frozen=True, kw_only=True)
class Make:
    """Make one of the listed datasets, unless it exists."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """as listed"""
    seed: int | None = None
    """seed of the episodes; refuses an existing dataset"""
    episodes: int | None = None
    """number of episodes; refuses an existing dataset"""
    quiet: bool = False
    """no progress bar"""

    def run(self) -> None:
        given = {k: v for k in ("seed", "episodes") if (v := getattr(self, k)) is not None}
        make: Any = make_dataset if given else ensure_dataset
        print(make(self.name, progress=not self.quiet, **given))


@dataclass(frozen=True, kw_only=True)
class Source:
    """The arguments of ``load_dataset`` that can be typed."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Minari or OGBench id, file or folder of load_dataset; build: or a built-in name"""
    columns: Annotated[tuple[str, ...], arg(metavar="KEY=NAME [...]")] = ()
    """the file's names of our keys; KEY=A,B,C joins columns, KEY= leaves one out"""
    env: str | None = None
    """environment id, for files that name none"""
    reward: tuple[float, float] | str = "raw"
    """raw, return_range, minus_one, or SCALE SHIFT"""
    reward_offset: int = 0
    """1 for files that store a reward one row later"""
    concatenate: tuple[str, ...] = ()
    """leaves of a Dict observation to join"""
    limit: int | None = None
    """at most this many transitions"""
    max_episode_steps: int | None = None
    """length at which episodes without truncated flags are cut"""
    clip_actions: bool = False
    """clip actions to their bounds"""
    autoreset: bool | None = None
    """True drops the row after each end of an episode, False keeps all; None recognises them"""

    def options(self) -> dict[str, Any]:
        given = {each.name: getattr(self, each.name) for each in fields(Source)[1:]}
        columns = dict(map(_column, self.columns))
        return given | {"columns": columns, "concatenate": self.concatenate or None}


@dataclass(frozen=True, kw_only=True)
class Describe(Source):
    """Print what a dataset contains, and draw it."""

    output: Path | None = None
    """a picture of the dataset: a .png, .pdf or .svg file"""

    def run(self) -> None:
        if self.output is not None:
            check_picture_path(self.output)
        dataset = load_dataset(self.source, **self.options())
        for name, text in _contents(dataset).items():
            print(f"{name:<{NAME_WIDTH - 1}} {text}")
        print("\n".join(hints := _hints(dataset)))
        if self.output is not None:
            draw(dataset, self.output, hints)
            print(f"picture: {self.output}")


@dataclass(frozen=True, kw_only=True)
class Build(Source):
    """Build a memory-mapped dataset, which load_dataset(FOLDER) opens on any machine."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """where the dataset is written"""
    shards: int | None = None
    """write this many shards of whole episodes, for load_shards(FOLDER)"""

    def run(self) -> None:
        name = ensure_source(self.source)
        if self.shards is None:
            built: DatasetSummary = load_dataset(name, memmap=self.folder, **self.options())
            parts, how = "", "load_dataset(FOLDER)"
        else:
            built = build_shards(name, self.folder, self.shards, **self.options())
            parts, how = f" in {len(built.shards)} shards", "load_shards(FOLDER)"
        print("\n".join(_hints(built)))
        print(f"{self.folder}: {len(built):,} transitions{parts}; open it with {how}.")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare a built dataset or shards with their checksums."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """where the dataset was written"""

    def run(self) -> None:
        print(f"{self.folder}: {verify(self.folder):,} bytes have the content that was built.")


COMMANDS: Any = (
    Annotated[List, subcommand("list")]
    | Annotated[Make, subcommand("make")]
    | Annotated[Describe, subcommand("describe")]
    | Annotated[Build, subcommand("build")]
    | Annotated[Verify, subcommand("verify")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 after an error (printed on stderr)."""
    command = tyro.cli(
        COMMANDS, args=arguments, prog="python -m iql_torchrl.data",
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    try:
        with cli.warnings_in_one_line():
            # describe and build print a dataset's warnings beside its notes.
            warnings.simplefilter("ignore", DatasetWarning)
            command.run()
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {as_typed(str(error))}", file=sys.stderr)
        return 1
    return 0


def _column(text: str) -> tuple[str, str | list[str] | None]:
    key, equals, name = text.partition("=")
    if not equals:
        cli.refuse(f"--columns: {text!r} has no '='; expected KEY=NAME.")
    return key, name.split(",") if "," in name else name or None


def _contents(dataset: OfflineDataset) -> dict[str, str]:
    """The lines of ``describe`` by name."""
    table, returns, lengths = dataset.transitions, dataset.episode_returns, dataset.episode_lengths
    flags = table["next", "terminated"].flatten().numpy()
    terminated = int(flags[lengths.cumsum() - 1].sum())
    inside = int(flags.sum()) - terminated
    ends = f"{terminated} by termination, {len(lengths) - terminated} by truncation"
    deviation = f"standard deviation {returns.std():.6g}"
    rows = {
        "episodes": f"{len(returns)}",
        "steps": f"{len(dataset)}",
        "episode length": f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}",
        "ends": f"{ends}; {inside} terminations inside episodes" if inside else ends,
        "return": f"mean {returns.mean():.6g}, {deviation}, {returns.min():.6g} to {returns.max():.6g}",
    }
    if dataset.reference_scores is not None:
        random, expert = dataset.reference_scores
        score = float(dataset.normalised_score(returns.mean()))
        rows["reference returns"] = f"random {random:.6g}, expert {expert:.6g}"
        rows["score of the mean"] = f"{score:.1f} (0 random, 100 expert)"
    spaces = leaf_spaces(dataset.observation_space) | {ACTION: dataset.action_space}
    for key, space in spaces.items():
        rows[f"space of {'/'.join(key)}"] = describe_space(space)
    for key in leaf_keys(table):
        if key in spaces or key == REWARD:
            values, (low, high) = table[key], dataset.range_of(key)
            kind = f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape[1:])}"
            rows["/".join(key)] = f"{low:.6g} to {high:.6g}, {kind}"
    return rows


def _hints(dataset: DatasetSummary) -> list[str]:
    """The warnings and the other notes, each once."""
    notes = [f"note: {text}" for text in dataset.notes if text not in dataset.warnings]
    return [as_typed(text) for text in [*(f"warning: {w}" for w in dataset.warnings), *notes]]


# -- messages name arguments of Python

VALUE = r"\{[^{}]*\}|\([^()]*\)|\[[^][]*\]|'[^']*'|True|None|[\d.]*\d"
NAMES = "|".join(each.name for each in fields(Source)[1:])
#: An argument; or a call, whose arguments stay as they are.
ARGUMENT = re.compile(rf"\w\([^()]*\)|\b({NAMES})=({VALUE})?(?![\w'\"({{[])")
ITEM = re.compile(r"'(\w+)': (\[[^]]*\]|[^,}]+)")


def as_typed(message: str) -> str:
    """``message`` with the arguments of ``load_dataset`` as options of the command line.

    >>> as_typed("pass columns={'terminated': None, 'truncated': 'done'} or clip_actions=True.")
    'pass --columns terminated= truncated=done or --clip-actions.'
    """

    def option(found: re.Match[str]) -> str:
        name, value = found[1], found[2] or ""
        if name is None:
            return found[0]
        if name == "columns" and value:
            items = ITEM.findall(value) or [("KEY", "...")]
            words = [shlex.quote(f"{key}={_name(item)}") for key, item in items]
        else:
            words = [] if value in ("True", "None") else [re.sub(r"[][(),']", "", value)]
        return " ".join(filter(None, [f"--{name.replace('_', '-')}", *words]))

    return ARGUMENT.sub(option, message)


def _name(item: str) -> str:
    """A column's name as typed, from the value of an item of ``columns={...}``."""
    if "..." in item:
        return "NAME,NAME" if item.startswith("[") else "NAME"
    return "" if item == "None" else ",".join(re.split(r"',\s*'", item.strip("[]'")))


if __name__ == "__main__":
    sys.exit(main())
