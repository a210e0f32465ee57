"""Reasons not to trust the estimates of a ranking: a name and a sentence for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.episodes import horizon

__all__ = ["BLOCKING", "doubts_of", "general_warnings", "member_warnings", "value_warnings"]

Row = Mapping[str, Any]

ERROR_GROWTH = 2.0
MIN_EFFECTIVE_SHARE = 0.1
WORST_STATE = 0.5
MIN_CORRECTING = 20.0
HISTORY = 4.5
SHARED = 0.05
HORIZONS, PASSES, UNLOGGED = 2.0, 1.0, 0.01
NAMED = 3

# A member with one of these is not recommended.
BLOCKING = ("extrapolation", "range", "few", "contradiction", "seen")


def doubts_of(
    row: Row,
    *,
    log_extrapolation: float,
    possible: tuple[float, float],
    episodes: int,
    max_extrapolation: float,
    min_effective_episodes: float,
) -> tuple[str, ...]:
    """Names of the doubts about one member's row of a ranking."""
    enough = max(min_effective_episodes, MIN_EFFECTIVE_SHARE * episodes)
    checks = {
        "importance": row["effective_episodes"] < enough,
        "extrapolation": row["extrapolation"] - log_extrapolation > max_extrapolation
        or row["worst_extrapolation"] >= WORST_STATE,
        "td_error": row["td_error"] > ERROR_GROWTH * row["td_error_training"],
        "range": not possible[0] <= row["value"] <= possible[1],
        "few": row["correcting_episodes"] < MIN_CORRECTING,
        "contradiction": row["importance_low"] > row["value_high"]
        or row["importance_high"] < row["value_low"],
        "seen": row["seen"] > SHARED,
    }
    return tuple(name for name, doubtful in checks.items() if doubtful)


def member_warnings(
    rows: Sequence[Row],
    *,
    episodes: int,
    log_extrapolation: float,
    possible: tuple[float, float],
) -> list[str]:
    """One sentence for each doubt, with the names of the members that it concerns."""
    low, high = possible

    def importance(doubted: Sequence[Row]) -> str:
        least = min(row["effective_episodes"] for row in doubted)
        return (
            f"importance weights have only {least:.1f} effective episodes of {episodes}; "
            "ignore importance_value."
        )

    def extrapolation(doubted: Sequence[Row]) -> str:
        most = max(row["extrapolation"] for row in doubted)
        worst = max(row["worst_extrapolation"] for row in doubted)
        return (
            f"up to {most:.0%} of their actions are rare or missing in the log in that state (of the "
            f"log's own actions: {log_extrapolation:.0%}), in the worst state {worst:.0%}; the log "
            "does not show what follows."
        )

    def td_error(doubted: Sequence[Row]) -> str:
        most = max(row["td_error"] / row["td_error_training"] for row in doubted)
        return (
            f"errors of the critics are up to {most:.1f} times as large on held-out steps as on "
            "training steps, so intervals are wide; use more data or smaller critics."
        )

    def outside(_: Sequence[Row]) -> str:
        return (
            f"values are outside the range that the log allows, {low:.4g} to {high:.4g}; the "
            "estimate has failed."
        )

    def few(doubted: Sequence[Row]) -> str:
        least = min(row["correcting_episodes"] for row in doubted)
        return (
            f"the correction by held-out steps has only {least:.1f} effective episodes of "
            f"{episodes}, at least {MIN_CORRECTING:g} are needed; hold out more."
        )

    def contradiction(doubted: Sequence[Row]) -> str:
        row = doubted[0]
        return (
            "fitted Q evaluation and importance sampling contradict each other beyond their "
            f"intervals ({row['member']}: {row['value_low']:.4g} to {row['value_high']:.4g} against "
            f"{row['importance_low']:.4g} to {row['importance_high']:.4g}); check action_log_prob, "
            "and whether the observations contain everything that the log's policy used."
        )

    def seen(doubted: Sequence[Row]) -> str:
        most = max(row["seen"] for row in doubted)
        return (
            f"trained on up to {most:.0%} of the held-out episodes, so these cannot test them; "
            "rank on episodes that no member was trained on."
        )

    sentences: dict[str, Callable[[Sequence[Row]], str]] = {
        "importance": importance,
        "extrapolation": extrapolation,
        "td_error": td_error,
        "range": outside,
        "few": few,
        "contradiction": contradiction,
        "seen": seen,
    }
    result = []
    for name, sentence in sentences.items():
        if doubted := [row for row in rows if name in row["doubts"]]:
            result.append(f"{_named(doubted)}: {sentence(doubted)}")
    return result


