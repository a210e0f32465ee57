"""The parent's side of the process of a ``BackgroundEvaluation``: start it, send, receive, end it."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from iql_torchrl.config import Arithmetic
from iql_torchrl.evaluation.background_worker import BOOTSTRAP, Failure, Structure, send
from iql_torchrl.evaluation.process_end import GRACE, TimeLimit, end, exit_code, start
from iql_torchrl.evaluation.rollout import Evaluation

__all__ = ["EvaluationProcess", "EvaluationTimeout", "Request", "Snapshot"]

Snapshot = dict[str, Tensor]


class EvaluationTimeout(TimeoutError):
    """An evaluation took longer than ``timeout`` and was ended; ``number`` is its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Request(NamedTuple):
    """One evaluation: its number, the policy's tensors, torch settings, seconds or None."""

    number: int
    snapshot: Snapshot
    settings: Arithmetic
    timeout: float | None


class EvaluationProcess:
    """The process of a ``BackgroundEvaluation`` and the thread that communicates with it.

    They hold no reference to the ``BackgroundEvaluation``, so that it can be garbage-collected.
    Each request gives one ``(number, Evaluation | Exception)`` in ``outcomes``, in order; None
    follows after the last one.
    """

    def __init__(self, structure: Structure, environment: str) -> None:
        self.outcomes: queue.SimpleQueue[tuple[int, Evaluation | Exception] | None]
        self.outcomes = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._structure, self._environment = structure, environment
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # Reentrant: the garbage collector may call stop() while the thread holds the lock.
        self._lock, self._stopped, self._owner = threading.RLock(), False, os.getpid()

    def put(self, request: Request) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver, daemon=True)
            self._thread.start()
        self._requests.put(request)

    def stop(self) -> None:
        """End the process, by force where it takes longer than ``GRACE``, and the thread."""
        if os.getpid() != self._owner:  # a copy in a forked process
            return
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None:
            end(process)
        self._requests.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(GRACE)

    def _deliver(self) -> None:
        while (request := self._requests.get()) is not None and not self._stopped:
            try:
                outcome: Evaluation | Exception = self._answer(request)
            except Exception as error:
                outcome = error
            if not self._stopped:
                self.outcomes.put((request.number, outcome))
        self.outcomes.put(None)
        if self._process is not None:
            self._forget(self._process)

    def _answer(self, request: Request) -> Evaluation:
        file = io.BytesIO()
        torch.save(request.snapshot, file)
        process, fresh = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        limit = TimeLimit(process, request.timeout)
        try:
            with limit:
                if fresh:
                    send([os.path.abspath(entry) for entry in sys.path], process.stdin)
                    send(self._structure, process.stdin)
                send((file.getvalue(), request.settings), process.stdin)
                reply = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = self._forget(process)
            if limit.passed:
                raise self._timed_out(request) from None
            name = f" ({signal.Signals(-code).name})" if code < 0 else ""
            raise RuntimeError(
                f"the evaluation process died with exit code {code}{name} while it evaluated "
                f"number {request.number}; look for its last messages on stderr. SIGKILL mostly means "
                f"that memory ran out: use fewer num_envs. The next submit starts a new process"
            ) from error
        if isinstance(reply, Failure):
            raise reply.revived()
        return reply

    def _timed_out(self, request: Request) -> EvaluationTimeout:
        return EvaluationTimeout(
            f"the background evaluation number {request.number} in {self._environment} took longer "
            f"than timeout={request.timeout:g} seconds; it was ended and gives no score. If the "
            "environment does not hang and evaluations take that long, pass a larger "
            "BackgroundEvaluation(timeout=...), or None for no limit. The next evaluation starts "
            "a new process.",
            request.number,
        )

    def _running(self) -> tuple[subprocess.Popen[bytes], bool]:
        """The process, and whether this call started it."""
        if self._process is not None and self._process.poll() is not None:
            self._forget(self._process)  # it died between two evaluations
        with self._lock:
            fresh = self._process is None
            if self._process is None and not self._stopped:
                self._process = start([sys.executable, "-c", BOOTSTRAP])
            if self._stopped or self._process is None:
                if self._process is not None:
                    self._process.kill()
                raise RuntimeError("the background evaluation is closed")
            return self._process, fresh

    def _forget(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a process, or kill it; close its pipes; its exit code."""
        code = exit_code(process)
        self._process = None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # bytes that the process did not read
                assert pipe is not None
                pipe.close()
        return code
