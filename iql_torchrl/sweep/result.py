"""What a sweep gives: one row for each run, a ranking, and their table and picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iql_torchrl.agent.build import Agent
from iql_torchrl.config import IQLConfig, knobs
from iql_torchrl.files import whole_file
from iql_torchrl.selection import Ranking
from iql_torchrl.sweep.picture import draw
from iql_torchrl.sweep.plan import differing, settings_of
from iql_torchrl.sweep.task import Task

__all__ = ["SweepResult", "joined", "write_table"]

Row = dict[str, Any]


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep, in the order of its configs.

    Attributes:
        rows: by name: ``member``, ``settings`` (the name without its seed), ``seed``, the settings
            in which runs of a population may differ and those in which these do, ``task``, the mean
            losses before the last checkpoint, ``score`` with ``score_low`` and ``score_high`` where
            the runs were evaluated, the columns of ``Ranking.rows`` where they were ranked, and
            ``error`` where a run failed.
        ranking: None without ``held_out``, or where nothing could be ranked.
        log_score: name and mean score of the policy that made the log; None without scores.
        failures: a sentence for each run that failed, by name.
        notes: what was left out, and why.
        tasks: the finished units of work, with the checkpoints of the runs.
        folder: has ``members.csv`` and ``sweep.png``.
    """

    rows: Mapping[str, Row]
    ranking: Ranking | None
    log_score: tuple[str, float] | None
    failures: Mapping[str, str]
    notes: tuple[str, ...]
    folder: Path
    tasks: tuple[Task, ...] = field(default=(), repr=False)

    def agent(self, name: str, device: str | None = None) -> Agent:
        """The trained agent of a run, from its checkpoint; ``ranking.recommended``, for example.

        ``device``: by default the one that it was trained on.

        Raises ``KeyError`` for a name that is no run, or that was not trained.
        """
        for task in self.tasks:
            if name in task.configs:
                return task.agent(name, device)
        why = self.failures.get(name, "it is none of the runs")
        raise KeyError(f"there is no agent {name!r}: {why}")

    def draw(self, *, title: str, words: str) -> None:
        """Write ``sweep.png`` of the runs that did not fail; nothing where there is no number."""
        rows = {
            name: row
            for name, row in self.rows.items()
            if name not in self.failures
            and (self.log_score is None or "score" in row)
            and (self.ranking is None or "value" in row)
        }
        if rows and (self.log_score is not None or self.ranking is not None):
            path = self.folder / "sweep.png"
            draw(path, rows, self.ranking, self.log_score, title=title, words=words)


def joined(
    configs: Mapping[str, IQLConfig],
    trained: Mapping[str, Row],
    ranking: Ranking | None,
    failures: Mapping[str, str],
) -> dict[str, Row]:
    """The rows of a result; ``trained``: rows of tasks by name."""
    values = list(configs.values())
    described = knobs(type(values[0]))
    different = differing(values)
    columns = [n for n, knob in described.items() if knob.per_run or n in different]
    ranked = {} if ranking is None else {row["member"]: row for row in ranking.rows}
    rows = {}
    for name, config in configs.items():
        row: Row = {"member": name, "settings": settings_of(name, config), "seed": config.seed}
        row |= {column: getattr(config, column) for column in columns}
        row |= trained.get(name, {})
        own = ranked.get(name, {})
        row |= {k: " ".join(v) if k == "doubts" else v for k, v in own.items()}
        if name in failures:
            row["error"] = failures[name]
        rows[name] = row
    return rows


def write_table(path: Path, rows: Mapping[str, Row]) -> None:
    """Replace ``path`` by one line per run; unknown numbers stay empty."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if key != "error"))
    with (
        whole_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [*columns, "error"], lineterminator="\n")
        writer.writeheader()
        for row in rows.values():
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value
