"""Calls in another process: each gives its result, its exception, or the end of the process.

The process is started by ``subprocess``, not ``multiprocessing``: the user's script is not imported
again, so scripts need no ``if __name__ == "__main__"``, and notebooks work. joblib's loky is not
used: with it an interpreter that exits would wait without end for a call that hangs, and workers
continue to run after the parent is killed.
"""

from __future__ import annotations

import _thread
import contextlib
import io
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import IO, Any

import cloudpickle
import gymnasium
import torch

from iql_torchrl.config import Arithmetic

Surroundings = tuple[list[str], list[bytes]]

GRACE = 5.0  # seconds in which environments may close before the process is ended by force
# SIGINT and SIGTERM are not used, because Ctrl-C and a scheduler send them to every process of a
# run, and only the parent handles them.
LEAVE = getattr(signal, "SIGUSR1", signal.SIGTERM)

# The pipes are moved from stdin and stdout to other descriptors, so that an environment may print.
PROGRAM = """
import sys
sys.path[:] = sys.argv[1:]
del sys.argv[1:]
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: None)
calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
from iql_torchrl.processes import serve
serve(calls, replies)
"""


class ProcessEnded(RuntimeError):
    """The process ended during a call; the message is its exit code and the signal's name."""


class CallTimeout(TimeoutError):
    """A call took longer than its time limit, and its process was ended."""


def packed(name: str, thing: Any) -> bytes:
    """``thing`` with the parts that another process cannot import, for ``torch.load``.

    Raises ``TypeError`` that names ``name`` for what cannot be pickled.
    """
    file, protocol = io.BytesIO(), pickle.DEFAULT_PROTOCOL
    try:
        torch.save(thing, file, pickle_module=cloudpickle, pickle_protocol=protocol)
    except Exception as error:
        raise TypeError(
            f"{name} cannot be sent to another process ({type(error).__name__}: {error}); it must "
            "not contain open files, locks or running environments: make them in a function."
        ) from error
    return file.getvalue()


def surroundings() -> Surroundings:
    """What calls need elsewhere: the folders of modules, and the environments registered here."""
    specs = []
    for spec in gymnasium.registry.values():
        if not str(spec.entry_point).startswith("gymnasium."):
            with contextlib.suppress(Exception):  # an error follows only if a call uses it
                specs.append(cloudpickle.dumps(spec))
    return _path(), specs


def packed_call(
    name: str, call: Callable[[], Any], elsewhere: Surroundings, *, threads: int | None = None
) -> bytes:
    """``call`` for :func:`perform` in another process, with this process's settings of torch.

    ``elsewhere``: :func:`surroundings`. ``threads``: of torch, by default as many as here. Raises as
    :func:`packed`.
    """
    settings = Arithmetic.current()
    settings = replace(settings, threads=settings.threads if threads is None else threads)
    return pickle.dumps((elsewhere, settings, packed(name, call)))


def perform(call: bytes) -> Any:
    """The result of what :func:`packed_call` packed in another process."""
    (path, specs), settings, own = pickle.loads(call)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    for each in specs:
        with contextlib.suppress(ImportError, AttributeError):
            spec = pickle.loads(each)
            gymnasium.registry.setdefault(spec.id, spec)
    settings.adopt()
    return torch.load(io.BytesIO(own), weights_only=False)()


