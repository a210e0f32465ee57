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
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, load_dataset, make_agent
from iql_torchrl.data import replay_buffer
from iql_torchrl.distributed import Ranks, data_parallel
from iql_torchrl.report import text_table
from record import RESULTS, save

import torch
from gymnasium import spaces
from torch import Tensor, distributed

OBSERVATION, ACTION, ROWS = 17, 6, 20_000  # the sizes of HalfCheetah


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


def transitions() -> Any:
    torch.manual_seed(0)
    ends = torch.arange(ROWS) % 1000 == 999
    return load_dataset(
        {
            "observation": torch.randn(ROWS, OBSERVATION).numpy(),
            "action": (torch.rand(ROWS, ACTION) * 2 - 1).numpy(),
            "reward": torch.randn(ROWS).numpy(),
            "terminated": (ends & False).numpy(),
            "truncated": ends.numpy(),
        },
        action_space=spaces.Box(-1.0, 1.0, (ACTION,)),
    )


def seconds_of(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def measure(dataset: Any, group: Ranks, width: int, batch: int, updates: int) -> dict[str, Any]:
    config = IQLConfig(hidden=(width, width), batch_size=batch)
    alone = make_agent(config, dataset).step
    alone.independent_ranks = True
    ranks = Timed(group.rank, group.size)
    shared = data_parallel(make_agent(config, dataset).step, ranks)
    buffer = replay_buffer(dataset.transitions, batch, seed=0)
    rows = buffer.sample()
    alone(rows), shared(rows)
    found: dict[str, list[float]] = {"alone": [], "two ranks": [], "exchanges": []}
    for _ in range(5):
        distributed.barrier()
        if group.is_main:
            found["alone"].append(seconds_of(lambda: alone(rows), updates))
        distributed.barrier()
        ranks.seconds, ranks.sums, ranks.numbers = 0.0, 0, 0
        found["two ranks"].append(seconds_of(lambda: shared(rows), updates))
        found["exchanges"].append(ranks.seconds / updates)
    row: dict[str, Any] = {"width": width, "batch": batch}
    row |= {f"{k} ms": 1e3 * statistics.median(v) for k, v in found.items() if v}
    row |= {"sums": ranks.sums / updates, "numbers": ranks.numbers / updates}
    return row | {"gathering ms": 1e3 * seconds_of(buffer.sample, updates)}


def rank_main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{options.folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=options.rank, world_size=2)
    group, dataset = Ranks.from_environment(), transitions()
    rows = [
        measure(dataset, group, width, batch, options.updates)
        for width in options.widths
        for batch in options.batches
    ]
    agreement = 1e6 * seconds_of(lambda: group.largest(0), 200)
    if group.is_main:
        Path(options.folder, "rows.json").write_text(json.dumps([rows, agreement]))
    distributed.barrier()
    group.close()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[64, 256, 1024])
    add("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    add("--updates", type=int, default=5, help="of each of the five repetitions")
    add("--rank", type=int, help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.rank is not None:
        rank_main(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *given, "--folder", folder, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit(1)
        rows, agreement = json.loads(Path(folder, "rows.json").read_text())
    print(text_table([list(rows[0]), *([f"{v:,.4g}" for v in row.values()] for row in rows)]))
    print(f"\nagreeing on a stop: {agreement:.0f} us")
    content = {"load": os.getloadavg(), "agreement_us": agreement, "rows": rows}
    save(RESULTS / "ranks.json", content)


if __name__ == "__main__":
    main()
