"""Trained policies ranked from a dataset alone; ``recommendation`` decides on one of them."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.data import OfflineDataset
from iql_torchrl.data.digests import shared_share
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.files import atomic_write
from iql_torchrl.selection.candidates import Candidate, bc_distance, has_density, resolve_candidates
from iql_torchrl.selection.episodes import Episodes, read_datasets
from iql_torchrl.selection.estimators import LOG_PROB, importance_sampling
from iql_torchrl.selection.fitted_q import FittedQ, fitted_q_evaluation
from iql_torchrl.selection.recommendation import (
    blocking_warnings,
    candidate_warnings,
    caveats_of,
    facts_of,
    general_warnings,
    recommendation,
)

MIN_COMPARED = 3
MIN_EFFECTIVE_SHARE = 0.1
IMPORTANCE = {  # a column, and the field of ``Importance`` that it has
    "importance_value": "values",
    "importance_low": "low",
    "importance_high": "high",
    "effective_episodes": "effective_sample_size",
    "mean_weight": "mean_weight",
    "wrong_propensities": "wrong",
}
COLUMNS = {
    "value": "value",
    "value_low": "low",
    "value_high": "high",
    "gain_low": "gain from",
    "gain_high": "to",
    "importance_value": "importance",
    "effective_episodes": "eff. episodes",
    "extrapolation": "extrapol.",
    "bc_distance": "from BC",
}


@dataclass(frozen=True)
class Ranking:
    """The result of ``selection.rank_policies``; ``str`` makes a table. Values in raw reward units.

    Attributes:
        rows: one dict per candidate, best estimated value first: ``rank`` (from 1), ``candidate``,
            ``temperature``; ``value``, with bounds for this candidate alone; ``gain`` over the
            behaviour policy, with bounds that hold for all candidates at once; ``td_error`` and
            ``td_error_training``; ``importance_value`` and bounds, ``effective_episodes``; of
            ``EpisodeScores`` ``exact``, ``extrapolation``, ``worst_extrapolation`` (unsupported) and
            ``correcting_episodes``; ``seen``, the share of the held-out episodes that the candidate
            was trained on; ``bc_distance``; ``caveats``, names of ``recommendation.CAVEATS``. NaN is
            unknown.
        behaviour_value, behaviour_low, behaviour_high: value of the behaviour policy, and its bounds.
        behaviour_extrapolation: share of the dataset's actions that count as unsupported.
        spearman, kendall: agreement of the two estimators over the candidates without the caveat
            ``importance``; NaN for fewer than three.
        recommended: name of the recommended candidate, or None.
        recommendation: the recommendation in one sentence.
        warnings: reasons not to trust the ranking, one sentence each.
        discount: of the values.
        episodes: number of held-out episodes.
    """

    rows: tuple[dict[str, Any], ...]
    behaviour_value: float
    behaviour_low: float
    behaviour_high: float
    behaviour_extrapolation: float
    spearman: float
    kendall: float
    recommended: str | None
    recommendation: str
    warnings: tuple[str, ...]
    discount: float
    episodes: int

    def __str__(self) -> str:
        behaviour = {
            "candidate": "behaviour policy",
            "value": self.behaviour_value,
            "value_low": self.behaviour_low,
            "value_high": self.behaviour_high,
            "extrapolation": self.behaviour_extrapolation,
        }
        width = max(len(row["candidate"]) for row in (*self.rows, behaviour))
        lines = [f"{'candidate':{width}}" + "".join(f" {title:>13}" for title in COLUMNS.values())]
        for row in (*self.rows, behaviour):
            values = [row.get(key, math.nan) for key in COLUMNS]
            cells = ["-" if math.isnan(value) else f"{value:.4g}" for value in values]
            lines.append(f"{row['candidate']:{width}}" + "".join(f" {cell:>13}" for cell in cells))
        lines.append(f"\n{self.episodes} held-out episodes, discount {self.discount:g}.")
        if not math.isnan(self.spearman):
            lines[-1] += (
                " Agreement of fitted Q evaluation and importance sampling: "
                f"Spearman {self.spearman:.2f}, Kendall {self.kendall:.2f}."
            )
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, self.recommendation])

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain JSON value; None for numbers that are not finite."""
        result: dict[str, Any] = json.loads(
            json.dumps(asdict(self)), parse_constant=lambda not_finite: None
        )
        return result

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Replace ``path`` by :meth:`to_dict`; on an error ``path`` does not change."""
        with atomic_write(Path(path)) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Ranking:
        """The ranking that :meth:`to_json` wrote; numbers that were not finite are NaN."""

        def unknown(saved: dict[str, Any]) -> dict[str, Any]:
            lists = {key: tuple(v) for key, v in saved.items() if isinstance(v, list)}
            nan = {k: math.nan for k, v in saved.items() if v is None and k != "recommended"}
            return saved | lists | nan

        return cls(**json.loads(Path(path).read_text(encoding="utf-8"), object_hook=unknown))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Replace ``path`` by one line per candidate, best first; unknown numbers stay empty."""
        rows = self.to_dict()["rows"]
        with (
            atomic_write(Path(path)) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"caveats": " ".join(row["caveats"])} for row in rows)


