"""Windows of the last observations of an episode, and networks that represent their last step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from iql_torchrl.config import check_whole
from iql_torchrl.networks.encoders import channels_come_first
from iql_torchrl.networks.perceptrons import first_layer

Policy = TypeVar("Policy", bound=nn.Module)
Observation = TypeVar("Observation")

#: Key of the bool ``(B, T)`` that is True at the steps of a window that are real.
HISTORY_MASK = "history_mask"


@dataclass(frozen=True)
class History:
    """What a policy reads of the past: its last ``length`` observations, the current one included.

    ``stack=False``: windows ``(B, length, *shape)``, oldest first, and their mask under
    ``"history_mask"``. ``stack=True``: the frames of a window as one observation, without a mask
    (:func:`stack_frames`). A policy has it as its attribute ``history`` (:func:`with_history`).
    """

    length: int
    stack: bool = False

    def __post_init__(self) -> None:
        check_whole(length=self.length)

    def padded(self, observations: Sequence[Observation]) -> list[Observation]:
        """``length`` observations: those of an episode so far, the first one repeated before them."""
        return [observations[0]] * (self.length - len(observations)) + [*observations]

    def mask(self, steps: int) -> Tensor:
        """Bool ``(length,)`` of a window of ``steps`` real observations."""
        return torch.arange(self.length) >= self.length - steps


def with_history(policy: Policy, length: int, *, stack: bool = False) -> Policy:
    """``policy`` itself, from now on with the attribute ``history``: ``History(length, stack)``.

    ``evaluate``, ``act`` and the export then give it windows of the last ``length`` observations.
    """
    policy.history = History(length, stack)  # type: ignore[assignment]
    return policy


def history_of(policy: Any) -> History | None:
    """A policy's ``history``; None for one that reads the current observation alone.

    Raises ``ValueError`` where the policy reads ``"history_mask"`` and has no history, and where it
    has one of another type.
    """
    history, reads = getattr(policy, "history", None), list(getattr(policy, "in_keys", ()))
    if not isinstance(history, History) and (history is not None or HISTORY_MASK in reads):
        raise ValueError(
            f"the policy reads {reads} and its history is {history!r}, so that the length of its "
            "windows is unknown; set it by networks.with_history(policy, length)."
        )
    return history


def stack_frames(window: Tensor, dims: int) -> Tensor:
    """Windows ``(B, T, *shape)`` as single observations, oldest frame first; ``dims``: of ``shape``.

    Scalars become ``(B, T)``, vectors ``(B, T * F)``. Matrices, such as grey images, get a last
    dimension: ``(B, H, W, T)``. Images of three dimensions are joined on their channels: the
    shorter of the two outer dimensions, the last one where they are equal; so are stacks of images,
    by their last three dimensions. Anything larger is joined on its last dimension. One frame (T = 1)
    stays as it is, ``(B, *shape)``.
    """
    if window.shape[1] == 1:
        return window.squeeze(1)
    if dims == 0:
        return window
    if dims == 2:
        return window.movedim(1, -1)
    first = dims in (3, 4) and channels_come_first(window.shape[-3:])
    return torch.cat(window.unbind(1), -3 if first else -1)


def repeat_first(window: Tensor, mask: Tensor) -> Tensor:
    """Windows ``(B, T, ...)`` with padding replaced by the first real step, as in training.

    ``mask``: bool ``(B, T)``, False and then True in every row.
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    place = torch.maximum(steps, (~mask).sum(1, keepdim=True).clamp(max=mask.shape[1] - 1))
    rows = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1)
    return window[rows, place]


