"""Streams and graphs of ``torch.cuda`` on the CPU, with what torch demands of their order.

A capture executes nothing that writes to memory and keeps every operator with its tensors; a replay
runs the operators on the same tensors. What a CUDA device would refuse raises ``RuntimeError``:
reading a number during a capture, drawing from a generator that was not registered, a capture
outside of the stream's device, a replay of a graph whose cuBLAS workspace was cleared.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iql_torchrl.update.captured import CudaGraph

WORKSPACE = 32 * 2**20  # bytes of cuBLAS for each stream, as on an H100
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")  # each waits for the device


class Event(NamedTuple):
    """A call with the device and the stream that were current."""

    what: str
    device: torch.device
    stream: Any


class FakeCuda:
    """The state of the fake: ``events`` so far, current ``device`` and ``stream``.

    ``end_fails``: an exception that the end of the next capture raises.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.end_fails: Exception | None = None
        self.captured_by: dict[int, Any] = {}  # generators that are marked as being captured
        self.graphs: weakref.WeakSet[FakeGraph] = weakref.WeakSet()
        self.streams: weakref.WeakSet[FakeStream] = weakref.WeakSet()
        kinds = (FakeStream, FakeGraph, FakeCapture, FakeGenerator)
        stream, graph, capture, generator = (
            type(kind.__name__, (kind,), {"cuda": self}) for kind in kinds
        )
        self.device = torch.device("cuda", 0)
        self.stream = self.default_stream = stream(self.device)
        for name, value in {
            "Stream": stream,
            "CUDAGraph": graph,
            "graph": capture,
            "device": lambda device: Current(self, device=torch.device(device)),
            "stream": lambda stream: Current(self, stream=stream),
            "current_stream": lambda device=None: self.stream,
            "synchronize": lambda device=None: None,
            "memory_allocated": lambda device=None: self.allocated(),
            "set_sync_debug_mode": lambda mode: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)
        monkeypatch.setattr(torch, "Generator", generator)
        monkeypatch.setattr(CudaGraph, "supports", staticmethod(lambda device: True))

    def note(self, what: str) -> None:
        self.events.append(Event(what, self.device, self.stream))

    def names(self, start: int = 0) -> list[str]:
        return [event.what for event in self.events[start:]]

    def captures(self) -> int:
        return self.names().count("begin")

    def allocated(self) -> int:
        """Bytes of the results inside of graphs, and of each stream's workspace."""
        return sum(graph.bytes() for graph in self.graphs) + WORKSPACE * len(self.streams)


class Current:
    """A context in which another device or stream is the current one."""

    def __init__(self, cuda: FakeCuda, **values: Any) -> None:
        self.cuda, self.values = cuda, values

    def __enter__(self) -> None:
        self.before = {name: getattr(self.cuda, name) for name in self.values}
        vars(self.cuda).update(self.values)

    def __exit__(self, *_: object) -> None:
        vars(self.cuda).update(self.before)


class FakeStream:
    cuda: FakeCuda

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = self.cuda.device if device is None else torch.device(device)
        self.cleared = 0  # how often a graph's end has cleared its workspace
        self.cuda.streams.add(self)

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.note("own waits" if self is not self.cuda.default_stream else "current waits")


class FakeGenerator(torch.Generator):
    """A CPU generator with what only CUDA's have."""

    cuda: FakeCuda

    def graphsafe_set_state(self, other: torch.Generator) -> None:
        self.set_state(other.get_state())
        self.cuda.captured_by.pop(id(self), None)


class Operation(NamedTuple):
    function: Any
    arguments: Any
    options: Any
    results: Any
    in_place: bool


