"""Runs from shards on one process or on several ranks; started as one rank of two."""

from __future__ import annotations

from pathlib import Path

from small_agents import config
from two_ranks import as_two_ranks, error_of

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


def main(ranks: Ranks, folder: Path) -> dict:
    own, first = folder / str(ranks.rank) / "shards", folder / "0" / "shards"
    return trained(ranks, first) | {
        "data": error_of(run(ranks, own).train),
        "rotation": error_of(run(ranks, first, replace_every=3 + ranks.rank).train),
    }


if __name__ == "__main__":
    as_two_ranks(main)
