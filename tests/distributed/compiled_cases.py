"""Compiled and captured updates with Adam as one rank of two; eager ones to compare with."""

from __future__ import annotations

from pathlib import Path

import population_cases
import torch
from rank_cases import CASES, ROWS, make_batches, make_step, tensors_of, trained
from two_ranks import as_two_ranks

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


def sums_in_the_graph(ranks: Ranks) -> list[int]:
    """How many sums over ranks each graph has that ``torch.compile`` makes of an update."""
    found = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        found.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return graph

    step = compiled(data_parallel(make_step(CASE), ranks), backend=backend)
    step(make_batches(CASE, 1)[0])
    return found


def main(ranks: Ranks, folder: Path) -> dict:
    return {
        "compiled": trained(CASE, ranks, compiled),
        "captured": calls(ranks),
        "population": population_cases.captured(ranks),
        "sums": sums_in_the_graph(ranks),
    }


if __name__ == "__main__":
    as_two_ranks(main)
