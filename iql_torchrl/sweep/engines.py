"""Engines of a sweep: functions that perform calls in other processes, and say which failed and why.

``calls`` are by name, and each may be performed again at any time. ``watch`` is called several times
a second. The result has a sentence for each call that failed. ``threads``: of torch. When this process
is interrupted, calls are ended or cancelled. ``TypeError`` for a call that cannot be pickled.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from iql_torchrl.processes import Worker, packed_call, perform, surroundings
from iql_torchrl.sweep.retries import RAY_RETRIES, first_line, is_repeated, why

__all__ = ["perform_locally", "perform_on_ray", "perform_on_slurm"]

Calls = Mapping[str, Callable[[], None]]
SECONDS = 0.2  # between two looks at the progress
ANSWER = 5.0  # seconds in which the machine of a cluster accepts a connection


def perform_locally(
    calls: Calls, watch: Callable[[], None], *, workers: int, threads: int
) -> dict[str, str]:
    """In ``workers`` processes on this machine; a call whose process dies is repeated two times."""
    waiting, deaths, failures = deque(_packed(calls, threads).items()), Counter[str](), {}
    crew = [Worker() for _ in range(min(workers, len(calls)))]
    idle, running = list(crew), dict[Future[Any], tuple[Worker, str, bytes]]()
    try:
        while waiting or running:
            while waiting and idle:
                worker, (name, order) = idle.pop(), waiting.popleft()
                running[worker.submit(order)] = worker, name, order
            for future in wait(running, SECONDS, FIRST_COMPLETED).done:
                worker, name, order = running.pop(future)
                idle.append(worker)
                if (error := future.exception()) is None:
                    continue
                if is_repeated(error, name, deaths):
                    waiting.append((name, order))
                else:
                    failures[name] = why(error)
            watch()
    finally:
        for worker in crew:
            worker.close()
    return failures


def perform_on_ray(
    calls: Calls,
    watch: Callable[[], None],
    *,
    workers: int,
    threads: int,
    address: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """As Ray tasks of ``threads`` CPUs, which Ray repeats up to three times where a node dies.

    Uses the connection that exists, else connects to ``address`` (by default ``RAY_ADDRESS`` of
    the environment), else starts Ray here with ``workers * threads`` CPUs; what was started or
    connected here is shut down at the end. ``options``: of a Ray task (``{"num_gpus": 0.5}``).

    Raises ``ImportError`` without ray, ``ConnectionError`` for an address without a cluster, and
    ``ValueError`` for options that Ray does not know.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'engine="ray" needs ray; install it with pip install "iql_torchrl[ray]".'
        ) from error
    ours = not ray.is_initialized()
    if ours:
        connect(ray, address or os.environ.get("RAY_ADDRESS") or None, workers * threads)
    waiting: list[Any] = []
    failures: dict[str, str] = {}
    try:
        given = {"num_cpus": threads, "max_retries": RAY_RETRIES, **(options or {})}
        task = ray.remote(_attempted).options(**given)
        names = {task.remote(order): name for name, order in _packed(calls, threads).items()}
        waiting = list(names)
        while waiting:
            finished, waiting = ray.wait(waiting, timeout=SECONDS)
            for each in finished:
                try:
                    sentence = ray.get(each)
                except ray.exceptions.RayError as error:
                    sentence = first_line(error)
                if sentence is not None:
                    failures[names[each]] = sentence
            watch()
        return failures
    finally:
        for each in waiting:  # after an exception
            ray.cancel(each, force=True)
        if ours:
            ray.shutdown()


def connect(ray: Any, address: str | None, cpus: int) -> None:
    """``ray.init``; ``ConnectionError`` at once where nothing answers at ``address``.

    Ray itself tries for minutes, then ends the process.
    """
    if address is None:
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        return
    try:
        if address not in ("auto", "local"):
            place = urlsplit(f"//{address.removeprefix('ray://')}")
            if place.port is None:
                raise ValueError("expected 'auto', 'HOST:PORT' or 'ray://HOST:PORT'")
            socket.create_connection((place.hostname, place.port), ANSWER).close()
        ray.init(address=address, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"address is {address!r}, where no Ray cluster answers ({first_line(error)}); start one "
            "with ray start --head, or leave address out to start Ray on this machine."
        ) from error


def perform_on_slurm(
    calls: Calls,
    watch: Callable[[], None],
    *,
    threads: int,
    folder: Path,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """As an array of Slurm jobs, which submitit queues again when they are preempted.

    ``folder``: of submitit's files, on a file system that all nodes reach. ``options``: of
    ``submitit.AutoExecutor.update_parameters`` (``slurm_partition``, ``timeout_min``, ...), and
    ``cluster="local"`` to run the jobs on this machine.

    Raises ``ImportError`` without submitit, ``RuntimeError`` where there is no Slurm.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            'engine="slurm" needs submitit; install it with pip install "iql_torchrl[slurm]".'
        ) from error

    class Requeued(submitit.helpers.Checkpointable):  # type: ignore[misc,unused-ignore]
        def __call__(self, order: bytes) -> str | None:
            return _attempted(order)

    parameters = {"cpus_per_task": threads, **options}
    cluster = parameters.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise RuntimeError(
            f"engine='slurm' finds no Slurm on this machine ({first_line(error)}); run it where "
            "sbatch works, or use engine='local'."
        ) from error
    executor.update_parameters(**parameters)
    orders = _packed(calls, threads)
    with executor.batch():  # one array of jobs
        jobs = {name: executor.submit(Requeued(), order) for name, order in orders.items()}
    try:
        while not all(job.done() for job in jobs.values()):
            watch()
            time.sleep(SECONDS)
    except BaseException:
        for job in jobs.values():
            job.cancel(check=False)
        raise
    failures = {}
    for name, job in jobs.items():
        lost = job.exception()
        sentence = job.result() if lost is None else first_line(lost)
        if sentence is not None:
            failures[name] = sentence
    return failures


def _packed(calls: Calls, threads: int) -> dict[str, bytes]:
    elsewhere = surroundings()
    return {
        name: packed_call("env or score", call, elsewhere, threads=threads)
        for name, call in calls.items()
    }


def _attempted(order: bytes) -> str | None:
    """Perform a call; why it failed."""
    try:
        perform(order)
    except Exception as error:
        traceback.print_exc()
        return why(error)
    return None
