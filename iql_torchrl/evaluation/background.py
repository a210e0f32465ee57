"""Evaluations in a process of their own, while training goes on.

The process is started by ``subprocess``, not ``multiprocessing``: nothing imports the main script
again, so scripts need no ``if __name__ == "__main__"``, and notebooks work.
"""

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
import weakref
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from iql_torchrl.evaluation.background_worker import (
    BOOTSTRAP,
    Arithmetic,
    Failure,
    Structure,
    named_tensors,
    send,
)
from iql_torchrl.evaluation.process_end import GRACE, TimeLimit, end, exit_code, start
from iql_torchrl.evaluation.result import reference_pair
from iql_torchrl.evaluation.rollout import Evaluation, check_arguments

__all__ = ["BackgroundEvaluation", "EvaluationTimeout"]

Snapshot = dict[str, Tensor]
TIMEOUT = 600.0  # seconds
POLL = 0.1  # seconds between two questions whether waiting is to end


class EvaluationTimeout(TimeoutError):
    """An evaluation took longer than ``timeout`` and was ended; ``number`` is its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class BackgroundEvaluation:
    """:func:`~iql_torchrl.evaluate` in another process: the same results, bit for bit.

    ``policy`` and ``make_env`` are sent once, as they are now; ``submit`` sends the policy's
    parameters and buffers. The process computes with the torch threads, default dtype and matrix
    precision of the moment of ``submit``, so the two share the processor's cores. It starts at
    the first ``submit``, prints to stderr, leaves Ctrl-C and SIGTERM to this process, and ends
    with this object, with the interpreter, or when this process dies in whatever way. Not for
    use from several threads.

    Args:
        policy: as for :func:`~iql_torchrl.evaluate`; it may live on any device.
        make_env: likewise; lambdas, closures and what a script or notebook defines are sent by
            value, with the globals they read.

    Keyword Args:
        device: where the policy is evaluated, by default the CPU.
        timeout: seconds > 0 that one evaluation may take, the start of its process (some seconds)
            included; None for no limit. After that the process is killed with all it has started,
            ``results`` raises :class:`EvaluationTimeout`, and the next evaluation starts a new
            process. An ``OfflineTrainer`` warns and trains on; that row has no score. The attribute
            ``timeout`` may be changed, and holds for what is submitted afterwards.

    The other keywords are those of :func:`~iql_torchrl.evaluate`.

    Raises:
        TypeError, ValueError: as from :func:`~iql_torchrl.evaluate`, or a thing cannot be sent.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        make_env: Callable[[], gymnasium.Env[Any, Any]],
        *,
        episodes: int,
        num_envs: int = 8,
        seed: int,
        reference_scores: Any = None,
        deterministic: bool = True,
        max_steps: int | None = None,
        device: torch.device | str | None = None,
        timeout: float | None = TIMEOUT,
    ) -> None:
        check_arguments(policy, make_env, episodes, num_envs, seed, max_steps)
        self.timeout = timeout
        arguments = {
            "episodes": episodes,
            "num_envs": num_envs,
            "seed": seed,
            "reference_scores": reference_pair(reference_scores),
            "deterministic": deterministic,
            "max_steps": max_steps,
            "device": "cpu" if device is None else str(torch.device(device)),
        }
        self._policy = policy
        self._wanted = {name: (t.shape, t.dtype) for name, t in named_tensors(policy).items()}
        self._child = _Child(Structure.of(policy, make_env, arguments), _name_of(make_env))
        self._pending: dict[int, Snapshot] = {}
        self._finished: list[tuple[int, Evaluation]] = []
        self._closed = weakref.finalize(self, self._child.stop)

    @property
    def timeout(self) -> float | None:
        """Seconds that one evaluation may take; None for no limit."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        number = isinstance(seconds, Real) and not isinstance(seconds, bool)
        if seconds is not None and not (number and 0 < seconds <= threading.TIMEOUT_MAX):
            raise ValueError(
                f"timeout is {seconds!r}; give the seconds that one evaluation may take, a finite "
                "number > 0, or None for no limit."
            )
        self._timeout = None if seconds is None else float(seconds)

    @property
    def pending(self) -> dict[int, Snapshot]:
        """The submitted policies by number, in order, that ``results`` has not returned yet.

        Each maps names of parameters and buffers to CPU tensors; for checkpoints, see
        :meth:`resubmit`. They stay after ``close()``.
        """
        return dict(self._pending)

    def submit(self, number: int) -> None:
        """Queue an evaluation of the policy as it is now, and return at once.

        Raises ``ValueError`` for a number that is pending, and ``RuntimeError`` after ``close()``.
        """
        self._queue(number, _copied(named_tensors(self._policy)))

    def resubmit(self, pending: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Queue snapshots that an earlier object's :attr:`pending` gave, in their order.

        Raises ``ValueError`` also where they belong to a policy of another structure.
        """
        for number, snapshot in pending.items():
            self._queue(number, _copied(snapshot))

    def results(
        self, *, wait: bool = False, stop: Callable[[], bool] | None = None
    ) -> list[tuple[int, Evaluation]]:
        """``(number, evaluation)`` of those finished since the last call, in order of submission.

        With ``wait`` it blocks until all submitted are done; ``stop`` is called several times a
        second meanwhile, and once it returns True the waiting ends. After ``close()`` it gives
        what had finished before.

        Raises:
            EvaluationTimeout: an evaluation took longer than ``timeout`` and was ended. Its number
                is no longer pending; the others are given by the next call.
            Exception: what an evaluation raised, with its traceback in the other process as the
                cause. Its number is no longer pending; the others are given by the next call.
            RuntimeError: the process died, with its exit code. The next evaluation in the queue,
                or the next ``submit``, starts another.
        """
        while len(self._finished) < len(self._pending):
            blocks = wait and self._closed.alive
            try:
                outcome = self._child.outcomes.get(blocks, POLL if blocks else None)
            except queue.Empty:
                if not blocks or (stop is not None and stop()):
                    break
                continue
            if outcome is None:
                break
            number, result = outcome
            if isinstance(result, Exception):
                del self._pending[number]
                raise result
            self._finished.append((number, result))
        finished, self._finished = self._finished, []
        for number, _ in finished:
            del self._pending[number]
        return finished

    def close(self) -> None:
        """End the process, also in the middle of an evaluation. More calls do nothing."""
        self._closed()

    def __enter__(self) -> BackgroundEvaluation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _queue(self, number: int, snapshot: Snapshot) -> None:
        if not self._closed.alive:
            raise RuntimeError("the background evaluation is closed; make a new one")
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise ValueError(f"number must be an integer, found {number!r}")
        if number in self._pending:
            raise ValueError(f"number {number} is pending already; each needs its own")
        found = {name: (t.shape, t.dtype) for name, t in snapshot.items()}
        for name in sorted(found.keys() ^ self._wanted.keys()):
            has = "lacks" if name in self._wanted else "holds"
            raise ValueError(
                f"snapshot {number} {has} {name!r}, unlike the policy when the evaluation was "
                f"made; make the BackgroundEvaluation from the policy in its present form"
            )
        for name, (shape, dtype) in found.items():
            if (shape, dtype) != self._wanted[name]:
                raise ValueError(
                    f"{name!r} of snapshot {number} is {dtype} of shape {tuple(shape)}, wanted "
                    f"{self._wanted[name][1]} of shape {tuple(self._wanted[name][0])}, as it was "
                    f"when the evaluation was made"
                )
        self._pending[int(number)] = snapshot
        settings = Arithmetic.current()
        self._child.put(_Request(int(number), snapshot, settings, self._timeout))


