"""Treatment of sepsis from clinicians' logs: discrete IQL, with survival computed exactly.

The log (``icu-sepsis/clinician-v0``): 20,000 stays of about 9 steps, 716 patient states, 25
treatments of which about 3 are admissible in a state, reward 1 for survival at the end and 0 else.
The simulator's dynamics are known, so a policy's probability of survival is a linear solve, without
sampling; training never sees them. For comparison, IQL without a network: the same equations solved
on the log's counts.

How the reward map and the temperature were chosen. One treatment changes survival little: over the
log, advantages have a standard deviation of 0.016. The paper's temperature of 3 would give such a
treatment the weight exp(3 * 0.016) = 1.05, which is cloning. Rewards times 100 make values
percentage points of survival, of a size that Adam's usual rates suit, and advantages 1.6 points.
The temperature, 2 per point, comes from the log alone: solve on half of the stays, and estimate the
policy's survival from the counts of the other half. That estimate is 0.783 at temperature 0, 0.810
at 0.5, 0.816 at 1, 0.817 at 2 and 0.818 beyond; benchmarks/bench_sepsis.py prints it.
"""

import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from iql_torchrl import Agent, IQLConfig, OfflineDataset, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import ENVIRONMENT, NAME, SepsisTables

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tqdm import tqdm

POINTS = 100.0  # of survival probability
COLOURS = {"clinicians": "0.5", "IQL on the log's counts": "tab:orange", "optimum": "tab:green"}
CONFIG = IQLConfig(
    updates=2_500,
    # States have very unequal frequencies: large batches reduce the noise of the rare ones.
    batch_size=2048,
    # Stays are short and always terminate, so almost no discount is needed.
    discount=0.999,
    expectile=0.7,
    temperature=2.0,
    # One layer on one-hot states is a table with shared features.
    hidden=(64,),
    # Values start at 0 and must rise to 80 points: higher rates, faster targets than usual.
    actor_lr=1e-2,
    critic_lr=1e-2,
    value_lr=1e-2,
    polyak=0.05,
    schedule="cosine",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path = Path("runs")
    """where the results are written"""


class Tabular(NamedTuple):
    """Values ``(S, A)`` (0 where the log has no such step), ``(S,)``, and the policy ``(S, A)``."""

    qvalue: np.ndarray
    value: np.ndarray
    policy: np.ndarray


def tabular_iql(rows: TensorDictBase, admissible: np.ndarray, config: IQLConfig) -> Tabular:
    """IQL's equations solved on the counts of the log.

    ``Q(s, a)`` is the mean of ``r + discount V(s')`` over the logged steps with that state and
    action, ``V(s)`` the expectile of ``Q(s, .)`` over the state's steps, the policy the log's
    frequencies times ``min(exp(temperature (Q - V)), max_weight)``, normalised. A state that the
    log never visits gets the uniform choice among ``admissible`` ``(S, A)``.
    """
    state, action = rows["observation"].numpy(), rows["action"].numpy()
    reward, ended = (rows["next", key].squeeze(-1).numpy() for key in ("reward", "terminated"))
    following = rows["next", "observation"].numpy()
    pair = state * admissible.shape[1] + action
    count = np.bincount(pair, minlength=admissible.size).reshape(admissible.shape)
    value = np.zeros(len(admissible))
    while True:
        target = reward + config.discount * ~ended * value[following]
        total = np.bincount(pair, target, admissible.size).reshape(admissible.shape)
        qvalue = total / np.maximum(count, 1)
        change = expectile(qvalue, count, config.expectile) - value
        value = value + change
        if np.abs(change).max() < 1e-9:
            break
    advantage = np.where(count > 0, qvalue - value[:, None], 0.0)
    # Limit the exponent too: the exponential could overflow.
    exponent = np.minimum(config.temperature * advantage, np.log(config.max_weight))
    policy = np.where(count.any(axis=1, keepdims=True), count * np.exp(exponent), admissible)
    return Tabular(qvalue, value, policy / policy.sum(axis=1, keepdims=True))


def expectile(values: np.ndarray, count: np.ndarray, level: float) -> np.ndarray:
    """Per row the ``level``-expectile of ``values`` counted ``count`` times; 0 for no counts."""
    result = np.full(len(values), -np.inf)
    while True:
        weight = count * np.where(values > result[:, None], level, 1 - level)
        better = (weight * values).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-300)
        if np.abs(better - result).max() < 1e-12:
            return better
        result = better


