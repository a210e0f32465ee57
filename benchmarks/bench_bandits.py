"""Bias, coverage and width of estimates from logged bandit feedback whose truth is known.

    python benchmarks/bench_bandits.py
    python benchmarks/bench_bandits.py --decisions
    python benchmarks/bench_bandits.py --family "1.0%, softmax, 2000" --repetitions 1000 \\
        --result bandits_1000
    python benchmarks/bench_bandits.py --decisions --family "34 arms, 0.4%" --repetitions 50 \\
        --trained 3333 --rounds 20000 50000 100000 200000 --result bandits_rounds

Families of ``bandit_families.py``, 200 repetitions each. Half of the rounds fit the click rate of
each arm, the other half corrects it. Estimates are those of the package (``selection.estimators``)
and of obp's formulas on the same rounds, which must be equal. Three bounds of the mean of the same
scores are compared: that of ``selection.bounds`` (Phan et al. 2021), the empirical Bernstein bound
(Maurer and Pontil 2009) and a betting bound (Waudby-Smith and Ramdas 2023, hedged capital), beside
the normal interval. ``--decisions`` ranks uniform, softmax, BC and IQL, with IQL in closed form.
Writes benchmarks/results/bandits.json or bandits_decisions.json.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from bandit_families import FAMILIES, Bandit, Logged, arm_means, softmax
from iql_torchrl import load_dataset
from iql_torchrl.report import text_table
from iql_torchrl.selection import bounds
from iql_torchrl.selection.bounds import mean_bounds
from iql_torchrl.selection.episodes import Episodes
from iql_torchrl.selection.estimators import (
    LoggedLogProb,
    ModelValues,
    candidate_scores,
    direct_method,
    episode_scores,
    per_decision,
)
from record import place, save

import numpy as np
from gymnasium import spaces

LIMITS, LEVEL = (0.0, 1.0), 0.025
ROUNDS = 10_000


def empirical_bernstein(scores: np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    """Theorem 4 of Maurer and Pontil 2009 on both sides."""
    rounds, log = len(scores), np.log(2 / LEVEL)
    half = (2 * scores.var(ddof=1) * log / rounds) ** 0.5
    half += 7 * (highest - lowest) * log / (3 * (rounds - 1))
    return scores.mean() - half, scores.mean() + half


def betting(scores: np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    """Means whose capital never reaches 1 / level, with predictable plug-in bets, by bisection."""
    unit = np.random.default_rng(0).permutation((scores - lowest) / (highest - lowest))
    place = np.arange(1, len(unit) + 1)
    mean = (0.5 + np.cumsum(unit)) / (place + 1)
    spread = np.concatenate([[0.25], (0.25 + np.cumsum((unit - mean) ** 2))[:-1] / place[1:]])
    bet = np.sqrt(2 * np.log(1 / LEVEL) / (len(unit) * spread))

    def refused(m: float, sign: int) -> bool:
        stake = np.minimum(bet, 0.5 / (m if sign > 0 else 1 - m))
        return bool(np.cumsum(np.log1p(sign * stake * (unit - m))).max() >= np.log(1 / LEVEL))

    ends = []
    for sign, outer in ((1, 1e-12), (-1, 1 - 1e-12)):
        inner = unit.mean()
        for _ in range(30):
            middle = (outer + inner) / 2
            outer, inner = (middle, inner) if refused(middle, sign) else (outer, middle)
        ends.append(lowest + (highest - lowest) * outer)
    return ends[0], ends[1]


def normal(scores: np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    half = 1.96 * scores.std(ddof=1) / len(scores) ** 0.5
    return scores.mean() - half, scores.mean() + half


OTHERS = {"Bernstein": empirical_bernstein, "betting": betting, "normal": normal}


def episodes_of(logged: Logged) -> Episodes:
    """The rounds as episodes of one step."""
    ones = np.ones(len(logged.action), bool)
    return Episodes(load_dataset(
        {"observation": logged.context.astype(np.float32), "action": logged.action,
         "reward": logged.reward.astype(np.float32), "terminated": ones, "truncated": ~ones},
        action_space=spaces.Discrete(logged.propensities.shape[1]), progress=False,
    ), 1.0)  # fmt: skip


def model_of(means: np.ndarray, logged: Logged, policy: np.ndarray) -> ModelValues:
    q = means[logged.action]
    return ModelValues(policy @ means, q, logged.reward - q, np.full(len(q), np.nan))


def log_probs(chosen: np.ndarray, logged: Logged) -> LoggedLogProb:
    """Of the logged actions, by the policy ``chosen`` ``(N, K)`` and by the behaviour policy."""
    with np.errstate(divide="ignore"):
        logs = (np.log(p[range(len(p)), logged.action]) for p in (chosen, logged.propensities))
        return LoggedLogProb(*logs)


def obp_values(ratio: np.ndarray, logged: Logged, model: ModelValues) -> dict[str, float]:
    """obp's DirectMethod, SelfNormalizedInverseProbabilityWeighting and DoublyRobust."""
    reward = logged.reward
    return {
        "direct method": model.initial.mean(),
        "importance sampling": (ratio * reward / ratio.mean()).mean(),
        "doubly robust": (model.initial + ratio * (reward - model.action_value)).mean(),
    }