class _Request(NamedTuple):
    number: int
    snapshot: Snapshot
    settings: Arithmetic
    timeout: float | None


class _Child:
    """The process and the thread that talks to it; they know nothing of the object above.

    Each number put in gives one ``(number, Evaluation | Exception)`` of ``outcomes``, in order;
    None follows when nothing more will come.
    """

    def __init__(self, structure: Structure, environment: str) -> None:
        self.outcomes: queue.SimpleQueue[tuple[int, Evaluation | Exception] | None]
        self.outcomes = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._structure, self._environment = structure, environment
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # Reentrant: the garbage collector may call stop() in the midst of the thread's work.
        self._lock, self._stopped, self._owner = threading.RLock(), False, os.getpid()

    def put(self, request: _Request) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver, daemon=True)
            self._thread.start()
        self._requests.put(request)

    def stop(self) -> None:
        """End the process, by force where it takes longer than ``GRACE``, and the thread."""
        if os.getpid() != self._owner:  # a fork's copy of this object has no say
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
            self._let_go(self._process)

    def _answer(self, request: _Request) -> Evaluation:
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
            code = self._let_go(process)
            if limit.passed:
                raise self._timed_out(request) from None
            name = f" ({signal.Signals(-code).name})" if code < 0 else ""
            raise RuntimeError(
                f"the evaluation process died with exit code {code}{name} while it evaluated "
                f"number {request.number}; look for its last words on stderr. SIGKILL mostly means "
                f"that memory ran out: use fewer num_envs. The next submit starts a fresh process"
            ) from error
        if isinstance(reply, Failure):
            raise reply.revived()
        return reply

    def _timed_out(self, request: _Request) -> EvaluationTimeout:
        return EvaluationTimeout(
            f"the background evaluation number {request.number} in {self._environment} took longer "
            f"than timeout={request.timeout:g} seconds; it was ended and gives no score. If the "
            "environment does not hang and evaluations take that long, pass a larger "
            "BackgroundEvaluation(timeout=...), or None for no limit. The next evaluation starts "
            "a new process.",
            request.number,
        )

    def _running(self) -> tuple[subprocess.Popen[bytes], bool]:
        """The process, and whether it was started just now."""
        if self._process is not None and self._process.poll() is not None:
            self._let_go(self._process)  # it died at rest, and nothing is lost
        with self._lock:
            fresh = self._process is None
            if self._process is None and not self._stopped:
                self._process = start([sys.executable, "-c", BOOTSTRAP])
            if self._stopped or self._process is None:
                if self._process is not None:
                    self._process.kill()
                raise RuntimeError("the background evaluation is closed")
            return self._process, fresh

    def _let_go(self, process: subprocess.Popen[bytes]) -> int:
        """Forget a process that ended or must; its exit code."""
        code = exit_code(process)
        self._process = None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # bytes that it did not read any more
                assert pipe is not None
                pipe.close()
        return code


def _name_of(make_env: Callable[[], Any]) -> str:
    """The environment's id where ``make_env`` has one, else the name of ``make_env``."""
    spec = getattr(make_env, "spec", None)
    name = getattr(spec, "id", spec) or getattr(make_env, "__qualname__", None)
    return str(name or make_env)


def _copied(tensors: Mapping[str, Tensor]) -> Snapshot:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
