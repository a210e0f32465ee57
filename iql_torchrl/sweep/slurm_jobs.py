"""Engine ``slurm``: an array of Slurm jobs, one for each task, by submitit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iql_torchrl.sweep.task import first_line
from iql_torchrl.sweep.worker import Job, packed, perform_packed

__all__ = ["perform_on_slurm"]

SECONDS = 0.5


class Requeued:
    """A job that submitit queues again, as it is, when Slurm preempts it or its time ends."""

    def __init__(self, order: bytes) -> None:
        self.order = order

    def __call__(self) -> None:
        perform_packed(self.order)

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(Requeued(self.order))


def perform_on_slurm(
    jobs: Sequence[Job],
    watch: Callable[[], None],
    *,
    threads: int,
    folder: Path,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Submit the jobs and wait for them; a sentence for each that failed, by its name.

    ``folder``: of submitit's files, on a file system that all nodes reach. ``options``: of
    ``submitit.AutoExecutor.update_parameters`` (``slurm_partition``, ``timeout_min``, ...), and
    ``cluster="local"`` to run the jobs on this machine. Jobs are cancelled when this process is
    interrupted.

    Raises ``ImportError`` without submitit, ``RuntimeError`` where there is no Slurm.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            'engine="slurm" needs submitit; install it with pip install "iql_torchrl[slurm]".'
        ) from error
    parameters = dict(options)
    cluster = parameters.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise RuntimeError(
            f"engine='slurm' finds no Slurm on this machine ({first_line(error)}); run it where "
            "sbatch works, or use engine='local'."
        ) from error
    executor.update_parameters(**{"cpus_per_task": threads, **parameters})
    with executor.batch():  # one array of jobs
        submitted = {job.name: executor.submit(Requeued(packed(job, threads))) for job in jobs}
    try:
        while not all(each.done() for each in submitted.values()):
            watch()
            time.sleep(SECONDS)
    except BaseException:
        for each in submitted.values():
            each.cancel(check=False)
        raise
    failures = {}
    for name, each in submitted.items():
        if (failure := each.exception()) is not None:
            failures[name] = _last_line(failure)
    return failures


def _last_line(error: BaseException) -> str:
    """Of a submitit failure, which contains the traceback of the job."""
    lines = [line for line in str(error).splitlines() if line.strip() and set(line) - {"-"}]
    named = [line for line in lines if "Error" in line and not line.startswith((" ", "/"))]
    return (named or lines or [type(error).__name__])[-1]
