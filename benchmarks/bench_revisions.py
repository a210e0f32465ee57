"""Milliseconds of one IQL update of two revisions of this package, measured in turn in one run.

    python benchmarks/bench_revisions.py 8952c53
    python benchmarks/bench_revisions.py 8952c53 HEAD --widths 64,256 --rounds 15
    python benchmarks/bench_revisions.py . . --products mkl,onednn --result products

Each revision is unpacked from git into a temporary folder and runs in its own process; the working
tree itself is revision ``.``. Only one process works at a time: for each form of the step, a block
of the first revision is followed by a block of the second, and in the next round the order is
reversed. Reported is the median of the ratios of neighbouring blocks. Sampling is included. Writes
benchmarks/results/revisions_DEVICE[_NAME].json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
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
    archive = subprocess.run(
        ["git", "-C", str(HERE.parent), "archive", revision], check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(target)], input=archive, check=True)
    return target


class Worker:
    """A process that runs the updates of one revision when it is asked to."""

    def __init__(self, tree: Path, products: str, width: int, options: argparse.Namespace) -> None:
        arguments = [str(tree), products, str(width), str(options.batch), options.device]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments, str(options.captured_updates)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, order: str, form: str, updates: int) -> float:
        """How long ``updates`` updates take; the first call also builds and compiles."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([order, form, updates]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the process of {self.process.args} ended with an error; see above.")

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(
    tree: str, products: str, width: str, batch: str, device: str, updates_per_call: str
) -> None:
    """The loop of a worker process: one request per line, one answer per line."""
    sys.path[:0] = [tree, str(Path(tree) / "benchmarks")]
    import iql_torchrl
    from bench_step import timed
    from step_rivals import Sizes, ours, transitions

    import torch

    assert Path(iql_torchrl.__file__).is_relative_to(tree), iql_torchrl.__file__
    torch._dynamo.config.recompile_limit = 64
    if products != "own":
        from iql_torchrl.config import choose_products

        choose_products(products)
    sizes = Sizes(width=int(width), batch=int(batch))
    rows = transitions(sizes, device)
    built: dict[tuple[str, str], Any] = {}
    for line in sys.stdin:
        order, form, updates = json.loads(line)
        if (order, form) not in built:
            torch.manual_seed(0)
            make = partial(ours, rows, sizes, device, order, form)
            built[order, form] = make(int(updates_per_call))
            timed(built[order, form][0], 3, sizes, device)
        update, per_call = built[order, form]
        print("seconds", timed(update, max(1, updates // per_call), sizes, device), flush=True)


def compare(revisions: list[str], width: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times of both revisions and their ratios, for each order and form."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        products = options.products.split(",")
        workers = [
            Worker(unpack(revision, Path(folder)), library, width, options)
            for revision, library in zip(revisions, products, strict=True)
        ]
        cases = [(order, form) for order in ORDERS for form in options.forms.split(",")]
        for case in cases:
            results[" ".join(case)] = {"ms": [[], []], "ratios": []}
            for worker in workers:
                worker.seconds(*case, options.block)
        for number in range(options.rounds):
            for case in cases:
                taken = [0.0, 0.0]
                for turn in (0, 1) if number % 2 == 0 else (1, 0):
                    seconds = workers[turn].seconds(*case, options.block)
                    taken[turn] = 1e3 * seconds / options.block
                    results[" ".join(case)]["ms"][turn].append(taken[turn])
                results[" ".join(case)]["ratios"].append(taken[1] / taken[0])
        for worker in workers:
            worker.stop()
    for name, entry in results.items():
        entry["median_ms"] = [statistics.median(ms) for ms in entry["ms"]]
        entry["median_ratio"] = statistics.median(entry["ratios"])
        first, second = entry["median_ms"]
        print(f"{name:24}{first:9.3f} ms{second:9.3f} ms{entry['median_ratio']:8.3f}", flush=True)
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("old", help="a git revision")
    parser.add_argument("new", nargs="?", default=".", help="a git revision (. = working tree)")
    parser.add_argument("--widths", default="256", metavar="N,...")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--forms", default=",".join(FORMS), metavar="FORM,...")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=96, help="updates in a block")
    parser.add_argument(
        "--captured-updates", type=int, default=8, help="updates in a captured call"
    )
    parser.add_argument(
        "--products", default="own,own", metavar="OLD,NEW",
        help="mkl, onednn or auto for each revision; own: as it chooses by itself",
    )  # fmt: skip
    parser.add_argument("--result", default="", metavar="NAME", help="ending of the file's name")
    return parser.parse_args()


def main() -> None:
    from bench_step import machine_of
    from record import RESULTS, save

    options = parse()
    revisions = [options.old, options.new]
    record: dict[str, Any] = {
        "machine": machine_of(options.device),
        "revisions": revisions,
        "products": options.products,
        "widths": {},
    }
    ending = f"_{options.result}" if options.result else ""
    for width in map(int, options.widths.split(",")):
        print(f"\nwidth {width}: {revisions[0]}, {revisions[1]}, median of ratios")
        record["widths"][width] = compare(revisions, width, options)
        save(RESULTS / f"revisions_{options.device.split(':')[0]}{ending}.json", record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
