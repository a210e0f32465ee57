"""``python -m iql_torchrl.data list | make | describe | build | verify``: see ``--help``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iql_torchrl.data.builtin.catalogue import (
    BUILTIN,
    OGBENCH_LOCAL,
    ensure_dataset,
    make_dataset,
)
from iql_torchrl.data.saved import verify

if TYPE_CHECKING:
    from iql_torchrl.data import OfflineDataset
    from iql_torchrl.data.builtin.ogbench import OGBenchRecipe
    from iql_torchrl.data.builtin.recipe import Recipe

NAME_WIDTH = 26


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 after an error (printed on stderr)."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "list":
            _list()
        elif options.command == "make":
            _make(options)
        elif options.command == "build":
            _build(options)
        elif options.command == "verify":
            size = verify(options.folder)
            print(f"{options.folder}: {size:,} bytes have the content that was built.")
        else:
            _describe(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m iql_torchrl.data")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the datasets that can be made on this machine")
    make = commands.add_parser("make", help="make one of them, unless it exists")
    make.add_argument("name", metavar="NAME", help="as listed")
    make.add_argument("--seed", type=int, help="of the episodes; refuses an existing dataset")
    make.add_argument("--episodes", type=int, help="how many; refuses an existing dataset")
    make.add_argument("--quiet", action="store_true", help="no progress bar")
    describe = commands.add_parser("describe", help="print what a dataset contains")
    describe.add_argument(
        "source", metavar="SOURCE", help="Minari or OGBench id, file or folder of load_dataset"
    )
    describe.add_argument("--env", help="environment id, for files that name none")
    describe.add_argument(
        "--output", type=Path, metavar="FILE", help="draw a histogram of the returns into this file"
    )
    build = commands.add_parser(
        "build", help="build a memory-mapped table, which load_dataset(FOLDER) opens on any machine"
    )
    build.add_argument("source", metavar="SOURCE", help="as of describe, or a built-in name")
    build.add_argument("folder", metavar="FOLDER", type=Path, help="of the table")
    build.add_argument("--env", help="environment id, for files that name none")
    build.add_argument("--limit", type=int, help="at most this many transitions")
    build.add_argument("--concatenate", nargs="+", help="leaves of a Dict observation to join")
    build.add_argument(
        "--shards", type=int, help="write so many tables of whole episodes, for load_shards(FOLDER)"
    )
    verify = commands.add_parser("verify", help="compare a built table or shards with checksums")
    verify.add_argument("folder", metavar="FOLDER", type=Path, help="of the table or the shards")
    return parser


def _build(options: argparse.Namespace) -> None:
    from iql_torchrl.data import build_shards, load_dataset

    name = ensure_dataset(options.source) if options.source in BUILTIN else options.source
    read: dict[str, Any] = {
        "env": options.env, "limit": options.limit, "concatenate": options.concatenate,
    }  # fmt: skip
    if options.shards is None:
        dataset = load_dataset(name, memmap=options.folder, **read)
        dataset.print_notes()
        print(f"{options.folder}: {len(dataset):,} transitions; open it with load_dataset(FOLDER).")
        return
    log = build_shards(name, options.folder, options.shards, **read)
    log.print_notes()
    print(
        f"{options.folder}: {len(log):,} transitions in {len(log.shards)} shards; open it with "
        "load_shards(FOLDER)."
    )


def _list() -> None:
    recipes: dict[str, Recipe | OGBenchRecipe] = {**BUILTIN, **OGBENCH_LOCAL}
    for name, recipe in recipes.items():
        print(f"{name} ({recipe.episodes} episodes)")
        print(textwrap.indent(textwrap.fill(recipe.description, 92), "    "))


def _make(options: argparse.Namespace) -> None:
    if options.seed is None and options.episodes is None:
        print(ensure_dataset(options.name, progress=not options.quiet))
        return
    made = make_dataset(
        options.name,
        seed=options.seed or 0,
        episodes=options.episodes,
        progress=not options.quiet,
    )
    print(made)


def _describe(options: argparse.Namespace) -> None:
    from iql_torchrl.data import load_dataset

    dataset = load_dataset(options.source, env=options.env)
    for name, text in _rows(dataset):
        print(f"{name:<{NAME_WIDTH}}{text}")
    dataset.print_notes()
    if options.output is not None:
        _draw(dataset, options.source, options.output)
        print(f"histogram of returns: {options.output}")


def _rows(dataset: OfflineDataset) -> list[tuple[str, str]]:
    table, returns, lengths = dataset.transitions, dataset.episode_returns, dataset.episode_lengths
    flags = table["next", "terminated"].flatten().numpy()
    terminated = int(flags[lengths.cumsum() - 1].sum())
    inside = int(flags.sum()) - terminated
    ends = f"{terminated} by termination, {len(lengths) - terminated} by truncation"
    rows = [
        ("episodes", f"{len(returns)}"),
        ("steps", f"{len(dataset)}"),
        ("episode length", f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}"),
        ("ends", f"{ends}; {inside} terminations inside episodes" if inside else ends),
        (
            "return",
            f"mean {returns.mean():.6g}, standard deviation {returns.std():.6g}, "
            f"{returns.min():.6g} to {returns.max():.6g}",
        ),
    ]
    if dataset.reference_scores is not None:
        random, expert = dataset.reference_scores
        score = 100.0 * (returns.mean() - random) / (expert - random)
        rows.append(("reference returns", f"random {random:.6g}, expert {expert:.6g}"))
        rows.append(("score of the mean", f"{score:.1f} (0 random, 100 expert)"))
    for key in table.keys(include_nested=True, leaves_only=True):
        path = (key,) if isinstance(key, str) else key
        if path[0] == "observation" or path in {("action",), ("next", "reward")}:
            rows.append(("/".join(path), _range(table[key])))
    return rows


def _range(values: Any) -> str:
    low, high = values.min().item(), values.max().item()
    shape = tuple(values.shape[1:])
    return f"{low:.6g} to {high:.6g}, {str(values.dtype).removeprefix('torch.')} {shape}"


def _draw(dataset: OfflineDataset, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    # A Figure without pyplot needs no display and does not change pyplot's state.
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(dataset.episode_returns, bins=40, color="0.6")
    axes.axvline(dataset.episode_returns.mean(), color="black", label="mean of the log")
    if dataset.reference_scores is not None:
        random, expert = dataset.reference_scores
        axes.axvline(random, color="tab:red", linestyle="--", label="random reference")
        axes.axvline(expert, color="tab:green", linestyle="--", label="expert reference")
    axes.set(title=title, xlabel="undiscounted return of an episode", ylabel="episodes")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
