"""Fully connected networks, their first layers, and V and the critics made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iql_torchrl.config import IQLConfig, check_whole, config_settings, launches_kernels
from iql_torchrl.networks.encoders import OneHot
from iql_torchrl.private_apis import keeps_batch_statistics

#: Makers of the activations that a config names. GELU is the approximation by tanh, as in JAX.
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": partial(nn.GELU, "tanh"),
    "mish": nn.Mish,
}
NARROW = 8  # outputs
SMALL = 2**22  # multiplications


class Standardise(nn.Module):
    """``(x - mean) / std`` over the last dimension, with the statistics as buffers.

    As the first layer of a network it lets the replay buffer store raw observations, and it is part
    of an exported policy. A column whose ``std`` is 0 is centred and not divided: the statistics say
    which columns are constant, because small numbers may only have a large unit. Tensors of floats
    keep their dtype, so that float64 observations get float64 statistics.

    Raises ``ValueError`` when the statistics differ in shape, are not finite, or a ``std`` is
    negative.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        mean, std = _floats(mean), _floats(std)
        if mean.shape != std.shape:
            raise ValueError(f"mean has shape {tuple(mean.shape)} and std {tuple(std.shape)}.")
        if not bool(torch.isfinite(mean).all() & torch.isfinite(std).all()):
            raise ValueError("mean and std must be finite; remove such values from the data first.")
        if bool((std < 0).any()):
            raise ValueError(
                f"std has the entry {float(std.min()):g}; standard deviations are >= 0."
            )
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", torch.where(std == 0, torch.ones_like(std), std))

    def forward(self, observation: Tensor) -> Tensor:
        return (observation - self.mean) / self.std


def _floats(values: Any) -> Tensor:
    """``values`` as a tensor of floats: with its own dtype if it is one, else with torch's default."""
    if isinstance(values, Tensor) and values.is_floating_point():
        return values
    return torch.as_tensor(values, dtype=torch.get_default_dtype())


class Linear(nn.Linear):
    """``nn.Linear`` that is K layers where its parameters are stacked.

    With a weight ``(out, in)`` it is ``nn.Linear``. With a weight ``(K, out, in)`` and a bias
    ``(K, out)`` an input ``(N, in)``, which all layers read, or ``(K, N, in)`` gives ``(K, N, out)``.
    Integers ``(*B,)`` are read as the one-hot vectors ``(*B, in)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return affine_of_categories(x, self.weight, self.bias)
        return affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.mT + bias``, of one layer or of K stacked ones (:class:`Linear`).

    Stacked weights multiply columns, so that their gradients come out in their layout. A compiled
    program computes layers of few outputs as sums, which it joins with what surrounds them.
    """
    if torch.compiler.is_compiling() and _is_better_summed(x, weight):
        if weight.shape[-2] == 1:
            return (x * weight).sum(-1, keepdim=True) + bias.unsqueeze(-2)
        return (x.unsqueeze(-2) * weight.unsqueeze(-3)).sum(-1) + bias.unsqueeze(-2)
    if weight.ndim == 2:
        return nn.functional.linear(x, weight, bias)
    if x.ndim == 2:  # one product for all layers
        out = (weight.flatten(0, 1) @ x.mT).unflatten(0, weight.shape[:2])
        return (out + bias.unsqueeze(-1)).mT
    return torch.baddbmm(bias.unsqueeze(-1), weight, x.mT).mT


def affine_of_categories(index: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`affine` of the one-hot vectors of ``index`` ``(*B,)``: columns of the weight."""
    columns = weight.gather(-1, index.reshape(-1).expand(*weight.shape[:-1], -1))
    out = columns.mT + bias.unsqueeze(-2)
    return out.reshape(*weight.shape[:-2], *index.shape, out.shape[-1])


def _is_better_summed(x: Tensor, weight: Tensor) -> bool:
    """Return whether a program computes the layer as a sum.

    It does with a single output, and on a GPU, where a launch takes longer than a small product, with
    at most ``NARROW`` outputs.

    Not one with few inputs: the gradient of its weights, as sums over a batch's rows, took 0.03 to
    0.05 ms on an H200; the product for 256 by 256 weights takes 0.008 (``profile_step.py``).
    """
    outputs = weight.shape[-2]
    if x.ndim < 2:
        return False
    if outputs == 1:
        return x.ndim >= weight.ndim
    if not launches_kernels(x.device) or outputs > NARROW:
        return False
    return weight.numel() * x.shape[-2] <= SMALL


def chain(x: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Linear layers with ReLU between them; ``leaves``: weight and bias of each, maybe stacked."""
    pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
    for number, (weight, bias) in enumerate(pairs):
        x = affine(x if number == 0 else x.relu(), weight, bias)
    return x


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that is K layers where its parameters are ``(K, features)``."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 1:
            return super().forward(x)
        normal = nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps)
        return normal * self.weight.unsqueeze(-2) + self.bias.unsqueeze(-2)


