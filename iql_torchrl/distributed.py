"""One run on several processes: the group of ranks, what they exchange, and the update they share."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchrl.checkpoint import GlobalRNGState

from iql_torchrl.private_apis import keeps_batch_statistics, summed_in_graph

S = TypeVar("S")
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
        if size > 1 and not group_size():
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
        if group_size():
            return cls(torch.distributed.get_rank(), group_size(), local)
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
        """True on rank 0, which alone writes files, logs, evaluates and shows progress."""
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
        if self.size > 1 and group_size():
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

    def sum_each(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """Sums over ranks of tensors of any shapes, as one flat sum in the widest of their dtypes.

        None stays None: the same tensors exist on all ranks.
        """
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return list(tensors)
        flat = self.sum(torch.cat([tensor.reshape(-1) for tensor in present]))
        pieces = iter(flat.split([tensor.numel() for tensor in present]))
        return [t if t is None else next(pieces).view(t.shape).to(t.dtype) for t in tensors]

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value)

    def from_main(self, function: Callable[[], T]) -> T:
        """The result of ``function``, which rank 0 alone calls while the others wait.

        The result is pickled. An exception on rank 0 is raised on all ranks.
        """
        if self.size == 1:
            return function()
        result, failure = _attempt(lambda: _picklable(function())) if self.is_main else (None, None)
        sent: list[Any] = [result, _sendable(failure)]
        torch.distributed.broadcast_object_list(sent, 0)
        failure = sent[1] if failure is None else failure
        if failure is not None:
            raise failure
        returned: T = sent[0]
        return returned

    def gather(self, value: T) -> list[T] | None:
        """The ranks' values in order, on rank 0; None on the others. Values are pickled."""
        if self.size == 1:
            return [value]
        values = self._from_all(lambda: _picklable(value))
        return values if self.is_main else None

    def _from_all(self, function: Callable[[], Any]) -> list[Any]:
        """What ``function`` returns on each rank, on every rank; where one raises, all raise."""
        result, failure = _attempt(function)
        received: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(received, (result, _sendable(failure)))
        if failure is not None:
            raise failure
        for number, (_, error) in enumerate(received):
            if error is not None:
                raise RuntimeError(f"rank {number} failed, so all ranks stop: {error}") from error
        return [each for each, _ in received]

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
        results: list[T] = []
        self._from_all(lambda: results.append(function()))
        self.share_random_state()
        return results[0]

    def share_random_state(self) -> None:
        """Give the global generators of Python, NumPy and torch on all ranks the state of rank 0's."""
        if self.size > 1:
            GlobalRNGState().load_state_dict(self.from_main(GlobalRNGState().state_dict))

    def check_same(self, value: Any, message: str) -> None:
        """Raise ``ValueError`` with ``message`` on all ranks unless all have an equal ``value``."""
        if self.size > 1:
            first, *others = self._from_all(lambda: _picklable(value))
            if any(other != first for other in others):
                raise ValueError(message)


def group_size() -> int:
    """Ranks of the initialised ``torch.distributed`` process group; 0 without a group."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r}; torchrun sets it to an integer.")
    return int(text)


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result, or the exception."""
    try:
        return function(), None
    except Exception as error:
        return None, error


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


def _sendable(error: Exception | None) -> Exception | None:
    """The exception, or one with its text where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def data_parallel(step: S, ranks: Ranks) -> S:
    """Make ``step`` train one network on all ranks; returns the step itself.

    Call it on every rank. Parameters, buffers and targets, the states of optimizer and schedulers and
    the global random generators become those of rank 0. After that every rank calls the step with the
    same whole batch, drawn by equally seeded generators: a rank computes the losses of its own rows,
    ``rank * B // size`` to ``(rank + 1) * B // size``, and each descent sums the gradients over ranks
    once, before clipping. So all ranks keep the same state, which does not depend on their number.
    Means are those of the whole batch, also with masks and priority weights; the metrics, and the
    priority and log-probability written into the batch, are those of the whole batch on every rank.

    ``compiled`` and, on a CPU, ``captured`` accept the step: its sums are nodes of the one graph
    (functional all-reduces, each with a wait; ``private_apis.summed_in_graph``), in the sequential
    order three: V's gradients, those of actor and critics, and the metrics; one more, the largest
    error, for the value objectives "exponential" and "gumbel". On a GPU ``captured`` refuses it.

    Dropout draws on each rank for its own rows, so it does not give the numbers of one process. With
    one rank nothing is changed.

    Raises:
        TypeError: no ``IQLStep``, plain or compiled.
        ValueError: a network with layers that keep statistics of batches (BatchNorm): each rank would
            see those of its own rows; a step with ``independent_ranks``; or one of a population, whose
            members are divided over ranks.
    """
    plain: Any = getattr(step, "plain", None)
    if plain is None:
        raise TypeError(
            f"step is {type(step).__name__}; expected an IQLStep, such as agent.step. Make it data "
            "parallel before captured(step, replay)."
        )
    if ranks.size == 1:
        return step
    if plain.independent_ranks:
        raise ValueError(
            "the step has independent_ranks=True, which lets each rank train its own network; leave "
            "it out to train one network on all ranks."
        )
    if plain.lift is not None:
        raise ValueError(
            "the step is that of a population: its members are divided over ranks, and not the rows of "
            "its batches. Build the IQLPopulation in the process group, which divides them."
        )
    for name in plain.loss.network_names:
        for path, module in getattr(plain.loss, name).named_modules():
            if keeps_batch_statistics(module):
                raise ValueError(
                    f"{name} has a {type(module).__name__} at {path!r}, which computes statistics of "
                    "a batch: each rank would use those of its own rows. Use LayerNorm or GroupNorm "
                    "instead, or train in one process."
                )
    with torch.no_grad():
        for tensor in (*plain.loss.parameters(), *plain.loss.buffers()):
            values = tensor.contiguous()
            torch.distributed.broadcast(values, 0)
            tensor.copy_(values)
    plain.load_state_dict(ranks.from_main(plain.state_dict))
    ranks.share_random_state()
    plain.ranks = ranks
    return step
