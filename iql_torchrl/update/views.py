"""A traced update in which parameters are read as views of the ranges that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

__all__ = ["through_ranges"]


def through_ranges(
    graph: fx.GraphModule, inputs: Sequence[Any], ranges: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[int]]:
    """The graph without those of its inputs that lie in ``ranges``, and which inputs it has kept.

    ``inputs`` are the tensors that the graph was traced with. An input in the storage of a range is
    computed from the range's own input, as a view: two inputs of one storage, of which one is
    written to, are no program that Inductor compiles well. A range that is no input of the graph is
    not written to, and what lies in it stays as it is.
    """
    if not ranges:
        return graph, list(range(len(inputs)))
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    places = [node for node in copied.nodes if node.op == "placeholder"]
    holders = {
        node: value
        for node, value in zip(places, inputs, strict=True)
        if any(value is held for held in ranges)
    }
    node_of = {held.untyped_storage().data_ptr(): node for node, held in holders.items()}
    first = next(node for node in copied.nodes if node.op != "placeholder")
    kept: list[int] = []
    for i, (node, value) in enumerate(zip(places, inputs, strict=True)):
        address = value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0
        if node in holders or address not in node_of:
            kept.append(i)
            continue
        with copied.inserting_before(first):
            view = copied.call_method("detach", (node_of[address],))
            if value.is_contiguous():
                start, size = value.storage_offset(), value.numel()
                view = copied.call_method("narrow", (view, 0, start, size))
                view = copied.call_method("view", (view, tuple(value.shape)))
            else:
                form = (tuple(value.shape), value.stride(), value.storage_offset())
                view = copied.call_method("as_strided", (view, *form))
            if value.requires_grad:
                view = copied.call_method("requires_grad_", (view,))
        node.replace_all_uses_with(view)
        copied.erase_node(node)
    return fx.GraphModule(graph, copied), kept