ENSEMBLE_LAYERS = (Linear, LayerNorm)


class MLP(nn.Sequential):
    """Fully connected layers: ``hidden`` widths, each followed by norm, activation and dropout.

    ``initialisation="orthogonal"``: weights orthogonal with gain sqrt(2) and biases zero in every
    layer, as in the official IQL code. ``"torch"``: weights and biases as ``nn.Linear`` draws them,
    uniform on +-1/sqrt(number of inputs). ``dropout`` is a probability in [0, 1); ``layer_norm``
    normalises before the activation, or with ``norm_after_activation`` after it. ``activation`` is
    a class or function that makes the module, such as ``nn.ReLU``.

    Raises ``ValueError`` on numbers of features or widths that are not whole and >= 1, on a
    ``dropout`` out of range and on another ``initialisation``; ``TypeError`` on an ``activation``
    of another kind.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: Callable[[], nn.Module] = nn.ReLU,
        layer_norm: bool = False,
        norm_after_activation: bool = False,
        dropout: float = 0.0,
        initialisation: str = "orthogonal",
    ) -> None:
        linear = _checked_linear(hidden, activation, dropout, initialisation)
        layers: list[nn.Module] = []
        for width in hidden:
            parts = [LayerNorm(width), activation()] if layer_norm else [activation()]
            parts = parts[::-1] if norm_after_activation else parts
            layers += [linear(in_features, width), *parts, *_dropout(dropout)]
            in_features = width
        super().__init__(*layers, linear(in_features, out_features))

    @property
    def first(self) -> nn.Module:
        """The first layer."""
        return next(iter(self))


class ResidualMLP(nn.Module):
    """A linear layer, residual blocks of one width h, activation, and a linear layer.

    Each block is ``x + Dense_h(activation(Dense_4h(LayerNorm(Dropout(x)))))``: the network of IDQL's
    policy (Hansen-Estruch et al. 2023, arXiv:2304.10573, appendix G), which has three blocks of width
    256 and dropout 0.1. ``hidden`` has the width once for each block. Initial weights as in
    :class:`MLP`.

    Raises ``ValueError`` and ``TypeError`` as :class:`MLP`, and ``ValueError`` on widths that differ.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
        initialisation: str = "orthogonal",
    ) -> None:
        linear = _checked_linear(hidden, activation, dropout, initialisation)
        if len(set(hidden)) != 1:
            raise ValueError(
                f"hidden is {tuple(hidden)}; residual blocks add their output to their input, so all "
                "widths must be equal, one for each block, such as (256, 256, 256)."
            )
        super().__init__()
        width = hidden[0]
        self.first = linear(in_features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *_dropout(dropout),
                LayerNorm(width),
                linear(width, 4 * width),
                activation(),
                linear(4 * width, width),
            )
            for _ in hidden
        )
        self.last = nn.Sequential(activation(), linear(width, out_features))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


def _checked_linear(
    hidden: object, activation: object, dropout: float, initialisation: str
) -> Callable[[int, int], nn.Linear]:
    """What makes the linear layers; raises on wrong arguments, it on wrong numbers of features."""
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise ValueError(f"hidden is {hidden!r}; expected a sequence of widths: ({hidden!r},).")
    check_whole(**{f"hidden[{number}]": width for number, width in enumerate(hidden)})
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1).")
    config_settings(IQLConfig)["initialisation"].check_in_loss(initialisation)
    if isinstance(activation, nn.Module) or not callable(activation):
        raise TypeError(
            f"activation is {activation!r}; expected a class or function that makes a module, such "
            "as torch.nn.ReLU, without parentheses."
        )

    def linear(in_features: int, out_features: int) -> nn.Linear:
        check_whole(in_features=in_features, out_features=out_features)
        layer = Linear(in_features, out_features)
        if initialisation == "orthogonal":
            nn.init.orthogonal_(layer.weight, 2.0**0.5)
            nn.init.zeros_(layer.bias)
        return layer

    return linear


def _dropout(probability: float) -> list[nn.Module]:
    return [nn.Dropout(probability)] if probability > 0 else []


def first_layer(preprocess: nn.Module | None) -> nn.Module:
    """``preprocess``, or the identity where it is None; ``TypeError`` on anything but a module."""
    if preprocess is not None and not isinstance(preprocess, nn.Module):
        raise TypeError(
            f"preprocess is {preprocess!r}; expected a torch module, such as OneHot(5): an object, not "
            "a class or function."
        )
    return preprocess or nn.Identity()


