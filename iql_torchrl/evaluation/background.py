"""Evaluations in another process, while training continues."""

from __future__ import annotations

import io
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from functools import lru_cache, partial
from itertools import chain
from numbers import Real
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iql_torchrl.data.scaling import known_scores
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.evaluation.rollout import check_arguments, evaluate
from iql_torchrl.processes import (
    CallTimeout,
    ProcessEnded,
    ProcessExecutor,
    serialize,
    serialize_call,
)

LARGE = 100 * 2**20  # bytes
POLL = 0.1  # seconds between two calls of ``stop`` while waiting
Snapshot = dict[str, Tensor]


class EvaluationTimeout(TimeoutError):
    """An evaluation took longer than ``timeout`` and was ended; ``number`` is its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class BackgroundEvaluation:
    """:func:`~iql_torchrl.evaluate` in another process: the same results, bit for bit.

    ``policy`` and ``make_env`` are sent as they are now; ``submit`` sends the policy's
    parameters and buffers. The process uses the number of torch threads, the default dtype and the
    matrix precision that are set when ``submit`` is called, so both processes share the processor's
    cores. It starts at the first ``submit``, prints to stderr, and ignores Ctrl-C and SIGTERM, which
    this process handles. It ends when this object is deleted, when the interpreter exits, or when
    this process is killed. Not for use from several threads.

    Args:
        policy: as for :func:`~iql_torchrl.evaluate`; it may be on any device.
        make_env: as for :func:`~iql_torchrl.evaluate`; lambdas, closures and functions that are
            defined in a script or notebook are sent by value, with the globals they read.

    Keyword Args:
        device: where the policy is evaluated, by default the CPU.
        timeout: seconds > 0 that one evaluation may take, including the start of its process (some
            seconds); None for no limit. After that the process and its child processes are killed,
            ``results`` raises :class:`EvaluationTimeout`, and the next evaluation starts a new
            process. An ``OfflineTrainer`` warns and continues; that row has no score. The attribute
            ``timeout`` may be changed; the new value is used for later calls of ``submit``.

    The other keywords are those of :func:`~iql_torchrl.evaluate`.

    Raises:
        TypeError, ValueError: as from :func:`~iql_torchrl.evaluate`, or an argument cannot be sent.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        make_env: Callable[[], gymnasium.Env[Any, Any]],
        *,
        episodes: int,
        num_envs: int = 8,
        seed: int,
        goals: Sequence[Mapping[str, Any]] | None = None,
        reference_scores: Any = None,
        deterministic: bool = True,
        max_steps: int | None = None,
        device: torch.device | str | None = None,
        timeout: float | None = 600.0,
    ) -> None:
        check_arguments(policy, make_env, episodes, num_envs, seed, max_steps, goals)
        self.timeout = timeout
        self._policy, self._layout = policy, _layout(named_tensors(policy))
        environment = serialize("make_env", make_env)
        if len(environment) > LARGE:
            warnings.warn(
                f"make_env sends {len(environment) / 2**20:.0f} MiB to the evaluation process; a "
                "function that refers to a dataset sends all of it: pass dataset.make_env itself",
                stacklevel=2,
            )
        where = "cpu" if device is None else str(torch.device(device))
        self._evaluate = partial(
            evaluated,
            serialize("policy", policy),
            environment,
            episodes=episodes,
            num_envs=num_envs,
            seed=seed,
            goals=goals,
            reference_scores=known_scores(reference_scores),
            deterministic=deterministic,
            max_steps=max_steps,
            device=where,
        )
        spec = getattr(make_env, "spec", None)
        name = getattr(spec, "id", spec) or getattr(make_env, "__qualname__", None)
        self._environment = name or make_env
        self._pending: dict[int, tuple[Snapshot, Future[Evaluation]]] = {}
        self._executor = ProcessExecutor()
        self._open = weakref.finalize(self, self._executor.shutdown)

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
        return {number: snapshot for number, (snapshot, _) in self._pending.items()}

    def submit(self, number: int) -> None:
        """Queue an evaluation of the policy as it is now, and return at once.

        Raises ``ValueError`` for a number that is pending, and ``RuntimeError`` after ``close()``.
        """
        self.resubmit({number: named_tensors(self._policy)})

    def resubmit(self, pending: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Queue the snapshots of an earlier object's :attr:`pending`, in their order.

        Raises as :meth:`submit`, and ``ValueError`` for snapshots of a policy of another structure.
        """
        for number, tensors in pending.items():
            if not self._open.alive:
                raise RuntimeError("the background evaluation is closed; make a new one")
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
                raise ValueError(f"number must be an integer, got {number!r}")
            if number in self._pending:
                raise ValueError(f"number {number} is pending already; each needs its own")
            self._check_layout(number, tensors)
            snapshot = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            task = serialize_call(partial(self._evaluate, snapshot))
            self._pending[int(number)] = snapshot, self._executor.submit(task, self._timeout)

    def results(
        self, *, wait: bool = False, stop: Callable[[], bool] | None = None
    ) -> list[tuple[int, Evaluation]]:
        """``(number, evaluation)`` of those finished since the last call, in order of submission.

        With ``wait`` it blocks until all submitted evaluations are finished. During the wait,
        ``stop`` is called several times a second; if it returns True, the wait ends. After
        ``close()`` it returns those that finished before.

        Raises:
            EvaluationTimeout: an evaluation took longer than ``timeout`` and was ended. Its number
                is no longer pending; the next call returns the others.
            Exception: what an evaluation raised, with its traceback in the other process as the
                cause. Its number is no longer pending; the next call returns the others.
            RuntimeError: the process died, with its exit code. The next evaluation in the queue,
                or the next ``submit``, starts another.
        """
        finished = []
        for number, (_, future) in self._pending.items():
            while wait and self._open.alive and wait_for([future], POLL).not_done:
                wait = stop is None or not stop()
            if not future.done():
                break
            if (error := future.exception()) is not None:
                del self._pending[number]
                raise self._explained(number, error)
            finished.append((number, future.result()))
        for number, _ in finished:
            del self._pending[number]
        return finished

    def close(self) -> None:
        """End the process, also during an evaluation. Further calls have no effect."""
        self._open()

    def __enter__(self) -> BackgroundEvaluation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _explained(self, number: int, error: BaseException) -> BaseException:
        if isinstance(error, CallTimeout):
            return EvaluationTimeout(
                f"the background evaluation number {number} in {self._environment} {error}; it was "
                "ended and gives no score. If the environment does not hang and evaluations take "
                "that long, pass a larger BackgroundEvaluation(timeout=...), or None for no limit. "
                "The next evaluation starts a new process.",
                number,
            )
        if isinstance(error, ProcessEnded):
            return RuntimeError(
                f"the evaluation process died with {error} while it evaluated number {number}; look "
                "for its last messages on stderr. SIGKILL mostly means that memory ran out: use "
                "fewer num_envs. The next submit starts a new process"
            )
        return error

    def _check_layout(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        layout = _layout(tensors)
        for name in sorted(layout.keys() | self._layout.keys()):
            given, expected = layout.get(name, "missing"), self._layout.get(name, "no such tensor")
            if given != expected:
                raise ValueError(
                    f"{name!r} of snapshot {number} is {given}, expected {expected}, as it was when "
                    "the evaluation was made; make the BackgroundEvaluation from the policy in its "
                    "present form"
                )


def named_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, including buffers that are not in the state dict."""
    return dict(chain(policy.named_parameters(), policy.named_buffers()))


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} of shape {tuple(t.shape)}" for name, t in tensors.items()}


def evaluated(
    policy: bytes, make_env: bytes, snapshot: Snapshot, *, device: str, **arguments: Any
) -> Evaluation:
    """In the other process: the evaluation of the policy with the tensors of ``snapshot``."""
    module, environments = rebuilt(policy, make_env, device)
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            new = snapshot[name].to(tensor.device)
            if not torch.equal(tensor, new):  # expanded constants cannot be written in place
                tensor.copy_(new)
    return evaluate(module, environments, device=device, **arguments)


@lru_cache(1)
def rebuilt(policy: bytes, make_env: bytes, device: str) -> tuple[Any, Any]:
    """The policy, on its device, and ``make_env``, which are the same in all calls of a process."""
    try:
        module, environments = (
            torch.load(io.BytesIO(each), map_location="cpu", weights_only=False)
            for each in (policy, make_env)
        )
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"policy or make_env cannot be rebuilt in the evaluation process ({error}); define "
            "their parts in the script itself, or in modules that it can import too"
        ) from error
    return module.to(device), environments