class Workers:
    """``size`` processes that perform calls in the order of submission, and are replaced if they end.

    They start with the first call, print to stderr, and ignore Ctrl-C and SIGTERM, which this
    process handles. They end with :meth:`close`, or when this process ends in any way.
    """

    def __init__(self, size: int = 1) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._size, self._threads = size, list[threading.Thread]()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        # Reentrant: the garbage collector may call close() while a thread has the lock.
        self._lock, self._owner = threading.RLock(), os.getpid()
        self._busy, self._closed = set[int](), False

    def submit(self, call: bytes, timeout: float | None = None, attempts: int = 1) -> Future[Any]:
        """The future result of a :func:`packed_call`, which starts when a process is free.

        It raises what the call raised, with its traceback in the other process as the cause;
        :class:`CallTimeout` where the call and the start of its process took more than ``timeout``
        seconds; :class:`ProcessEnded` where ``attempts`` processes ended during the call. The next
        call then starts another process. ``close()`` leaves futures as they are.
        """
        if not self._threads:
            for number in range(self._size):
                thread = threading.Thread(target=self._deliver, args=(number,), daemon=True)
                self._threads.append(thread)
                thread.start()
        future: Future[Any] = Future()
        self._calls.put((future, call, timeout, attempts))
        return future

    def close(self) -> None:
        """End the processes, also during a call, and the threads. Further calls have no effect."""
        if os.getpid() != self._owner:  # a copy in a forked process
            return
        with self._lock:
            self._closed, processes = True, dict(self._processes)
        for number, process in processes.items():
            if number in self._busy:
                _end(process)
            else:
                process.kill()  # its own end takes seconds
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(GRACE)

    def _deliver(self, number: int) -> None:
        while (item := self._calls.get()) is not None and not self._closed:
            future, *call, attempts = item
            self._busy.add(number)
            while not future.done() and not self._closed:
                attempts -= 1
                try:
                    future.set_result(self._answer(number, *call))
                except Exception as error:
                    if not self._closed and not (attempts and isinstance(error, ProcessEnded)):
                        future.set_exception(error)
            self._busy.remove(number)
        self._forget(number)

    def _answer(self, number: int, call: bytes, timeout: float | None) -> Any:
        process, passed = self._running(number), threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None

        def end() -> None:
            passed.set()
            _end(process)

        timer = threading.Timer(threading.TIMEOUT_MAX if timeout is None else timeout, end)
        timer.daemon = True  # an interpreter that exits does not wait for it
        timer.start()
        try:
            pickle.dump(call, process.stdin)
            process.stdin.flush()
            succeeded, reply = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = self._forget(number)
            if passed.is_set():
                raise CallTimeout(f"took longer than timeout={timeout:g} seconds") from None
            name = f" ({signal.Signals(-code).name})" if code < 0 else ""
            raise ProcessEnded(f"exit code {code}{name}") from error
        finally:
            timer.cancel()
            timer.join()  # if it is ending the process, wait until it has ended
        if not succeeded:
            raise pickle.loads(reply)
        return reply

    def _running(self, number: int) -> subprocess.Popen[bytes]:
        if number in self._processes and self._processes[number].poll() is not None:
            self._forget(number)  # it ended between two calls
        with self._lock:
            if self._closed:
                raise ProcessEnded("closed")
            if number not in self._processes:
                command, pipe = [sys.executable, "-c", PROGRAM, *_path()], subprocess.PIPE
                self._processes[number] = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, start_new_session=True
                )
            return self._processes[number]

    def _forget(self, number: int) -> int:
        """Wait for the end of a process, or kill it; close its pipes; its exit code."""
        process = self._processes.pop(number, None)
        if process is None:
            return 0
        code = _exit_code(process)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # bytes that the process did not read
                assert pipe is not None
                pipe.close()
        return code


def _path() -> list[str]:
    return [os.path.abspath(entry) for entry in sys.path]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(LEAVE)
    _exit_code(process)


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait ``GRACE`` seconds for the end of a process, then kill it; kill what it has started."""
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
    if hasattr(os, "killpg"):  # simulators of an environment may hold the pipes open
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def serve(calls: IO[bytes], replies: IO[bytes]) -> None:
    """Perform calls until the parent process ends, or sends the signal ``LEAVE``.

    ``SystemExit`` is then raised in the main thread, and lets ``evaluate`` close its environments.
    """
    signal.signal(LEAVE, lambda *_: sys.exit(128 + LEAVE))
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            call = pickle.load(calls)
        except EOFError:
            return
        try:
            reply = pickle.dumps((True, perform(call)))
        except Exception as error:
            reply = pickle.dumps((False, failure(error)))
        replies.write(reply)
        replies.flush()


def _follow_parent(parent: int) -> None:
    """End this process after its parent, also during a call."""
    while os.getppid() == parent:
        time.sleep(1.0)
    _thread.interrupt_main(LEAVE)
    time.sleep(GRACE)
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
