"""Engine ``ray``: tasks with retries on a Ray cluster, or on one that is started here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iql_torchrl.sweep.task import first_line
from iql_torchrl.sweep.worker import Job, packed, perform_packed

__all__ = ["perform_on_ray"]

SECONDS = 0.5
RETRIES = 3


def perform_on_ray(
    jobs: Sequence[Job],
    watch: Callable[[], None],
    *,
    workers: int,
    threads: int,
    address: str | None = None,
) -> dict[str, str]:
    """Perform the jobs as Ray tasks of ``threads`` CPUs; a sentence for each that failed, by its name.

    Uses the connection that exists, else connects to ``address``, else starts Ray here with
    ``workers * threads`` CPUs; what was started or connected here is shut down at the end. Ray
    repeats a task whose worker or node dies, up to three times; it then continues from its folder,
    which every node must reach under the same path.

    Raises ``ImportError`` without ray, and ``ConnectionError`` for an address without a cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'engine="ray" needs ray; install it with pip install "iql_torchrl[ray]".'
        ) from error
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, workers * threads)
    try:
        perform = ray.remote(perform_packed).options(num_cpus=threads, max_retries=RETRIES)
        names = {perform.remote(packed(job, threads)): job.name for job in jobs}
        failures, waiting = {}, list(names)
        while waiting:
            finished, waiting = ray.wait(waiting, timeout=SECONDS)
            for each in finished:
                try:
                    ray.get(each)
                except ray.exceptions.RayTaskError as error:
                    failures[names[each]] = (
                        f"{type(error.cause).__name__}: {first_line(error.cause)}"
                    )
                except ray.exceptions.RayError as error:
                    failures[names[each]] = first_line(error)
            watch()
        return failures
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: object, address: str | None, cpus: int) -> None:
    options = {"include_dashboard": False, "num_cpus": cpus} if address is None else {}
    try:
        ray.init(address=address, log_to_driver=False, **options)  # type: ignore[attr-defined]
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        if address is None:
            raise
        raise ConnectionError(
            f"address is {address!r}, where no Ray cluster answers ({first_line(error)}); start one "
            "with ray start --head, or leave address out to start Ray on this machine."
        ) from error
