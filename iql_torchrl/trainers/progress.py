"""The progress of a run: updates, metrics since the last row, rows, best score; interruptions."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.distributed import Ranks
from iql_torchrl.private_apis import add_to_all

__all__ = ["Interruption", "Progress", "check_finite"]

# torchrun sends its processes a Ctrl-C that the terminal has sent them already
SECONDS_OF_ONE_SIGNAL = 5.0
CALLS_PER_AGREEMENT = 16  # an exchange between ranks takes about as long as a small layer


@dataclass
class Progress:
    """The state of a run without weights and random generators.

    ``rows`` has one entry per event, in order of updates: the means of the metrics since the last
    row, and the numbers of an evaluation. ``best`` is the highest monitored value so far.
    """

    updates: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    best_update: int | None = None
    _names: list[str] = field(default_factory=list)
    _totals: list[Tensor] = field(default_factory=list)
    _counted: int = 0

    def tally(self, metrics: TensorDictBase, updates: int = 1) -> None:
        """Add the scalars of one update, or the means over ``updates``, without synchronising."""
        if not self._totals:
            scalars = {k: v for k, v in metrics.items() if isinstance(v, Tensor) and v.ndim == 0}
            self._names = [str(name) for name in scalars]
            self._totals = [torch.zeros_like(v) for v in scalars.values()]
        values = [metrics.get(name) for name in self._names]
        add_to_all(self._totals, values, updates)
        self._counted += updates

    def means(self) -> dict[str, float]:
        """Means of the metrics since the last call, as Python floats."""
        if not self._counted:
            return {}
        values = (torch.stack(self._totals) / self._counted).tolist()
        self._totals, self._counted = [], 0
        return dict(zip(self._names, values, strict=True))

    def record(self, update: int, values: Mapping[str, float]) -> None:
        """Put ``values`` into the row of ``update``, which may be an older one."""
        for row in reversed(self.rows):
            if row["update"] == update:
                row.update(values)
                return
        self.rows.append({"update": update, **values})
        self.rows.sort(key=lambda row: row["update"])

    def improves(self, update: int, value: float) -> bool:
        """Whether ``value`` is higher than all before; if so it is stored as the best."""
        if math.isnan(value) or (self.best is not None and value <= self.best):
            return False
        self.best, self.best_update = value, update
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "rows": [dict(row) for row in self.rows],
            "best": self.best,
            "best_update": self.best_update,
            "names": list(self._names),
            "totals": [total.clone() for total in self._totals],
            "counted": self._counted,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        self.updates = state["updates"]
        self.rows = [dict(row) for row in state["rows"]]
        self.best, self.best_update = state["best"], state["best_update"]
        self._names = list(state["names"])
        self._totals = [total.to(device) for total in state["totals"]]
        self._counted = state["counted"]


def check_finite(means: Mapping[str, float], updates: int) -> None:
    """Raises ``FloatingPointError`` naming the losses whose mean is not finite."""
    bad = [n for n, v in means.items() if n.startswith("loss_") and not math.isfinite(v)]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} became {means[bad[0]]} before update {updates:,}, and nothing was "
            "saved since the last event. Look for extreme rewards or observations in the data, or "
            "lower the learning rates, or set max_grad_norm."
        )


class Interruption:
    """A context in which the first Ctrl-C or SIGTERM only sets ``asked``; the second raises.

    With several ranks a signal within ``SECONDS_OF_ONE_SIGNAL`` of the first is taken for the same one.
    ``requested`` is what all ranks have agreed on: with one rank it is ``asked``; with several a
    signal to any of them, from the next :meth:`agree` on. Has no effect outside the main thread,
    where Python delivers no signals.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self.asked: int | None = None
        self._asked_at = 0.0
        self._agreed: int | None = None
        self._calls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._handle) for n in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # one that was not set from Python cannot be set from there
                signal.signal(number, handler)
        self._previous = {}

    @property
    def requested(self) -> int | None:
        return self.asked if self._ranks.size == 1 else self._agreed

    def agree(self) -> None:
        """Exchange with the other ranks whether one was asked to stop; every rank must call it."""
        if self._ranks.size > 1:
            self._agreed = self._ranks.largest(self.asked or 0) or None

    def stops(self) -> bool:
        """Whether to stop now. Ranks agree at every ``CALLS_PER_AGREEMENT``-th call."""
        if self._ranks.size > 1:
            self._calls += 1
            if self._calls % CALLS_PER_AGREEMENT == 0:
                self.agree()
        return self.requested is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        alone = self._ranks.size == 1
        if self.asked is not None:
            if not alone and time.monotonic() - self._asked_at < SECONDS_OF_ONE_SIGNAL:
                return
            self._restore()
            _raise(self.asked)
        self.asked, self._asked_at = number, time.monotonic()
        if self._ranks.is_main:
            # os.write, because print may be interrupted in the middle of itself
            when = b"after this update" if alone else b"within 16 updates"
            after = b"" if alone else b" after five seconds"
            text = b"\nStopping %b; press Ctrl-C again%b to stop at once.\n" % (when, after)
            os.write(2, text)

    def finish(self) -> None:
        """Raise what the signal would have raised: KeyboardInterrupt, or SystemExit(143)."""
        if self.requested is not None:
            _raise(self.requested)


def _raise(number: int) -> None:
    if number == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt
