"""Intervals of four policies in forty datasets of bandit feedback, against the truth: bandits.png.

    PYTHONPATH=benchmarks python docs/pictures/bandits.py

34 actions chosen uniformly, a click rate of 0.4 %, 10,000 rounds (``benchmarks/bandit_families.py``).
"""

from pathlib import Path

import numpy as np
from bandit_families import Bandit, arm_means
from bench_bandits import LIMITS, episodes_of, model_of
from matplotlib.figure import Figure

from iql_torchrl.selection.bounds import mean_bounds
from iql_torchrl.selection.estimators import LoggedLogProb, candidate_scores

REPETITIONS, ROUNDS = 40, 10_000


def main() -> None:
    bandit = Bandit(34, 0.004, "uniform", matters=True)
    figure = Figure(figsize=(8, 3), layout="constrained", facecolor="white")
    panels = dict(zip(bandit.policies(), figure.subplots(1, 4), strict=True))
    for seed in range(REPETITIONS):
        fit, fresh = bandit.dataset(ROUNDS, seed).split(ROUNDS // 2)
        episodes, place = episodes_of(fresh), np.arange(len(fresh.action))
        scored = []
        for policy in bandit.policies().values():
            chosen = policy(fresh.context)
            with np.errstate(divide="ignore"):
                logged = LoggedLogProb(
                    *(np.log(p[place, fresh.action]) for p in (chosen, fresh.propensities))
                )
            model = model_of(arm_means(fit), fresh, chosen)
            scored.append(candidate_scores(episodes, logged, (model, model), LIMITS, np.nan))
        scores = np.array([each.scores for each in scored])
        away = np.array([each.deviation for each in scored])
        mean = scores.mean(1)
        bounds = mean_bounds(scores, mean - away[:, 0], mean + away[:, 1], together=False)
        for axes, centre, low, high in zip(panels.values(), mean, *bounds, strict=True):
            axes.plot([max(low, 0), high], [seed, seed], color="#0072B2", linewidth=1)
            axes.plot(centre, seed, ".", color="#0072B2", markersize=3)
    for name, axes in panels.items():
        axes.axvline(bandit.value(bandit.policies()[name]), color="#D55E00")
        axes.set(title=name, yticks=[], xlabel="click rate")
        axes.locator_params(axis="x", nbins=4)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
