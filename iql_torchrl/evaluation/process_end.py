"""Start a subprocess; end it by a signal, by killing it, or at a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from types import TracebackType

__all__ = ["GRACE", "LEAVE", "TimeLimit", "end", "exit_code", "kill_session", "start"]

GRACE = 5.0  # seconds in which environments may close before the process is ended by force
# SIGINT and SIGTERM are not used, because Ctrl-C and a scheduler send them to every process of a
# run, and only the parent handles them.
LEAVE = getattr(signal, "SIGUSR1", signal.SIGTERM)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a process with pipes, in its own session, so that its child processes can be ended too."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Signal a process to end, kill it after ``GRACE`` seconds, and kill its remaining children."""
    if process.returncode is not None:  # its id may belong to another process now
        return
    process.send_signal(LEAVE)
    exit_code(process)
    kill_session(process)  # simulators that an environment started may hold the pipes open


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait at most ``GRACE`` seconds for the end of a process, then kill it."""
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class TimeLimit:
    """A context that ends ``process`` after ``seconds``; None: no limit.

    ``passed``: whether the limit was reached.
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
            self._timer.join()  # if it is ending the process, wait until it has ended

    def _end(self) -> None:
        self.passed = True
        end(self._process)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the session of a process from :func:`start`: its child processes."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
