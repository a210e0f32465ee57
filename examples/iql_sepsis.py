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

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from iql_torchrl import Agent, IQLConfig, OfflineDataset, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import ENVIRONMENT, NAME, SepsisTables
from iql_torchrl.data.builtin.recipes import import_for_recipe
from iql_torchrl.report import text_table, write_rows
from iql_torchrl.report.figures import Series, comparison_figure, save

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tqdm import tqdm

POINTS = 100.0  # of survival probability
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
    value, change = np.zeros(len(admissible)), np.inf
    while np.abs(change).max() >= 1e-9:
        target = reward + config.discount * ~ended * value[following]
        total = np.bincount(pair, target, admissible.size).reshape(admissible.shape)
        qvalue = total / np.maximum(count, 1)
        change = expectile(qvalue, count, config.expectile) - value
        value = value + change
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


def dynamics() -> SepsisTables:
    """The model from which survival is computed exactly."""
    import_for_recipe("icu_sepsis", NAME)  # registers the environment
    return SepsisTables(gymnasium.make(ENVIRONMENT, disable_env_checker=True))


def survival(agent: Agent, tables: SepsisTables) -> float:
    """The exact probability of survival under the policy."""
    return tables.value(probabilities(agent, tables.admissible))


def probabilities(agent: Agent, admissible: np.ndarray) -> np.ndarray:
    """The policy as a table ``(S, A)``."""
    states = torch.arange(len(admissible))
    columns = {"observation": states, "action_mask": torch.from_numpy(admissible)}
    batch = TensorDict(columns, batch_size=[len(states)], device=agent.config.device)
    with torch.no_grad():
        table = agent.policy.get_dist(batch).probs.double().cpu().numpy()
    return table / table.sum(axis=1, keepdims=True)


def train(config: IQLConfig, log: OfflineDataset, tables: SepsisTables) -> list[dict[str, float]]:
    """Exact survival and the step's metrics, at twenty points of the training."""
    agent = make_agent(config, log)
    batches = log.device_sampler(config.batch_size, device=config.device, seed=config.seed)
    every = max(1, config.updates // 20)
    history = [{"update": 0, "survival": survival(agent, tables)}]
    for update in tqdm(range(1, config.updates + 1), desc=f"seed {config.seed}", disable=None):
        metrics = agent.step(batches.sample())
        if update % every == 0 or update == config.updates:
            numbers = {key: metrics[key].item() for key in sorted(metrics.keys())}
            history.append({"update": update, "survival": survival(agent, tables)} | numbers)
    return history


@cli.errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    options, config = cli.parse(
        Options, arguments, presets={"sepsis": CONFIG}, description=__doc__.split("\n\n")[0]
    )
    tables = dynamics()
    log = load_dataset(ensure_dataset(NAME), reward=(POINTS, 0.0))
    log.print_notes()
    print(f"{NAME}: {len(log.episode_returns):,} stays, {log.episode_returns.mean():.4f} survived")
    history = train(config, log, tables)
    folder = options.output / f"sepsis-seed{config.seed}"
    write_rows(folder / "metrics.csv", history)
    cloned, counts = (
        tabular_iql(log.transitions, tables.admissible, replace(config, temperature=temperature))
        for temperature in (0.0, config.temperature)
    )
    levels = {
        "random treatments": tables.value(),
        "clinicians": tables.value(tables.clinician),
        "cloning of the log's counts": tables.value(cloned.policy),
        "IQL on the log's counts": tables.value(counts.policy),
        "IQL, network": history[-1]["survival"],
        "optimum": tables.optimal_value(),
    }
    print("\nexact probability of survival")
    print(text_table([[name, f"{level:.4f}"] for name, level in levels.items()]))
    updates, values = np.array([[row["update"], row["survival"]] for row in history]).T
    lines = [Series(name, updates, 0 * updates + level) for name, level in levels.items()]
    lines[-2] = Series("IQL, network", updates, values)
    save(comparison_figure({"survival": lines}), folder / "survival.png")
    print(f"\nWritten to {folder}/")


if __name__ == "__main__":
    main()
