"""Engine ``local``: worker processes on this machine."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import IO

from iql_torchrl.evaluation.background_worker import Failure, bootstrap, send
from iql_torchrl.evaluation.process_end import end, exit_code, kill_session, start
from iql_torchrl.sweep.worker import Job, packed

__all__ = ["perform_locally"]

PROGRAM = bootstrap("iql_torchrl.sweep.worker")
SECONDS = 0.2  # between two looks at the progress
MOST_DEATHS = 3


def perform_locally(
    jobs: Sequence[Job], watch: Callable[[], None], *, workers: int, threads: int
) -> dict[str, str]:
    """Perform the jobs in ``workers`` processes; a sentence for each that failed, by its name.

    A job whose process dies is continued by a new process, up to three times. ``watch`` is called
    several times a second. Processes end with this one.
    """
    crew = Crew({job.name: packed(job, threads) for job in jobs})
    count = min(workers, len(jobs))
    with ThreadPoolExecutor(max(count, 1)) as pool:
        running = [pool.submit(crew.work) for _ in range(count)]
        try:
            while wait(running, timeout=SECONDS).not_done:
                watch()
        finally:
            crew.stop()
    for each in running:
        each.result()
    return crew.failures


class Crew:
    """Orders that wait, processes that perform them, and failures; used from several threads."""

    def __init__(self, orders: dict[str, bytes]) -> None:
        self.failures: dict[str, str] = {}
        self._orders, self._waiting = orders, deque(orders)
        self._deaths: Counter[str] = Counter()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def work(self) -> None:
        """Perform orders one by one in a process, until none waits."""
        process = None
        while not self._stopped:
            try:
                name = self._waiting.popleft()
            except IndexError:
                break
            process = process or self._start()
            if process is None:
                break
            try:
                reply = _answer(process, self._orders[name])
            except (OSError, EOFError, pickle.UnpicklingError):
                self._died(name, process)
                process = None
                continue
            if reply is not None:
                self.failures[name] = reply.summary.splitlines()[0]
        if process is not None:
            process.kill()  # it has nothing to do; its own end takes seconds
            self._finish(process)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            processes = list(self._processes)
        for process in processes:
            end(process)

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopped:
                return None
            process = start([sys.executable, "-c", PROGRAM])
            self._processes.add(process)
        with contextlib.suppress(OSError):  # of a process that died: reading finds that
            send([os.path.abspath(entry) for entry in sys.path if entry], _pipes(process)[0])
        return process

    def _died(self, name: str, process: subprocess.Popen[bytes]) -> None:
        code = self._finish(process)
        if self._stopped:
            return
        self._deaths[name] += 1
        if self._deaths[name] < MOST_DEATHS:
            self._waiting.append(name)
            return
        word = f"{signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.failures[name] = (
            f"its process ended {MOST_DEATHS} times ({word}); SIGKILL mostly means that memory ran "
            "out: use fewer workers or members_per_task."
        )

    def _finish(self, process: subprocess.Popen[bytes]) -> int:
        for pipe in _pipes(process):
            with contextlib.suppress(OSError):  # bytes that the process did not read
                pipe.close()
        code = exit_code(process)
        kill_session(process)  # simulators that its environments started
        with self._lock:
            self._processes.discard(process)
        return code


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _answer(process: subprocess.Popen[bytes], order: bytes) -> Failure | None:
    requests, replies = _pipes(process)
    send(order, requests)
    reply: Failure | None = pickle.load(replies)
    return reply
