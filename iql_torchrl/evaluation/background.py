"""Evaluations in another process, while training continues.

The process is started by ``subprocess``, not ``multiprocessing``: the user's script is not imported
again, so scripts need no ``if __name__ == "__main__"``, and notebooks work. joblib's loky is not
used, because with it an interpreter that exits waits for a hung evaluation for ever, and workers
outlive a parent that is killed.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from iql_torchrl.config import Arithmetic
from iql_torchrl.evaluation.background_process import (
    EvaluationProcess,
    EvaluationTimeout,
    Request,
    Snapshot,
)
from iql_torchrl.evaluation.background_worker import Structure, named_tensors
from iql_torchrl.evaluation.result import reference_pair
from iql_torchrl.evaluation.rollout import Evaluation, check_arguments

__all__ = ["BackgroundEvaluation", "EvaluationTimeout"]

TIMEOUT = 600.0  # seconds
POLL = 0.1  # seconds between two calls of ``stop`` while waiting


class BackgroundEvaluation:
    """:func:`~iql_torchrl.evaluate` in another process: the same results, bit for bit.

    ``policy`` and ``make_env`` are sent once, as they are now; ``submit`` sends the policy's
    parameters and buffers. The process uses the number of torch threads, the default dtype and the
    matrix precision that are set when ``submit`` is called, so both processes share the processor's
    cores. It starts at the first ``submit``, prints to stderr, ignores Ctrl-C and SIGTERM (this
    process decides what they mean), and ends with this object, with the interpreter, or when this
    process is killed. Not for use from several threads.

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
        self._layout = {name: (t.shape, t.dtype) for name, t in named_tensors(policy).items()}
        structure = Structure.of(policy, make_env, arguments)
        self._child = EvaluationProcess(structure, _name_of(make_env))
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
        :meth:`resubmit`. ``close()`` does not remove them.
        """
        return dict(self._pending)

    def submit(self, number: int) -> None:
        """Queue an evaluation of the policy as it is now, and return at once.

        Raises ``ValueError`` for a number that is pending, and ``RuntimeError`` after ``close()``.
        """
        self._queue(number, _copied(named_tensors(self._policy)))

    def resubmit(self, pending: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Queue the snapshots of an earlier object's :attr:`pending`, in their order.

        Raises as :meth:`submit`, and ``ValueError`` for snapshots of a policy of another structure.
        """
        for number, snapshot in pending.items():
            self._queue(number, _copied(snapshot))

    def results(
        self, *, wait: bool = False, stop: Callable[[], bool] | None = None
    ) -> list[tuple[int, Evaluation]]:
        """``(number, evaluation)`` of those finished since the last call, in order of submission.

        With ``wait`` it blocks until all submitted are finished; ``stop`` is called several times a
        second meanwhile, and if it returns True, the wait ends. After ``close()`` it returns those
        that had finished before.

        Raises:
            EvaluationTimeout: an evaluation took longer than ``timeout`` and was ended. Its number
                is no longer pending; the next call returns the others.
            Exception: what an evaluation raised, with its traceback in the other process as the
                cause. Its number is no longer pending; the next call returns the others.
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
        """End the process, also during an evaluation. Further calls have no effect."""
        self._closed()

    def __enter__(self) -> BackgroundEvaluation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _queue(self, number: int, snapshot: Snapshot) -> None:
        if not self._closed.alive:
            raise RuntimeError("the background evaluation is closed; make a new one")
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise ValueError(f"number must be an integer, got {number!r}")
        if number in self._pending:
            raise ValueError(f"number {number} is pending already; each needs its own")
        self._check_layout(number, snapshot)
        self._pending[int(number)] = snapshot
        settings = Arithmetic.current()
        self._child.put(Request(int(number), snapshot, settings, self._timeout))

    def _check_layout(self, number: int, snapshot: Snapshot) -> None:
        layout = {name: (t.shape, t.dtype) for name, t in snapshot.items()}
        for name in sorted(layout.keys() ^ self._layout.keys()):
            has = "lacks" if name in self._layout else "has"
            raise ValueError(
                f"snapshot {number} {has} {name!r}, unlike the policy when the evaluation was "
                f"made; make the BackgroundEvaluation from the policy in its present form"
            )
        for name, (shape, dtype) in layout.items():
            if (shape, dtype) != self._layout[name]:
                raise ValueError(
                    f"{name!r} of snapshot {number} is {dtype} of shape {tuple(shape)}, expected "
                    f"{self._layout[name][1]} of shape {tuple(self._layout[name][0])}, as it was "
                    f"when the evaluation was made"
                )


def _name_of(make_env: Callable[[], Any]) -> str:
    """The environment's id where ``make_env`` has one, else the name of ``make_env``."""
    spec = getattr(make_env, "spec", None)
    name = getattr(spec, "id", spec) or getattr(make_env, "__qualname__", None)
    return str(name or make_env)


def _copied(tensors: Mapping[str, Tensor]) -> Snapshot:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
