"""Runs of the trainer on one process or on several ranks; started as one rank of two.

The ranks make the updates of ``rank_cases`` and train the populations of ``population_cases`` too.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import population_cases
import torch
from conftest import NormedCritic, make_batch, make_networks
from rank_cases import (
    CASES,
    DEFAULT,
    ROWS,
    as_two_ranks,
    error_of,
    make_batches,
    make_step,
    tensors_of,
    trained,
)
from small_agents import config, small_columns
from torch import optim

from iql_torchrl import (
    IQLLoss,
    IQLStep,
    OfflineTrainer,
    captured,
    compiled,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.data import DeviceSampler, load_shards
from iql_torchrl.data import load as loading
from iql_torchrl.distributed import Ranks, data_parallel
from iql_torchrl.evaluation import BackgroundEvaluation
from iql_torchrl.trainers import run_folder

HALF, WHOLE = 12, 24


def trainer(group: Ranks, folder: Path | None, total: int = WHOLE, **options) -> OfflineTrainer:
    dataset = load_dataset(small_columns())
    agent = make_agent(config(optimizer="adamw", schedule="cosine", batch_size=15), dataset)
    parts = {"agent": agent, "step": data_parallel(agent.step, group), "ranks": group}
    parts |= {"dataset": dataset, "folder": folder, "total_updates": total, "progress_bar": False}
    # moves rank 0's generator
    parts["evaluation"] = lambda: {"return_mean": float(torch.rand(()))}
    parts |= {"log_interval": 4, "eval_interval": 6, "seed": 0}
    return OfflineTrainer(**(parts | options))


def state(run: OfflineTrainer) -> dict:
    """What a checkpoint holds of weights, optimizer and sampling, and the losses of the rows."""
    parts = run.state_dict()
    return {
        "loss": parts["loss_module"],
        "optimizer": parts["step"]["optimizer"]["state"],
        "replay": parts["replay_buffer"]["generator"],
        "random": torch.get_rng_state(),
        "updates": run.updates,
        "losses": [row["loss_value"] for row in run.progress.rows if "loss_value" in row],
    }


def prioritised(ranks: Ranks) -> dict[str, Any]:
    """Twenty updates of rows that are drawn by priority; weights, and the priorities of all rows."""
    step = data_parallel(make_step({}), ranks)
    torch.manual_seed(1)
    rows, priorities = make_batch(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        drawn = torch.multinomial(priorities, 15, replacement=False, generator=generator)
        batch = rows[drawn]
        batch["priority_weight"] = (priorities[drawn] / priorities.sum() * 40) ** -0.6
        step(batch)
        priorities[drawn] = batch["td_error"].clamp(min=1e-6) ** 0.9
    return {"state": tensors_of(step.loss), "priorities": priorities}


def memmaps(ranks: Ranks, folder: Path) -> dict[str, list[int]]:
    """How many tables each rank builds: of one folder at the same time, and after rank 0."""
    np.savez(folder / f"log{ranks.rank}.npz", **small_columns())
    original, built = loading.write_dataset, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)  # so that the other rank comes meanwhile
        built.append(1)
        return original(*args, **kwargs)

    def load(name: str) -> float:
        dataset = load_dataset(folder / "log0.npz", memmap=folder / name)
        return float(dataset.transitions["next", "reward"].sum())

    loading.write_dataset = counted
    ranks.check_same(0, "wait for the file")
    sums, counts = [load("at_once")], [len(built)]
    sums.append(ranks.main_first(lambda: load("in_turn")))
    loading.write_dataset = original
    return {"built": [*counts, len(built) - counts[0]], "sums": sums}


def evaluated(ranks: Ranks, folder: Path | None, background: bool) -> list[float]:
    """Returns of a run, evaluated by rank 0 in this process or in another."""
    dataset = load_dataset(
        small_columns(action=small_columns()["action"][:, :1])
    )  # of the shape of Pendulum's
    agent = make_agent(config(batch_size=15), dataset)
    kind = BackgroundEvaluation if background and ranks.is_main else partial(partial, evaluate)
    make_env = partial(gymnasium.make, "Pendulum-v1", max_episode_steps=10)
    evaluation: Any = kind(agent.policy, make_env, episodes=4, seed=0)
    run = OfflineTrainer(
        agent=agent, step=data_parallel(agent.step, ranks), ranks=ranks, dataset=dataset, seed=0,
        folder=folder, total_updates=WHOLE, log_interval=4, eval_interval=6, progress_bar=False,
        evaluation=evaluation,
    )  # fmt: skip
    run.train()
    return [row["return_mean"] for row in run.progress.rows if "return_mean" in row]


def stopped_by_a_signal(ranks: Ranks) -> tuple[str, int]:
    run = trainer(ranks, None, 40, log_interval=40, evaluation=None)
    stops = ranks.rank == 1
    run.register_op(
        "post_optim",
        lambda: os.kill(os.getpid(), signal.SIGTERM) if stops and run.updates == 5 else None,
    )
    return error_of(run.train), run.updates


def stopped_by_nan(ranks: Ranks) -> tuple[str, int]:
    run = trainer(ranks, None, evaluation=None)
    if ranks.rank == 1:
        next(run.loss_module.parameters()).data.fill_(torch.nan)
    return error_of(run.train), run.updates


def failed_evaluation() -> dict[str, float]:
    raise OSError("the environment is gone")


def plain_step(normed: bool = False) -> IQLStep:
    loss = IQLLoss(*make_networks(critic=NormedCritic() if normed else None))
    return IQLStep(loss, optim.Adam(loss.parameters()), None)


def updates(ranks: Ranks, names: Iterable[str]) -> dict:
    return {"updates": {name: trained(CASES[name], ranks) for name in names}}


def runs(ranks: Ranks, folder: Path) -> dict:
    """Runs without interruption, resumed on as many ranks, and begun by one process."""
    own = folder / f"rank{ranks.rank}"
    whole = trainer(ranks, None)
    whole.train()
    half = trainer(ranks, own / "half", HALF)
    half.train()
    if ranks.is_main:
        shutil.copytree(own / "half", folder / "kept")
    again = trainer(ranks, own / "half")
    known = [again.has_checkpoint(), trainer(ranks, own / "empty").has_checkpoint()]
    again.resume()
    again.train()
    # the folder of a run of one process; only rank 0 is given it
    other = trainer(ranks, folder / "alone" if ranks.is_main else own / "nowhere").resume()
    other.train()
    written = [str(path.relative_to(own)) for path in own.rglob("*.*")] if own.exists() else []
    return {
        "whole": state(whole),
        "again": state(again),
        "other": state(other),
        "written": sorted(written),
        "known": known,
    }


def refusals(ranks: Ranks, folder: Path) -> dict:
    """How runs are stopped, and what is refused."""
    unseeded = load_dataset(small_columns()).device_sampler(15)
    other = load_dataset(small_columns(40 + 10 * ranks.rank))
    return {
        "signal": stopped_by_a_signal(ranks),
        "nan": stopped_by_nan(ranks),
        "evaluation": error_of(trainer(ranks, None, evaluation=failed_evaluation).train),
        "resume": error_of(trainer(ranks, folder / f"empty{ranks.rank}").resume),
        "unseeded": error_of(trainer(ranks, None, replay_buffer=unseeded).train),
        "data": error_of(trainer(ranks, None, dataset=other).train),
        "intervals": error_of(trainer(ranks, None, WHOLE + ranks.rank).train),
        "not given": error_of(lambda: trainer(ranks, None, ranks=None)),
        "not parallel": error_of(
            lambda: trainer(ranks, None, agent=None, step=plain_step(), replay_buffer=unseeded)
        ),
        "batch norm": error_of(lambda: data_parallel(plain_step(normed=True), ranks)),
        "plain": error_of(lambda: plain_step()(make_batch())),
        "one trajectory": error_of(
            lambda: data_parallel(make_step({"time": 4}), ranks)(make_batch(8, dtype=torch.float64))
        ),
        "few rows": error_of(lambda: data_parallel(plain_step(), ranks)(make_batch(1))),
    }


def on_shards(ranks: Ranks, folder: Path, **options: Any) -> OfflineTrainer:
    log = load_shards(folder)
    agent = make_agent(config(batch_size=15), log)
    replay = log.replay_buffer(15, **{"seed": 0, "loaded": 2, "replace_every": 3, **options})
    return OfflineTrainer(
        agent=agent, step=data_parallel(agent.step, ranks), dataset=log, replay_buffer=replay,
        ranks=ranks, total_updates=20, progress_bar=False,
    )  # fmt: skip


def trained_on_shards(ranks: Ranks, folder: Path) -> dict:
    run = on_shards(ranks, folder)
    run.train()
    weights = {k: v.detach().clone() for k, v in run.loss_module.state_dict().items()}
    return {"weights": weights, "loaded": run.replay_buffer.loaded_shards()}


COMPILED = CASES["adam"]  # with masks


def sampler() -> DeviceSampler:
    return DeviceSampler(torch.cat(make_batches(COMPILED, 3)), ROWS, seed=1)


def calls(ranks: Ranks) -> dict:
    """Five calls of four captured updates each."""
    step = data_parallel(make_step(COMPILED), ranks)
    call = captured(step, sampler(), updates=4)
    metrics = torch.stack([call() for _ in range(5)])
    return {"state": tensors_of(step.loss), "metrics": dict(metrics.items())}


def calls_by_hand() -> dict:
    """The same updates, eagerly in one process."""
    step, rows = make_step(COMPILED), sampler()
    metrics = torch.stack([step(rows.sample()) for _ in range(20)])
    means = {name: values.view(5, 4).mean(1) for name, values in metrics.items()}
    return {"state": tensors_of(step.loss), "metrics": means}


def sums_in_the_graph(ranks: Ranks) -> list[int]:
    """How many sums over ranks each graph has that ``torch.compile`` makes of an update."""
    counts = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        counts.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return graph

    step = compiled(data_parallel(make_step(COMPILED), ranks), backend=backend)
    step(make_batches(COMPILED, 1)[0])
    return counts


class Unsendable(Exception):
    """An error that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("of rank 0")
        self.function = lambda: None


