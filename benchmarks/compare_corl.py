"""The same updates here and in CORL's code: largest differences of weights.

    python benchmarks/compare_corl.py --corl iql.py --datasets halfcheetah-replay

Both learners of ``bench_scores.py`` start from CORL's initial weights and learn from the same rows.
Ours has ``order="simultaneous"`` (all losses from the same parameters), as CORL computes them, and all
is float64, so that a difference of the algorithms is not hidden by rounding. Observations are
standardised by the same numbers (CORL adds 0.001 to the deviations), and rewards are those of this
package, which differ from CORL's by rounding. Training enlarges the smallest difference, so CORL's code
is also compared with itself, from weights of V that differ by 1e-9. The result is
benchmarks/results/compare_corl.json.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, make_agent
from iql_torchrl.agent import Agent
from iql_torchrl.data import OfflineDataset
from record import RESULTS, save
from score_datasets import CACHE, DATASETS, options_of, scored_data
from score_methods import Task, corl_trainer

import gymnasium
import numpy as np
import torch
from torch import Tensor

LAYERS = (0, 2, 4)
POINTS = (1, 10, 100, 300, 1_000)
DISTURBANCE = 1e-9


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """CORL's weights by the names of ``IQLLoss``: both critics in one tensor."""
    found = {"actor_network_params.module.0.module.log_std": trainer.actor.log_std}
    for layer in LAYERS:
        for part in ("weight", "bias"):
            end = f"mlp.{layer}.{part}"
            names = [f"q{number}.net.{layer}.{part}" for number in (1, 2)]
            found |= {
                f"actor_network_params.module.0.module.{end}": getattr(
                    trainer.actor.net.net[layer], part
                ),
                f"value_network_params.module.{end}": getattr(trainer.vf.v.net[layer], part),
                f"qvalue_network_params.module.{end}": _both(trainer.qf, names),
                f"target_qvalue_network_params.module.{end}": _both(trainer.q_target, names),
            }
    return {name: value.detach() for name, value in found.items()}


def _both(critics: torch.nn.Module, names: list[str]) -> Tensor:
    state = critics.state_dict()
    return torch.stack([state[name] for name in names])


def largest_differences(some: Mapping[str, Any], trainer: Any) -> dict[str, float]:
    """The largest absolute difference of the weights of each network."""
    largest: dict[str, float] = {}
    for name, value in weights_of(trainer).items():
        network, difference = name.partition("_params")[0], float((some[name] - value).abs().max())
        largest[network] = max(largest.get(network, 0.0), difference)
    return largest


def disturbed(trainer: Any) -> Any:
    """A copy whose weights of V differ by up to ``DISTURBANCE``."""
    other = copy.deepcopy(trainer)
    with torch.no_grad():
        for weight in other.vf.parameters():
            weight.add_(torch.rand_like(weight), alpha=DISTURBANCE)
    return other


def learners(name: str, o: argparse.Namespace) -> tuple[Agent, Any, OfflineDataset, list[Tensor]]:
    """Ours with CORL's weights; CORL's; the dataset; CORL's means, deviations and bounds."""
    data, _ = scored_data(name, o.peers)
    scored, env = DATASETS[name], data.make_env()
    env.close()
    box = env.action_space
    assert isinstance(box, gymnasium.spaces.Box), box
    task = Task(
        rows=data.rows, seed=o.seed, updates=o.updates, chunk=1, low=box.low.tolist(),
        high=box.high.tolist(), options=options_of(scored, "CORL", data, o.corl),
    )  # fmt: skip
    trainer, _, statistics = corl_trainer(task)
    mean, std, bound = (value.double() for value in statistics)
    settings: dict[str, Any] = options_of(scored, "ours", data, None)
    settings |= {"hidden": tuple(settings["hidden"]), "order": "simultaneous"}
    config = IQLConfig(seed=o.seed, updates=o.updates, **settings)
    dataset = data.dataset(config.reward)
    agent = make_agent(config, dataset)
    for network in (trainer.actor, trainer.vf, trainer.qf, trainer.q_target, agent.loss):
        network.double()
    given, own = weights_of(trainer), agent.loss.state_dict()
    for end, value in {"preprocess.mean": mean, "preprocess.std": std}.items():
        given |= {key: value.expand_as(own[key]) for key in own if key.endswith(end)}
    agent.loss.load_state_dict({**own, **given})
    double_eps(agent)
    return agent, trainer, dataset, [mean, std, bound]


def compare(name: str, o: argparse.Namespace) -> dict[str, Any]:
    """Train both, and CORL's once more from disturbed weights, on the dataset ``name``."""
    agent, trainer, dataset, (mean, std, bound) = learners(name, o)
    other, found, control = disturbed(trainer), {}, {}
    rows, draws = dataset.transitions, np.random.default_rng(o.seed)
    for update in range(1, o.updates + 1):
        index = torch.as_tensor(draws.integers(len(rows), size=agent.config.batch_size))
        batch = rows[index].apply(_double)
        after = batch["next"]
        states = [(each["observation"] - mean) / std for each in (batch, after)]
        ends = after["terminated"].double()
        for each in (trainer, other):
            each.train([states[0], batch["action"] / bound, after["reward"], states[1], ends])
        agent.step(batch)
        if update in POINTS:
            found[str(update)] = largest_differences(agent.loss.state_dict(), trainer)
            control[str(update)] = largest_differences(weights_of(other), trainer)
            print(f"{name}, {update:,} updates: {_shown(found[str(update)])}")
            print(f"  CORL's code, disturbed: {_shown(control[str(update)])}", flush=True)
    return {"differences": found, "disturbed": control, "settings": agent.config.to_dict()}


def double_eps(agent: Agent) -> None:
    """CORL's loss of the critics is a mean, ours a sum: Adam sees the factor 2 in its epsilon only."""
    critics = {id(p) for n, p in agent.loss.named_parameters() if n.startswith("qvalue_network")}
    for group in agent.optimizer.param_groups:
        if any(id(p) in critics for p in group["params"]):
            group["eps"] *= 2


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _shown(differences: Mapping[str, float]) -> str:
    return ", ".join(f"{network} {value:.2g}" for network, value in differences.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--corl", type=Path, required=True, metavar="FILE", help="CORL's algorithms/offline/iql.py")
    add("--peers", type=Path, default=CACHE, help="folder of the datasets; may be new")
    add("--datasets", nargs="+", choices=DATASETS, default=["halfcheetah-replay"])
    add("--updates", type=int, default=1_000)
    add("--seed", type=int, default=0)
    o = parser.parse_args()
    torch.set_num_threads(1)
    content = {name: compare(name, o) for name in o.datasets}
    save(RESULTS / "compare_corl.json", content, packages=("gymnasium", "mujoco"))


if __name__ == "__main__":
    main()
