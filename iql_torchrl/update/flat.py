"""Flat storage: parameters, moments and targets that lie one after the other in a few tensors.

The graph forms of the update read and write a whole range with one operation. The user's
parameters, the optimizer's state and the target critics are views into the ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from iql_torchrl.host import version_of
from iql_torchrl.objectives.conversion import NETWORKS

__all__ = ["Flat", "FlatStorage", "Piece", "Range"]

ALIGNMENT = 64  # bytes; every piece starts at a multiple, as tensors of their own do
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A tensor's place in a range: ``parameter`` counts the optimizer's, ``start`` elements."""

    parameter: int
    start: int
    shape: tuple[int, ...]
    size: int

    def of(self, flat: Tensor) -> Tensor:
        """This piece of a range's tensor, as a view."""
        return flat[self.start : self.start + self.size].view(self.shape)


class Range(NamedTuple):
    """The parameters of one network in one group of the optimizer, side by side.

    ``length`` counts elements, with the gaps that align the pieces; gaps hold zeros. ``whole``:
    all pieces are trained and were updated equally often. ``followed``: every piece has a target.
    """

    group: int
    network: int
    pieces: tuple[Piece, ...]
    length: int
    whole: bool
    followed: bool

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The pieces' tensors, one each, in a new tensor ``(length,)``."""
        parts: list[Tensor] = []
        ends = [*(piece.start for piece in self.pieces[1:]), self.length]
        for piece, tensor, end in zip(self.pieces, tensors, ends, strict=True):
            parts.append(tensor.reshape(-1))
            if end > piece.start + piece.size:
                parts.append(tensor.new_zeros(end - piece.start - piece.size))
        return torch.cat(parts)


class Flat(NamedTuple):
    """Tensors of the ranges: ``parameters``, ``averages`` and ``squares`` ``(length,)`` each.

    ``steps``: counts of updates, ``(pieces,)``. ``targets``: only of ranges that are followed.
    """

    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    targets: list[Tensor]


