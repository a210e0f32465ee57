"""Reasons not to trust the estimates of a ranking: a name and a sentence for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iql_torchrl.selection.fitted_q import FittedQ

__all__ = [
    "BLOCKING",
    "Evidence",
    "blocking_warnings",
    "doubts_of",
    "general_warnings",
    "member_warnings",
]

Row = Mapping[str, Any]

ERROR_GROWTH, TINY = 2.0, 1e-300
MIN_EFFECTIVE_SHARE = 0.1
WORST_STATE = 0.5
MIN_CORRECTING = 20.0
HISTORY = 4.5
SHARED = 0.05
HORIZONS, PASSES, UNLOGGED = 2.0, 1.0, 0.01
MIN_AGREEMENT = 0.3
NAMED = 3

# A member with one of these is not recommended.
BLOCKING = ("extrapolation", "range", "few", "contradiction", "seen")

# Of each doubt; ``least`` and ``most`` are over the rows of the members that it concerns.
DOUBTS = {
    "importance": (
        "importance weights have only {least[effective_episodes]:.1f} effective episodes of "
        "{episodes}; ignore importance_value."
    ),
    "extrapolation": (
        "up to {most[extrapolation]:.0%} of their actions are rare or missing in the log in that "
        "state (of the log's own actions: {log_extrapolation:.0%}), in the worst state "
        "{most[worst_extrapolation]:.0%}; the log does not show what follows."
    ),
    "td_error": (
        "errors of the critics are up to {growth:.1f} times as large on held-out steps as on "
        "training steps, so intervals are wide; use more data or smaller critics."
    ),
    "range": (
        "values are outside the range that the log allows, {possible[0]:.4g} to {possible[1]:.4g}; "
        "the estimate has failed."
    ),
    "few": (
        "the correction by held-out steps has only {least[correcting_episodes]:.1f} effective "
        "episodes of {episodes}, at least {enough:g} are needed; hold out more."
    ),
    "contradiction": (
        "fitted Q evaluation and importance sampling contradict each other beyond their intervals "
        "({first[member]}: {first[value_low]:.4g} to {first[value_high]:.4g} against "
        "{first[importance_low]:.4g} to {first[importance_high]:.4g}); check action_log_prob, and "
        "whether the observations contain everything that the log's policy used."
    ),
    "seen": (
        "trained on up to {most[seen]:.0%} of the held-out episodes, so these cannot test them; "
        "rank on episodes that no member was trained on."
    ),
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a ranking beside its rows.

    Attributes:
        fitted_q: the evaluation of the members.
        episodes: number of held-out episodes.
        horizon: how many steps a value adds up.
        possible: smallest and largest possible value.
        log: value of the log and its bounds.
        shared: share of the held-out episodes that are also in the data of the fit.
        fit_seen: greatest share of the fit's episodes that one member was trained on.
        unchecked: why there is no importance sampling, or empty.
        sampled: whether the values are of continuous actions as the members draw them.
        clone: the member that imitates the log.
    """

    fitted_q: FittedQ
    episodes: int
    horizon: float
    possible: tuple[float, float]
    log: tuple[float, float, float]
    shared: float
    fit_seen: float
    unchecked: str
    sampled: bool
    clone: str | None


def doubts_of(
    row: Row, known: Evidence, *, max_extrapolation: float, min_effective_episodes: float
) -> tuple[str, ...]:
    """Names of the doubts about one member's row of a ranking."""
    enough = max(min_effective_episodes, MIN_EFFECTIVE_SHARE * known.episodes)
    more = row["extrapolation"] - known.fitted_q.episodes.log_unsupported
    checks = {
        "importance": row["effective_episodes"] < enough,
        "extrapolation": more > max_extrapolation or row["worst_extrapolation"] >= WORST_STATE,
        "td_error": row["td_error"] > ERROR_GROWTH * row["td_error_training"],
        "range": not known.possible[0] <= row["value"] <= known.possible[1],
        "few": row["correcting_episodes"] < MIN_CORRECTING,
        "contradiction": row["importance_low"] > row["value_high"]
        or row["importance_high"] < row["value_low"],
        "seen": row["seen"] > SHARED,
    }
    return tuple(name for name, doubtful in checks.items() if doubtful)


