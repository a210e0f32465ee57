"""What speaks against the estimates of a ranking, in names and in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data import OfflineDataset
from iql_torchrl.importance import Importance
from iql_torchrl.members import horizon, open_ended

__all__ = [
    "doubts_of",
    "general_warnings",
    "is_off",
    "member_warnings",
    "value_warnings",
]

FloatArray = NDArray[np.float64]

ERROR_GROWTH = 2.0
OPTIMISM_ERRORS, OPTIMISM_SHARE = 2.0, 0.25
MIN_EFFECTIVE_SHARE = 0.1
HORIZONS, PASSES, UNLOGGED = 2.0, 1.0, 0.01
NAMED = 3


def doubts_of(
    row: Mapping[str, Any],
    returns: FloatArray,
    max_extrapolation: float,
    min_effective_episodes: float,
) -> tuple[str, ...]:
    """Names of the doubts about one member's row; ``returns``: of the held-out episodes."""
    enough = max(min_effective_episodes, MIN_EFFECTIVE_SHARE * len(returns))
    found = {
        "importance": row["effective_episodes"] < enough,
        "extrapolation": row["extrapolation"] > max_extrapolation,
        "td_error": row["td_error"] > ERROR_GROWTH * row["td_error_training"],
        "optimism": row["optimism"]
        > max(OPTIMISM_ERRORS * row["optimism_error"], OPTIMISM_SHARE * abs(row["gain"])),
        "range": not returns.min() <= row["value"] <= returns.max(),
    }
    return tuple(name for name, doubtful in found.items() if doubtful)


def member_warnings(
    rows: Sequence[Mapping[str, Any]], returns: FloatArray, usual: float
) -> list[str]:
    """One sentence for each doubt that some member raises, naming the members."""
    found = []
    if those := [row for row in rows if "importance" in row["doubts"]]:
        least = min(row["effective_episodes"] for row in those)
        found.append(
            f"{_named(those)}: importance weights rest on as few as {least:.1f} effective "
            f"episodes of {len(returns)}; ignore importance_value."
        )
    if those := [row for row in rows if "extrapolation" in row["doubts"]]:
        most = max(row["extrapolation"] for row in those)
        found.append(
            f"{_named(those)}: up to {most:.0%} of the actions lie where the log has almost none "
            f"(of the log's own, {usual:.0%}); values are guesswork there."
        )
    if those := [row for row in rows if "td_error" in row["doubts"]]:
        most = max(row["td_error"] / row["td_error_training"] for row in those)
        found.append(
            f"{_named(those)}: critics err up to {most:.1f} times as much on held-out steps as on "
            "their own; use more data or smaller critics."
        )
    if those := [row for row in rows if "optimism" in row["doubts"]]:
        worst = max(those, key=lambda row: float(row["optimism"]))
        found.append(
            f"{_named(those)}: held-out steps earn less than the critics say; along an episode, "
            f"values are too high by up to about {worst['optimism']:.2g} (standard error "
            f"{worst['optimism_error']:.2g}). Fit on episodes that the members were not trained on."
        )
    if those := [row for row in rows if "range" in row["doubts"]]:
        found.append(
            f"{_named(those)}: values lie outside every return of the log, {returns.min():.4g} to "
            f"{returns.max():.4g}; the critics may have diverged."
        )
    return found


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [row["member"] for row in rows]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def value_warnings(
    backups: float,
    passes: float,
    held_out: OfflineDataset,
    discount: float,
    *,
    with_clone: bool,
) -> list[str]:
    """Why no value may be compared with the log's: one sentence each.

    ``backups``: how often the critics' targets were renewed; ``passes``: of their data.
    """
    found = []
    ahead = horizon(held_out, discount)
    if backups < HORIZONS * ahead or passes < PASSES:
        found.append(
            f"fitted Q evaluation renewed its targets {backups:.3g} times, in {passes:.3g} passes "
            f"of the data, where values look {ahead:.3g} steps ahead: it has not converged; use "
            "more updates."
        )
    if not with_clone:
        left = float((discount**held_out.episode_lengths * open_ended(held_out)).mean())
        if left > UNLOGGED:
            found.append(
                f"truncated episodes leave {left:.0%} of the discounted future unlogged: the log's "
                "value lacks it, the members' do not. Give a member that imitates the log."
            )
    return found


def general_warnings(
    importance: Importance | None,
    agreement: float,
    clone: Mapping[str, Any] | None,
    log: tuple[float, float, float],
) -> list[str]:
    """Sentences about the whole ranking.

    ``agreement``: Spearman of the estimators; ``clone``: its row; ``log``: value and bounds.
    """
    found = []
    if importance is None:
        found.append(
            "the data hold no behaviour log-probabilities and no behaviour model was given, so "
            "nothing independent checks the values."
        )
    elif agreement < 0.3:
        found.append(
            f"the two estimators order the members differently (Spearman {agreement:.2f})."
        )
    if clone is None:
        found.append("no member imitates the log, so distances from it are unknown.")
    elif is_off(clone, log):
        found.append(
            f"fitted Q evaluation gives {clone['member']}, which imitates the log, "
            f"{clone['value']:.4g}, and the log earned {log[0]:.4g} ({log[1]:.4g} to "
            f"{log[2]:.4g}): the clone is a poor one, or all values are off by about as much."
        )
    return found


def is_off(clone: Mapping[str, Any], log: tuple[float, float, float]) -> bool:
    """Whether the clone's estimate lies outside the log's own interval, ``(value, low, high)``."""
    return not log[1] <= clone["value"] <= log[2]