def unsendable(ranks: Ranks) -> list[str]:
    """What each rank raises where a value or an error of another cannot be sent; none may wait."""

    def fail() -> None:
        raise Unsendable

    value = (lambda: None) if ranks.rank == 1 else 1
    return [
        error_of(lambda: ranks.from_main(lambda: lambda: None)),
        error_of(lambda: ranks.from_main(fail)),
        error_of(lambda: ranks.gather(value)),
    ]


def main(ranks: Ranks, folder: Path, part: str) -> dict:
    run_folder.draw = lambda *args, **kwargs: None  # a picture takes a second
    if part == "compiled":
        return {
            "compiled": trained(COMPILED, ranks, compiled),
            "captured": calls(ranks),
            "population": population_cases.captured(ranks),
            "sums": sums_in_the_graph(ranks),
        }
    if part == "shards":
        own, first = folder / str(ranks.rank) / "shards", folder / "0" / "shards"
        return trained_on_shards(ranks, first) | {
            "data": error_of(on_shards(ranks, own).train),
            "rotation": error_of(on_shards(ranks, first, replace_every=3 + ranks.rank).train),
        }
    if part == "slow":
        own = folder / f"rank{ranks.rank}"
        return {
            **updates(ranks, sorted(CASES.keys() - set(DEFAULT))),
            "foreground": evaluated(ranks, own / "foreground", background=False),
            "background": evaluated(ranks, own / "background", background=True),
            "best": (own / "background" / "best.torchrl").exists(),
        }
    return {
        **runs(ranks, folder),
        **updates(ranks, DEFAULT),
        **refusals(ranks, folder),
        "prioritised": prioritised(ranks),
        "memmaps": memmaps(ranks, folder),
        "unsendable": unsendable(ranks),
        "populations": population_cases.results(ranks, folder),
    }


if __name__ == "__main__":
    as_two_ranks(main)