def _named(rows: Sequence[Row]) -> str:
    names = [row["member"] for row in rows]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def value_warnings(
    backups: float,
    passes: float,
    held_out: OfflineDataset,
    discount: float,
    shared: float,
    history: Mapping[str, float],
) -> list[str]:
    """Reasons why no value may be compared with the log's: one sentence each.

    ``backups``: how often the critics' targets were updated; ``passes``: over the data;
    ``shared``: share of the held-out episodes that are also in the data of the fit; ``history``: t
    statistics of outcomes against earlier steps.
    """
    result = []
    ahead = horizon(held_out, discount)
    if backups < HORIZONS * ahead or passes < PASSES:
        result.append(
            f"fitted Q evaluation renewed its targets {backups:.3g} times, in {passes:.3g} passes "
            f"of the data, where values look {ahead:.3g} steps ahead: it has not converged; use "
            "more updates."
        )
    if shared > SHARED:
        result.append(
            f"{shared:.0%} of the held-out episodes are also among those fitted on, so they cannot "
            "show the error of the fit; give two parts of one log: dataset.split(fraction, seed)."
        )
    if depends := {name: t for name, t in history.items() if abs(t) > HISTORY}:
        strongest = max(depends, key=lambda name: abs(depends[name]))
        result.append(
            f"what follows a step depends on more than observation and action: on {strongest} (t "
            f"statistic {depends[strongest]:.1f}); values assume that it does not. Add to the "
            "observations what the outcomes depend on, such as the time or earlier observations."
        )
    return result


def general_warnings(
    rows: Sequence[Row],
    *,
    unchecked: str,
    sampled: bool,
    agreement: float,
    clone: str | None,
    log: tuple[float, float, float],
    unlogged: float,
    fit_seen: float,
) -> list[str]:
    """Sentences about the whole ranking.

    ``agreement``: Spearman of the estimators; ``clone``: the member that imitates the log; ``log``:
    value and bounds; ``unchecked``: why there is no importance sampling, or empty; ``sampled``: whether
    the values are of continuous actions as the members draw them; ``unlogged``: discounted
    weight of ends that no logged state describes;
    ``fit_seen``: greatest share of the fit's episodes that one member was trained on.
    """
    result = []
    if fit_seen > SHARED:
        result.append(
            f"members were trained on up to {fit_seen:.0%} of the episodes fitted on, so the fit "
            "estimates them too high; held-out episodes correct that, but intervals are wider."
        )
    if unlogged > UNLOGGED:
        result.append(
            f"truncated episodes leave {unlogged:.0%} of the discounted future in states that the "
            "log never describes; intervals assume any logged return there, the estimates the "
            "least."
        )
    if sampled:
        result.append(
            "values are of actions as the members draw them, because importance sampling needs "
            "densities: act so too (deterministic=False), or rank with deterministic=True."
        )
    if unchecked:
        result.append(f"{unchecked}, so nothing independent checks the values.")
    elif agreement < 0.3:
        result.append(
            f"the two estimators order the members differently (Spearman {agreement:.2f})."
        )
    imitation = next((row for row in rows if row["member"] == clone), None)
    if imitation is None:
        return result
    if imitation["value_low"] > log[2] or imitation["value_high"] < log[1]:
        result.append(
            f"{clone}, which imitates the log, is estimated at {imitation['value']:.4g} "
            f"({imitation['value_low']:.4g} to {imitation['value_high']:.4g}) and the log at "
            f"{log[0]:.4g} ({log[1]:.4g} to {log[2]:.4g}): the clone is a poor one, or the "
            "observations lack what the log's policy acted on."
        )
    return result
