"""Which candidate is recommended, if any: the reasons against it, a name and a sentence for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iql_torchrl.data.digests import shared_share, sketch_of
from iql_torchrl.selection.candidates import Candidate
from iql_torchrl.selection.episodes import Episodes
from iql_torchrl.selection.fitted_q import FittedQ

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

# A candidate with one of these is not recommended.
BLOCKING = ("extrapolation", "range", "few", "contradiction", "seen")

# Of each caveat; ``least`` and ``most`` are over the rows of the candidates that it concerns.
CAVEATS = {
    "importance": (
        "importance weights have only {least[effective_episodes]:.1f} effective episodes of "
        "{episodes}; ignore importance_value."
    ),
    "extrapolation": (
        "up to {most[extrapolation]:.0%} of their actions are rare or missing in the dataset in that "
        "state (of the behaviour policy's actions: {behaviour_extrapolation:.0%}), in the worst state "
        "{most[worst_extrapolation]:.0%}; the dataset does not show what follows."
    ),
    "td_error": (
        "errors of the critics are up to {growth:.1f} times as large on held-out steps as on "
        "training steps, so intervals are wide; use more data or smaller critics."
    ),
    "range": (
        "values are outside the range that the dataset allows, {possible[0]:.4g} to {possible[1]:.4g}; "
        "the estimate has failed; use smaller critics or fewer updates."
    ),
    "few": (
        "the correction by held-out steps has only {least[correcting_episodes]:.1f} effective "
        "episodes of {episodes}, at least {enough:g} are needed; hold out more."
    ),
    "contradiction": (
        "fitted Q evaluation and importance sampling contradict each other beyond their intervals "
        "({first[candidate]}: {first[value_low]:.4g} to {first[value_high]:.4g} against "
        "{first[importance_low]:.4g} to {first[importance_high]:.4g}); check action_log_prob, and "
        "whether the observations contain everything that the behaviour policy used."
    ),
    "seen": (
        "trained on up to {most[seen]:.0%} of the held-out episodes, so these cannot test them; "
        "rank on episodes that no candidate was trained on."
    ),
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a ranking beside its rows, and the options of ``rank_policies``.

    ``bc_baseline``: the candidate trained by behaviour cloning. ``fitted_q``: fitted on ``train``,
    corrected by ``held_out``. ``unchecked``: why there is no importance sampling, or empty.
    ``sampled``: whether values are of continuous actions as the candidates draw them.
    """

    candidates: tuple[Candidate, ...]
    bc_baseline: Candidate | None
    fitted_q: FittedQ
    train: Episodes
    held_out: Episodes
    unchecked: str
    sampled: bool
    max_extrapolation: float
    min_effective_episodes: float
    confidence: float
    seed: int

    @cached_property
    def log(self) -> tuple[float, float, float]:
        """Value of the log and its bounds."""
        return self.fitted_q.episodes.behaviour_value(self.confidence, self.seed)

    @cached_property
    def possible(self) -> tuple[float, float]:
        """Smallest and largest possible value.

        For networks the range of logged returns. A table may combine parts of different episodes,
        so there the range is that of the smallest and the largest logged reward at every step.
        """
        low, high = self.fitted_q.episodes.return_range
        if math.isfinite(self.fitted_q.backups):
            return low, high
        logs, discount = (self.train, self.held_out), self.fitted_q.discount
        rewards = np.concatenate([log.reward for log in logs])
        longest = max(int(log.lengths.max()) for log in logs)
        steps = longest if discount == 1 else 1 / (1 - discount)
        return min(low, steps * float(rewards.min())), max(high, steps * float(rewards.max()))

    def seen(self, log: Episodes) -> list[float]:
        """Share of the log's episodes that each candidate was trained on, 0 where unknown."""
        digests, trained = (
            log.log.episode_digests(),
            (candidate.episodes for candidate in self.candidates),
        )
        return [0.0 if own is None else shared_share(own, digests) for own in trained]


def caveats_of(row: Row, known: Evidence) -> tuple[str, ...]:
    """Names of the caveats about one candidate's row of a ranking."""
    enough = max(known.min_effective_episodes, MIN_EFFECTIVE_SHARE * len(known.held_out))
    more = row["extrapolation"] - known.fitted_q.episodes.behaviour_unsupported
    checks = {
        "importance": row["effective_episodes"] < enough,
        "extrapolation": more > known.max_extrapolation
        or row["worst_extrapolation"] >= WORST_STATE,
        "td_error": row["td_error"] > ERROR_GROWTH * row["td_error_training"],
        "range": not known.possible[0] <= row["value"] <= known.possible[1],
        "few": row["correcting_episodes"] < MIN_CORRECTING,
        "contradiction": row["importance_low"] > row["value_high"]
        or row["importance_high"] < row["value_low"],
        "seen": row["seen"] > SHARED,
    }
    return tuple(name for name, doubtful in checks.items() if doubtful)