def repetition(
    bandit: Bandit, rounds: int, seed: int, truth: dict[str, float]
) -> list[dict[str, Any]]:
    fit, fresh = bandit.dataset(rounds, 1000 + seed).split(rounds // 2)
    episodes, means = episodes_of(fresh), arm_means(fit)
    results = []
    for name, policy in bandit.policies().items():
        chosen = policy(fresh.context)
        logged = log_probs(chosen, fresh)
        model = model_of(means, fresh, chosen)
        scored = candidate_scores(episodes, logged, (model, model), LIMITS, np.nan)
        values = {
            "direct method": direct_method(episodes, *logged, model).mean(),
            "importance sampling": per_decision(episodes, *logged).mean(),
            "doubly robust": scored.scores.mean(),
        }
        ratio = np.exp(logged.policy - logged.behaviour)
        with np.errstate(invalid="ignore"):
            obp = obp_values(ratio, fresh, model)
        equal = np.allclose([*values.values()], [*obp.values()], rtol=1e-9, equal_nan=True)
        mean, (below, above) = scored.scores.mean(), scored.deviation
        ends = min(mean - below, scored.scores.min()), max(mean + above, scored.scores.max())
        intervals = {kind: bound(scored.scores, *ends) for kind, bound in OTHERS.items()}
        row = {"policy": name, "equal": equal, "effective": scored.effective}
        row |= {f"error {key}": value - truth[name] for key, value in values.items()}
        results.append((row, intervals, scored.scores, ends))
    rows, intervals, scores, ends = zip(*results, strict=True)
    simplex = mean_bounds(np.array(scores), *np.transpose(ends), together=False, seed=seed)
    for row, others, *own in zip(rows, intervals, *simplex, strict=True):
        for kind, pair in {"simplex": own, **others}.items():
            low, high = np.clip(pair, *LIMITS)
            row[f"covered {kind}"] = low <= truth[row["policy"]] <= high
            row[f"width {kind}"] = high - low
    return list(rows)


def estimates(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for arms, rate, behaviour, matters, rounds in FAMILIES:
        family = f"{arms} arms, {rate:.1%}, {behaviour}, {rounds}" + ", contexts" * matters
        if options.family not in family:
            continue
        bandit = Bandit(arms, rate, behaviour, matters)
        truth = {name: bandit.value(policy) for name, policy in bandit.policies().items()}
        rows = defaultdict(list)
        for seed in range(options.repetitions):
            for row in repetition(bandit, rounds, seed, truth):
                rows[row.pop("policy")].append(row)
        result = {
            name: {"truth": truth[name]}
            | {key: float(np.nanmean([row[key] for row in each])) for key in each[0]}
            for name, each in rows.items()
        }
        columns = ["truth", "error doubly robust", "equal"]
        columns += [f"{what} {k}" for k in ("simplex", *OTHERS) for what in ("covered", "width")]
        table = [[n, *(f"{row[key]:.4f}" for key in columns)] for n, row in result.items()]
        print(f"{family}\n{text_table([['', *columns], *table])}", flush=True)
        yield family, result


def candidates_of(fit: Logged, bandit: Bandit, gain: float) -> dict[str, Any]:
    """Uniform; a softmax unlike the truth; BC; IQL in closed form: BC times exp(advantage / scale)."""
    means = arm_means(fit, prior=50.0)
    advantage = means - fit.reward.mean()
    frequency = (np.bincount(fit.action, minlength=bandit.arms) + 1) / (
        len(fit.action) + bandit.arms
    )
    iql = frequency * np.exp(np.clip(gain * advantage / means.std(), -20, 20))
    unlike = softmax(np.random.default_rng(7).standard_normal((1, bandit.arms)))[0]
    tables = {"uniform": np.full(bandit.arms, 1 / bandit.arms), "softmax": unlike,
              "BC": frequency, "IQL": iql / iql.sum()}  # fmt: skip
    return {name: (lambda x, p=table: np.tile(p, (len(x), 1))) for name, table in tables.items()}


def decision(bandit: Bandit, rounds: int, seed: int, trained: int | None) -> dict[str, Any]:
    """``trained`` rounds train (None: a third), half of the rest fits, and the other half decides."""
    train, rest = bandit.dataset(rounds, 5000 + seed).split(trained or rounds // 3)
    fit, fresh = rest.split((rounds - len(train.action)) // 2)
    episodes, means = episodes_of(fresh), arm_means(fit)
    candidates = candidates_of(train, bandit, gain=2.0)
    logged, models, count = [], [], len(candidates)
    for policy in candidates.values():
        chosen = policy(fresh.context)
        logged.append(log_probs(chosen, fresh))
        models.append((model_of(means, fresh, chosen),) * 2)
    scores = episode_scores(
        episodes, logged, models, LIMITS, np.full(count, np.nan), behaviour_scores=fresh.reward,
        behaviour_scores_high=fresh.reward, behaviour_max_deviation=0.0, unsupported=np.zeros(count),
        behaviour_unsupported=0.0, worst_unsupported=np.zeros(count), uncovered_ends=0.0, history={},
    )  # fmt: skip
    low, _ = scores.gain_bounds(0.95, seed)
    sound = (low > 0) & (scores.effective_episodes >= 20)
    values = scores.scores.mean(1)
    behaviour = bandit.value(bandit.propensities)
    gains = np.array([bandit.value(policy) - behaviour for policy in candidates.values()])
    if not sound.any():
        return {"recommended": None, "wrong": False, "possible": gains.max() / behaviour}
    best = int(np.flatnonzero(sound)[values[sound].argmax()])
    return {
        "recommended": [*candidates][best],
        "wrong": bool(gains[best] < low[best]),  # less than the claimed margin
        "harmful": bool(gains[best] <= 0),
        "gain": gains[best] / behaviour,
        "possible": gains.max() / behaviour,
    }


def decisions(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    repetitions = options.repetitions
    for arms, rate, behaviour in ((5, 0.05, "uniform"), (34, 0.05, "uniform"), (34, 0.05, "softmax"),
                                  (5, 0.01, "uniform"), (34, 0.004, "uniform")):  # fmt: skip
        bandit = Bandit(arms, rate, behaviour, matters=False)
        for rounds in options.rounds:
            family = f"{arms} arms, {rate:.1%}, {behaviour}"
            if options.family not in family:
                continue
            rows = [decision(bandit, rounds, seed, options.trained) for seed in range(repetitions)]
            found = [row for row in rows if row["recommended"]]
            result = {
                "recommended": len(found) / repetitions,
                "wrong": sum(row["wrong"] for row in rows) / repetitions,
                "harmful": sum(row.get("harmful", False) for row in rows) / repetitions,
                "relative gain": float(np.mean([row["gain"] for row in found])) if found else 0.0,
                "possible": float(np.mean([row["possible"] for row in rows])),
            }
            if rounds != ROUNDS:
                family += f", {rounds}"
            print(family, {k: round(v, 3) for k, v in result.items()}, flush=True)
            yield family, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--decisions", action="store_true")
    parser.add_argument("--family", default="", help="only families whose name contains this")
    parser.add_argument("--rounds", type=int, nargs="+", default=[ROUNDS], help="of decisions")
    parser.add_argument("--trained", type=int, help="rounds that train; a third if not given")
    parser.add_argument("--result", help="name of the file")
    options = parser.parse_args()
    bounds.MAX_DRAWS = bounds.MIN_DRAWS = 2_000  # quantiles of 2.5 % from 50 draws: enough here
    began, run = time.perf_counter(), decisions if options.decisions else estimates
    usual = "bandits_decisions" if options.decisions else "bandits"
    output, results = place(options.result or usual, ""), {}
    for family, result in run(options):
        results[family] = result
        seconds = time.perf_counter() - began
        save(output, {"seconds": seconds, "repetitions": options.repetitions, "families": results})


if __name__ == "__main__":
    main()
