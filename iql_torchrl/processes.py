"""An executor of one other process, in which each call may have a time limit.

``ProcessPoolExecutor`` is not used: it imports the user's script again, an interpreter that exits waits
for a call that hangs, and a process that ends takes the calls that wait with it.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any
from unittest import mock

import cloudpickle
import gymnasium
import torch

from iql_torchrl.config import Arithmetic

SPAWN = multiprocessing.get_context("spawn")


class ProcessEnded(RuntimeError):
    """The process ended during a call; the message is its exit code and the signal's name."""


class CallTimeout(TimeoutError):
    """A call took longer than its time limit, and its process was ended."""


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
    """``call`` with ``sys.path``, the environments registered here, and the settings of torch."""
    specs = []
    for spec in gymnasium.registry.values():
        if not str(spec.entry_point).startswith("gymnasium."):
            with contextlib.suppress(Exception):  # an error follows only if a call uses it
                specs.append(cloudpickle.dumps(spec))
    path = [os.path.abspath(entry) for entry in sys.path]
    return pickle.dumps((path, specs, Arithmetic.current(), serialize("the call", call)))


def run_task(task: bytes) -> Any:
    """Perform a serialized call in another process."""
    path, specs, settings, call = pickle.loads(task)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    for each in specs:
        with contextlib.suppress(ImportError, AttributeError):
            spec = pickle.loads(each)
            gymnasium.registry.setdefault(spec.id, spec)
    settings.adopt()
    return torch.load(io.BytesIO(call), weights_only=False)()


class ProcessExecutor:
    """One process that performs serialized calls in their order, and is replaced where it ends.

    It starts with the first call, prints to stderr, and ignores Ctrl-C and SIGTERM, which this process
    handles. It ends with :meth:`shutdown`, or when this process ends in any way.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process: Any = None
        self._owner, self._closed = os.getpid(), False
        self._thread = threading.Thread(target=self._deliver, daemon=True)

    def submit(self, task: bytes, timeout: float | None = None) -> Future[Any]:
        """The future result, or what the call raised, with its traceback as the cause.

        :class:`CallTimeout` where the call and the start of its process took more than ``timeout``
        seconds, and :class:`ProcessEnded`; the next call then starts another process.
        """
        if self._thread.ident is None:
            self._thread.start()
            # called before multiprocessing's own function, which waits for the process
            atexit.register(self.shutdown)
        future: Future[Any] = Future()
        self._tasks.put((future, task, timeout))
        return future

    def shutdown(self) -> None:
        """End the process, also during a call; futures stay as they are."""
        if os.getpid() == self._owner and not self._closed:  # not in a forked copy
            self._closed = True
            atexit.unregister(self.shutdown)
            self._tasks.put(None)
            self._end()

    def _deliver(self) -> None:
        while (item := self._tasks.get()) is not None and not self._closed:
            future, *task = item
            try:
                future.set_result(self._call(*task))
            except Exception as error:
                if not self._closed:
                    future.set_exception(error)
        self._end()  # of a process that was started after ``shutdown``

    def _call(self, task: bytes, timeout: float | None) -> Any:
        if self._process is None or not self._process.is_alive():
            self._pipe, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=serve, args=(theirs, os.getpid()))
            # without a name or file of ``__main__`` the script is not imported again
            with mock.patch.dict(sys.modules, {"__main__": types.ModuleType("__main__")}):
                process.start()
            theirs.close()
            self._process = process
        process = self._process
        try:
            self._pipe.send_bytes(task)
            if not self._pipe.poll(timeout):
                self._end()
                raise CallTimeout(f"took longer than timeout={timeout:g} seconds")
            succeeded, reply = pickle.loads(self._pipe.recv_bytes())
        except (BrokenPipeError, ConnectionResetError, EOFError) as error:
            self._end()
            process.join()
            code = process.exitcode
            name = f" ({signal.Signals(-code).name})" if code < 0 else ""
            raise ProcessEnded(f"exit code {code}{name}") from error
        if not succeeded:
            raise pickle.loads(reply)
        return reply

    def _end(self) -> None:
        """Kill the process and what it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        if hasattr(os, "killpg"):  # simulators of an environment may be processes
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()


def serve(pipe: Connection, parent: int) -> None:
    """Perform calls until the process ``parent`` ends."""
    if hasattr(os, "setsid"):
        os.setsid()
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:  # the parent process has ended
            return
        try:
            reply = pickle.dumps((True, run_task(task)))
        except Exception as error:
            reply = pickle.dumps((False, failure(error)))
        pipe.send_bytes(reply)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def failure(error: Exception) -> bytes:
    """An exception as a pickle, with its traceback as the cause: a ``RuntimeError`` where needed."""
    try:
        sent = cloudpickle.dumps(ExceptionWithTraceback(error, error.__traceback__))
        pickle.loads(sent)
    except Exception:  # a class whose arguments pickle does not know
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        sent = pickle.dumps(ExceptionWithTraceback(plain, error.__traceback__))
    return sent
