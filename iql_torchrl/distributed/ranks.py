"""The group of processes that train one run, and what they exchange."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchrl.checkpoint import GlobalRNGState

from iql_torchrl.private_apis import summed_in_graph

__all__ = ["Ranks"]

T = TypeVar("T")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# An evaluation of rank 0, for which the others wait, may take this long.
TIMEOUT = timedelta(hours=12)


class Ranks:
    """The ranks of a ``torch.distributed`` process group; ``Ranks()`` is one process without a group.

    With one rank every method returns what it was given, and nothing is communicated.

    Attributes: ``rank`` in [0, ``size``), ``size``, ``local_rank`` (the number of this process on its
    machine), ``device`` (``cuda:<local_rank>`` where CUDA is available, else the CPU).

    Raises ``RuntimeError`` on ``size > 1`` without an initialised process group.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        if size > 1 and not _has_group():
            raise RuntimeError(
                f"there are {size} ranks and no torch.distributed process group; use "
                "Ranks.from_environment() under torchrun, or call init_process_group first."
            )
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @classmethod
    def from_environment(cls, timeout: timedelta = TIMEOUT) -> Ranks:
        """The ranks of an initialised process group, else of torchrun's variables, else one process.

        Under torchrun with more than one process it initialises the group (gloo, and NCCL for tensors
        on GPUs) and makes ``cuda:<LOCAL_RANK>`` the current device. ``timeout``: how long a rank waits
        for the others.

        Raises ``ValueError`` where torchrun's variables are incomplete or are no numbers.
        """
        local = _number("LOCAL_RANK", 0)
        if _has_group():
            there = torch.distributed
            return cls(there.get_rank(), there.get_world_size(), local)
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE is {size} and {', '.join(missing)} of torchrun's variables are not set; "
                "start the script with torchrun, or unset WORLD_SIZE for one process."
            )
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        rank = _number("RANK", 0)
        group: Any = torch.distributed  # whose types lack two public names
        store, _, _ = next(iter(group.rendezvous("env://", rank, size, timeout=timeout)))
        # After a restart torchrun's store has the addresses of the processes that have ended; gloo
        # would try to connect to them, and fail or wait (seen with torch 2.13).
        restart = _number(RESTARTS, 0)
        group.init_process_group(
            backend,
            store=group.PrefixStore(f"restart {restart}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        return cls(rank, size, local)

    @property
    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files, logs, evaluates and shows progress."""
        return self.rank == 0

    @property
    def restarts(self) -> int:
        """How often torchrun has started its processes again (``--max-restarts``); else 0."""
        return _number(RESTARTS, 0)

    def part(self, count: int) -> range:
        """Which of ``count`` things, numbered from 0, belong to this rank: consecutive ones."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def close(self) -> None:
        """Leave the process group, at the end of the program."""
        if self.size > 1 and _has_group():
            torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def only_main_prints(self) -> Iterator[None]:
        """Inside, what the other ranks print is dropped; exceptions that leave it are shown."""
        with contextlib.ExitStack() as stack:
            if not self.is_main:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    # -- what is exchanged -----------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all ranks, with the same bits on each; a new tensor."""
        if self.size == 1:
            return values
        if torch.compiler.is_compiling():
            return summed_in_graph(values)
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value)

    def broadcast(self, tensor: Tensor) -> None:
        """Write rank 0's values into ``tensor`` on all ranks."""
        if self.size > 1:
            values = tensor.detach().contiguous()
            torch.distributed.broadcast(values, 0)
            with torch.no_grad():
                tensor.detach().copy_(values)

    def from_main(self, function: Callable[[], T]) -> T:
        """The result of ``function``, which rank 0 alone calls while the others wait.

        The result is pickled. An exception on rank 0 is raised on all ranks.
        """
        if self.size == 1:
            return function()
        sent: list[Any] = [None, None]
        if self.is_main:
            try:
                sent[0] = _picklable(function())
            except Exception as error:
                sent[1] = _sendable(error)
                torch.distributed.broadcast_object_list(sent, 0)
                raise
        torch.distributed.broadcast_object_list(sent, 0)
        if sent[1] is not None:
            raise sent[1]
        result: T = sent[0]
        return result

    def gather(self, value: T) -> list[T] | None:
        """The ranks' values in order, on rank 0; None on the others. Values are pickled."""
        if self.size == 1:
            return [value]
        values = self._from_all(value)
        return values if self.is_main else None

    def _from_all(self, value: Any) -> list[Any]:
        """The ranks' values in order, on every rank; all raise where one cannot be pickled."""
        sent: tuple[Exception | None, Any]
        try:
            sent = (None, _picklable(value))
        except Exception as failure:
            sent = (_sendable(failure), None)
        received: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(received, sent)
        for number, (error, _) in enumerate(received):
            if error is not None:
                raise RuntimeError(f"rank {number} sent nothing: {error}") from error
        return [each for _, each in received]

    def main_first(self, function: Callable[[], T]) -> T:
        """The result of ``function``, called by rank 0 and then, when it has returned, by the others.

        For a function that builds files where there are none, and else opens them.
        """
        results: list[T] = []
        self.from_main(lambda: results.append(function()))
        return results[0] if results else function()

    def together(self, function: Callable[[], T]) -> T:
        """The result of ``function`` on this rank; where it raises on any rank, all ranks raise.

        Afterwards the global random generators of all ranks have the state of rank 0's, because rank 0
        may draw for something that only it does, such as an evaluation.
        """
        if self.size == 1:
            return function()
        result: Any = None
        failure: Exception | None = None
        try:
            result = function()
        except Exception as error:
            failure = error
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, None if failure is None else _sendable(failure))
        if failure is not None:
            raise failure
        for number, other in enumerate(found):
            if other is not None:
                raise RuntimeError(f"rank {number} failed, so all ranks stop: {other}") from other
        self.share_random_state()
        returned: T = result
        return returned

    def share_random_state(self) -> None:
        """Give the global generators of Python, NumPy and torch on all ranks the state of rank 0's."""
        if self.size > 1:
            GlobalRNGState().load_state_dict(self.from_main(GlobalRNGState().state_dict))

    def check_same(self, value: Any, message: str) -> None:
        """Raise ``ValueError`` with ``message`` on all ranks unless all have an equal ``value``."""
        if self.size == 1:
            return
        values = self._from_all(value)
        if any(other != values[0] for other in values):
            raise ValueError(message)


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r}; torchrun sets it to a whole number.")
    return int(text)


def _picklable(value: T) -> T:
    """``value``; raises ``TypeError`` where it cannot be sent, before other ranks wait for it."""
    try:
        pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"a {type(value).__name__} cannot be sent to the other ranks, because it cannot be pickled "
            f"({error}); return plain data, arrays or tensors."
        ) from error
    return value


def _sendable(error: Exception) -> Exception:
    """The exception, or one with its text where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
