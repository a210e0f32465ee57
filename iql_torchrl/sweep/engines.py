"""Engines of a sweep: functions that perform calls in other processes, and say which failed and why.

``calls`` are by name, and each may be performed again at any time. ``watch`` is called several times
a second. The result has a sentence for each call that failed. ``threads``: of torch. When this process
is interrupted, calls are ended or cancelled. ``TypeError`` for a call that cannot be pickled.

A call whose process dies is repeated, and continues from its last checkpoint; not a call that raises.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from iql_torchrl.files import first_line
from iql_torchrl.processes import ProcessEnded, Workers, packed_call, perform, surroundings

Calls = Mapping[str, Callable[[], None]]
PERFORMED, RAY_RETRIES = 3, 3  # how often a call is performed here, and repeated by Ray
SECONDS = 0.2  # between two looks at the progress
ANSWER = 5.0  # seconds in which the machine of a cluster accepts a connection


def perform_locally(
    calls: Calls, watch: Callable[[], None], *, workers: int, threads: int
) -> dict[str, str]:
    """In ``workers`` processes on this machine; a call whose process dies is repeated two times."""
    orders = _packed(calls, threads)
    with closing(Workers(min(workers, len(calls)))) as crew:
        jobs = {name: crew.submit(order, None, PERFORMED) for name, order in orders.items()}
        return _followed(jobs, watch, partial(wait, jobs.values(), SECONDS))


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
    tasks: list[Any] = []
    try:
        given = {"num_cpus": threads, "max_retries": RAY_RETRIES, **(options or {})}
        task, orders = ray.remote(_attempted).options(**given), _packed(calls, threads)
        tasks += map(task.remote, orders.values())
        jobs = dict(zip(orders, [each.future() for each in tasks], strict=True))
        return _followed(jobs, watch, partial(wait, jobs.values(), SECONDS))
    finally:
        for each in tasks:  # after an exception; no effect on those that have ended
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
        return _followed(jobs, watch, partial(time.sleep, SECONDS))
    except BaseException:
        for job in jobs.values():
            job.cancel(check=False)
        raise


def _followed(
    jobs: Mapping[str, Any], watch: Callable[[], None], pause: Callable[[], Any]
) -> dict[str, str]:
    """Wait for ``jobs``, futures of None or of why a call failed; a sentence for each that failed."""
    while not all(job.done() for job in jobs.values()):
        watch()
        pause()
    errors = {name: job.exception() for name, job in jobs.items()}
    ends = {n: jobs[n].result() if error is None else why(error) for n, error in errors.items()}
    return {name: sentence for name, sentence in ends.items() if sentence is not None}


def why(error: BaseException) -> str:
    """Why a call failed that is not repeated, in one line."""
    if isinstance(error, ProcessEnded):
        return (
            f"its process ended {PERFORMED} times, with {error}; SIGKILL mostly means that memory ran "
            "out: use fewer workers or members_per_task."
        )
    return f"{type(error).__name__}: {first_line(error)}"


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
