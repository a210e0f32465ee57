"""Compiled and captured updates with Adam as one rank of two; eager ones to compare with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rank_cases import CASES, ROWS, make_batches, make_step, tensors_of, trained
from torch import distributed

from iql_torchrl import captured, compiled
from iql_torchrl.data import DeviceSampler
from iql_torchrl.distributed import Ranks, data_parallel

CASE = CASES["adam"]  # with masks


def sampler() -> DeviceSampler:
    return DeviceSampler(torch.cat(make_batches(CASE, 3)), ROWS, seed=1)


def calls(ranks: Ranks) -> dict:
    """Five calls of four captured updates each."""
    step = data_parallel(make_step(CASE), ranks)
    call = captured(step, sampler(), updates=4)
    metrics = torch.stack([call() for _ in range(5)])
    return {"state": tensors_of(step.loss), "metrics": dict(metrics.items())}


def calls_by_hand() -> dict:
    """The same updates, eagerly in one process."""
    step, rows = make_step(CASE), sampler()
    metrics = torch.stack([step(rows.sample()) for _ in range(20)])
    means = {name: values.view(5, 4).mean(1) for name, values in metrics.items()}
    return {"state": tensors_of(step.loss), "metrics": means}


def main(rank: int, folder: Path) -> None:
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Ranks.from_environment()
    results = {"compiled": trained(CASE, ranks, compiled), "captured": calls(ranks)}
    torch.save(results, folder / f"rank{rank}.pt")
    ranks.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
