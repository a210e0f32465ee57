"""Runs from shards on one process or on several ranks; started as one rank of two."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from small_agents import config
from torch import distributed

from iql_torchrl import OfflineTrainer, make_agent
from iql_torchrl.data import load_shards
from iql_torchrl.distributed import Ranks, data_parallel


def run(ranks: Ranks, folder: Path, updates: int = 20, **options) -> OfflineTrainer:
    log = load_shards(folder)
    agent = make_agent(config(batch_size=15), log)
    replay = log.replay_buffer(15, **{"seed": 0, "loaded": 2, "replace_every": 3, **options})
    return OfflineTrainer(
        agent=agent, step=data_parallel(agent.step, ranks), dataset=log, replay_buffer=replay,
        ranks=ranks, total_updates=updates, progress_bar=False,
    )  # fmt: skip


def trained(ranks: Ranks, folder: Path) -> dict:
    trainer = run(ranks, folder)
    trainer.train()
    weights = {k: v.detach().clone() for k, v in trainer.loss_module.state_dict().items()}
    return {"weights": weights, "loaded": trainer.replay_buffer.loaded_shards()}


def error_of(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main(rank: int, folder: Path) -> None:
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Ranks.from_environment()
    results = trained(ranks, folder / "0" / "shards")
    results["data"] = error_of(run(ranks, folder / str(rank) / "shards").train)
    results["rotation"] = error_of(
        run(ranks, folder / "0" / "shards", replace_every=3 + rank).train
    )
    torch.save(results, folder / f"rank{rank}.pt")
    ranks.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