class FakeGraph:
    cuda: FakeCuda

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.generators: list[torch.Generator] = []
        self.stream: FakeStream | None = None  # where it was captured
        self.cuda.graphs.add(self)

    def register_generator_state(self, generator: torch.Generator) -> None:
        if id(generator) in self.cuda.captured_by:
            raise RuntimeError("the generator is marked as being captured")
        self.generators.append(generator)
        self.cuda.note("register")

    def replay(self) -> None:
        if self.stream is None:
            raise RuntimeError("called replay without a preceding successful capture")
        if self.cuda.device != self.stream.device:
            raise RuntimeError("replayed while another device is current")
        if self.stream.cleared != self.cleared:
            raise RuntimeError("an illegal memory access: the cuBLAS workspace is gone")
        self.cuda.note("replay")
        with torch.no_grad():
            for function, arguments, options, results, in_place in self.operations:
                fresh = function(*arguments, **options)
                if not in_place:
                    for kept, new in zip(tree_leaves(results), tree_leaves(fresh), strict=True):
                        if isinstance(kept, torch.Tensor):
                            kept.copy_(new)

    def reset(self) -> None:
        if self.stream is not None:
            self.stream.cleared += 1
            self.cuda.note("reset")
        self.stream = None
        self.operations.clear()

    def __del__(self) -> None:
        self.reset()

    def bytes(self) -> int:
        results = [
            leaf for o in self.operations if not o.in_place for leaf in tree_leaves(o.results)
        ]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in results
            if isinstance(t, torch.Tensor)
        }
        return sum(storages.values())


class Recorder(TorchDispatchMode):
    """Keeps operators in ``graph``; those that write to their arguments are not executed."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options, schema = options or {}, function._schema
        name = schema.name.removeprefix("aten::")
        if name in READS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        generator = options.get("generator")
        if generator is not None and all(
            generator._cdata != registered._cdata for registered in self.graph.generators
        ):
            raise RuntimeError(f"{name}: a generator that is not registered with the graph")
        if schema.is_mutable:
            results = written(schema, arguments, options)
        else:
            results = without_drawing(function, arguments, options)
        in_place = schema.is_mutable or any(r.alias_info is not None for r in schema.returns)
        self.graph.operations.append(Operation(function, arguments, options, results, in_place))
        return results


def one_hot(categories: torch.Tensor, num_classes: int) -> torch.Tensor:
    """As on CUDA, where torch does not read the categories to check them."""
    places = torch.arange(num_classes, device=categories.device)
    return (categories.unsqueeze(-1) == places).long()


def without_drawing(function: Any, arguments: Any, options: Any) -> Any:
    """The operator's results; the generator that it draws from stays as it was."""
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return function(*arguments, **options)
    generator = options.get("generator") or torch.default_generator
    state = generator.get_state()
    results = function(*arguments, **options)
    generator.set_state(state)
    return results


def written(schema: Any, arguments: Any, options: Any) -> Any:
    """What an operator that writes to its arguments returns: those arguments."""
    results = []
    for value in schema.returns:
        assert value.alias_info is not None, f"{schema.name} also returns something new"
        for place, parameter in enumerate(schema.arguments):
            alias = parameter.alias_info
            if alias is not None and alias.before_set == value.alias_info.before_set:
                positional = place < len(arguments)
                results.append(arguments[place] if positional else options[parameter.name])
    assert len(results) == len(schema.returns), schema
    return None if not results else results[0] if len(results) == 1 else tuple(results)


class FakeCapture:
    """``torch.cuda.graph``; as torch's, a failing end leaves the capture stream current."""

    cuda: FakeCuda

    def __init__(self, graph: FakeGraph, *, stream: FakeStream) -> None:
        self.graph, self.stream = graph, stream
        self.context = Current(self.cuda, stream=stream)

    def __enter__(self) -> None:
        if self.cuda.device != self.stream.device:
            raise RuntimeError("captured on a stream of another device: the graph would be empty")
        self.context.__enter__()
        self.cuda.note("begin")
        for generator in self.graph.generators:
            self.cuda.captured_by[id(generator)] = generator
        self.mode = Recorder(self.graph)
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        failure, self.cuda.end_fails = self.cuda.end_fails, None
        if failure is not None:
            raise failure
        self.cuda.note("end")
        self.cuda.captured_by.clear()
        self.graph.stream, self.graph.cleared = self.stream, self.stream.cleared
        self.context.__exit__()
