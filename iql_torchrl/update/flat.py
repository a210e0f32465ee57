"""Flat storage: parameters, moments and targets that lie one after the other in a few tensors.

The graph forms of the update read and write a whole range with one operation. The user's
parameters, the optimizer's state and the target critics are views into the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from iql_torchrl.host import versions_of
from iql_torchrl.objectives.conversion import NETWORKS
from iql_torchrl.objectives.network_loss import NetworkLoss

__all__ = ["Flat", "FlatStorage", "Piece", "Range"]

ALIGNMENT = 64  # bytes; every piece starts at a multiple, as tensors of their own do
MOMENTS = ("exp_avg", "exp_avg_sq")
# Several optimizers may train one loss: each may lay out again what another has laid out.
_STORAGES: WeakKeyDictionary[NetworkLoss, WeakSet[FlatStorage]] = WeakKeyDictionary()


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
        optimizer: its Adam states are laid out, where there are some already.
        followers: pairs of a live tensor and the target that follows it.
    """

    def __init__(
        self,
        loss: NetworkLoss,
        optimizer: Optimizer,
        followers: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.loss, self.optimizer = loss, optimizer
        self._follower = {id(live): target for live, target in followers}
        self.ranges: tuple[Range, ...] = ()
        self.flat: Flat | None = None
        self._leaves: list[Tensor] = []
        self._addresses: list[int] = []
        self._counts: list[Tensor] = []
        self._complete = False  # whether every trained parameter has a state
        self._states: list[tuple[Tensor, bool, dict[str, Any], tuple[Tensor, ...]]] = []
        self._versions: list[int] = []
        self._listed: list[Tensor] = []
        self._objective: Any = None
        _STORAGES.setdefault(loss, WeakSet()).add(self)

    def current(self, start: Callable[[], None] | None = None) -> Flat | None:
        """The ranges, laid out again where a tensor was replaced; None where some do not fit.

        ``start`` fills empty states of the optimizer; without it they stay empty.
        They do not fit where a tensor is sparse, not contiguous, no plain tensor, already in shared
        memory, or part of a storage that may hold something else. New ranges are new tensors: whoever
        kept an old view keeps its values.
        """
        unfinished = not self._leaves or (start and not self._complete)
        if unfinished or not self._in_place() or self._reaches_others():
            if start:
                start()
            with torch.no_grad():
                self._lay_out()
        return self.flat

    def counted(self) -> None:
        """Note that an update of this storage was made, in which all pieces of a range counted."""
        if self.flat is not None:
            self._versions = self._counts_written()

    def follows(self, live: Tensor) -> bool:
        """Whether the tensor lies in a range that has targets."""
        return any(
            self._listed[piece.parameter] is live
            for form in self.ranges
            if form.followed
            for piece in form.pieces
        )

    # -- what was laid out is where it was -------------------------------------------------------

    def _reaches_others(self) -> bool:
        """Whether the policy's loss may reach other parameters than those that were counted so far."""
        return getattr(self.loss, "actor_objective", None) != self._objective

    def _in_place(self) -> bool:
        if [leaf.data_ptr() for leaf in self._leaves] != self._addresses:
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
        versions = self._counts_written()
        if versions != self._versions:  # another update counted: all parameters alike?
            self._versions = versions
            pairs = zip(self.ranges, self.flat.steps, strict=True)
            return all(_alike(steps) for r, steps in pairs if r.whole)
        return True

    def _counts_written(self) -> list[int]:
        """How often each parameter's count was written to."""
        return versions_of(self._counts)

    # -- laying out ------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        groups = self.optimizer.param_groups
        listed = [p for group in groups for p in group["params"]]
        group_of = [i for i, group in enumerate(groups) for _ in group["params"]]
        ranges = tuple(self._form(listed, group_of))
        if self._fits(listed, ranges):
            self.flat = self._fill(listed, ranges)
        elif self.flat is not None:
            self._release()
            self.flat = None
        self.ranges = () if self.flat is None else ranges
        self._listed = listed
        self._objective = getattr(self.loss, "actor_objective", None)
        leaves = [*listed, *self._follower.values()]
        self._leaves = leaves
        self._addresses = [leaf.data_ptr() for leaf in leaves]
        states = self.optimizer.state
        self._states = [
            (p, p.requires_grad, states.get(p, {}), _parts(states.get(p, {}))) for p in listed
        ]
        self._counts = [parts[-1] for *_, parts in self._states if parts]
        self._complete = all(parts for _, trained, _, parts in self._states if trained)
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
            if id(p) in network_of and not p.is_meta:
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
            whole = trained and all(states) and len({float(s["step"]) for s in states}) == 1
            followed = all(id(listed[i]) in self._follower for i in members)
            yield Range(group, network, tuple(pieces), end, whole, followed)

    def _fits(self, listed: Sequence[Tensor], ranges: Sequence[Range]) -> bool:
        """Whether every trained parameter has one place, and everything laid out may be moved."""
        places = [piece.parameter for form in ranges for piece in form.pieces]
        trained = {i for i, p in enumerate(listed) if p.requires_grad}
        if len(set(places)) != len(places) or not trained <= set(places):
            return False
        if not ranges or self.loss.shared.trunk:
            return False
        for form in ranges:
            live = [listed[piece.parameter] for piece in form.pieces]
            targets = [self._follower[id(p)] for p in live] if form.followed else []
            for tensors in (live, targets):
                if not all(map(_is_plain, tensors)) or not self._may_move(tensors, form):
                    return False
            if not _moments_fit([(p, self.optimizer.state.get(p)) for p in live]):
                return False
        return True

    def _may_move(self, tensors: Sequence[Tensor], form: Range) -> bool:
        """Whether nothing else can lie in the storage of these tensors."""
        if not tensors or _joined(tensors, form) is not None:
            return True
        known = {
            (id(tensor), address)
            for storage in _STORAGES[self.loss]
            if storage.flat is not None
            for tensor, address in zip(storage._leaves, storage._addresses, strict=True)
        }
        return all(
            (t.untyped_storage().nbytes() == t.nbytes or (id(t), t.data_ptr()) in known)
            and (t.device.type == "cuda" or not t.is_shared())
            for t in tensors
        )

    def _release(self) -> None:
        """Give every tensor that still is where it was laid out storage of its own.

        Inductor does not compile updates of several tensors in one storage.
        """
        for tensor, address in zip(self._leaves, self._addresses, strict=True):
            if tensor.data_ptr() == address:
                tensor.data = tensor.data.clone()
        for *_, state, parts in self._states:
            for name, part in zip((*MOMENTS, "step"), parts, strict=False):
                if state.get(name) is part:
                    state[name] = part.clone()
        self.loss.forget_evaluator()

    def _fill(self, listed: Sequence[Tensor], ranges: Sequence[Range]) -> Flat:
        """Tensors of the ranges with the present values, and every leaf as a view into them."""
        flat = Flat([], [], [], [], [])
        states = self.optimizer.state
        before = [leaf.data_ptr() for leaf in (*listed, *self._follower.values())]
        for r in ranges:
            parameters = [listed[piece.parameter] for piece in r.pieces]
            flat.parameters.append(_moved(parameters, r))
            if r.followed:
                flat.targets.append(_moved([self._follower[id(p)] for p in parameters], r))
            held = [states.get(p) or {} for p in parameters]
            for name, tensors in zip(MOMENTS, (flat.averages, flat.squares), strict=True):
                tensors.append(_gathered(held, name, r, parameters[0]))
            flat.steps.append(_gathered_steps(held))
        if before != [leaf.data_ptr() for leaf in (*listed, *self._follower.values())]:
            self.loss.forget_evaluator()  # its copies of the networks hold other views of targets
        return flat


def _parts(state: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(state[name] for name in (*MOMENTS, "step")) if state else ()


def _alike(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _is_plain(tensor: Any) -> bool:
    """Whether it is a dense and contiguous tensor of torch's own class."""
    return (
        isinstance(tensor, Tensor)
        and type(tensor.data) is Tensor
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.is_floating_point()
        and not tensor.is_inference()
        and tensor.numel() > 0
    )


def _moments_fit(pairs: Sequence[tuple[Tensor, dict[str, Any] | None]]) -> bool:
    """Whether the Adam states of parameters have the parameters' form, and one kind of counts."""
    kinds = set()
    for parameter, state in pairs:
        if not state:
            continue
        for moment in [state[name] for name in MOMENTS]:
            if not _is_plain(moment) or moment.shape != parameter.shape:
                return False
            if (moment.dtype, moment.device) != (parameter.dtype, parameter.device):
                return False
        kinds.add((state["step"].dtype, state["step"].device))
    return len(kinds) <= 1


def _joined(tensors: Sequence[Tensor], form: Range) -> Tensor | None:
    """The range's tensor where the tensors lie in one already, and nothing else does."""
    first = tensors[0]
    storage, size = first.untyped_storage(), first.element_size()
    if storage.nbytes() != form.length * size:
        return None
    for piece, tensor in zip(form.pieces, tensors, strict=True):
        if tensor.data_ptr() != storage.data_ptr() + piece.start * size:
            return None
        if tensor.dtype != first.dtype or tuple(tensor.shape) != piece.shape:
            return None
    return _all_of(first)


def _all_of(part: Tensor) -> Tensor:
    """The whole storage of a tensor as one dimension; for autograd no view of anything."""
    whole = torch.empty(0, dtype=part.dtype, device=part.device)
    storage = part.untyped_storage()
    whole.set_(storage, 0, (storage.nbytes() // part.element_size(),), (1,))
    return whole


def _moved(tensors: Sequence[Tensor], form: Range) -> Tensor:
    flat = _joined(tensors, form)
    if flat is None or flat.data_ptr() % ALIGNMENT:
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
    """Counts ``(len(states),)``, of which the states' own are views."""
    counts = [state["step"] for state in states if state]
    if len(counts) == len(states):
        storage, size = counts[0].untyped_storage(), counts[0].element_size()
        places = [storage.data_ptr() + i * size for i in range(len(counts))]
        whole = storage.nbytes() == len(counts) * size
        if whole and [count.data_ptr() for count in counts] == places:
            return _all_of(counts[0])
    first = next((state["step"] for state in states if state), torch.zeros(()))
    steps = torch.zeros(len(states), dtype=first.dtype, device=first.device)
    for place, state in zip(steps.unbind(), states, strict=True):
        if state:
            place.copy_(state["step"])
            state["step"] = place
    return steps
