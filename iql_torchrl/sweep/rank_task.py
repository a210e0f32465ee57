"""The last unit of work: the ranking of all members from the held-out episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iql_torchrl.data.saved import folder_lock
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_members
from iql_torchrl.selection.members import resolve_member
from iql_torchrl.sweep.task import Common, Task, first_line, read_json, write_json

__all__ = ["RankTask"]


@dataclass(frozen=True)
class RankTask:
    """``ranking.json`` of the members of finished tasks.

    All members are estimated together, because the bounds of the gains hold for all of them at
    once. Estimates are fitted on half of the held-out episodes and corrected by the other half.
    Members that cannot be ranked (with a history, for example) are named in ``skipped.json``.
    """

    folder: Path
    tasks: Sequence[Task]
    common: Common

    total = done = 0  # it makes no updates of members

    @property
    def finished(self) -> bool:
        """Whether the ranking is there, and is of the members of these tasks."""
        done: list[str] = read_json(self.folder / "ranked.json", [])
        return done == self._names() and (self.folder / "ranking.json").exists()

    @property
    def name(self) -> str:
        return "the ranking"

    def _names(self) -> list[str]:
        rows = [row for task in self.tasks for row in task.rows()]
        return [row["member"] for row in rows if "error" not in row]

    def result(self) -> tuple[Ranking | None, dict[str, str]]:
        """The ranking, None where no member could be ranked; and why others were not."""
        skipped: dict[str, str] = read_json(self.folder / "skipped.json", {})
        path = self.folder / "ranking.json"
        return (None if read_json(path) is None else Ranking.from_json(path)), skipped

    def perform(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder):
            if self.finished:
                return
            first, names = self.tasks[0].first, set(self._names())
            rest = self.common.parts(first).held_out
            assert rest is not None
            members, skipped = {}, {}
            for task in self.tasks:
                own = self.common.parts(task.first).train
                for name, agent in task.agents(own):
                    if name not in names:
                        continue
                    try:
                        resolve_member(name, agent)
                        members[name] = agent
                    except ValueError as error:
                        skipped[name] = first_line(error)
            fit, held_out = rest.split(0.5, seed=0)
            discount = first.discount if self.common.discount is None else self.common.discount
            write_json(self.folder / "skipped.json", skipped)
            if members:
                fitted = fitted_q_evaluation(
                    members, fit, held_out, discount=discount, updates=self.common.fit_updates
                )
                ranking = rank_members(members, fit, held_out, discount=discount, fitted_q=fitted)
                ranking.to_json(self.folder / "ranking.json")
            else:
                write_json(self.folder / "ranking.json", None)
            write_json(self.folder / "ranked.json", self._names())
