"""Evaluations of a run: results are written into its rows, and the best checkpoint is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iql_torchrl.evaluation.background import BackgroundEvaluation, EvaluationTimeout
from iql_torchrl.evaluation.rollout import Evaluation
from iql_torchrl.trainers.progress import Progress
from iql_torchrl.trainers.run_folder import RunFolder

__all__ = ["Evaluate", "Scores"]

Evaluate = Callable[[], "Evaluation | Mapping[str, float]"]


class Scores:
    """Writes evaluations into the rows of a run, and keeps the checkpoint with the best result.

    Args:
        evaluation: a function, called at once; a ``BackgroundEvaluation``, whose results are
            written later into the row of the update that was evaluated; or None.
        monitor: the name of the number by which checkpoints are compared, higher is better.
        log: called with (update, name, value) for each number of an evaluation.
        stop: called several times a second while waiting for the background; True ends the wait.
    """

    def __init__(
        self,
        evaluation: Evaluate | BackgroundEvaluation | None,
        monitor: str,
        progress: Progress,
        folder: RunFolder | None,
        log: Callable[[int, str, float], None],
        stop: Callable[[], bool],
    ) -> None:
        self.evaluation, self.monitor = evaluation, monitor
        self._progress, self._folder, self._log = progress, folder, log
        self._stop = stop
        self._keep: Callable[[Path], None] | None = None

    @property
    def pending(self) -> dict[int, dict[str, Any]]:
        """Policies whose evaluation is not finished, by update."""
        if isinstance(self.evaluation, BackgroundEvaluation):
            return dict(self.evaluation.pending)
        return {}

    def resubmit(self, pending: Mapping[int, Any]) -> None:
        """Repeat the evaluations that were not finished when the run was saved."""
        if pending and isinstance(self.evaluation, BackgroundEvaluation):
            self.evaluation.resubmit(pending)

    def is_missing(self, update: int) -> bool:
        """Whether the policy of ``update`` has been neither evaluated nor submitted."""
        done = any(r["update"] == update and self.monitor in r for r in self._progress.rows)
        return self.evaluation is not None and not done and update not in self.pending

    def evaluate(self, update: int) -> None:
        """Evaluate the present policy; at most one evaluation runs in the background."""
        if isinstance(self.evaluation, BackgroundEvaluation):
            self.collect(wait=True)
            if self.pending:  # interrupted during the wait: this evaluation follows after a resume
                return
            self.evaluation.submit(update)
            if self._folder is not None:
                folder = self._folder
                self._keep = lambda saved: folder.set_aside(saved, update)
        elif self.evaluation is not None:
            improves = self._enter(update, self.evaluation())
            if improves and self._folder is not None:
                self._keep = self._folder.promote

    def collect(self, wait: bool = False) -> None:
        """Write the results of finished background evaluations; ``wait``: until all are finished.

        An evaluation that took too long gives no result, but a ``RuntimeWarning``.
        """
        while isinstance(self.evaluation, BackgroundEvaluation):
            try:
                results = self.evaluation.results(wait=wait, stop=self._stop)
            except EvaluationTimeout as error:
                if self._folder is not None:
                    self._folder.judge(error.number, improves=False)
                warnings.warn(f"Training continues: {error}", RuntimeWarning, stacklevel=2)
                continue
            for update, evaluation in results:
                improves = self._enter(update, evaluation)
                if self._folder is not None:
                    self._folder.judge(update, improves=improves)
            return

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the state at this update is, or may turn out to be, the best."""
        return self._keep is not None

    def saved(self, path: Path) -> None:
        """The state at this update has been saved as ``path``."""
        if self._keep is not None:
            self._keep(path)
            self._keep = None

    def latest(self) -> tuple[str, int, float] | None:
        """``monitor``, the last update that was evaluated, and the monitored number there."""
        for row in reversed(self._progress.rows):
            if self.monitor in row:
                return self.monitor, int(row["update"]), row[self.monitor]
        return None

    def _enter(self, update: int, evaluation: Evaluation | Mapping[str, float]) -> bool:
        values = _numbers(evaluation)
        if self.monitor not in values:
            raise ValueError(
                f"monitor is {self.monitor!r}, which the evaluation does not give; it gives "
                f"{sorted(values)}."
            )
        self._progress.record(update, values)
        for name, value in values.items():
            self._log(update, name, value)
        return self._progress.improves(update, values[self.monitor])


def _numbers(evaluation: Any) -> dict[str, float]:
    if isinstance(evaluation, Evaluation):
        return evaluation.summary()
    if not isinstance(evaluation, Mapping):
        raise TypeError(
            f"the evaluation returned {evaluation!r}; expected an Evaluation, or a dict of numbers "
            "such as {'return_mean': 1.0}."
        )
    values = {}
    for name, value in evaluation.items():
        try:
            values[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"the evaluation gives {value!r} for {name!r}; expected one number."
            ) from error
    if "update" in values:
        raise ValueError(
            "the evaluation gives 'update', which is the number of updates in each row; use "
            "another name."
        )
    return values
