"""Evaluations in another process, while training continues."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from unittest import mock

import cloudpickle
import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iql_torchrl.config import Arithmetic
from iql_torchrl.data.scaling import known_scores
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.evaluation.rollout import check_arguments, evaluate

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

    ``submit`` sends the policy's parameters and buffers as they are then, and the settings of torch:
    number of threads, default dtype, matrix precision. The process starts at the first ``submit``,
    prints to stderr, and ignores Ctrl-C and SIGTERM, which this process handles. It ends when this
    object is deleted or this process ends in any way. Not for use from several threads.

    Args:
        policy: as for :func:`~iql_torchrl.evaluate`; it may be on any device.
        make_env: as for :func:`~iql_torchrl.evaluate`; lambdas, closures and functions that are
            defined in a script or notebook are sent by value, with the globals they read.

    Keyword Args:
        device: where the policy is evaluated, by default the CPU.
        timeout: seconds > 0 that one evaluation may take, including the start of its process (some
            seconds); None for no limit. After that ``results`` ends the process and its child
            processes and raises :class:`EvaluationTimeout`. An ``OfflineTrainer`` warns and
            continues; that row has no score.

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
        number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if timeout is not None and not (number and 0 < timeout < float("inf")):
            raise ValueError(
                f"timeout is {timeout!r}; give the seconds that one evaluation may take, a finite "
                "number > 0, or None for no limit."
            )
        if (size := len(serialize("make_env", make_env))) > LARGE:
            warnings.warn(
                f"make_env sends {size / 2**20:.0f} MiB to the evaluation process; a function that "
                "refers to a dataset sends the whole dataset: pass dataset.make_env itself",
                stacklevel=2,
            )
        self.timeout, self._make_env, self._policy = timeout, make_env, policy
        copy = io.BytesIO(serialize("policy", policy))
        self._copy = torch.load(copy, map_location="cpu", weights_only=False)
        self._evaluate = partial(
            evaluate_on, self._copy, make_env, episodes=episodes, num_envs=num_envs, seed=seed,
            goals=goals, reference_scores=known_scores(reference_scores), max_steps=max_steps,
            deterministic=deterministic, device=str(torch.device(device or "cpu")),
        )  # fmt: skip
        self._calls: dict[int, _Call] = {}
        self._worker: _Worker | None = None
        self._closed, self._first_since = False, 0.0

    @property
    def pending(self) -> dict[int, Snapshot]:
        """The submitted policies by number, in order, that ``results`` has not returned yet.

        Each maps names of parameters and buffers to CPU tensors; for checkpoints, see
        :meth:`resubmit`. ``close()`` does not remove them.
        """
        return {number: call.snapshot for number, call in self._calls.items()}

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
            if self._closed:
                raise RuntimeError("the background evaluation is closed; make a new one")
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
                raise ValueError(f"number must be an integer, got {number!r}")
            if number in self._calls:
                raise ValueError(f"number {number} is pending already; each needs its own")
            snapshot = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            write_tensors(self._copy, snapshot, f"snapshot {number}")
            self._start(int(number), snapshot, serialize_call(self._evaluate), self.timeout)

    def _start(self, number: int, snapshot: Snapshot, task: bytes, timeout: float | None) -> None:
        if self._worker is None or not self._worker.process.is_alive():
            self._worker = _Worker()
        if not self._calls:
            self._first_since = time.monotonic()
        worker, process = self._worker, self._worker.process
        future = worker.executor.submit(run_task, task)
        future.add_done_callback(lambda done: _kill(process) if is_lost(done) else None)
        self._calls[number] = _Call(snapshot, task, timeout, worker, future)

    def results(
        self, *, wait: bool = False, stop: Callable[[], bool] | None = None
    ) -> list[tuple[int, Evaluation]]:
        """``(number, evaluation)`` of those finished since the last call, in order of submission.

        With ``wait`` it blocks until all submitted evaluations are finished. During the wait,
        ``stop`` is called several times a second; if it returns True, the wait ends. After
        ``close()`` it returns those that finished before.

        Raises:
            EvaluationTimeout: an evaluation took longer than ``timeout`` and was ended.
            RuntimeError: the process died, with its exit code.
            Exception: what an evaluation raised, with its traceback there as the cause.

        The number that failed is no longer pending; the next call returns the others. The next
        evaluation after the end of a process starts another one.
        """
        finished = {}
        for number, call in self._calls.items():
            while not (late := self._is_late(call)) and wait and not call.future.done():
                wait = stop is None or not stop()
                wait_for([call.future], POLL)
            if late:
                call.worker.end()
            elif not call.future.done() or (self._closed and is_lost(call.future)):
                break
            self._first_since = time.monotonic()
            if late or call.future.exception() is not None:
                del self._calls[number]
                raise self._error(number, call, late)
            finished[number] = call.future.result()
        self._calls = {n: call for n, call in self._calls.items() if n not in finished}
        return list(finished.items())

    def _is_late(self, call: _Call) -> bool:
        """Return True if ``call``, the first that has not ended, has run longer than its timeout."""
        if call.timeout is None or self._closed or call.future.done():
            return False
        return time.monotonic() - self._first_since > call.timeout

    def _error(self, number: int, call: _Call, late: bool) -> BaseException:
        """Why a call has no result; where its process ended, those that waited for it start again."""
        error = None if late else call.future.exception()
        if error is not None and not is_lost(call.future):
            return error
        call.worker.executor.shutdown()  # until it has joined the process; then its calls have ended
        for waiting, other in self._calls.items():
            if is_lost(other.future):
                self._start(waiting, other.snapshot, other.task, other.timeout)
        if late:
            return EvaluationTimeout(
                f"the background evaluation number {number} in {self._make_env} took longer than "
                f"timeout={call.timeout:g} seconds; it was ended and gives no score. If the "
                "environment does not hang and evaluations take that long, pass a larger "
                "BackgroundEvaluation(timeout=...), or None for no limit.",
                number,
            )
        code = call.worker.process.exitcode or 0
        name = f" ({signal.Signals(-code).name})" if code < 0 else ""
        return RuntimeError(
            f"the evaluation process died with exit code {code}{name} while it evaluated number "
            f"{number}; look for its last messages on stderr. SIGKILL mostly means that memory ran "
            "out: use fewer num_envs."
        )

    def close(self) -> None:
        """End the process, also during an evaluation. Further calls have no effect."""
        self._closed = True
        if self._worker is not None:
            self._worker.end()

    def __enter__(self) -> BackgroundEvaluation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Worker:
    """An executor of one process; ``end``, or the end of this process, ends it."""

    def __init__(self) -> None:
        self.executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        # without a name or file of ``__main__`` the user's script is not imported again
        with mock.patch.dict(sys.modules, {"__main__": types.ModuleType("__main__")}):
            self.executor.submit(_prepare, os.getpid())
        (self.process,) = self.executor._processes.values()
        self.end = weakref.finalize(self, _end, self.executor, self.process, os.getpid())
        # before the function of the executors, which waits for their calls
        threading._register_atexit(self.end)  # type: ignore[attr-defined]


class _Call(NamedTuple):
    snapshot: Snapshot
    task: bytes
    timeout: float | None
    worker: _Worker
    future: Future[Evaluation]


def is_lost(future: Future[Any]) -> bool:
    """Return True if the process ended before the call."""
    return future.done() and isinstance(future.exception(), BrokenProcessPool)


def _end(executor: ProcessPoolExecutor, process: Any, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked copy
        if process.is_alive():
            _kill(process)
        # without it the executor, which modules may hold until the end, prints an error there
        executor.shutdown(wait=False)
        process.join()


def _kill(process: Any) -> None:
    """Kill the process and what it has started."""
    if hasattr(os, "killpg"):  # simulators of an environment may be processes
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _prepare(parent: int) -> None:
    """In the other process, before the first call; it ends soon after the process ``parent``."""
    if hasattr(os, "setsid"):
        os.setsid()
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def serialize(name: str, thing: Any) -> bytes:
    """``thing`` with the parts that another process cannot import, else ``TypeError``."""
    file, protocol = io.BytesIO(), pickle.DEFAULT_PROTOCOL
    try:
        torch.save(thing, file, pickle_module=cloudpickle, pickle_protocol=protocol)
    except Exception as error:
        raise TypeError(
            f"{name} cannot be sent to another process ({type(error).__name__}: {error}); it must "
            "not contain open files, locks or running environments: make them in a function."
        ) from error
    return file.getvalue()


def serialize_call(call: Callable[[], Any]) -> bytes:
    """``call`` with the environments that are registered here and the settings of torch."""
    specs = []
    for spec in gymnasium.registry.values():
        if not str(spec.entry_point).startswith("gymnasium."):
            with contextlib.suppress(Exception):  # an error follows only if a call uses it
                specs.append(cloudpickle.dumps(spec))
    return serialize("the call", (specs, Arithmetic.current(), call))


def run_task(task: bytes) -> Any:
    """Perform a serialized call. What pickle cannot rebuild is raised as ``RuntimeError``."""
    try:
        specs, settings, call = torch.load(io.BytesIO(task), weights_only=False)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"policy or make_env cannot be rebuilt in the evaluation process ({error}); define "
            "their parts in the script itself, or in modules that it can import too"
        ) from error
    for each in specs:
        with contextlib.suppress(ImportError, AttributeError):
            spec = pickle.loads(each)
            gymnasium.registry.setdefault(spec.id, spec)
    settings.adopt()
    try:
        return call()
    except (Exception, SystemExit) as error:
        sent = None
        with contextlib.suppress(Exception):  # a class whose arguments pickle does not know
            sent = pickle.loads(pickle.dumps(error))
        if isinstance(sent, Exception):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def evaluate_on(policy: Any, make_env: Any, *, device: str, **settings: Any) -> Evaluation:
    """:func:`~iql_torchrl.evaluate` of the policy, which is moved to ``device`` first."""
    return evaluate(policy.to(device), make_env, device=device, **settings)


def named_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, including buffers that are not in the state dict."""
    return dict(chain(policy.named_parameters(), policy.named_buffers()))


@torch.no_grad()
def write_tensors(policy: nn.Module, tensors: Snapshot, name: str) -> None:
    """Write ``tensors`` into the policy; ``ValueError`` where it has others."""
    own = named_tensors(policy)
    for key in sorted(own.keys() | tensors.keys()):
        given, expected = (
            f"{t.dtype} of shape {tuple(t.shape)}" if t is not None else "missing"
            for t in (tensors.get(key), own.get(key))
        )
        if given != expected:
            raise ValueError(
                f"{key!r} of {name} is {given}, expected {expected}, as it was when the "
                "BackgroundEvaluation was made; make it from the policy in its present form"
            )
        if not torch.equal(own[key], tensors[key]):  # expanded constants cannot be written in place
            own[key].copy_(tensors[key])
