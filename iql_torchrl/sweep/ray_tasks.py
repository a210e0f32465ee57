"""Engine ``ray``: tasks with retries on a Ray cluster, or on one that is started here."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iql_torchrl.sweep.task import first_line
from iql_torchrl.sweep.worker import Job, packed, perform_packed

__all__ = ["perform_on_ray"]

SECONDS = 0.5  # between two looks at the progress
ANSWER = 5.0  # seconds in which the machine of a cluster accepts a connection
RETRIES = 3


def perform_on_ray(
    jobs: Sequence[Job],
    watch: Callable[[], None],
    *,
    workers: int,
    threads: int,
    address: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Perform the jobs as Ray tasks of ``threads`` CPUs; a sentence for each that failed, by its name.

    Uses the connection that exists, else connects to ``address`` (by default ``RAY_ADDRESS`` of
    the environment), else starts Ray here with ``workers * threads`` CPUs; what was started or
    connected here is shut down at the end. Ray repeats a task whose worker or node dies, up to
    three times; it then continues from its folder, which every node must reach under the same path.
    ``options``: of a Ray task (``{"num_gpus": 0.5}``). Tasks are cancelled when this process is
    interrupted.

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
        address = address or os.environ.get("RAY_ADDRESS") or None  # as Ray itself
        _connect(ray, address, workers * threads)
    given = {"num_cpus": threads, "max_retries": RETRIES, **(options or {})}
    waiting: list[Any] = []
    try:
        perform = ray.remote(perform_packed).options(**given)
        names = {perform.remote(packed(job, threads)): job.name for job in jobs}
        failures, waiting = {}, list(names)
        while waiting:
            finished, waiting = ray.wait(waiting, timeout=SECONDS)
            for each in finished:
                if sentence := _failure(ray, each):
                    failures[names[each]] = sentence
            watch()
        return failures
    finally:
        for each in waiting:  # after an exception
            ray.cancel(each, force=True)
        if ours:
            ray.shutdown()


def _failure(ray: Any, finished: Any) -> str | None:
    try:
        ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        return f"{type(error.cause).__name__}: {first_line(error.cause)}"
    except ray.exceptions.RayError as error:
        return first_line(error)
    return None


def _connect(ray: Any, address: str | None, cpus: int) -> None:
    options = {"include_dashboard": False, "num_cpus": cpus} if address is None else {}
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if address is None:
            raise
        raise ConnectionError(
            f"address is {address!r}, where no Ray cluster answers ({first_line(error)}); start one "
            "with ray start --head, or leave address out to start Ray on this machine."
        ) from error


def _check_answers(address: str | None) -> None:
    """Raise ``OSError`` where nothing listens: Ray itself tries for minutes, then ends the process."""
    if address in (None, "auto", "local"):
        return
    parts = re.fullmatch(r"(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)", str(address))
    if parts is None:
        raise ValueError("expected 'auto', 'HOST:PORT' or 'ray://HOST:PORT'")
    socket.create_connection((parts["host"].strip("[]"), int(parts["port"])), ANSWER).close()
