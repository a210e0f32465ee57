"""Events of a run and what is recorded at them: intervals, rows, display, signals."""

from __future__ import annotations

import copy
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import FrameType
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from tqdm import tqdm

from iql_torchrl.distributed import Ranks
from iql_torchrl.private_apis import add_to_all

# torchrun sends its processes a Ctrl-C that the terminal has sent them already
SECONDS_OF_ONE_SIGNAL = 5.0
CALLS_PER_AGREEMENT = 16  # an exchange between ranks takes about as long as a small layer


def whole_updates(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an integer, also where it is a whole float such as ``1e3``; else ``ValueError``."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or int(value) != value or value < least:
        raise ValueError(f"{name} is {value!r}; it counts updates: an integer >= {least}.")
    return int(value)


def intervals(
    total_updates: int, updates_per_call: int, evaluates: bool, **given: Any
) -> tuple[int, int, int]:
    """Updates between rows, evaluations and checkpoints; ``given`` are the trainer's arguments."""
    result = {"total_updates": total_updates}
    for name, parts in (("log_interval", 100), ("eval_interval", 10)):
        default = updates_per_call * max(1, math.ceil(total_updates / parts / updates_per_call))
        result[name] = whole_updates(name, default if given[name] is None else given[name])
    for name, value in result.items():
        if value % updates_per_call and (evaluates or name != "eval_interval"):
            raise ValueError(
                f"{name} is {value}, and the step makes {updates_per_call} updates a call; give a "
                "multiple of that."
            )
    name, evaluation = "save_trainer_interval", result["eval_interval"]
    save = whole_updates(name, evaluation if given[name] is None else given[name])
    return result["log_interval"], evaluation, save


@dataclass
class Progress:
    """One row per event, with means of metrics and an evaluation's numbers; and the best evaluation."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    best_update: int | None = None
    names: list[str] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    counted: int = 0

    def tally(self, metrics: TensorDictBase, updates: int = 1) -> None:
        """Add the scalars of one update, or the means over ``updates``, without synchronising."""
        if not self.totals:
            scalars = {k: v for k, v in metrics.items() if isinstance(v, Tensor) and v.ndim == 0}
            self.names = [str(name) for name in scalars]
            self.totals = [torch.zeros_like(v) for v in scalars.values()]
        values = [metrics.get(name, None) for name in self.names]
        for place in [place for place, value in enumerate(values) if value is None][::-1]:
            del self.names[place], self.totals[place], values[place]  # of an earlier objective
        add_to_all(self.totals, values, updates)
        self.counted += updates

    def new_row(self, update: int) -> dict[str, float]:
        """Record and return the means of the metrics since the last row; losses must be finite."""
        means: dict[str, float] = {}
        if self.counted:
            values = (torch.stack(self.totals) / self.counted).tolist()
            means = dict(zip(self.names, values, strict=True))
            self.totals, self.counted = [], 0
        bad = [n for n, v in means.items() if n.startswith("loss_") and not math.isfinite(v)]
        if bad:
            density = (
                " A policy's density must be positive and finite at every logged action, also at the "
                "bounds of the action space."
            )
            raise FloatingPointError(
                f"{', '.join(bad)} became {means[bad[0]]} before update {update:,}, and nothing was "
                "saved since the last event. Look for extreme rewards or observations in the data, or "
                f"lower the learning rates, or set max_grad_norm.{density * ('loss_actor' in bad)}"
            )
        self.record(update, means)
        return means

    def record(self, update: int, values: Mapping[str, float]) -> None:
        """Put ``values`` into the row of ``update``, which may be an older one."""
        for row in reversed(self.rows):
            if row["update"] == update:
                row.update(values)
                return
        self.rows.append({"update": update, **values})
        self.rows.sort(key=lambda row: row["update"])

    def improves(self, update: int, value: float) -> bool:
        """Return True if ``value`` is higher than all before; it is then stored as the best."""
        if math.isnan(value) or (self.best is not None and value <= self.best):
            return False
        self.best, self.best_update = value, update
        return True

    def latest(self, name: str) -> tuple[str, int, float] | None:
        """``name``, the last update with a number of that name, and the number."""
        rows = (row for row in reversed(self.rows) if name in row)
        return next(((name, int(row["update"]), row[name]) for row in rows), None)

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        vars(self).update(copy.deepcopy({name: state[name] for name in vars(self)}))
        self.totals = [total.to(device) for total in self.totals]


class Display:
    """Progress on stderr: a bar on a terminal; in a file or a pipe, one line at each event."""

    def __init__(self, enabled: bool, total: int, updates: int) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._lines, self._total = enabled and not terminal, total
        self._shown_score: tuple[str, int, float] | None = None
        options: Any = {"unit": "update", "dynamic_ncols": True}
        options["disable"] = not (enabled and terminal)
        self._bar: Any = tqdm(total=total, initial=updates, **options)
        self.advance = self._bar.update  # called at every update
        self.close = self._bar.close

    def event(
        self,
        updates: int,
        values: Mapping[str, float],
        *,
        score: tuple[str, int, float] | None,
        speed: float | None = None,
        saved: bool = False,
    ) -> None:
        """Show losses and other ``values``, and the last score: (name, update, value)."""
        shown = {name.removeprefix("loss_"): f"{value:.4g}" for name, value in values.items()}
        place = ""
        if score is not None:
            shown[score[0]] = f"{score[2]:.4g}"
            place = "" if score[1] == updates else f" at {score[1]:,}"
        if self._lines:
            parts = [] if speed is None else [f"{speed:,.{0 if speed >= 10 else 2}f} updates/s"]
            parts += [f"{name} {text}" for name, text in shown.items()]
            line = f"update {updates:,} of {self._total:,}: {', '.join(parts)}{place}"
            print(
                line.removesuffix(": ") + (", saved" if saved else ""), file=sys.stderr, flush=True
            )
        self._shown_score = score
        self._bar.set_postfix(shown)

    def last_score(self, updates: int, score: tuple[str, int, float] | None) -> None:
        """Show a score that came after the last event, unless it has been shown."""
        if score is not None and score != self._shown_score:
            self.event(updates, {}, score=score)


class Interruption:
    """A context in which the first Ctrl-C or SIGTERM only sets ``asked``, and the second raises.

    ``requested`` is the signal on which all ranks have agreed: with one rank it is ``asked``, with
    several a signal to any of them, from the next :meth:`agree` on. Has no effect outside the main
    thread, where Python delivers no signals.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._alone = ranks, ranks.size == 1
        self.asked: int | None = None
        self._asked_at = 0.0
        self._agreed: int | None = None
        self._calls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._previous = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # one that was not set from Python cannot be set from there
                signal.signal(number, handler)
        self._previous = {}

    @property
    def requested(self) -> int | None:
        return self.asked if self._alone else self._agreed

    def agree(self) -> None:
        """Exchange with the other ranks whether one was asked to stop; every rank must call it."""
        if not self._alone:
            self._agreed = self._ranks.largest(self.asked or 0) or None

    def stops(self) -> bool:
        """Return True if training stops now. Ranks agree at every ``CALLS_PER_AGREEMENT``-th call."""
        self._calls += 1
        if self._calls % CALLS_PER_AGREEMENT == 0:
            self.agree()
        return self.requested is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            if self._alone or time.monotonic() - self._asked_at >= SECONDS_OF_ONE_SIGNAL:
                self.__exit__()
                _raise(self.asked)
            return
        self.asked, self._asked_at = number, time.monotonic()
        if self._ranks.is_main:
            when = "after this update" if self._alone else "within 16 updates"
            after = "" if self._alone else " after five seconds"
            text = f"\nStopping {when}; press Ctrl-C again{after} to stop at once.\n"
            os.write(2, text.encode())  # print may be interrupted in the middle of itself

    def finish(self) -> None:
        """Raise what the signal would have raised: KeyboardInterrupt, or SystemExit(143)."""
        if self.requested is not None:
            _raise(self.requested)


def _raise(number: int) -> None:
    raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt
