"""The code in the process of a ``BackgroundEvaluation``, and the messages it receives and sends."""

from __future__ import annotations

import _thread
import contextlib
import io
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

import cloudpickle
import gymnasium
import torch
from torch import Tensor, nn

from iql_torchrl.config import Arithmetic
from iql_torchrl.evaluation.process_end import GRACE, LEAVE
from iql_torchrl.evaluation.rollout import Evaluation, evaluate

__all__ = [
    "BOOTSTRAP",
    "Failure",
    "Structure",
    "bootstrap",
    "named_tensors",
    "received",
    "register",
    "registrations",
    "send",
    "serve",
]


def bootstrap(module: str) -> str:
    """The program of a process that calls ``module.serve(requests, replies)``; see ``start``.

    It receives ``sys.path`` first. The pipes are moved from stdin and stdout to other descriptors,
    so that an environment may print.
    """
    return f"""
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import os, pickle, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: None)
requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
sys.path[:] = pickle.load(requests)
from {module} import serve
serve(requests, replies)
"""


BOOTSTRAP = bootstrap(__name__)

LARGE = 100 * 2**20


@dataclass(frozen=True)
class Structure:
    """The first message: the pickled policy and ``make_env``, and the keywords of ``evaluate``."""

    policy: bytes
    make_env: bytes
    registrations: tuple[bytes, ...]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, policy: nn.Module, make_env: Any, arguments: dict[str, Any]) -> Structure:
        """Raises ``TypeError`` for objects that cannot be pickled; warns of a large ``make_env``."""
        environment = _packed("make_env", make_env)
        if len(environment) > LARGE:
            warnings.warn(
                f"make_env sends {len(environment) / 2**20:.0f} MiB to the evaluation process; a "
                f"function that refers to a dataset sends all of it: pass dataset.make_env itself",
                stacklevel=3,
            )
        return cls(_packed("policy", policy), environment, registrations(), arguments)

    def rebuilt(self) -> tuple[Any, Any]:
        """The policy, on its device, and ``make_env``."""
        try:
            register(self.registrations)
            policy, make_env = (
                torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)
                for packed in (self.policy, self.make_env)
            )
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"policy or make_env cannot be rebuilt in the evaluation process ({error}); define "
                f"their parts in the script itself, or in modules that it can import too"
            ) from error
        return policy.to(self.arguments["device"]), make_env


class ProcessTraceback(Exception):
    """The cause of an error from the other process: its traceback there."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


@dataclass(frozen=True)
class Failure:
    """An exception to be sent: its pickle, its message and its traceback as text."""

    pickled: bytes
    summary: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        summary = f"{type(error).__name__}: {error}"
        try:
            pickled = cloudpickle.dumps(error)
            pickle.loads(pickled)
        except Exception:  # a class whose arguments pickle does not know
            pickled = pickle.dumps(RuntimeError(summary))
        return cls(pickled, summary, "".join(traceback.format_exception(error)))

    def revived(self) -> Exception:
        """The exception, with its traceback in the other process as the cause."""
        try:
            error: Exception = pickle.loads(self.pickled)
        except Exception:  # its class cannot be imported here
            error = RuntimeError(self.summary)
        error.__cause__ = ProcessTraceback(self.trace)
        return error


def _packed(name: str, thing: Any) -> bytes:
    file = io.BytesIO()
    protocol = pickle.DEFAULT_PROTOCOL
    try:
        torch.save(thing, file, pickle_module=cloudpickle, pickle_protocol=protocol)
    except Exception as error:
        raise TypeError(
            f"{name} cannot be sent to the evaluation process ({type(error).__name__}: {error}); "
            f"it must not contain open files, locks or running environments: make them in "
            f"the function that make_env is"
        ) from error
    return file.getvalue()


def registrations() -> tuple[bytes, ...]:
    """Environments that the program registered, for ``gymnasium.make`` in the other process."""
    packed = []
    for spec in gymnasium.registry.values():
        if not str(spec.entry_point).startswith("gymnasium."):
            with contextlib.suppress(
                Exception
            ):  # left out; an error follows only if make_env uses it
                packed.append(cloudpickle.dumps(spec))
    return tuple(packed)


def register(packed: Iterable[bytes]) -> None:
    """Register what :func:`registrations` returned in another process."""
    for spec_bytes in packed:
        with contextlib.suppress(ImportError, AttributeError):
            spec = pickle.loads(spec_bytes)
            gymnasium.registry.setdefault(spec.id, spec)


def named_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, including buffers that are not in the state dict."""
    return dict(chain(policy.named_parameters(), policy.named_buffers()))


def send(message: Any, pipe: IO[bytes]) -> None:
    pickle.dump(message, pipe)
    pipe.flush()


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer requests in order until the parent process ends, or sends the signal ``LEAVE``.

    The pipe delivers a ``Structure``, then pairs of a snapshot and an ``Arithmetic``; the answer to
    each pair is an ``Evaluation`` or a ``Failure``.
    """
    inbox = received(requests)
    structure: Structure | None = inbox.get()
    built = None
    while structure is not None and (request := inbox.get()) is not None:
        try:
            built = built or structure.rebuilt()
            reply: Evaluation | Failure = _evaluated(*built, structure.arguments, *request)
        except Exception as error:
            reply = Failure.of(error)
        send(reply, replies)


def received(requests: IO[bytes]) -> queue.SimpleQueue[Any]:
    """The messages of the parent process as they arrive, then None.

    From then on this process ends when the parent does, or on the signal ``LEAVE``: ``SystemExit``
    is raised in the main thread, and lets ``evaluate`` close its environments.
    """
    signal.signal(LEAVE, lambda *_: sys.exit(128 + LEAVE))
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, inbox), daemon=True).start()
    threading.Thread(target=_follow_parent, args=(os.getppid(), inbox), daemon=True).start()
    return inbox


def _evaluated(
    policy: Any, make_env: Any, arguments: dict[str, Any], saved: bytes, settings: Arithmetic
) -> Evaluation:
    settings.adopt()
    snapshot = torch.load(io.BytesIO(saved), weights_only=True)
    with torch.no_grad():
        for name, tensor in named_tensors(policy).items():
            new = snapshot[name].to(tensor.device)
            if not torch.equal(tensor, new):  # expanded constants cannot be written in place
                tensor.copy_(new)
    return evaluate(policy, make_env, **arguments)


def _receive(requests: IO[bytes], inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(pickle.load(requests))
    except (EOFError, OSError, pickle.UnpicklingError):
        _leave(inbox)


def _follow_parent(parent: int, inbox: queue.SimpleQueue[Any]) -> None:
    # A process that the parent forked keeps the pipe open after the parent's end: no end of file.
    while os.getppid() == parent:
        time.sleep(1.0)
    _leave(inbox)


def _leave(inbox: queue.SimpleQueue[Any]) -> None:
    inbox.put(None)
    _thread.interrupt_main(LEAVE)
    time.sleep(GRACE)
    os._exit(1)
