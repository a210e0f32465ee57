"""Milliseconds of one IQL update of two revisions of this package, measured in turn in one run.

    python benchmarks/bench_revisions.py 8952c53
    python benchmarks/bench_revisions.py 8952c53 HEAD --widths 64,256 --rounds 15

Each revision is unpacked from git into a temporary folder and runs in its own process; the working
tree itself is revision ``.``. Only one process works at a time: for each form of the step, a block
of the first revision is followed by a block of the second, and in the next round the order is
reversed. Reported is the median of the ratios of neighbouring blocks. Sampling is included. Writes
benchmarks/results/revisions_DEVICE[_NAME].json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ORDERS, FORMS = ("sequential", "simultaneous"), ("eager", "compiled", "captured")


def unpack(revision: str, folder: Path) -> Path:
    """The files of ``revision`` in ``folder``; ``.`` is the working tree as it is."""
    if revision == ".":
        return HERE.parent
    target = folder / revision.replace("/", "_")
    if target.exists():
        return target
    target.mkdir()
    archive = subprocess.check_output(["git", "-C", str(HERE.parent), "archive", revision])
    subprocess.run(["tar", "-x", "-C", str(target)], input=archive, check=True)
    return target


BUILT: dict[tuple[str, str], Any] = {}  # in a worker: updates by order and form


def begin(tree: Path) -> None:
    """In a worker: use the revision in ``tree``."""
    sys.path[:0] = [str(tree), str(tree / "benchmarks")]
    import iql_torchrl

    import torch

    assert Path(iql_torchrl.__file__).is_relative_to(tree), iql_torchrl.__file__
    torch._dynamo.config.recompile_limit = 64


def seconds(order: str, form: str, updates: int, width: int, o: argparse.Namespace) -> float:
    """In a worker: how long ``updates`` updates take; the first call also builds and compiles."""
    from bench_step import timed
    from step_rivals import Sizes, ours, transitions

    import torch

    sizes = Sizes(width=width, batch=o.batch)
    if (order, form) not in BUILT:
        torch.manual_seed(0)
        rows = transitions(sizes, o.device)
        BUILT[order, form] = ours(rows, sizes, o.device, order, form, o.captured_updates)
        timed(BUILT[order, form][0], 3, sizes, o.device)
    update, per_call = BUILT[order, form]
    return float(timed(update, max(1, updates // per_call), sizes, o.device))


def compare(revisions: list[str], width: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times of both revisions and their ratios, for each order and form."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = [
            stack.enter_context(
                ProcessPoolExecutor(
                    1,
                    mp_context=get_context("spawn"),
                    initializer=begin,
                    initargs=(unpack(revision, Path(folder)),),
                )
            )
            for revision in revisions
        ]

        def block(turn: int, case: tuple[str, str]) -> float:
            return workers[turn].submit(seconds, *case, options.block, width, options).result()

        cases = [(order, form) for order in ORDERS for form in options.forms.split(",")]
        for case in cases:
            results[" ".join(case)] = {"ms": [[], []], "ratios": []}
            for turn in (0, 1):
                block(turn, case)
        for number in range(options.rounds):
            for case in cases:
                taken = [0.0, 0.0]
                for turn in (0, 1) if number % 2 == 0 else (1, 0):
                    taken[turn] = 1e3 * block(turn, case) / options.block
                    results[" ".join(case)]["ms"][turn].append(taken[turn])
                results[" ".join(case)]["ratios"].append(taken[1] / taken[0])
    for name, entry in results.items():
        entry["median_ms"] = [statistics.median(ms) for ms in entry["ms"]]
        entry["median_ratio"] = statistics.median(entry["ratios"])
        first, second = entry["median_ms"]
        print(f"{name:24}{first:9.3f} ms{second:9.3f} ms{entry['median_ratio']:8.3f}", flush=True)
    return results


def main() -> None:
    from record import place, save

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("old", help="a git revision")
    add("new", nargs="?", default=".", help="a git revision (. = working tree)")
    add("--widths", default="256", metavar="N,...")
    add("--batch", type=int, default=256)
    add("--forms", default=",".join(FORMS), metavar="FORM,...")
    add("--device", default="cpu")
    add("--rounds", type=int, default=15)
    add("--block", type=int, default=96, help="updates in a block")
    add("--captured-updates", type=int, default=8, help="updates in a captured call")
    add("--result", default="", metavar="NAME", help="ending of the file's name")
    options = parser.parse_args()
    revisions = [options.old, options.new]
    record: dict[str, Any] = {"revisions": revisions, "widths": {}}
    path = place("revisions", options.device, options.result)
    for width in map(int, options.widths.split(",")):
        print(f"\nwidth {width}: {revisions[0]}, {revisions[1]}, median of ratios")
        record["widths"][width] = compare(revisions, width, options)
        save(path, record, device=options.device)


if __name__ == "__main__":
    main()
