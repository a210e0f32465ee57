"""Which candidate is recommended, if any, and why not: caveats, a name and a sentence for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from iql_torchrl.data.digests import shared_share, sketch_of
from iql_torchrl.selection.episodes import Episodes
from iql_torchrl.selection.fitted_q import FittedQ

Row = Mapping[str, Any]

ERROR_GROWTH, TINY = 2.0, 1e-300
WORST_STATE = 0.5
MIN_CORRECTING = 20.0
HISTORY = 4.5
SHARED = 0.05
HORIZONS, PASSES, UNCOVERED = 2.0, 1.0, 0.01
MIN_AGREEMENT = 0.3
NAMED = 3

# A candidate with one of these is not recommended; with one of CONFLICTS, no candidate is.
BLOCKING = ("extrapolation", "range", "few", "contradiction", "propensities", "seen")
CONFLICTS = {"contradiction", "propensities"}

# ``least`` and ``most`` are over the rows of the candidates that have the caveat, ``first`` is the
# best of them and ``worst`` the one with the largest extrapolation.
CAVEATS = {
    "importance": (
        "importance weights have only {least[effective_episodes]:.1f} effective episodes of "
        "{episodes}; ignore importance_value."
    ),
    "extrapolation": (
        "{worst[extrapolation]:.0%} of the {unit} of {worst[candidate]} take actions that are rare or "
        "missing in the dataset in that state (of the behaviour policy's: "
        "{behaviour_extrapolation:.0%}), in a single state up to {worst[worst_extrapolation]:.0%} of "
        "its actions; the dataset does not show what follows."
    ),
    "td_error": (
        "errors of the critics are up to {growth:.1f} times as large on held-out steps as on "
        "training steps, so intervals are wide{remedy}."
    ),
    "range": (
        "values are outside the range that the dataset allows, {possible[0]:.4g} to "
        "{possible[1]:.4g}; the estimate has failed{remedy}."
    ),
    "few": (
        "the correction by held-out steps has only {least[correcting_episodes]:.1f} effective "
        "episodes of {episodes}, at least {min_correcting:g} are needed; hold out more."
    ),
    "contradiction": (
        "fitted Q evaluation and importance sampling contradict each other beyond their intervals "
        "({first[candidate]}: {first[value_low]:.4g} to {first[value_high]:.4g} against "
        "{first[importance_low]:.4g} to {first[importance_high]:.4g}); check action_log_prob, and "
        "whether the observations contain everything that the behaviour policy used."
    ),
    "propensities": (
        "importance weights have mean {most[mean_weight]:.3g}, and exact propensities give 1, so "
        "logged probabilities are too small and intervals are unknown; check action_log_prob."
    ),
    "seen": (
        "trained on up to {most[seen]:.0%} of the held-out episodes, so these cannot test them; "
        "rank on episodes that no candidate was trained on."
    ),
}
REMEDIES = {
    "td_error": "; use more data or smaller critics",
    "range": "; use smaller critics or fewer updates",
}


def facts_of(fitted_q: FittedQ, train: Episodes, held_out: Episodes) -> dict[str, Any]:
    """What caveats and their sentences read beside the rows.

    ``possible``: smallest and largest value. For networks the range of logged returns. A table may
    combine parts of different episodes, so there the smallest and the largest logged reward count at
    every step. ``converged``: whether rewards travelled far enough, and every step was seen.
    """
    low, high = fitted_q.episodes.return_range
    table = not math.isfinite(fitted_q.backups)
    if table:
        discount = fitted_q.discount
        rewards = np.concatenate([train.reward, held_out.reward])
        longest = max(int(part.lengths.max()) for part in (train, held_out))
        steps = longest if discount == 1 else 1 / (1 - discount)
        low, high = min(low, steps * float(rewards.min())), max(high, steps * float(rewards.max()))
    far = fitted_q.backups >= HORIZONS * held_out.horizon
    return {
        "possible": (low, high),
        "converged": far and fitted_q.passes >= PASSES,
        "episodes": len(held_out),
        "unit": "episodes" if table else "steps",
        "behaviour_extrapolation": fitted_q.episodes.behaviour_unsupported,
        "min_correcting": MIN_CORRECTING,
    }


def caveats_of(
    row: Row, facts: Mapping[str, Any], max_extrapolation: float, min_effective: float
) -> tuple[str, ...]:
    """Names of the caveats of one candidate; with exact weights errors of the model do not matter."""
    more = row["extrapolation"] - facts["behaviour_extrapolation"]
    low, high = facts["possible"]
    value, modelled = row["value"], not row["exact"]
    disjoint = (
        row["importance_low"] > row["value_high"] or row["importance_high"] < row["value_low"]
    )
    checks = {
        "importance": row["effective_episodes"] < min_effective,
        "extrapolation": more > max_extrapolation or row["worst_extrapolation"] >= WORST_STATE,
        "td_error": modelled and row["td_error"] > ERROR_GROWTH * row["td_error_training"],
        "range": math.isnan(value) or (modelled and not low <= value <= high),
        "few": row["correcting_episodes"] < MIN_CORRECTING,
        "contradiction": modelled and disjoint,
        "propensities": row["wrong_propensities"],
        "seen": row["seen"] > SHARED,
    }
    return tuple(name for name, applies in checks.items() if applies)


def recommendation(rows: Sequence[Row], blocked: bool, confidence: float) -> tuple[str | None, str]:
    """The recommended candidate of ``rows``, best first, or None, and a sentence about it.

    It has the largest value among those whose lower bound of the gain is above 0 and that have no
    caveat of ``BLOCKING``. ``blocked``: no value may be compared with the behaviour policy's.
    """
    better = [row for row in rows if row["gain_low"] > 0]
    sound = [row for row in better if not set(row["caveats"]) & set(BLOCKING)]
    of_all = blocked or any(set(row["caveats"]) & CONFLICTS for row in rows)
    refused = of_all or not sound
    row = rows[0] if refused else sound[0]
    interval = (
        f"{confidence:.0%} interval for all {len(rows)} candidates at once {row['gain_low']:.4g} "
        f"to {row['gain_high']:.4g}"
    )
    if refused:
        concerned = "a warning concerns all candidates" if of_all else "it has caveats"
        if not of_all and len(better) > 1:
            concerned = f"all {len(better)} with an interval above 0 have caveats"
        reason = f"; {concerned}, see the warnings" if better else ""
        return None, (
            "Recommendation: no candidate is reliably better than the behaviour policy (the "
            f"highest estimate, {row['candidate']}, gains {row['gain']:.4g}, {interval}{reason})."
        )
    higher = row["rank"] - 1
    more = f"; {higher} with higher estimates have caveats or are uncertain" if higher else ""
    return row["candidate"], (
        f"Recommendation: {row['candidate']}, with an estimated gain over the behaviour policy of "
        f"{row['gain']:.4g} ({interval}{more})."
    )


def candidate_warnings(rows: Sequence[Row], facts: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each caveat, with the names of the candidates that have it."""
    for name, sentence in CAVEATS.items():
        having = [row for row in rows if name in row["caveats"]]
        if not having:
            continue
        numbers = [key for key, value in having[0].items() if isinstance(value, float)]
        least, most = ({k: of(row[k] for row in having) for k in numbers} for of in (min, max))
        growth = [row["td_error"] / max(row["td_error_training"], TINY) for row in having]
        text = sentence.format(
            **facts, least=least, most=most, growth=max(growth), first=having[0],
            worst=max(having, key=lambda row: row["extrapolation"]),
            # more updates are the remedy of critics that have not converged; both would contradict
            remedy=REMEDIES.get(name, "") if facts["converged"] else "",
        )  # fmt: skip
        more = f" and {len(having) - NAMED} more" if len(having) > NAMED else ""
        yield f"{', '.join(row['candidate'] for row in having[:NAMED])}{more}: {text}"