def probabilities(agent: Agent, admissible: np.ndarray) -> np.ndarray:
    """The policy as a table ``(S, A)``."""
    columns = {
        "observation": torch.arange(len(admissible)),
        "action_mask": torch.from_numpy(admissible),
    }
    states = TensorDict(columns, batch_size=[len(admissible)], device=agent.config.device)
    with torch.no_grad():
        table = agent.policy.get_dist(states).probs.double().cpu().numpy()
    return table / table.sum(axis=1, keepdims=True)


def train(config: IQLConfig, log: OfflineDataset, tables: SepsisTables) -> list[dict[str, float]]:
    """Exact survival and the step's metrics, at twenty points of the training."""
    agent = make_agent(config, log)
    batches = log.device_sampler(config.batch_size, device=config.device, seed=config.seed)
    every = max(1, config.updates // 20)
    history = [{"update": 0, "survival": tables.value(probabilities(agent, tables.admissible))}]
    bar = tqdm(range(1, config.updates + 1), desc=f"seed {config.seed}", disable=None)
    for update in bar:
        metrics = agent.step(batches.sample())
        if update % every == 0 or update == config.updates:
            survival = tables.value(probabilities(agent, tables.admissible))
            numbers = {key: metrics[key].item() for key in sorted(metrics.keys())}
            history.append({"update": update, "survival": survival, **numbers})
            bar.set_postfix_str(f"survival {survival:.4f}")
    return history


def draw(path: Path, history: list[dict[str, float]], levels: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in COLOURS.items():
        axes.axhline(levels[name], color=colour, ls="--", label=f"{name} ({levels[name]:.3f})")
    updates, survival = zip(*((row["update"], row["survival"]) for row in history), strict=True)
    label = f"IQL, network ({survival[-1]:.3f})"
    axes.plot(updates, survival, marker="o", markersize=3, label=label)
    axes.set(xlabel="gradient updates", ylabel="exact probability of survival", title=NAME)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    options, config = cli.parse(
        Options, arguments, presets={"sepsis": CONFIG}, description=__doc__.split("\n\n")[0]
    )
    folder = options.output / f"sepsis-seed{config.seed}"
    try:
        import gymnasium
        import icu_sepsis  # noqa: F401  (registers the environment)

        log = load_dataset(ensure_dataset(NAME), reward=(POINTS, 0.0))
        log.print_notes()
    except (ImportError, ValueError) as error:
        remedy = '; install it with pip install "iql_torchrl[datasets]".'
        print(f"error: {error}{isinstance(error, ImportError) * remedy}", file=sys.stderr)
        return 2
    tables = SepsisTables(gymnasium.make(ENVIRONMENT, disable_env_checker=True))
    counts = tabular_iql(log.transitions, tables.admissible, config)
    print(f"{NAME}: {len(log.episode_returns):,} stays, {log.episode_returns.mean():.4f} survived")
    history = train(config, log, tables)

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[-1]))
        writer.writeheader()
        writer.writerows(history)
    cloned = tabular_iql(log.transitions, tables.admissible, replace(config, temperature=0.0))
    levels = {
        "random treatments": tables.value(),
        "clinicians": tables.value(tables.clinician),
        "cloning of the log's counts": tables.value(cloned.policy),
        "IQL on the log's counts": tables.value(counts.policy),
        "IQL, network": history[-1]["survival"],
        "optimum": tables.optimal_value(),
    }
    draw(folder / "survival.png", history, levels)
    print("\nexact probability of survival")
    for name, level in levels.items():
        print(f"  {name:30}{level:.4f}")
    print(f"\nWritten to {folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