class FlatStorage:
    """The ranges of a loss and an Adam optimizer, and what was put into them.

    Args:
        loss: its networks' parameters are laid out; those that share a trunk are not.
        optimizer: every parameter that is trained has its Adam state.
        followers: pairs of a live tensor and the target that follows it.
    """

    def __init__(
        self,
        loss: nn.Module,
        optimizer: Optimizer,
        followers: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.loss, self.optimizer = loss, optimizer
        self._follower = {id(live): target for live, target in followers}
        self.ranges: tuple[Range, ...] = ()
        self.flat: Flat | None = None
        self._addresses: list[tuple[Tensor, int]] = []
        self._states: list[tuple[Tensor, bool, dict[str, Any], tuple[Tensor, ...]]] = []
        self._versions: list[int] = []
        self._listed: list[Tensor] = []

    def current(self) -> Flat | None:
        """The ranges, laid out again where a tensor was replaced; None where some do not fit.

        They do not fit where a tensor is sparse, not contiguous, no plain tensor, in shared memory,
        or part of a storage that holds something else. New ranges are new tensors: whoever kept an
        old view keeps its values.
        """
        if not self._addresses or not self._in_place():
            with torch.no_grad():
                self._lay_out()
        return self.flat

    def counted(self) -> None:
        """Note that an update of this storage was made, in which all pieces of a range counted."""
        if self.flat is not None:
            self._versions = [version_of(steps) for steps in self.flat.steps]

    def follows(self, live: Tensor) -> bool:
        """Whether the tensor lies in a range that has targets."""
        return any(
            self._listed[piece.parameter] is live
            for form in self.ranges
            if form.followed
            for piece in form.pieces
        )

    # -- what was laid out is where it was -------------------------------------------------------

    def _in_place(self) -> bool:
        for tensor, address in self._addresses:
            if tensor.data_ptr() != address:
                return False
        listed = [p for group in self.optimizer.param_groups for p in group["params"]]
        if len(listed) != len(self._states):
            return False
        states = self.optimizer.state
        for now, (parameter, trained, state, parts) in zip(listed, self._states, strict=True):
            if now is not parameter or now.requires_grad is not trained:
                return False
            if parts:
                average, square, step = parts
                if (
                    states.get(now) is not state
                    or state["exp_avg"] is not average
                    or state["exp_avg_sq"] is not square
                    or state["step"] is not step
                ):
                    return False
            elif now in states:
                return False
        if self.flat is None:
            return True
        versions = [version_of(steps) for steps in self.flat.steps]
        if versions != self._versions:  # another update counted: all parameters alike?
            self._versions = versions
            pairs = zip(self.ranges, self.flat.steps, strict=True)
            return all(_alike(steps) for r, steps in pairs if r.whole)
        return True

    # -- laying out ------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        groups = self.optimizer.param_groups
        listed = [p for group in groups for p in group["params"]]
        group_of = [i for i, group in enumerate(groups) for _ in group["params"]]
        ranges = tuple(self._form(listed, group_of))
        self.flat = self._fill(listed, ranges) if self._fits(listed, ranges) else None
        self.ranges = () if self.flat is None else ranges
        self._listed = listed
        leaves = [*listed, *self._follower.values()]
        self._addresses = [(leaf, leaf.data_ptr()) for leaf in leaves]
        states = self.optimizer.state
        self._states = [
            (p, p.requires_grad, states.get(p, {}), _parts(states.get(p, {}))) for p in listed
        ]
        self.counted()

    def _form(self, listed: Sequence[Tensor], group_of: Sequence[int]) -> Iterator[Range]:
        """Ranges of the parameters: side by side are those of one group, network, dtype, device."""
        network_of = {
            id(parameter): number
            for number, network in enumerate(NETWORKS)
            for name, parameter in self.loss.named_parameters()
            if name.startswith(f"{network}_params.")
        }
        sets: dict[Any, list[int]] = {}
        for i, p in enumerate(listed):
            if id(p) in network_of:
                key = (group_of[i], network_of[id(p)], p.dtype, p.device)
                sets.setdefault(key, []).append(i)
        for (group, network, _, _), members in sets.items():
            pieces, end = [], 0
            for i in members:
                p, size = listed[i], listed[i].numel()
                pieces.append(Piece(i, end, tuple(p.shape), size))
                unit = max(1, ALIGNMENT // p.element_size())
                end = -(-(end + size) // unit) * unit
            states = [self.optimizer.state.get(listed[i], {}) for i in members]
            trained = all(listed[i].requires_grad for i in members)
            whole = trained and len({float(s["step"]) for s in states}) == 1
            followed = all(id(listed[i]) in self._follower for i in members)
            yield Range(group, network, tuple(pieces), end, whole, followed)

    def _fits(self, listed: Sequence[Tensor], ranges: Sequence[Range]) -> bool:
        places = [piece.parameter for r in ranges for piece in r.pieces]
        trained = [i for i, p in enumerate(listed) if p.requires_grad]
        if len(set(places)) != len(places) or not set(trained) <= set(places):
            return False
        if not ranges or any(entry for entry in getattr(self.loss, "shared").trunk):
            return False
        states = self.optimizer.state
        for r in ranges:
            own = [[listed[p.parameter] for p in r.pieces]]
            if r.followed:
                own.append([self._follower[id(p)] for p in own[0]])
            laid = [states[p] for p in own[0] if p in states]
            if not all(_is_plain(t) for tensors in own for t in tensors):
                return False
            if not all(self._may_move(tensors, r) for tensors in own):
                return False
            for state, p in [(states[p], p) for p in own[0] if p in states]:
                moments = [state.get(name) for name in MOMENTS]
                if not all(_is_plain(m) and m.shape == p.shape and m.dtype == p.dtype
                           and m.device == p.device for m in moments):
                    return False
            if len({(s["step"].dtype, s["step"].device) for s in laid}) > 1:
                return False
        return True

    def _may_move(self, tensors: Sequence[Tensor], form: Range) -> bool:
        """Whether nothing else can lie in the storage of these tensors."""
        if _joined(tensors, form) is not None:
            return True
        known = {(id(tensor), address) for tensor, address in self._addresses}
        return all(
            t.untyped_storage().nbytes() == t.numel() * t.element_size()
            or (self.flat is not None and (id(t), t.data_ptr()) in known)
            for t in tensors
        )

    def _fill(self, listed: Sequence[Tensor], ranges: Sequence[Range]) -> Flat:
        """Tensors of the ranges with the present values, and every leaf as a view into them."""
        flat = Flat([], [], [], [], [])
        states = self.optimizer.state
        for r in ranges:
            parameters = [listed[piece.parameter] for piece in r.pieces]
            flat.parameters.append(_moved(parameters, r))
            if r.followed:
                flat.targets.append(_moved([self._follower[id(p)] for p in parameters], r))
            held = [states.get(p) or {} for p in parameters]
            for name, tensors in zip(MOMENTS, (flat.averages, flat.squares), strict=True):
                tensors.append(_gathered(held, name, r, parameters[0]))
            flat.steps.append(_gathered_steps(held))
        return flat


def _parts(state: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(state[name] for name in (*MOMENTS, "step")) if state else ()


def _alike(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _is_plain(tensor: Any) -> bool:
    """Whether it is dense and contiguous, and of this process alone."""
    return (
        isinstance(tensor, Tensor)
        and type(tensor.data) is Tensor
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.is_floating_point()
        and not tensor.is_inference()
        and tensor.numel() > 0
        and (tensor.device.type == "cuda" or not tensor.is_shared())
    )


def _joined(tensors: Sequence[Tensor], form: Range) -> Tensor | None:
    """The range's tensor where the tensors lie in one already, and nothing else does."""
    first = tensors[0]
    storage, size = first.untyped_storage(), first.element_size()
    if storage.nbytes() != form.length * size or first.data_ptr() % ALIGNMENT:
        return None
    for piece, tensor in zip(form.pieces, tensors, strict=True):
        if tensor.data_ptr() != storage.data_ptr() + piece.start * size:
            return None
        if tensor.dtype != first.dtype or tuple(tensor.shape) != piece.shape:
            return None
    return first.detach().as_strided((form.length,), (1,), 0)


def _moved(tensors: Sequence[Tensor], form: Range) -> Tensor:
    flat = _joined(tensors, form)
    if flat is None:
        flat = form.join([tensor.detach() for tensor in tensors])
        for piece, tensor in zip(form.pieces, tensors, strict=True):
            tensor.data = piece.of(flat)
    return flat


def _gathered(states: Sequence[dict[str, Any]], name: str, form: Range, like: Tensor) -> Tensor:
    """The range's tensor of the moments ``name``; a parameter without state has zeros."""
    if all(states):
        flat = _joined([state[name] for state in states], form)
        if flat is not None:
            return flat
    flat = torch.zeros(form.length, dtype=like.dtype, device=like.device)
    for piece, state in zip(form.pieces, states, strict=True):
        if state:
            piece.of(flat).copy_(state[name])
            state[name] = piece.of(flat)
    return flat


def _gathered_steps(states: Sequence[dict[str, Any]]) -> Tensor:
    counts = [state["step"] for state in states if state]
    if len(counts) == len(states) and counts[0].untyped_storage().nbytes() == len(counts) * counts[0].element_size():
        size, start = counts[0].element_size(), counts[0].untyped_storage().data_ptr()
        if [count.data_ptr() for count in counts] == [start + i * size for i in range(len(counts))]:
            return counts[0].detach().as_strided((len(counts),), (1,), 0)
    first = next((state["step"] for state in states if state), torch.zeros(()))
    steps = torch.zeros(len(states), dtype=first.dtype, device=first.device)
    for place, state in zip(steps.unbind(), states, strict=True):
        if state:
            place.copy_(state["step"])
            state["step"] = place
    return steps
