"""Updates that one process and several ranks make in the same way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_batch, make_networks
from losses.test_encoder import build as build_encoded
from losses.test_encoder import steps as encoded_steps
from small_agents import config, small_columns
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import distributed, nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torchrl.objectives import SoftUpdate, ValueEstimators

from iql_torchrl import DiscreteIQLLoss, IQLLoss, IQLStep, load_dataset, make_agent, policies
from iql_torchrl.distributed import Ranks, data_parallel
from iql_torchrl.losses import Exponential, Gumbel

UPDATES, ROWS = 20, 13  # 13 rows: two ranks have 6 and 7


def masked(batch):
    """Padding: all of rank 0's rows but one, and two of rank 1's; nan where there is padding."""
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[1:6] = False
    mask[[8, 12]] = False
    batch["collector", "mask"] = mask
    batch["observation"][~mask] = torch.nan
    return batch


def one_rank_masked(batch):
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[:6] = False
    batch["collector", "mask"] = mask
    return batch


def weighted(batch):
    batch["priority_weight"] = torch.linspace(0.05, 3.0, ROWS, dtype=torch.float64)
    return batch


def both(batch):
    return weighted(masked(batch))


def policy_entries(batch):
    """Other observations for the policy, as goals of its own are."""
    batch["for_actor"] = {"observation": batch["observation"].flip(0)}
    return masked(batch)


# SGD by default: the updates of Adam do not change where all gradients have a wrong common factor
CASES = {
    "sequential": {},
    "simultaneous": {"order": "simultaneous"},
    "clipped": {"max_grad_norm": 0.05},
    "clipped at once": {"max_grad_norm": 0.05, "order": "simultaneous"},
    "masked": {"change": masked},
    "masked at once": {"change": masked, "order": "simultaneous"},
    "a rank without valid rows": {"change": one_rank_masked},
    "weighted": {"change": weighted},
    "weighted and masked": {"change": both, "max_grad_norm": 0.1},
    "sums": {"loss": {"reduction": "sum"}, "rate": 2e-3},
    "adam": {"optimizer": optim.Adam, "change": masked, "rate": 3e-3},
    "adamw and a schedule": {"optimizer": optim.AdamW, "scheduled": True, "rate": 3e-3},
    "ddpg_bc": {"loss": {"actor_objective": "ddpg_bc"}, "change": masked},
    "exponential": {"loss": {"value_objective": Exponential(0.1)}, "change": both},
    "gumbel": {"loss": {"value_objective": Gumbel(0.1, pessimism=0.5)}},
    "entries of the policy": {"change": policy_entries},
    "flow": {"flow": True},
    "discrete": {"discrete": True},
    "encoder": {"encoder": "all"},
    "encoder of the critics": {"encoder": "critics", "order": "simultaneous", "max_grad_norm": 0.1},
    "history": {"history": "lstm", "rate": 0.2},
    "chunks": {"chunk": 3, "rate": 0.05},
    "trajectories": {"time": 4, "loss": {"diagnostics": True}},
    "history, attention": {"history": "transformer", "rate": 0.05, "order": "simultaneous"},
}
DEFAULT = (
    "clipped at once", "weighted and masked", "adamw and a schedule", "discrete", "encoder", "history",
    "exponential", "trajectories",
)  # fmt: skip


def layers():
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4))


def make_step(case):
    """A step in double precision, with the same weights in every process."""
    torch.manual_seed(3)
    loss = make_loss(case)
    optimizer = case.get("optimizer", optim.SGD)(loss.parameters(), lr=case.get("rate", 0.02))
    scheduler = LambdaLR(optimizer, lambda n: 1 / (1 + n)) if case.get("scheduled") else None
    return IQLStep(
        loss,
        optimizer,
        SoftUpdate(loss, tau=0.05),
        order=case.get("order", "sequential"),
        max_grad_norm=case.get("max_grad_norm"),
        lr_scheduler=scheduler,
    )


def recurrent(case):
    """A dataset, and an agent for it whose policy reads the last three observations."""
    dataset = load_dataset(small_columns())
    kind = {"history_encoder": case["history"], "history_features": 8}
    return dataset, make_agent(config(history=3, **kind), dataset)


def of_chunks(case):
    """A dataset, and an agent for it whose policy proposes three actions."""
    dataset = load_dataset(small_columns())
    return dataset, make_agent(config(action_chunk=case["chunk"]), dataset)


def make_loss(case, **options):
    if "chunk" in case:
        return of_chunks(case)[1].loss.double()
    if "history" in case:
        return recurrent(case)[1].loss.double()
    options = {"diagnostics": True, **case.get("loss", {}), **options}
    if "encoder" in case:
        return build_encoded(gradient=case["encoder"], random_shift=2).double()
    actor, critics, value = make_networks(critics=2)
    if case.get("discrete"):
        actor = ProbabilisticTensorDictSequential(
            TensorDictModule(layers(), ["observation"], ["logits"]),
            ProbabilisticTensorDictModule(
                ["logits"], ["action"], distribution_class=torch.distributions.Categorical
            ),
        )
        critics = [
            TensorDictModule(layers(), ["observation"], ["state_action_value"]) for _ in range(2)
        ]
        loss = DiscreteIQLLoss(actor, critics, value, **options)
    else:
        if case.get("flow"):
            actor = policies.flow(5, actor.spec["action"], hidden=(16,))
            options["actor_objective"] = "flow"
        loss = IQLLoss(actor, critics, value, **options)
    loss = loss.double()
    if "time" in case:
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.8)
    _ = loss.value_estimator
    return loss


def tensors_of(loss):
    state = loss.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def make_batches(case, count=UPDATES):
    torch.manual_seed(4)
    if "encoder" in case:
        return list(doubled(encoded_steps(ROWS * count)).split(ROWS))
    if "history" in case:
        buffer = recurrent(case)[0].windows(3).replay_buffer(ROWS, seed=6)
        return [doubled(buffer.sample()) for _ in range(count)]
    if "chunk" in case:
        buffer = of_chunks(case)[0].chunks(case["chunk"]).replay_buffer(ROWS, seed=6)
        return [doubled(buffer.sample()) for _ in range(count)]
    shape = (ROWS, case["time"]) if "time" in case else (ROWS,)
    batches = [make_batch(*shape, dtype=torch.float64) for _ in range(count)]
    if case.get("discrete"):
        for batch in batches:
            batch["action"] = torch.randint(4, (ROWS, 1))
    return [case.get("change", lambda batch: batch)(batch) for batch in batches]


def doubled(batch):
    return batch.apply(lambda x: x.double() if x.is_floating_point() else x)


def trained(case, ranks, form=lambda step: step):
    """Weights and targets, metrics of every update, and what was written into the last batch."""
    step = make_step(case)
    if ranks.rank:
        for parameter in step.loss.parameters():  # what data_parallel broadcasts
            parameter.data.add_(1.0)
    batches = make_batches(case)
    torch.manual_seed(5 + ranks.rank)  # data_parallel gives all ranks the state of rank 0
    step = form(data_parallel(step, ranks))
    metrics = torch.stack([step(batch) for batch in batches])
    return {
        "state": tensors_of(step.loss),
        "metrics": dict(metrics.items()),
        "written": {k: batches[-1][k] for k in ("td_error", "sample_log_prob") if k in batches[-1]},
    }


# -- Two ranks of a gloo group, whose store is a file: starting a script, and forking in it


def run_ranks(script: str, folder: Path, *arguments: str) -> list[dict]:
    """What each rank of ``script`` in this folder saved, by rank."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    path = Path(__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, path, folder, *arguments],
        env=settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def as_two_ranks(main: Callable[..., dict[str, Any]]) -> None:
    """Call ``main(ranks, folder, *arguments)`` as two ranks and save what each returns.

    Folder and arguments are those of the command line. The second rank is a fork, before any thread
    was started, so that one process imports what both need.
    """
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    child = os.fork()
    try:
        rank = 0 if child else 1
        store = distributed.FileStore(str(folder / "store"), 2)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        ranks = Ranks.from_environment()
        torch.save(main(ranks, folder, *sys.argv[2:]), folder / f"rank{rank}.pt")
        ranks.close()
    except BaseException:
        if child:  # it would wait for this rank
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
