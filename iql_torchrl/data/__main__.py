"""``python -m iql_torchrl.data list | make | describe | build | verify``: see ``--help``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iql_torchrl.data import DatasetSummary, build_shards, load_dataset
from iql_torchrl.data.builtin import (
    BUILTIN,
    ensure_dataset,
    ensure_source,
    make_dataset,
)
from iql_torchrl.data.replay import leaf_keys
from iql_torchrl.data.saved import verify
from iql_torchrl.data.schema import ACTION, REWARD

NAME_WIDTH = 26


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 after an error (printed on stderr)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m iql_torchrl.data")
    commands = parser.add_subparsers(required=True)

    def command(run: Any, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.strip("_"), help=summary)
        added.set_defaults(run=run)
        return added

    command(_list, "the datasets that can be made on this machine")
    make = command(_make, "make one of them, unless it exists")
    make.add_argument("name", metavar="NAME", help="as listed")
    make.add_argument("--seed", type=int, help="of the episodes; refuses an existing dataset")
    make.add_argument("--episodes", type=int, help="how many; refuses an existing dataset")
    make.add_argument("--quiet", action="store_true", help="no progress bar")
    describe = command(_describe, "print what a dataset contains")
    build = command(
        _build, "build a memory-mapped table, which load_dataset(FOLDER) opens on any machine"
    )
    for reads in (describe, build):
        reads.add_argument(
            "source", metavar="SOURCE",
            help="Minari or OGBench id, file or folder of load_dataset; build: or a built-in name",
        )  # fmt: skip
        reads.add_argument("--env", help="environment id, for files that name none")
        reads.add_argument("--limit", type=int, help="at most this many transitions")
        reads.add_argument("--concatenate", nargs="+", help="leaves of a Dict observation to join")
        reads.add_argument(
            "--columns", nargs="+", type=_column, metavar="KEY=NAME", default=(),
            help="the file's names of our keys; KEY=A,B,C joins columns, KEY= leaves one out",
        )  # fmt: skip
    build.add_argument("folder", metavar="FOLDER", type=Path, help="of the table")
    build.add_argument(
        "--shards", type=int, help="write so many tables of whole episodes, for load_shards(FOLDER)"
    )
    verify = command(_verify, "compare a built table or shards with checksums")
    verify.add_argument("folder", metavar="FOLDER", type=Path, help="of the table or the shards")
    return parser


def _column(text: str) -> tuple[str, str | list[str] | None]:
    key, equals, name = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='; expected KEY=NAME")
    return key, name.split(",") if "," in name else name or None


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``load_dataset`` that were given."""
    read = {name: getattr(options, name) for name in ("env", "limit", "concatenate")}
    return {**read, "columns": dict(options.columns)}


def _list(_: argparse.Namespace) -> None:
    for name, recipe in BUILTIN.items():
        print(f"{name} ({recipe.episodes} episodes)")
        print(textwrap.indent(textwrap.fill(recipe.description, 92), "    "))


def _make(options: argparse.Namespace) -> None:
    progress = not options.quiet
    if options.seed is None and options.episodes is None:
        print(ensure_dataset(options.name, progress=progress))
    else:
        seed, episodes = options.seed or 0, options.episodes
        print(make_dataset(options.name, seed=seed, episodes=episodes, progress=progress))


def _build(options: argparse.Namespace) -> None:
    name = ensure_source(options.source)
    read = _reading(options)
    if options.shards is None:
        log: DatasetSummary = load_dataset(name, memmap=options.folder, **read)
        parts, how = "", "load_dataset(FOLDER)"
    else:
        log = build_shards(name, options.folder, options.shards, **read)
        parts, how = f" in {len(log.shards)} shards", "load_shards(FOLDER)"
    log.print_notes()
    print(f"{options.folder}: {len(log):,} transitions{parts}; open it with {how}.")


def _verify(options: argparse.Namespace) -> None:
    print(f"{options.folder}: {verify(options.folder):,} bytes have the content that was built.")


def _describe(options: argparse.Namespace) -> None:
    dataset = load_dataset(options.source, **_reading(options))
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
    for key in leaf_keys(table):
        if key[0] == "observation" or key in (ACTION, REWARD):
            values, (low, high) = table[key], dataset.range_of(key)
            kind = f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape[1:])}"
            rows["/".join(key)] = f"{low:.6g} to {high:.6g}, {kind}"
    for name, text in rows.items():
        print(f"{name:<{NAME_WIDTH}}{text}")
    dataset.print_notes()


if __name__ == "__main__":
    sys.exit(main())
