"""Networks that read a window of observations and represent its last step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iql_torchrl.networks.perceptrons import check_whole, first_layer

__all__ = ["CausalTransformer", "LSTMEncoder"]


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
        for name, value in (
            ("in_features", in_features), ("features", features), ("layers", layers),
        ):  # fmt: skip
            check_whole(name, value)
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
        for name, value in (
            ("in_features", in_features), ("features", features), ("layers", layers),
            ("heads", heads), ("length", length),
        ):  # fmt: skip
            check_whole(name, value)
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
