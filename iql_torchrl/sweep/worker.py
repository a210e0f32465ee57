"""A job as bytes, and the process that performs jobs for the local engine."""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import replace
from typing import IO, Any, Protocol

import cloudpickle

from iql_torchrl.config import Arithmetic
from iql_torchrl.evaluation.background_worker import (
    Failure,
    received,
    register,
    registrations,
    send,
)

__all__ = ["Job", "packed", "perform_packed", "serve"]


class Job(Protocol):
    """A unit of work that may be performed again at any time: ``Task`` or ``RankTask``."""

    @property
    def name(self) -> str: ...

    @property
    def finished(self) -> bool: ...

    @property
    def total(self) -> int: ...

    @property
    def done(self) -> int: ...

    def perform(self) -> None: ...


def packed(job: Job, threads: int) -> bytes:
    """The job with what it needs elsewhere: modules' folders, environments, torch's settings.

    Raises ``TypeError`` for an ``env`` or ``score`` that cannot be pickled.
    """
    arithmetic = replace(Arithmetic.current(), threads=threads)
    path = [os.path.abspath(entry) for entry in sys.path]
    try:
        own = cloudpickle.dumps(job)
    except Exception as error:
        raise TypeError(
            f"env or score cannot be sent to workers ({type(error).__name__}: {error}); they must "
            "not contain open files, locks or running environments."
        ) from error
    return pickle.dumps((path, registrations(), arithmetic, own))


def perform_packed(order: bytes) -> None:
    path, environments, arithmetic, own = pickle.loads(order)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    register(environments)
    arithmetic.adopt()
    job: Any = pickle.loads(own)
    job.perform()


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Perform orders until the parent process ends; the answer to each is None or a ``Failure``."""
    inbox = received(requests)
    while (order := inbox.get()) is not None:
        try:
            perform_packed(order)
            reply: Failure | None = None
        except Exception as error:
            reply = Failure.of(error)
        send(reply, replies)