class AroundPerceptron(nn.Module):
    """Base of networks of a first layer, ``preprocess``, and fully connected layers, ``mlp``.

    ``in_features`` is the number of features that ``mlp`` reads. Further keywords go to :class:`MLP`,
    or with ``residual=True`` to :class:`ResidualMLP`.

    The parameters of ``mlp`` may be those of K networks, ``(K, ...)``: the result is then
    ``(K, *B, out)``. ``IQLLoss`` evaluates K critics so (:func:`can_be_ensemble`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        preprocess: nn.Module | None = None,
        residual: bool = False,
        **mlp: Any,
    ) -> None:
        super().__init__()
        self.preprocess = first_layer(preprocess)
        self.mlp: nn.Module = (ResidualMLP if residual else MLP)(in_features, out_features, **mlp)

    def forward(self, *inputs: Tensor) -> Any:
        observation = join_observations(inputs)
        if type(self.preprocess) is OneHot and type(self._first()) is Linear:
            out = self.mlp(observation.long().reshape(-1))
            return out.reshape(*out.shape[:-2], *observation.shape, out.shape[-1])
        return self.layers(self.preprocess(observation))

    def _first(self) -> Any:
        """The first of the fully connected layers; None in a module of yours."""
        return getattr(self.mlp, "first", None)

    def layers(self, features: Tensor) -> Tensor:
        """``mlp``: ``(*B, in)`` to ``(*B, out)``, of K networks to ``(K, *B, out)``."""
        weight = getattr(self._first(), "weight", None)
        if weight is not None and features.dtype != weight.dtype:
            _check_dtype(features, weight)
        if weight is None or weight.ndim < 3:
            out: Tensor = self.mlp(features)
            return out
        out = self.mlp(features.reshape(-1, features.shape[-1]))
        return out.reshape(len(out), *features.shape[:-1], out.shape[-1])


def _check_dtype(features: Tensor, weight: Tensor) -> None:
    """Raise ``TypeError`` unless autocast makes one dtype of both."""
    if not features.is_floating_point():
        raise TypeError(
            f"a network's first layer got {features.dtype}; it needs floating-point observations. Give "
            "a network of categories preprocess=networks.OneHot(...), and cast other integers to float."
        )
    if not torch.is_autocast_enabled(features.device.type):
        raise TypeError(
            f"a network's first layer got {features.dtype} and has weights of {weight.dtype}; cast the "
            f"batch's observations and actions to {weight.dtype}, or the loss to {features.dtype} "
            "before the optimizer is built."
        )


def can_be_ensemble(network: object) -> bool:
    """Return whether ``network`` computes K networks where its parameters are stacked.

    It is a network of this package, and not of a class with a ``forward`` of its own, whose parameters
    are all weights and biases of fully connected and normalisation layers of ``mlp``, which read them
    so; no weight is computed of others (``weight_norm``), and no layer keeps statistics of batches.
    """
    if not isinstance(network, AroundPerceptron) or _is_changed(type(network)):
        return False
    if any(keeps_batch_statistics(module) for module in network.modules()):
        return False
    layers = {id(module) for module in network.mlp.modules() if type(module) in ENSEMBLE_LAYERS}
    return all(
        id(module) in layers and name in ("weight", "bias")
        for module in network.modules()
        for name, _ in module.named_parameters(recurse=False)
    )


def _is_changed(kind: type[AroundPerceptron]) -> bool:
    """Return whether the class computes something else than the networks of this package."""
    computes = (kind.forward, kind.layers)
    return computes not in [(own.forward, own.layers) for own in (AroundPerceptron, Critic)]


class StateValue(AroundPerceptron):
    """V(s): observations joined on the last dimension -> ``(*B, 1)``.

    ``in_features`` is the number of output features of the keyword ``preprocess``, the first layer
    (:class:`Standardise`, :class:`OneHot`, your own encoder); further keywords go to :class:`MLP`, or
    with ``residual=True`` to :class:`ResidualMLP`, as in all networks and policies here.
    """

    def __init__(self, in_features: int, **network: Any) -> None:
        super().__init__(in_features, 1, **network)


class DiscreteCritic(AroundPerceptron):
    """Q(s, .): observations joined on the last dimension -> one value per action, ``(*B, N)``."""

    def __init__(self, in_features: int, num_actions: int, **network: Any) -> None:
        if num_actions < 2:
            raise ValueError(f"num_actions is {num_actions}; a choice needs at least two.")
        super().__init__(in_features, num_actions, **network)


class Critic(AroundPerceptron):
    """Q(s, a): observations, then the action as the last argument -> ``(*B, 1)``.

    ``preprocess`` reads the observations, not the action; ``in_features`` is the number of its
    output features.
    """

    def __init__(self, in_features: int, action_features: int, **network: Any) -> None:
        super().__init__(in_features + action_features, 1, **network)

    def forward(self, *inputs: Tensor) -> Any:
        *observations, action = inputs
        features = self.preprocess(join_observations(observations))
        if action.ndim != features.ndim:
            raise ValueError(
                f"the action has shape {tuple(action.shape)} and the features of the observations "
                f"{tuple(features.shape)}; expected an action (*B, A). An action of one number is "
                "stored as (*B, 1): batch['action'].unsqueeze(-1)."
            )
        return self.layers(torch.cat([features, action], -1))


def join_observations(observations: Sequence[Tensor]) -> Tensor:
    return observations[0] if len(observations) == 1 else torch.cat(list(observations), -1)