def member_warnings(rows: Sequence[Row], known: Evidence) -> list[str]:
    """One sentence for each doubt, with the names of the members that it concerns."""
    result = []
    for name, sentence in DOUBTS.items():
        doubted = [row for row in rows if name in row["doubts"]]
        if not doubted:
            continue
        numbers = [key for key, value in doubted[0].items() if isinstance(value, float)]
        least, most = ({k: of(row[k] for row in doubted) for k in numbers} for of in (min, max))
        growth = [row["td_error"] / max(row["td_error_training"], TINY) for row in doubted]
        text = sentence.format(
            least=least, most=most, growth=max(growth), first=doubted[0], possible=known.possible,
            log_extrapolation=known.fitted_q.episodes.log_unsupported,
            episodes=known.episodes, enough=MIN_CORRECTING,
        )  # fmt: skip
        more = f" and {len(doubted) - NAMED} more" if len(doubted) > NAMED else ""
        result.append(f"{', '.join(row['member'] for row in doubted[:NAMED])}{more}: {text}")
    return result


def blocking_warnings(known: Evidence) -> list[str]:
    """Reasons why no value may be compared with the log's: one sentence each."""
    fitted_q, result = known.fitted_q, []
    if fitted_q.backups < HORIZONS * known.horizon or fitted_q.passes < PASSES:
        result.append(
            f"fitted Q evaluation renewed its targets {fitted_q.backups:.3g} times, in "
            f"{fitted_q.passes:.3g} passes of the data, where values look {known.horizon:.3g} steps "
            "ahead: it has not converged; use more updates."
        )
    if known.shared > SHARED:
        result.append(
            f"{known.shared:.0%} of the held-out episodes are also among those fitted on, so they "
            "cannot show the error of the fit; give two parts of one log: "
            "dataset.split(fraction, seed)."
        )
    history = fitted_q.episodes.history
    strongest = max(history, key=lambda name: abs(history[name]), default="")
    if strongest and abs(history[strongest]) > HISTORY:
        result.append(
            f"what follows a step depends on more than observation and action: on {strongest} (t "
            f"statistic {history[strongest]:.1f}); values assume that it does not. Add to the "
            "observations what the outcomes depend on, such as the time or earlier observations."
        )
    return result


def general_warnings(rows: Sequence[Row], known: Evidence, agreement: float) -> list[str]:
    """Sentences about the whole ranking; ``agreement``: Spearman's of the two estimators."""
    result, unlogged = [], known.fitted_q.episodes.unlogged_ends
    if known.fit_seen > SHARED:
        result.append(
            f"members were trained on up to {known.fit_seen:.0%} of the episodes fitted on, so the "
            "fit estimates them too high; held-out episodes correct that, but intervals are wider."
        )
    if unlogged > UNLOGGED:
        result.append(
            f"truncated episodes leave {unlogged:.0%} of the discounted future in states that the "
            "log never describes; intervals assume any logged return there, the estimates the least."
        )
    if known.sampled:
        result.append(
            "values are of actions as the members draw them, because importance sampling needs "
            "densities: act so too (deterministic=False), or rank with deterministic=True."
        )
    if known.unchecked:
        result.append(f"{known.unchecked}, so nothing independent checks the values.")
    elif agreement < MIN_AGREEMENT:
        result.append(
            f"the two estimators order the members differently (Spearman {agreement:.2f})."
        )
    value, low, high = known.log
    for row in rows:
        if row["member"] == known.clone and (row["value_low"] > high or row["value_high"] < low):
            result.append(
                f"{known.clone}, which imitates the log, is estimated at {row['value']:.4g} "
                f"({row['value_low']:.4g} to {row['value_high']:.4g}) and the log at {value:.4g} "
                f"({low:.4g} to {high:.4g}): the clone is a poor one, or the observations lack what "
                "the log's policy acted on."
            )
    return result
