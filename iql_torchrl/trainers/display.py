"""Progress on stderr, and the message after an interruption."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

__all__ = ["Display", "print_how_to_continue"]


class Display:
    """Progress on stderr: a bar on a terminal; in a file or a pipe, one line at each event.

    Args:
        enabled: False shows nothing.
        total, updates: the number of updates at the end of the run, and now.
    """

    def __init__(self, enabled: bool, total: int, updates: int) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._lines, self._total = enabled and not terminal, total
        self._shown_score: tuple[int, float] | None = None
        self._bar: Any = tqdm(
            total=total,
            initial=updates,
            unit="update",
            dynamic_ncols=True,
            disable=not (enabled and terminal),
        )
        self.advance = self._bar.update  # called at every update

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

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
        if self._lines:
            parts = []
            if speed is not None:
                parts.append(f"{speed:,.{0 if speed >= 10 else 2}f} updates/s")
            parts += [f"{name} {value}" for name, value in shown.items()]
            if score is not None:
                name, at, value = score
                parts.append(f"{name} {value:.4g}" + ("" if at == updates else f" at {at:,}"))
            parts += ["saved"] if saved else []
            line = f"update {updates:,} of {self._total:,}: {', '.join(parts)}"
            print(line.removesuffix(": "), file=sys.stderr, flush=True)
        elif score is not None:
            shown[score[0]] = f"{score[2]:.4g}"
        self._shown_score = None if score is None else score[1:]
        self._bar.set_postfix(shown)

    def last_score(self, updates: int, score: tuple[str, int, float] | None) -> None:
        """Show a score that came after the last event, unless it has been shown."""
        if score is not None and score[1:] != self._shown_score:
            self.event(updates, {}, score=score)


def print_how_to_continue(trainer: Any) -> None:
    """Print on stderr at which update training stopped, what it saved, and how to continue."""
    saved = "" if trainer.folder is None else f" and saved {trainer.folder.path}"
    print(
        f"Stopped after update {trainer.updates:,} of {trainer.total_updates:,}{saved}. "
        f"{_how_to_continue(trainer)}",
        file=sys.stderr,
    )


def _how_to_continue(trainer: Any) -> str:
    command = trainer.resume_command
    if command is None and trainer.folder is not None:
        command = "trainer.resume().train()"
    elif command is None and trainer.save_trainer_file is not None:
        command = f"trainer.load_from_file({str(trainer.save_trainer_file)!r}).train()"
    elif command is None and trainer.checkpoint_rotation is not None:
        command = "trainer.load_from_file(the newest checkpoint).train()"
    if command is None:
        return (
            "Nothing was saved, because the trainer has no folder=. In this process, continue with: "
            "trainer.train()"
        )
    return f"Continue with: {command}"
