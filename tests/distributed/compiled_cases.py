"""Compiled and captured updates with Adam, on one process or as one rank of two."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rank_cases import CASES, make_batches, make_step, tensors_of, trained
from torch import distributed

from iql_torchrl import captured, compiled
from iql_torchrl.data import DeviceSampler
from iql_torchrl.distributed import Ranks, data_parallel

CASE = CASES["adam"]  # with masks


def calls(ranks: Ranks) -> dict:
    """Five calls of four captured updates each."""
    step = data_parallel(make_step(CASE), ranks)
    rows = DeviceSampler(torch.cat(make_batches(CASE, 3)), 13, seed=1)
    call = captured(step, rows, updates=4)
    metrics = torch.stack([call() for _ in range(5)])
    return {"state": tensors_of(step.loss), "metrics": dict(metrics.items())}


def results(ranks: Ranks) -> dict:
    return {"compiled": trained(CASE, ranks, compiled), "captured": calls(ranks)}


def main(rank: int, folder: Path) -> None:
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Ranks.from_environment()
    torch.save(results(ranks), folder / f"rank{rank}.pt")
    ranks.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