class LSTMEncoder(nn.Module):
    """Layers of LSTM over a window: ``(*B, T, F)`` and its mask ``(*B, T)`` to ``(*B, features)``.

    The output is the hidden state of the last layer after the last step. A step where the mask is
    False changes no state, so that neither values nor gradients depend on what it holds. A
    window may have any number of steps.

    The steps are a loop in Python, which a compiler or an export unrolls: ``torch.nn.LSTM`` cannot be
    part of a compiled update (Dynamo breaks the graph there). Weights are drawn as ``nn.LSTM`` draws
    them, uniform on +-1/sqrt(features), except for the bias of the forget gate, which is 1
    (Jozefowicz, Zaremba, Sutskever 2015, "An empirical exploration of recurrent network
    architectures").

    Args:
        in_features: F, or the features that ``preprocess`` makes of them.
        features: width of the states and of the output.
        layers: number of layers, each of which reads the states of the one before.
        preprocess: what is applied to every step first, such as ``Standardise`` or an encoder of
            images; it gets as many windows as the call.

    Raises ``ValueError`` on numbers that are not whole and >= 1; a call raises it on a mask of
    another shape than the window.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        layers: int = 1,
        preprocess: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_whole(in_features=in_features, features=features, layers=layers)
        self.features = features
        self.preprocess = first_layer(preprocess)
        widths = [in_features, *[features] * (layers - 1)]
        self.inputs = nn.ModuleList(nn.Linear(width, 4 * features) for width in widths)
        self.recurrent = nn.ModuleList(
            nn.Linear(features, 4 * features, bias=False) for _ in widths
        )
        bound = features**-0.5
        for parameter in (*self.inputs.parameters(), *self.recurrent.parameters()):
            nn.init.uniform_(parameter, -bound, bound)
            if parameter.ndim == 1:  # gates in torch's order: input, forget, cell, output
                nn.init.ones_(parameter.data[features : 2 * features])

    def forward(self, *inputs: Tensor) -> Tensor:
        """``inputs``: windows, one for each observation that ``preprocess`` reads, then the mask."""
        *windows, mask = inputs
        states = _steps_of(self.preprocess, windows, mask)
        for from_input, recurrent in zip(self.inputs, self.recurrent, strict=True):
            states = self._layer(from_input(states), mask, recurrent)
        return states[..., -1, :]

    def _layer(self, gates: Tensor, mask: Tensor, recurrent: nn.Module) -> Tensor:
        """States ``(*B, T, features)`` from the inputs' part of the gates ``(*B, T, 4 * features)``."""
        steps = mask.unsqueeze(-1).unbind(-2)
        hidden = cell = torch.zeros_like(gates[..., 0, : self.features])
        states = []
        for real, from_input in zip(steps, gates.unbind(-2), strict=True):
            entry, forget, new, out = (from_input + recurrent(hidden)).chunk(4, -1)
            updated = forget.sigmoid() * cell + entry.sigmoid() * new.tanh()
            cell = torch.where(real, updated, cell)
            hidden = torch.where(real, out.sigmoid() * updated.tanh(), hidden)
            states.append(hidden)
        return torch.stack(states, -2)


