"""Milliseconds of one update where the observation is a category: TorchRL and this package.

    python benchmarks/bench_categories.py

Sizes of ICU-Sepsis (716 states, 25 treatments) and of examples/iql_sepsis.py (batch 2048, one layer
of 64) on random transitions, sampling included. TorchRL's networks read the one-hot form, as in its
environments with ``OneHot`` specs; "ours one-hot" reads the same form. Blocks of all competitors
alternate and their medians are compared. Writes benchmarks/results/categories_DEVICE.json.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial

from bench_step import REFERENCE, machine_of, measure, show, summarise
from iql_torchrl import DiscreteIQLLoss, IQLStep, networks, policies
from record import RESULTS, save
from step_rivals import FORMS, Made, Rival, Sizes, in_form, trained_as_torchrl_does

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import ValueOperator
from torchrl.objectives import DiscreteIQLLoss as TorchRLLoss
from torchrl.objectives import SoftUpdate

STATES, ACTIONS, WIDTH, BATCH, ROWS = 716, 25, 64, 2048, 100_000


def transitions(one_hot: bool, device: str) -> TensorDict:
    draw = torch.Generator().manual_seed(0)
    state, following = torch.randint(STATES, (2, ROWS), generator=draw)
    terminated = torch.rand(ROWS, 1, generator=draw) < 0.1
    form = (lambda s: nn.functional.one_hot(s, STATES).float()) if one_hot else (lambda s: s)
    return TensorDict(
        {
            "observation": form(state),
            "action": torch.randint(ACTIONS, (ROWS,), generator=draw),
            "next": {
                "observation": form(following),
                "reward": torch.randn(ROWS, 1, generator=draw),
                "terminated": terminated,
                "done": terminated.clone(),
            },
        },
        [ROWS],
    ).to(device)


def parts(one_hot: bool) -> list[nn.Module]:
    options = {} if one_hot else {"preprocess": networks.OneHot(STATES)}
    options["hidden"] = (WIDTH,)
    critic = networks.DiscreteCritic(STATES, ACTIONS, **options)
    return [
        policies.categorical(STATES, Categorical(ACTIONS), **options),
        ValueOperator(critic, in_keys=["observation"], out_keys=["state_action_value"]),
        ValueOperator(networks.StateValue(STATES, **options), in_keys=["observation"]),
    ]


def torchrl_loop(compile: bool, _: TensorDict, sizes: Sizes, device: str) -> Made:
    loss = TorchRLLoss(
        *parts(one_hot=True), action_space="categorical", loss_function="l2", expectile=0.7
    ).to(device)
    rows = transitions(True, device)
    return trained_as_torchrl_does(loss, rows, sizes, device, compile, lr=1e-2, tau=0.05)


def ours(form: str, one_hot: bool, _: TensorDict, sizes: Sizes, device: str) -> Made:
    loss = DiscreteIQLLoss(*parts(one_hot), action_space="categorical").to(device)
    in_graph = {"capturable": True} if device.startswith("cuda") else {}
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2, fused=True, **in_graph)
    step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.05))
    return in_form(step, form, transitions(one_hot, device), sizes, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", default="cpu")
    add("--rounds", type=int, default=15)
    add("--block", type=float, default=0.3, help="seconds")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # tensordict under torch.compile
    rivals: dict[str, Rival] = {
        REFERENCE: partial(torchrl_loop, False),
        "TorchRL compiled": partial(torchrl_loop, True),
        "ours one-hot eager": partial(ours, "eager", True),
        "ours one-hot captured": partial(ours, "captured", True),
    }
    rivals |= {f"ours {form}": partial(ours, form, False) for form in FORMS}
    sizes = Sizes(width=WIDTH, batch=BATCH, rows=1)
    results, _ = measure(rivals, sizes, options.device, options.rounds, options.block, 0)
    summarise(results)
    show(sizes, results)
    recorded = {"states": STATES, "actions": ACTIONS, "width": WIDTH, "batch": BATCH}
    content = {"machine": machine_of(options.device), "sizes": recorded, "competitors": results}
    save(RESULTS / f"categories_{options.device.split(':')[0]}.json", content)


if __name__ == "__main__":
    main()
