"""Populations whose runs one process trains, or two ranks divide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rank_cases import error_of, tensors_of
from small_populations import MEMBERS, configs, dataset, double

from iql_torchrl import IQLPopulation
from iql_torchrl.distributed import Ranks

UPDATES, BEFORE = 20, 8
# options of all configs, batches; three runs, so that the ranks have one and two
CASES = {
    "shared": ({"schedule": "cosine", "max_grad_norm": 0.5}, "shared"),
    "own batches, adamw": ({"optimizer": "adamw", "weight_decay": 0.1}, "own"),
    "flow": ({"policy": "flow", "order": "simultaneous"}, "shared"),
}
DIFFERENT = MEMBERS[1:]


def population(case: str, ranks: Ranks, **more: Any) -> IQLPopulation:
    options, batches = CASES[case]
    settings = configs(DIFFERENT, **options, **more)
    return IQLPopulation(settings, dataset(), batches=batches, ranks=ranks)


def trained(made: IQLPopulation, ranks: Ranks, updates: int = UPDATES) -> dict[str, Any]:
    """Weights of all runs, and means of their metrics, on rank 0; an empty dict elsewhere."""
    torch.manual_seed(7)  # flow policies draw from torch's default generator
    (event,) = made.train(updates, every=updates)
    metrics = ranks.gather(dict(event.metrics.items()))
    whole = made.joined()
    if whole is None or metrics is None:
        return {}
    joined = {name: torch.cat([part[name] for part in metrics]) for name in metrics[0]}
    return {"state": tensors_of(whole.loss), "metrics": joined, "configs": whole.configs}


def saved_and_continued(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A file of two ranks and one of one process, continued by two ranks."""
    first = population("own batches, adamw", ranks)
    list(first.train(BEFORE, every=BEFORE))
    first.save(folder / "of_two_ranks.torchrl")
    data = dataset()
    results = {}
    for name in ("of_two_ranks", "of_one_process"):
        again = IQLPopulation.load(folder / f"{name}.torchrl", data, ranks=ranks)
        results[name] = (again.updates, trained(again, ranks, UPDATES - BEFORE))
    return results


def refused(ranks: Ranks) -> dict[str, str]:
    data, settings = dataset(), configs(DIFFERENT)
    other = [replace(config, seed=config.seed + ranks.rank) for config in settings]
    rows = dataset("discrete") if ranks.rank else data
    return {
        "fewer": error_of(lambda: IQLPopulation(settings[:1], data, ranks=ranks)),
        "configs": error_of(lambda: IQLPopulation(other, data, ranks=ranks)),
        "data": error_of(lambda: IQLPopulation(settings, rows, ranks=ranks)),
    }


def results(ranks: Ranks, folder: Path) -> dict[str, Any]:
    with double():
        found = {case: trained(population(case, ranks), ranks) for case in CASES}
        runs = [config.seed for config in population("shared", ranks).configs]
        return found | {
            "runs": runs,
            "files": saved_and_continued(ranks, folder),
            "refused": refused(ranks),
        }


def captured(ranks: Ranks) -> dict[str, Any]:
    with double():
        return trained(population("own batches, adamw", ranks, compile=True), ranks)


def of_one_process(case: str) -> dict[str, Any]:
    with double():
        return trained(population(case, Ranks()), Ranks())


def write_file_of_one_process(folder: Path) -> None:
    with double():
        first = population("own batches, adamw", Ranks())
        list(first.train(BEFORE, every=BEFORE))
        first.save(folder / "of_one_process.torchrl")


def check(found: dict, alone: dict, tolerance: float, parts=("state", "metrics")) -> None:
    """Compare what :func:`trained` returned, relative and absolute."""
    for part in parts:
        torch.testing.assert_close(found[part], alone[part], rtol=tolerance, atol=tolerance)