class CausalTransformer(nn.Module):
    """A transformer over a window: ``(*B, T, F)`` and its mask ``(*B, T)`` to ``(*B, features)``.

    ``layers`` blocks of self-attention and a perceptron of width ``4 * features``, with layer
    normalisation before each (Xiong et al. 2020, arXiv:2002.04745); a step attends to itself and to
    real steps before it. The output is the last step's, after a final normalisation. Positions are
    learned vectors, counted from the window's end, so that a shorter window is one whose earlier
    steps are padding. Steps where the mask is False have no influence on values and gradients.

    Args:
        in_features: F, or the features that ``preprocess`` makes of them.
        features: width of the steps' representation and of the output.
        layers, heads: numbers of blocks, and of attention heads in each.
        length: largest number of steps T.
        preprocess: what is applied to every step first, such as ``Standardise`` or an encoder of
            images; it gets as many windows as the call.

    Raises ``ValueError`` on numbers that are not whole and >= 1 and on ``features`` that ``heads`` do
    not divide; a call raises it on a longer window and on a mask of another shape.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        layers: int = 2,
        heads: int = 4,
        length: int,
        preprocess: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_whole(in_features=in_features, features=features, layers=layers)
        check_whole(heads=heads, length=length)
        if features % heads:
            raise ValueError(
                f"features is {features} and heads is {heads}; each head has features / heads "
                "dimensions, so choose a multiple."
            )
        self.length = length
        self.preprocess = first_layer(preprocess)
        self.first = nn.Linear(in_features, features)
        self.positions = nn.Parameter(torch.empty(length, features))
        self.blocks = nn.ModuleList(_Block(features, heads, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(features)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, *inputs: Tensor) -> Tensor:
        """``inputs``: windows, one for each observation that ``preprocess`` reads, then the mask."""
        *windows, mask = inputs
        steps = mask.shape[-1]
        if steps > self.length:
            raise ValueError(
                f"the window has {steps} steps and this transformer was made for at most "
                f"{self.length}; make it with length={steps}."
            )
        x = self.first(_steps_of(self.preprocess, windows, mask)) + self.positions[-steps:]
        # step i sees the real steps up to i; a padded step sees itself, so that no row is empty
        number = torch.arange(steps, device=mask.device)
        before = number.unsqueeze(-1) >= number
        itself = number.unsqueeze(-1) == number
        sees = (before & mask.unsqueeze(-2)) | itself
        for block in self.blocks[:-1]:
            x = block(x, sees, x)
        last: Tensor = self.blocks[-1](x[..., -1:, :], sees[..., -1:, :], x)
        out: Tensor = self.norm(last.squeeze(-2))
        return out


class _Block(nn.Module):
    """One block of a :class:`CausalTransformer`; queries are some of the steps, or all."""

    def __init__(self, features: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(features)
        self.query = nn.Linear(features, features)
        self.key_value = nn.Linear(features, 2 * features)
        self.joined = nn.Linear(features, features)
        second = nn.Linear(4 * features, features)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, 4 * features), nn.GELU("tanh"), second
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():  # so that the sum over layers does not grow with their number
            for weight in (self.joined.weight, second.weight):
                weight.div_(math.sqrt(2 * layers))

    def forward(self, x: Tensor, sees: Tensor, steps: Tensor) -> Tensor:
        """``x`` ``(*B, Q, features)`` after it has read ``steps`` ``(*B, T, features)``."""
        query = self._split(self.query(self.norm(x)))
        key, value = map(self._split, self.key_value(self.norm(steps)).chunk(2, -1))
        # torch's scaled_dot_product_attention has no rule for vmap, by which critics are evaluated
        scores = query @ key.transpose(-2, -1) / math.sqrt(key.shape[-1])
        weights = scores.masked_fill(~sees.unsqueeze(-3), -math.inf).softmax(-1)
        x = x + self.joined((weights @ value).transpose(-3, -2).flatten(-2))
        out: Tensor = x + self.perceptron(x)
        return out

    def _split(self, x: Tensor) -> Tensor:
        """``(*B, T, features)`` to ``(*B, heads, T, features / heads)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


def _steps_of(preprocess: nn.Module, windows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """``(*B, T, F)``: the steps as the network reads them, padding replaced by zeros."""
    for window in windows:
        if mask.dtype != torch.bool or not mask.ndim or window.shape[: mask.ndim] != mask.shape:
            raise ValueError(
                f"the window has shape {tuple(window.shape)} and its mask {tuple(mask.shape)} of "
                f"{mask.dtype}; expected a window (*B, T, ...) and a bool mask (*B, T), as batches of "
                "dataset.windows(length) have them."
            )
    steps = preprocess(*(_without_padding(window, mask) for window in windows))
    return _without_padding(steps, mask)


def _without_padding(window: Tensor, mask: Tensor) -> Tensor:
    real = mask.view(*mask.shape, *(1,) * (window.ndim - mask.ndim))
    return torch.where(real, window, torch.zeros_like(window))
