"""What a loss reads from a TensorDict: checked once, per sample, padding replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase
from tensordict.utils import is_batchedtensor
from torch import Tensor

from iql_torchrl import functional as F
from iql_torchrl.config import number_dtype
from iql_torchrl.data.goals import FOR_ACTOR
from iql_torchrl.networks import CHUNK_MASK, HISTORY_MASK

LAST_LAYERS = (
    "Check the networks' last layers: each gives one number for each that the others give."
)


@dataclass(frozen=True)
class Batch:
    """A batch of transitions of shape ``(*B,)``.

    ``data`` holds the entries, ``mask`` (bool, ``(*B,)``) says which steps are real (``None``: all),
    ``weight`` (``(*B,)``) holds the importance weights of a prioritised buffer (``None``: equal).
    ``draws`` are the random tensors that the loss asks for, by name. ``features`` keeps what an
    encoder gave for these steps. In a part of a batch that several ranks share, ``all_reduce_mean``
    turns a mean over the part into that of the batch, and ``all_reduce_max`` its largest value.
    """

    data: TensorDictBase
    mask: Tensor | None
    weight: Tensor | None
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    features: dict[Any, Any] = field(default_factory=dict)
    all_reduce_mean: Callable[[Tensor], Tensor] | None = None
    all_reduce_max: Callable[[Tensor], Tensor] | None = None

    @property
    def next(self) -> Batch:
        return replace(
            self,
            data=self.data.get("next"),
            draws={
                k.removeprefix("next_"): v for k, v in self.draws.items() if k.startswith("next_")
            },
            features=self.features.setdefault("next", {}),
        )

    @property
    def for_actor(self) -> Batch:
        """What the policy's loss reads: this batch, or one with the entries below ``FOR_ACTOR``."""
        if self.data.get(FOR_ACTOR, None) is None:
            return self
        data = self.data.exclude(FOR_ACTOR).copy().update(self.data.get(FOR_ACTOR))
        return replace(self, data=data, features={})

    def with_draws(
        self,
        inputs: Mapping[str, Draw],
        parameters: Iterator[Tensor],
        draws: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """With the random tensors ``inputs``: the batch's entries, else ``draws``, else new ones.

        New ones have dtype and device of the first of ``parameters``, and are by default drawn from
        torch's generator.
        """
        if not inputs:
            return self
        like = next(parameters)
        drawn: dict[str, Tensor] = {}
        for key, draw in inputs.items():
            given = self.data.get(key, None)
            if given is not None:
                drawn[key] = draw.fit(given, self.data.batch_size, key, like)
            elif draws is not None and key in draws:
                drawn[key] = draws[key]
            else:
                drawn[key] = draw.fill(draw.empty(like), generator)
        return replace(self, draws=drawn)

    def rows(self, first: int, end: int) -> Batch:
        """Entries ``first`` to ``end`` (excluded) of the first dimension, as views."""

        def part(entry: Any) -> Any:
            return None if entry is None else entry[first:end]

        return Batch(
            data=part(self.data),
            mask=part(self.mask),
            weight=part(self.weight),
            draws={name: part(draw) for name, draw in self.draws.items()},
        )

    def mean(self, value: Tensor) -> Tensor:
        """Mean of per-sample ``value`` over the valid steps, those of all ranks."""
        mean = F.weighted_mean(value, mask=self.mask_like(value))
        return mean if self.all_reduce_mean is None else self.all_reduce_mean(mean)

    def largest(self, value: Tensor) -> Tensor:
        """The largest of per-sample ``value`` over the valid steps of all ranks; no gradient."""
        value, mask = value.detach(), self.mask_like(value)
        if mask is not None:  # padding may hold anything
            value = value.masked_fill(~mask, -torch.inf)
        largest = value.amax()
        return largest if self.all_reduce_max is None else self.all_reduce_max(largest)

    def divisors(self, where: torch.device) -> tuple[Tensor, Tensor]:
        """What means are divided by, 0-d: the valid steps' weights, and the number of valid steps.

        Losses are divided by the first, scalars by the second.
        """
        steps = torch.ones(self.data.batch_size, dtype=number_dtype(where), device=where)
        weights = steps if self.weight is None else steps * self.weight
        if self.mask is not None:  # a weight of padding may be nan
            steps, weights = (each.masked_fill(~self.mask, 0.0) for each in (steps, weights))
        return weights.sum(), steps.sum()

    def mask_like(self, value: Tensor) -> Tensor | None:
        """``mask`` in the shape of per-sample ``value``: a step's entry applies to all of it."""
        return None if self.mask is None else _like(self.mask, value)

    def weight_like(self, value: Tensor) -> Tensor | None:
        """``weight`` in the shape of per-sample ``value``."""
        return None if self.weight is None else _like(self.weight, value)


def _like(entry: Tensor, value: Tensor) -> Tensor:
    return entry.view(*entry.shape, *(1,) * (value.ndim - entry.ndim)).expand_as(value)


# Keys of a batch that replace draws.
FLOW_NOISE, FLOW_TIME, FLOW_DROP = "flow_noise", "flow_time", "flow_drop"
IMAGE_SHIFT, NEXT_IMAGE_SHIFT = "image_shift", "next_image_shift"


@dataclass(frozen=True)
class Draw:
    """A random tensor of shape ``(*batch, *entries)``: standard normal, or uniform on [0, 1).

    ``entries``: the shape of a sample's numbers; empty: one number, without a dimension.
    """

    batch: tuple[int, ...]
    entries: tuple[int, ...] = ()
    normal: bool = False

    def fill(self, out: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw into ``out``; by default from the generator of torch on its device."""
        fill = out.normal_ if self.normal else out.uniform_
        return fill(generator=generator)

    def empty(self, like: Tensor) -> Tensor:
        return torch.zeros((*self.batch, *self.entries), dtype=like.dtype, device=like.device)

    def fit(self, given: Tensor, size: torch.Size, key: str, like: Tensor) -> Tensor:
        """The entry ``key`` of a batch of shape ``size`` in place of the draw.

        Raises ``ValueError`` on another shape.
        """
        if not self.entries:
            given = per_sample(given, size, key)
        if given.shape != (*size, *self.entries):
            raise ValueError(
                f"{key!r} has shape {tuple(given.shape)} in a batch of shape {tuple(size)}; "
                f"expected {(*size, *self.entries)}: it replaces "
                f"{'standard normal' if self.normal else 'uniform'} numbers that the loss draws."
            )
        return given.to(like.dtype).expand(*self.batch, *self.entries)


def read_batch(
    tensordict: TensorDictBase,
    *,
    required: Iterable[NestedKey],
    mask_keys: Iterable[NestedKey],
    weight_key: NestedKey | None,
    done_key: NestedKey,
) -> Batch:
    """Check ``required``, find masks and weights, and neutralise masked steps.

    A masked step is replaced, entry by entry, by a copy of the first valid one: whatever padding
    holds (``nan`` included) then reaches no network, no statistic of a normalisation layer, no
    return of a later step. Without masks ``data`` is ``tensordict`` itself.

    Raises ``KeyError`` naming a missing key, ``ValueError`` on an empty batch, on a mask or weight
    of a wrong shape and, on a CPU outside ``torch.compile`` and ``vmap``, on a mask without any
    valid step. Elsewhere that check would wait for the device or break the graph: there such a
    batch has losses and gradients of zero.
    """
    if 0 in tensordict.batch_size:
        raise ValueError(
            f"the batch has shape {tuple(tensordict.batch_size)}: it holds no steps, so its losses "
            "have no value. Sample at least one step; check that the replay buffer is not empty and "
            "that slicing or filtering leaves something."
        )
    for key in required:
        entry = tensordict.get(key, None)
        if entry is None:
            raise KeyError(_missing(key, tensordict))
        if entry.shape[:1] == (0,):
            raise ValueError(f"{key!r} has shape {tuple(entry.shape)}: the batch holds no steps.")
    shape = tensordict.batch_size
    mask: Tensor | None = None
    read = []
    for key in mask_keys:
        entry = tensordict.get(key, None)
        if entry is not None:
            read.append(key)
            entry = _one_a_step(entry, shape, key).bool()
            mask = entry if mask is None else mask & entry
    weight = None if weight_key is None else tensordict.get(weight_key, None)
    if weight is not None:
        weight = _one_a_step(weight, shape, weight_key).detach()
    if mask is not None:
        _check_some_valid(mask, read)
        tensordict = _neutralise(tensordict, mask, done_key)
    return Batch(tensordict, mask, weight)


def _check_some_valid(mask: Tensor, keys: list[NestedKey]) -> None:
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not is_batchedtensor(mask) and not bool(mask.any()):
        raise ValueError(
            f"{' and '.join(map(repr, keys))} mark none of the batch's {mask.numel()} steps as "
            "valid; expected True at every real step and False at padding. Check that the mask is not "
            "inverted, or leave such batches out."
        )


def _one_a_step(value: Tensor, shape: torch.Size, key: NestedKey) -> Tensor:
    value = per_sample(value, shape, key)
    if value.shape != shape:
        raise ValueError(
            f"{key!r} has shape {tuple(value.shape)} in a batch of shape {tuple(shape)}; expected one "
            "entry per step."
        )
    return value


def per_sample(value: Tensor, shape: torch.Size, key: NestedKey, *, leading: int = 0) -> Tensor:
    """``value`` with one number per sample: a trailing singleton squeezed, half precision widened.

    The one place where ``(B, 1)`` becomes ``(B,)``, so that no later sum broadcasts to ``(B, B)``.
    ``leading`` dimensions (an ensemble's) come first; dimensions after the batch's (agents, say)
    stay, and :func:`check_same_shape` holds them equal between quantities. Raises ``ValueError`` when
    the batch shape is not where it belongs, ``TypeError`` on anything but a tensor.
    """
    if not isinstance(value, Tensor):  # of a function of the user's
        raise TypeError(
            f"{key!r} is {value!r}; expected a tensor of shape {tuple(shape)}, one number per step."
        )
    dims = leading + len(shape)
    if value.ndim > dims and value.shape[-1] == 1:
        value = value.squeeze(-1)
    if value.shape[leading:dims] != shape:
        raise ValueError(
            f"{key!r} has shape {tuple(value.shape)} in a batch of shape {tuple(shape)}; expected "
            f"one number per step, shape {(*shape, 1)} or {tuple(shape)}."
        )
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def check_chunks(data: TensorDictBase, action_key: NestedKey, reward_key: NestedKey) -> None:
    """Raise ``ValueError`` where a batch with ``"chunk_mask"`` does not have chunks of actions."""
    mask = data.get(CHUNK_MASK, None)
    if mask is None:
        return
    reward, width = data.get(("next", reward_key)), data.get(action_key).shape[-1]
    dims = len(data.batch_size)
    if mask.shape != reward.shape or mask.ndim != dims + 1 or width % mask.shape[-1]:
        raise ValueError(
            f"{CHUNK_MASK!r} has shape {tuple(mask.shape)}, the reward {tuple(reward.shape)} and "
            f"{action_key!r} rows of {width} numbers; expected masks and rewards of one shape "
            f"{(*data.batch_size, 'h')}, and h actions in each row. Take batches from "
            "dataset.chunks(h)."
        )


def output_of(written: TensorDictBase, key: NestedKey, name: str) -> Tensor:
    """What a network wrote under ``key``; raises ``KeyError`` when it wrote elsewhere."""
    value = written.get(key, None)
    if value is None:
        keys = sorted(map(str, written.keys(include_nested=True, leaves_only=True)))
        raise KeyError(
            f"{name} writes no {key!r}; it writes {keys}. Build it with out_keys=[{key!r}], or name "
            "its key with loss.set_keys(...)."
        )
    return value


def check_same_shape(advice: str, **quantities: Tensor) -> None:
    """Raise ``ValueError`` with ``advice`` unless all quantities have one shape: nothing broadcasts."""
    if len({value.shape for value in quantities.values()}) > 1:
        found = (f"{name} has shape {tuple(value.shape)}" for name, value in quantities.items())
        raise ValueError(
            f"{', '.join(found)}; expected one shape, with one number per sample in each. {advice}"
        )


def check_action(key: NestedKey, logged: Tensor, shape: Sequence[int]) -> None:
    """Raise ``ValueError`` unless the logged action has the ``shape`` of the policy's actions."""
    found, expected = tuple(logged.shape), tuple(shape)
    if found == expected:
        return
    discrete = ", or use DiscreteIQLLoss, which accepts indices and one-hot actions"
    if found == expected[:-1] and expected[-1] == 1:
        advice = "An action of one number is stored as (*B, 1): batch['action'].unsqueeze(-1)"
    elif found == (*expected, 1):
        advice = (
            "This distribution takes one number per sample without a dimension of its own, such as the "
            f"index of a Categorical: give it batch['action'].squeeze(-1){discrete}"
        )
    elif found[:-1] == expected:
        advice = (
            f"If these are one-hot, give it their indices, batch['action'].argmax(-1){discrete}"
        )
    else:
        advice = "Make the policy with the action spec of the data, dataset.action_spec"
    raise ValueError(
        f"{key!r} has shape {found} and the policy's actions have shape {expected}; expected one "
        f"shape, so that nothing broadcasts. {advice}."
    )


def _missing(key: NestedKey, tensordict: TensorDictBase) -> str:
    name = key[-1] if isinstance(key, tuple) else key
    usual = "rename it with loss.set_keys(...), or give the network the in_keys the data has"
    advice = {
        "terminated": "'terminated' is where the future is worth nothing and 'done' may be a mere time "
        "limit, so the one is not taken for the other. If no episode was cut short, "
        "loss.set_keys(terminated='done')",
        HISTORY_MASK: "take batches from dataset.windows(length).replay_buffer(batch_size), or train "
        "with OfflineTrainer",
    }.get(name, usual)
    keys = sorted(map(str, tensordict.keys(include_nested=True, leaves_only=True)))
    return f"{key!r} is not in the batch, which holds {', '.join(keys)}; {advice}."


def _neutralise(tensordict: TensorDictBase, mask: Tensor, done_key: NestedKey) -> TensorDictBase:
    first = mask.flatten().to(torch.uint8).argmax().view(1)
    some = mask.any()
    dims = mask.ndim
    if isinstance(tensordict, LazyStackedTensorDict):
        tensordict = tensordict.contiguous()

    def fill(entry: Tensor) -> Tensor:
        row = entry.flatten(0, dims - 1).index_select(0, first)
        row = torch.where(some, row, torch.zeros_like(row))  # nothing valid: nothing to copy
        keep = mask.view(*mask.shape, *(1,) * (entry.ndim - dims))
        return torch.where(keep, entry, row.view(*(1,) * dims, *entry.shape[dims:]))

    filled = tensordict.apply(fill)
    done = filled.get(done_key, None)
    if done is not None:
        filled.set(done_key, done.bool() | _ends_before_padding(done, mask))
    return filled


def _ends_before_padding(done: Tensor, mask: Tensor) -> Tensor:
    """Steps followed by padding: multi-step returns stop and bootstrap there."""
    ends = torch.zeros_like(mask)
    ends[..., :-1] = ~mask[..., 1:]
    return ends.view(*mask.shape, *(1,) * (done.ndim - mask.ndim))