def blocking_warnings(
    fitted_q: FittedQ, train: Episodes, held_out: Episodes, converged: bool
) -> Iterator[str]:
    """Reasons why no value may be compared with the behaviour policy's: one sentence each."""
    modelled = not fitted_q.episodes.exact.all()
    if modelled and not converged:
        factor = max(HORIZONS * held_out.horizon / fitted_q.backups, PASSES / fitted_q.passes)
        yield (
            f"fitted Q evaluation renewed its targets {fitted_q.backups:.3g} times, in "
            f"{fitted_q.passes:.3g} passes of the data, where values look {held_out.horizon:.3g} "
            f"steps ahead: it has not converged; use more updates, {factor:.1f} times as many or more."
        )
    sketch = sketch_of(train.dataset.episode_digests())
    if (shared := shared_share(sketch, held_out.dataset.episode_digests())) > SHARED:
        yield (
            f"{shared:.0%} of the held-out episodes are also among those fitted on, so they "
            "cannot show the error of the fit; give two parts of one dataset: "
            "dataset.split(fraction, seed)."
        )
    history = fitted_q.episodes.history
    strongest = max(history, key=lambda name: abs(history[name]), default="")
    if modelled and strongest and abs(history[strongest]) > HISTORY:
        yield (
            f"what follows a step depends on more than observation and action: on {strongest} (t "
            f"statistic {history[strongest]:.1f}); values assume that it does not. Add to the "
            "observations what the outcomes depend on, such as the time or earlier observations."
        )


def general_warnings(
    fitted_q: FittedQ, held_out: Episodes, fit_seen: float, unchecked: str, agreement: float,
    baseline: Row | None, behaviour: tuple[float, float, float],
) -> Iterator[str]:  # fmt: skip
    """Sentences about the whole ranking.

    ``fit_seen``: largest share of the episodes fitted on that a candidate was trained on.
    ``unchecked``: why there is no importance sampling, or empty. ``agreement``: Spearman's.
    ``baseline``: of behaviour cloning. ``behaviour``: value of the behaviour policy and its bounds.
    """
    uncovered = fitted_q.episodes.uncovered_ends
    if fit_seen > SHARED:
        yield (
            f"candidates were trained on up to {fit_seen:.0%} of the episodes fitted on, so the "
            "fit estimates them too high; held-out episodes correct that, but intervals are wider."
        )
    if uncovered > UNCOVERED:
        yield (
            f"truncated episodes leave {uncovered:.0%} of the discounted future in states that the "
            "dataset never describes; intervals assume any logged return there, the estimates the "
            "least."
        )
    if not fitted_q.deterministic and held_out.continuous:
        yield (
            "values are of actions as the candidates draw them, because importance sampling needs "
            "densities: act so too (deterministic=False), or rank with deterministic=True."
        )
    if unchecked:
        yield f"{unchecked}, so nothing independent checks the values."
    elif agreement < MIN_AGREEMENT:
        yield f"the two estimators order the candidates differently (Spearman {agreement:.2f})."
    value, low, high = behaviour
    if baseline and (baseline["value_low"] > high or baseline["value_high"] < low):
        yield (
            "{candidate}, trained by behaviour cloning, is estimated at {value:.4g} ({value_low:.4g} "
            "to {value_high:.4g}) and the behaviour policy at ".format_map(baseline)
            + f"{value:.4g} ({low:.4g} to {high:.4g}): the cloning is poor, or the observations "
            "lack what the behaviour policy acted on."
        )
