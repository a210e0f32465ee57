"""The ranking of trained policies by estimated value: its rows, text, JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from iql_torchrl.files import whole_file

__all__ = ["Ranking"]

COLUMNS = (
    ("value", "value"),
    ("value_low", "low"),
    ("value_high", "high"),
    ("gain_low", "gain from"),
    ("gain_high", "to"),
    ("importance_value", "importance"),
    ("effective_episodes", "eff. episodes"),
    ("extrapolation", "extrapol."),
    ("clone_distance", "from clone"),
)


@dataclass(frozen=True)
class Ranking:
    """The result of ``selection.rank_members``; ``str`` makes a table. Values in raw reward units.

    Attributes:
        rows: one dict per member, best estimated value first: ``rank`` (from 1), ``member``,
            ``temperature``; ``value`` by fitted Q evaluation corrected on held-out episodes, with
            bounds for this member alone; ``gain`` over the log, with bounds that hold for
            all members at once; ``td_error`` and ``td_error_training``; ``importance_value`` and
            bounds, ``effective_episodes``; ``extrapolation`` and ``worst_extrapolation``, see
            ``EpisodeScores``; ``correcting_episodes``, its ``effective_episodes``; ``seen``, the
            share of the held-out episodes that the member was trained on; ``clone_distance``;
            ``doubts``, names of the warnings that concern it (``importance``, ``extrapolation``,
            ``td_error``, ``range``, ``few``, ``contradiction``, ``seen``). NaN is unknown.
        log_value, log_low, log_high: value of the policy that made the log, and its bounds.
        log_extrapolation: share of the log's own actions that count as outside the log.
        spearman, kendall: agreement of the two estimators over the members whose importance weights
            are not doubted; NaN for fewer than three.
        recommended: name of the recommended member, or None.
        recommendation: the recommendation in one sentence.
        warnings: reasons not to trust the ranking, one sentence each.
        discount: of the values.
        episodes: number of held-out episodes.
    """

    rows: tuple[dict[str, Any], ...]
    log_value: float
    log_low: float
    log_high: float
    log_extrapolation: float
    spearman: float
    kendall: float
    recommended: str | None
    recommendation: str
    warnings: tuple[str, ...]
    discount: float
    episodes: int

    def __str__(self) -> str:
        width = max(len("the log"), *(len(row["member"]) for row in self.rows))
        lines = [f"{'member':{width}}" + "".join(f" {title:>13}" for _, title in COLUMNS)]
        for row in self.rows:
            lines.append(
                f"{row['member']:{width}}" + "".join(f" {_short(row[key])}" for key, _ in COLUMNS)
            )
        empty = dict.fromkeys([key for key, _ in COLUMNS], math.nan)
        log = empty | {
            "value": self.log_value,
            "value_low": self.log_low,
            "value_high": self.log_high,
            "extrapolation": self.log_extrapolation,
        }
        lines.append(f"{'the log':{width}}" + "".join(f" {_short(v)}" for v in log.values()))
        lines.append(
            f"\n{self.episodes} held-out episodes, discount {self.discount:g}. Agreement of fitted "
            f"Q evaluation and importance sampling: Spearman {self.spearman:.2f}, "
            f"Kendall {self.kendall:.2f}."
        )
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, self.recommendation])

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain JSON value; None for numbers that are not finite."""
        return {field.name: _json(getattr(self, field.name)) for field in fields(self)}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Replace ``path`` by :meth:`to_dict`; on an error ``path`` does not change."""
        with whole_file(Path(path)) as temporary:
            text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Ranking:
        """The ranking that :meth:`to_json` wrote; numbers that were not finite are NaN."""
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            {k: tuple(v) if k == "doubts" else _number(v) for k, v in row.items()}
            for row in saved["rows"]
        ]
        own = {"rows": tuple(rows), "warnings": tuple(saved["warnings"])}
        keep = {"recommended": saved["recommended"]}
        return cls(**{key: _number(value) for key, value in saved.items()} | own | keep)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Replace ``path`` by one line per member, best first; unknown numbers stay empty."""
        with (
            whole_file(Path(path)) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(_json(row | {"doubts": " ".join(row["doubts"])}) for row in self.rows)


def _short(value: float) -> str:
    return f"{'-' if math.isnan(value) else format(value, '.4g'):>13}"


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
