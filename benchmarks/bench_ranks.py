"""Time of a data parallel update on two ranks, and of its exchanges, over widths and batches.

    python benchmarks/bench_ranks.py

Starts itself as two gloo ranks of one thread each. For each width and batch: the eager update of the
joined batch in one process while the other rank waits, the update on two ranks, and the part of it
that the exchanges take (waiting for the slower rank included), in alternation. Also the time of the
exchange with which the trainer agrees on stopping, and of gathering the joined batch, which every
rank does. Writes benchmarks/results/ranks.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iql_torchrl import make_agent
from iql_torchrl.distributed import Ranks, data_parallel
from iql_torchrl.report import text_table
from record import RESULTS, in_processes, place, save
from step_rivals import Sizes, config_of, dataset_of

import torch
from torch import Tensor, distributed

ROWS = 20_000


class Timed(Ranks):
    """Ranks that add up the seconds of their sums, and count their numbers."""

    seconds, sums, numbers = 0.0, 0, 0

    def sum(self, values: Tensor) -> Tensor:
        began = time.perf_counter()
        total = super().sum(values)
        self.seconds += time.perf_counter() - began
        self.sums += 1
        self.numbers += values.numel()
        return total


def seconds_of(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def measure(dataset: Any, group: Ranks, width: int, batch: int, updates: int) -> dict[str, Any]:
    config = config_of(Sizes(width=width, batch=batch), "cpu")
    alone = make_agent(config, dataset).step
    alone.independent_ranks = True
    ranks = Timed(group.rank, group.size)
    shared = data_parallel(make_agent(config, dataset).step, ranks)
    buffer = dataset.replay_buffer(batch, seed=0)
    rows = buffer.sample()
    alone(rows), shared(rows)
    taken: dict[str, list[float]] = {"alone": [], "two ranks": [], "exchanges": []}
    for _ in range(5):
        distributed.barrier()
        if group.is_main:
            taken["alone"].append(seconds_of(lambda: alone(rows), updates))
        distributed.barrier()
        ranks.seconds, ranks.sums, ranks.numbers = 0.0, 0, 0
        taken["two ranks"].append(seconds_of(lambda: shared(rows), updates))
        taken["exchanges"].append(ranks.seconds / updates)
    row: dict[str, Any] = {"width": width, "batch": batch}
    row |= {f"{k} ms": 1e3 * statistics.median(v) for k, v in taken.items() if v}
    row |= {"sums": ranks.sums / updates, "numbers": ranks.numbers / updates}
    return row | {"gathering ms": 1e3 * seconds_of(buffer.sample, updates)}


def rank_main(rank: int, options: argparse.Namespace, folder: str) -> tuple[list[Any], float]:
    """Rows of the table, and the microseconds of agreeing on a stop."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group, dataset = Ranks.from_environment(), dataset_of(Sizes(rows=ROWS))
    rows = [
        measure(dataset, group, width, batch, options.updates)
        for width in options.widths
        for batch in options.batches
    ]
    agreement = 1e6 * seconds_of(lambda: group.largest(0), 200)
    distributed.barrier()
    group.close()
    return rows, agreement


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[64, 256, 1024])
    add("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    add("--updates", type=int, default=5, help="of each of the five repetitions")
    add("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(rank, options, folder) for rank in range(2)]
        rows, agreement = in_processes(rank_main, jobs, 2)[0]
    print(text_table([list(rows[0]), *([f"{v:,.4g}" for v in row.values()] for row in rows)]))
    print(f"\nagreeing on a stop: {agreement:.0f} us")
    path = place("ranks", folder=options.output)
    save(path, {"agreement_us": agreement, "rows": rows})


if __name__ == "__main__":
    main()