def rank_policies(
    candidates: Mapping[str, Any],
    train: OfflineDataset,
    held_out: OfflineDataset,
    *,
    discount: float,
    fitted_q: FittedQ | None = None,
    behaviour: Any = None,
    bc_baseline: str | None = None,
    deterministic: bool | None = None,
    min_count: int = 2,
    max_extrapolation: float = 0.05,
    min_effective_episodes: float = 100.0,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Ranking:
    """Candidates by estimated value, with caveats about each estimate, and a recommendation.

    A candidate's ``value`` is the mean of its doubly robust scores over the held-out episodes: fitted
    Q evaluation on ``train``, corrected by held-out steps. ``gain`` is the mean over episodes of the
    difference to the behaviour policy. Its bounds (:func:`bounds.mean_bounds`) hold for all candidates
    at once with probability ``confidence``, so they remain valid for the best of many, and include the
    error of the fit.

    The recommended candidate has the largest value among those whose interval of the gain is above
    zero and that have no caveats except ``importance`` and ``td_error``. No candidate is recommended
    where networks have not converged, where ``train`` and ``held_out`` share episodes, where
    outcomes depend on more than the observation (tested for a table), or where for any candidate
    fitted Q evaluation and importance sampling contradict each other beyond their intervals.

    Assumptions: episodes are independent of each other, no return is worse than the worst one from
    any logged state, and candidates were chosen without ``held_out``; with networks also that the
    critics' features describe values and visits. A dataset cannot show the effect of an action that it
    lacks in a state, nor of causes that the observations do not contain.

    Args:
        candidates: name to ``Agent`` or TorchRL actor.
        train, held_out: see :func:`fitted_q_evaluation`; without episodes that candidates trained on.
        discount: in [0, 1].
        fitted_q: an evaluation of the same candidates on ``held_out``; None:
            ``fitted_q_evaluation`` with its defaults.
        behaviour: see :func:`importance_sampling`; None: ``"action_log_prob"`` where the data have it,
            otherwise no importance sampling.
        bc_baseline: the candidate that was trained by behaviour cloning (BC), from which distances are
            measured; by default the first of temperature 0 that does not take the best of several
            actions.
        deterministic: whether both estimators evaluate the most probable or deterministic action, or
            the policy as it samples; not used with ``fitted_q``. None: as it samples for discrete
            actions, and for continuous ones where there is importance sampling, which needs densities:
            it is left out, with a warning, where some candidate has none or ``deterministic`` is True.
        min_count, progress: see :func:`fitted_q_evaluation`; not used with ``fitted_q``.
        max_extrapolation: the largest share of unsupported actions, minus that of the behaviour
            policy, in [0, 1]; up to it they count with the smallest logged return.
        min_effective_episodes: effective sample size below which importance sampling has a caveat, as
            it has below a tenth of the held-out episodes.
        confidence: of the intervals, in (0, 1).
        seed: of every random choice.

    Raises:
        TypeError, ValueError: as ``fitted_q_evaluation`` and ``importance_sampling``; ``bc_baseline``
            is not a candidate; ``fitted_q`` is of other candidates, episodes or another
            discount; a number out of range.
    """
    resolved = resolve_candidates(candidates)
    fit, fresh = read_datasets(train, held_out, discount)
    _check_shares(max_extrapolation, confidence)
    baseline = _bc_baseline(resolved, bc_baseline)
    if behaviour is None and LOG_PROB in held_out.transitions:
        behaviour = LOG_PROB
    chosen = deterministic if fitted_q is None else fitted_q.deterministic
    unchecked = _unchecked(resolved, fresh, behaviour, fresh.continuous and bool(chosen))
    if fitted_q is None:
        if chosen is None and fresh.continuous:
            chosen = bool(unchecked)
        fitted_q = fitted_q_evaluation(
            candidates, train, held_out, discount=discount, min_count=min_count, seed=seed,
            behaviour=behaviour, deterministic=chosen, progress=progress,
        )  # fmt: skip
    _check_is_of(fitted_q, resolved, fresh, discount)
    columns = _columns(resolved, fitted_q, fresh, baseline, confidence, seed)
    if not unchecked:
        # Intervals that hold for all candidates at once (Bonferroni), in the range of logged returns.
        result = importance_sampling(
            {candidate.name: candidate.policy for candidate in resolved}, held_out,
            behaviour=behaviour, discount=discount, deterministic=fitted_q.deterministic, seed=seed,
            confidence=1 - (1 - confidence) / len(resolved),
            return_limits=fitted_q.episodes.return_range,
        )  # fmt: skip
        columns |= {column: getattr(result, name) for column, name in IMPORTANCE.items()}
    facts = facts_of(fitted_q, fit, fresh)
    enough = max(min_effective_episodes, MIN_EFFECTIVE_SHARE * len(fresh))
    rows = _ranked(columns, resolved)
    for row in rows:
        row["caveats"] = caveats_of(row, facts, max_extrapolation, enough)
    agreement = _agreement(rows)
    value = fitted_q.episodes.behaviour_value(confidence, seed)
    blocking = [*blocking_warnings(fitted_q, fit, fresh, facts["converged"])]
    clone = next((row for row in rows if baseline and row["candidate"] == baseline.name), None)
    seen = max(_seen(resolved, fit))
    warnings = (
        *candidate_warnings(rows, facts),
        *blocking,
        *general_warnings(fitted_q, fresh, seen, unchecked, agreement[0], clone, value),
    )
    recommended, sentence = recommendation(rows, bool(blocking), confidence)
    return Ranking(
        tuple(rows), *value, fitted_q.episodes.behaviour_unsupported, *agreement, recommended,
        sentence, warnings, discount, len(fresh),
    )  # fmt: skip


def _check_shares(max_extrapolation: float, confidence: float) -> None:
    for name, share in (("max_extrapolation", max_extrapolation), ("confidence", confidence)):
        ends = name == "confidence" and share in (0, 1)
        if isinstance(share, bool) or not 0 <= share <= 1 or ends:
            raise ValueError(f"{name} is {share!r}; it must lie between 0 and 1.")


def _check_is_of(
    fitted_q: FittedQ, candidates: Sequence[Candidate], held_out: Episodes, discount: float
) -> None:
    """Raise ``ValueError`` unless ``fitted_q`` is an evaluation of these candidates and episodes."""
    actual = (fitted_q.names, fitted_q.episodes.scores.shape[1], fitted_q.discount)
    expected = (tuple(candidate.name for candidate in candidates), len(held_out), discount)
    if actual != expected:
        raise ValueError(
            f"fitted_q has (candidates, episodes, discount) {actual}, expected {expected}: "
            "pass what fitted_q_evaluation returned for the same arguments."
        )


def _ranked(columns: Mapping[str, Any], candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """One dict per candidate with its numbers in ``columns``, best value first."""
    rows: list[dict[str, Any]] = []
    for number in np.argsort(-np.asarray(columns["value"]), kind="stable").tolist():
        row = {"rank": len(rows) + 1, "candidate": candidates[number].name}
        rows.append(row | {k: np.asarray(values)[number].item() for k, values in columns.items()})
    return rows


def _agreement(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Spearman's and Kendall's correlation of the two estimators; NaN for fewer than three rows."""
    sound = [row for row in rows if "importance" not in row["caveats"]]
    if len(sound) < MIN_COMPARED:
        return math.nan, math.nan
    return rank_correlations(*([r[key] for r in sound] for key in ("value", "importance_value")))


def _columns(
    candidates: Sequence[Candidate], fitted_q: FittedQ, held_out: Episodes,
    baseline: Candidate | None, confidence: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What is estimated of each candidate, ``(P,)`` by name; NaN where unknown."""
    episodes = fitted_q.episodes
    value_low, value_high = episodes.value_bounds(confidence, seed)
    gain_low, gain_high = episodes.gain_bounds(confidence, seed)
    unknown = np.full(len(candidates), math.nan)
    distances: Any = unknown
    if baseline is not None:
        distances = [bc_distance(each, baseline, held_out.dataset) for each in candidates]
    return {
        "temperature": [candidate.temperature for candidate in candidates],
        "value": fitted_q.values,
        "value_low": value_low,
        "value_high": value_high,
        "gain": (episodes.scores - episodes.behaviour_scores).mean(1),
        "gain_low": gain_low,
        "gain_high": gain_high,
        "exact": episodes.exact,
        "td_error": fitted_q.td_error,
        "td_error_training": fitted_q.td_error_training,
        **dict.fromkeys(IMPORTANCE, unknown),
        "wrong_propensities": np.zeros(len(candidates), bool),
        "extrapolation": episodes.unsupported,
        "worst_extrapolation": episodes.worst_unsupported,
        "correcting_episodes": episodes.effective_episodes,
        "bc_distance": distances,
        "seen": _seen(candidates, held_out),
    }


def _seen(candidates: Sequence[Candidate], part: Episodes) -> list[float]:
    """Share of the episodes that each candidate was trained on, 0 where unknown."""
    digests, trained = part.dataset.episode_digests(), (each.episodes for each in candidates)
    return [0.0 if known is None else shared_share(known, digests) for known in trained]


def _bc_baseline(candidates: Sequence[Candidate], name: str | None) -> Candidate | None:
    if name is None:
        # the best of several actions is not the behaviour
        clones = (m for m in candidates if getattr(m.policy, "critics", None) is None)
        return next((candidate for candidate in clones if candidate.temperature == 0), None)
    named = {candidate.name: candidate for candidate in candidates}
    if name not in named:
        raise ValueError(f"bc_baseline is {name!r}; expected one of the candidates {[*named]}.")
    return named[name]


def _unchecked(
    candidates: Sequence[Candidate], held_out: Episodes, behaviour: Any, deterministic: bool
) -> str:
    """Why there is no importance sampling, or empty; ``deterministic``: of continuous actions."""
    if behaviour is None:
        return "the data hold no behaviour log-probabilities and no behaviour model was given"
    if deterministic:
        return (
            "importance sampling is left out, because values are of deterministic continuous actions, "
            "which have no density (deterministic=False evaluates the policies as they sample)"
        )
    if not held_out.continuous:
        return ""
    without = [each.name for each in candidates if not has_density(each, held_out.dataset)]
    have = f"{', '.join(without)} {'have' if len(without) > 1 else 'has'}"
    reason = f"importance sampling is left out, because {have} no density of actions"
    return reason if without else ""
