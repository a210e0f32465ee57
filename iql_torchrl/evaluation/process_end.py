"""How a subprocess is ended: by request, by force, or because a time limit has passed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from types import TracebackType

__all__ = ["GRACE", "LEAVE", "TimeLimit", "end", "exit_code", "start"]

GRACE = 5.0  # seconds in which environments may close before the process is ended by force
# Ctrl-C and a scheduler's SIGTERM reach every process of a run: the parent decides what they mean.
LEAVE = getattr(signal, "SIGUSR1", signal.SIGTERM)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a process with pipes, in a session of its own: what it starts can be ended with it."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, by force after ``GRACE`` seconds, and kill what it leaves behind."""
    if process.returncode is not None:  # its number may be another process's by now
        return
    process.send_signal(LEAVE)
    exit_code(process)
    _kill_session(process)  # simulators that an environment started, which may hold the pipes open


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait at most ``GRACE`` seconds for the end of a process, then kill it."""
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class TimeLimit:
    """A context that ends ``process`` where it lasts longer than ``seconds``; None: no limit.

    ``passed`` says afterwards whether that happened.
    """

    def __init__(self, process: subprocess.Popen[bytes], seconds: float | None) -> None:
        self.passed = False
        self._process = process
        self._timer = None if seconds is None else threading.Timer(seconds, self._end)

    def __enter__(self) -> TimeLimit:
        if self._timer is not None:
            self._timer.daemon = True  # an interpreter that exits does not wait for it
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # where it has begun to end the process, until that is done

    def _end(self) -> None:
        self.passed = True
        end(self._process)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