def recommendation(
    rows: Sequence[Row], known: Evidence, agreement: float
) -> tuple[str | None, str, tuple[str, ...]]:
    """The recommended candidate of ``rows``, best first; a sentence about it; all warnings.

    ``agreement``: Spearman's correlation of the two estimators.
    """
    blocking, better = [*_blocking_warnings(known)], [row for row in rows if row["gain_low"] > 0]
    general = _general_warnings(rows, known, agreement)
    warnings = (*_candidate_warnings(rows, known), *blocking, *general)
    sound = [row for row in better if not set(row["caveats"]) & set(BLOCKING)]
    refused = blocking or any("contradiction" in row["caveats"] for row in rows) or not sound
    row = rows[0] if refused else sound[0]
    interval = (
        f"{known.confidence:.0%} interval for all {len(rows)} candidates at once {row['gain_low']:.4g} "
        f"to {row['gain_high']:.4g}"
    )
    if refused:
        doubted = "; higher estimates have caveats, see the warnings" if better else ""
        sentence = (
            "Recommendation: no candidate is reliably better than the behaviour policy (the "
            "highest estimate, "
            f"{row['candidate']}, gains {row['gain']:.4g}, {interval}{doubted})."
        )
        return None, sentence, warnings
    higher = row["rank"] - 1
    more = f"; {higher} with higher estimates have caveats or are uncertain" if higher else ""
    sentence = (
        f"Recommendation: {row['candidate']}, with an estimated gain over the behaviour policy of "
        f"{row['gain']:.4g} ({interval}{more})."
    )
    return row["candidate"], sentence, warnings


def _candidate_warnings(rows: Sequence[Row], known: Evidence) -> Iterator[str]:
    """One sentence for each caveat, with the names of the candidates that it concerns."""
    for name, sentence in CAVEATS.items():
        doubted = [row for row in rows if name in row["caveats"]]
        if not doubted:
            continue
        numbers = [key for key, value in doubted[0].items() if isinstance(value, float)]
        least, most = ({k: of(row[k] for row in doubted) for k in numbers} for of in (min, max))
        growth = [row["td_error"] / max(row["td_error_training"], TINY) for row in doubted]
        text = sentence.format(
            least=least, most=most, growth=max(growth), first=doubted[0], possible=known.possible,
            behaviour_extrapolation=known.fitted_q.episodes.behaviour_unsupported,
            episodes=len(known.held_out), enough=MIN_CORRECTING,
        )  # fmt: skip
        more = f" and {len(doubted) - NAMED} more" if len(doubted) > NAMED else ""
        yield f"{', '.join(row['candidate'] for row in doubted[:NAMED])}{more}: {text}"


def _blocking_warnings(known: Evidence) -> Iterator[str]:
    """Reasons why no value may be compared with the log's: one sentence each."""
    fitted_q = known.fitted_q
    horizon = known.held_out.horizon(fitted_q.discount)
    if fitted_q.backups < HORIZONS * horizon or fitted_q.passes < PASSES:
        yield (
            f"fitted Q evaluation renewed its targets {fitted_q.backups:.3g} times, in "
            f"{fitted_q.passes:.3g} passes of the data, where values look {horizon:.3g} steps "
            "ahead: it has not converged; use more updates."
        )
    digests = [log.log.episode_digests() for log in (known.train, known.held_out)]
    if (shared := shared_share(sketch_of(digests[0]), digests[1])) > SHARED:
        yield (
            f"{shared:.0%} of the held-out episodes are also among those fitted on, so they "
            "cannot show the error of the fit; give two parts of one log: "
            "dataset.split(fraction, seed)."
        )
    history = fitted_q.episodes.history
    strongest = max(history, key=lambda name: abs(history[name]), default="")
    if strongest and abs(history[strongest]) > HISTORY:
        yield (
            f"what follows a step depends on more than observation and action: on {strongest} (t "
            f"statistic {history[strongest]:.1f}); values assume that it does not. Add to the "
            "observations what the outcomes depend on, such as the time or earlier observations."
        )


def _general_warnings(rows: Sequence[Row], known: Evidence, agreement: float) -> Iterator[str]:
    """Sentences about the whole ranking."""
    unlogged = known.fitted_q.episodes.uncovered_ends
    if (fit_seen := max(known.seen(known.train))) > SHARED:
        yield (
            f"candidates were trained on up to {fit_seen:.0%} of the episodes fitted on, so the "
            "fit estimates them too high; held-out episodes correct that, but intervals are wider."
        )
    if unlogged > UNLOGGED:
        yield (
            f"truncated episodes leave {unlogged:.0%} of the discounted future in states that the "
            "log never describes; intervals assume any logged return there, the estimates the least."
        )
    if known.sampled:
        yield (
            "values are of actions as the candidates draw them, because importance sampling needs "
            "densities: act so too (deterministic=False), or rank with deterministic=True."
        )
    if known.unchecked:
        yield f"{known.unchecked}, so nothing independent checks the values."
    elif agreement < MIN_AGREEMENT:
        yield f"the two estimators order the candidates differently (Spearman {agreement:.2f})."
    value, low, high = known.log
    for row in rows:
        own = known.bc_baseline is not None and row["candidate"] == known.bc_baseline.name
        if own and (row["value_low"] > high or row["value_high"] < low):
            yield (
                f"{row['candidate']}, trained by behaviour cloning, is estimated at {row['value']:.4g} "
                f"({row['value_low']:.4g} to {row['value_high']:.4g}) and the behaviour policy at "
                f"{value:.4g} ({low:.4g} to {high:.4g}): the cloning is poor, or the "
                "observations lack what the behaviour policy acted on."
            )
