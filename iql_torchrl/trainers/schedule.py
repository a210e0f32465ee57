"""When a run records a row, evaluates and saves, in updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

__all__ = ["Schedule", "whole_updates"]


@dataclass(frozen=True)
class Schedule:
    """Intervals of a run in updates.

    An event is a multiple of ``row_interval``, or of ``eval_interval`` where policies are
    evaluated, or the end of the run. ``updates_per_call``: how many updates one call of the step
    makes.
    """

    row_interval: int
    eval_interval: int
    save_interval: int
    evaluates: bool
    evaluate_first: bool
    updates_per_call: int

    @classmethod
    def of(
        cls,
        total_updates: int,
        *,
        log_interval: int | None,
        eval_interval: int | None,
        save_trainer_interval: int | None,
        evaluates: bool,
        evaluate_first: bool,
        updates_per_call: int,
    ) -> Schedule:
        """The intervals; those that are None become a hundredth or a tenth of the total.

        Raises ``ValueError`` for what is not a positive number of updates, or not a multiple of
        ``updates_per_call``.
        """
        intervals = {
            "total_updates": (total_updates := whole_updates("total_updates", total_updates)),
            "eval_interval": (eval_interval := _whole("eval_interval", eval_interval)),
            "log_interval": (log_interval := _whole("log_interval", log_interval)),
            "save_trainer_interval": (
                save_trainer_interval := _whole("save_trainer_interval", save_trainer_interval)
            ),
        }
        whole_calls = {"total_updates", "log_interval"} | (
            {"eval_interval"} if evaluates else set()
        )
        for name, value in intervals.items():
            if value is not None:
                _check(name, value, updates_per_call if name in whole_calls else 1)
        if eval_interval is None:
            eval_interval = _part(total_updates, 10, updates_per_call)
        if log_interval is None:
            log_interval = _part(total_updates, 100, updates_per_call)
        return cls(
            log_interval,
            eval_interval,
            save_trainer_interval or eval_interval,
            evaluates,
            evaluate_first,
            updates_per_call,
        )

    def next_event(self, updates: int, total: int) -> int:
        """The first event after ``updates``, in a run of ``total``."""
        intervals = [self.row_interval] + [self.eval_interval] * self.evaluates
        return min(total, *((updates // every + 1) * every for every in intervals))

    def evaluation_due(self, updates: int, total: int) -> bool:
        """Whether the policy is to be evaluated after ``updates`` of ``total``."""
        if updates == 0:
            return self.evaluate_first
        return updates % self.eval_interval == 0 or updates == total


def _part(total: int, parts: int, updates_per_call: int) -> int:
    """About ``total / parts``, rounded up to whole calls of the step."""
    return max(1, math.ceil(total / parts / updates_per_call)) * updates_per_call


def whole_updates(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an integer, also where it is a whole float such as ``1e3``; else ``ValueError``."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or int(value) != value or value < least:
        raise ValueError(f"{name} is {value!r}; it counts updates: a whole number >= {least}.")
    return int(value)


def _whole(name: str, value: Any) -> int | None:
    return None if value is None else whole_updates(name, value)


def _check(name: str, value: int, multiple_of: int) -> None:
    if value % multiple_of:
        raise ValueError(
            f"{name} is {value}, and the step makes {multiple_of} updates a call; give a multiple "
            "of that."
        )
