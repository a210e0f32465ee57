"""The equations of Implicit Q-Learning on plain tensors.

Data are positional, settings are keyword-only, results are per sample unless noted.
Equation numbers refer to Kostrikov et al. 2021, arXiv:2110.06169.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "condition_input",
    "cosine_factor",
    "effective_sample_size",
    "expectile_loss",
    "exponential_weight",
    "flow_path",
    "gumbel_loss",
    "pessimistic_value",
    "pick_action",
    "positive_weight",
    "quantile_loss",
    "reduce",
    "regression_loss",
    "sparse_loss",
    "sparse_weight",
    "td_target",
    "weighted_mean",
]

REGRESSION_LOSSES = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
}


def expectile_loss(error: Tensor, *, expectile: float | Tensor) -> Tensor:
    """Squared error weighted by its sign; minimised by the ``expectile`` of the target (eq. 5).

    ``|expectile - 1(error < 0)| * error**2``, same shape as ``error``.

    ``error`` is target minus prediction: with ``expectile > 0.5`` a prediction that is too low
    costs more than one equally too high, so predictions settle in the upper tail. ``0.5`` is
    half the squared error (the mean); ``1`` ignores predictions that are too high (the maximum).
    """
    return _weighted_by_sign(error, expectile, error.square())


def quantile_loss(error: Tensor, *, quantile: float | Tensor) -> Tensor:
    """Absolute error weighted by its sign (pinball); minimised by the ``quantile`` of the target.

    ``|quantile - 1(error < 0)| * |error|``, same shape as ``error`` = target minus prediction.
    ``0.5`` is half the absolute error (the median). Koenker and Bassett 1978.
    """
    return _weighted_by_sign(error, quantile, error.abs())


def _weighted_by_sign(error: Tensor, level: float | Tensor, size: Tensor) -> Tensor:
    """``size`` times ``level``, and times ``1 - level`` where ``error`` is below 0."""
    if not isinstance(level, Tensor) and not 0 <= level <= 1:
        raise ValueError(f"the expectile or quantile is {level}; it must lie in [0, 1].")
    return torch.where(error < 0, (1 - level) * size, level * size)


def sparse_loss(error: Tensor, *, alpha: float | Tensor) -> Tensor:
    """Squared error that becomes linear where a prediction is ``2 alpha`` too high, or more (SQL).

    ``max(1 + error / (2 alpha), 0)**2 - error / alpha - 1``, same shape as ``error`` = target minus
    prediction: ``(error / (2 alpha))**2`` above ``-2 alpha``, ``-error / alpha - 1`` below. Minimised
    by the prediction at which the mean of ``max(1 + error / (2 alpha), 0)`` is 1. ``alpha > 0`` has
    the unit of the target: a large one gives the mean, and towards 0 the maximum.

    Xu et al. 2023, arXiv:2303.15810; their ``v / alpha`` is ``-error / alpha`` plus what does not
    depend on v. ``alpha`` of their JAX code is 4 times this one. Raises ``ValueError`` on a number
    ``alpha <= 0``.
    """
    half = error / (2 * _positive(alpha))
    bounded = half.clamp(min=-1)
    return bounded * (2 * half - bounded)


def gumbel_loss(
    error: Tensor,
    *,
    alpha: float | Tensor,
    clip: float | Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """``exp(z) - z - 1`` of ``z = min(error / alpha, clip)``, times ``exp(-m)`` (EQL and XQL).

    Same shape as ``error`` = target minus prediction. ``m = max(z of the largest error, -1)`` keeps
    ``exp`` finite; it gets no gradient. ``largest``, that broadcasts with ``error``, is by default
    the largest of ``error``. Minimised by ``alpha log(mean(exp(target / alpha)))`` where no ``z``
    reaches ``clip``: a large ``alpha > 0`` gives the mean, and towards 0 the maximum.

    ``exp(-m)`` multiplies the gradient of a whole batch: its direction is that of the loss without
    it, and batches with a large error count less. A sample whose ``z`` is above ``clip`` has no
    gradient: V ignores it.

    Xu et al. 2023, arXiv:2303.15810 (EQL: clip 5); Garg et al. 2023, arXiv:2301.02328 (XQL: 7).
    Raises ``ValueError`` on a number ``alpha <= 0``.
    """
    if largest is None:
        largest = error.detach().amax() if error.numel() else error.new_zeros(())
    exponent, shift = error / _positive(alpha), largest / alpha
    if clip is not None:
        exponent, shift = exponent.clamp(max=clip), shift.clamp(max=clip)
    shift = shift.clamp(min=-1)
    return (exponent - shift).exp() - (exponent + 1) * (-shift).exp()


def _positive(alpha: float | Tensor) -> float | Tensor:
    if not isinstance(alpha, Tensor) and not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be > 0.")
    return alpha


def pessimistic_value(values: Tensor, *, pessimism: float | Tensor | None) -> Tensor:
    """One value from those of K critics: ``(K, *B)`` -> ``(*B,)``.

    ``mean - pessimism * std`` over the critics, or the minimum where ``pessimism`` is None. ``std``
    divides by K (not K - 1): 0 for one critic, and of two critics ``pessimism = 1`` is the minimum
    too. 0 is the mean. Gradients are not finite where all critics agree.
    """
    if pessimism is None:
        return values.amin(0)
    return values.mean(0) - pessimism * values.std(0, correction=0)


def regression_loss(prediction: Tensor, target: Tensor, *, loss_function: str) -> Tensor:
    """Element-wise ``"l2"``, ``"l1"`` or ``"smooth_l1"`` distance of two tensors of one shape.

    Raises ``ValueError`` on another name or on shapes that differ (no silent broadcast).
    """
    if loss_function not in REGRESSION_LOSSES:
        raise ValueError(
            f"loss_function is {loss_function!r}; choose one of {sorted(REGRESSION_LOSSES)}."
        )
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; "
            "expand the target first, so that nothing broadcasts by accident."
        )
    return REGRESSION_LOSSES[loss_function](prediction, target, reduction="none")


def td_target(
    reward: Tensor, next_value: Tensor, terminated: Tensor, *, gamma: float | Tensor
) -> Tensor:
    """One-step bootstrapped return ``reward + gamma * next_value``, all of one shape (eq. 6).

    Where ``terminated`` is true the value of the next state is zero by definition, so ``next_value``
    is not used there and may be anything, ``nan`` included. Truncation is not an argument: an
    episode that ends at a time limit would have continued. ``gamma`` may be a tensor (``gamma**n``
    for n-step rewards).

    Raises ``ValueError`` where the shapes would broadcast beyond that of ``next_value``.
    """
    target = reward + gamma * next_value.masked_fill(terminated.bool(), 0.0)
    if target.shape != next_value.shape:
        raise ValueError(
            f"reward has shape {tuple(reward.shape)}, next_value {tuple(next_value.shape)} and "
            f"terminated {tuple(terminated.shape)}; expected one shape. Squeeze or expand them "
            "first, so that nothing broadcasts by accident."
        )
    return target


def exponential_weight(
    advantage: Tensor, *, temperature: float | Tensor, max_weight: float | Tensor
) -> Tensor:
    """Weight of a sample for the policy, ``min(exp(temperature * advantage), max_weight)``.

    Shape of ``advantage``, range ``[0, max_weight]`` (eq. 7; the clip, 100, is the official
    code's). ``temperature`` is an inverse temperature: 0 gives every sample weight 1 (behaviour
    cloning), a large one keeps only the best actions. The exponent is capped before ``exp``, so
    no advantage overflows and gradients stay finite; ``nan`` stays ``nan``. Raises ``ValueError``
    on a number ``max_weight <= 0``.
    """
    if not isinstance(max_weight, Tensor) and not max_weight > 0:
        raise ValueError(f"max_weight is {max_weight}; it must be > 0 (the paper's is 100).")
    exponent = temperature * advantage
    highest: Any = max_weight
    clip = highest.log() if isinstance(highest, Tensor) else math.log(highest)
    return torch.where(exponent >= clip, highest, exponent.clamp(max=clip).exp())


def positive_weight(advantage: Tensor, *, max_weight: float | Tensor) -> Tensor:
    """Weight of a sample for the policy, ``min(max(advantage, 0), max_weight)``.

    Shape of ``advantage``: only actions that are better than V count. The weight of SQL and EQL in
    their authors' code (Xu et al. 2023, arXiv:2303.15810).
    """
    return advantage.clamp(min=0).clamp(max=max_weight)


def sparse_weight(
    advantage: Tensor, *, alpha: float | Tensor, max_weight: float | Tensor
) -> Tensor:
    """Weight of a sample for the policy, ``min(max(1 + advantage / (2 alpha), 0), max_weight)``.

    Shape of ``advantage``. The ratio of SQL's optimal policy to the behaviour policy (Xu et al. 2023,
    arXiv:2303.15810): its mean is 1 where V minimises :func:`sparse_loss`, and actions that are worse
    than V by ``2 alpha`` have weight 0. A large ``alpha`` is behaviour cloning. Raises ``ValueError``
    on a number ``alpha <= 0``.
    """
    return positive_weight(1 + advantage / (2 * _positive(alpha)), max_weight=max_weight)


def flow_path(noise: Tensor, action: Tensor, *, time: Tensor) -> tuple[Tensor, Tensor]:
    """A point on the straight line from ``noise`` to ``action``, and its velocity there.

    ``(1 - time) * noise + time * action`` and ``action - noise``, both ``(*B, A)``; ``time`` is
    ``(*B,)`` in [0, 1]. The regression of the velocity on the point is conditional flow matching
    (Lipman et al. 2023, arXiv:2210.02747, eq. 22 and 23 with sigma_min = 0).
    """
    velocity = action - noise
    return noise + time.unsqueeze(-1) * velocity, velocity


def condition_input(condition: Tensor, known: Tensor) -> Tensor:
    """What a conditioned flow reads of a condition, ``(*B, 2)``: ``known``, and their product.

    ``condition`` and ``known`` (bool, or 0 and 1): ``(*B,)``. Where it is not known both numbers are
    0, which differs from a known condition of 0.
    """
    known = known.to(condition.dtype)
    return torch.stack([known, known * condition], -1)


def pick_action(values: Tensor, action: Tensor, *, leading: int | None = None) -> Tensor:
    """Value of the chosen action: ``(*K, *B, N)`` values of N actions -> ``(*K, *B)``.

    ``action`` is an index ``(*B,)`` or ``(*B, 1)``, or one-hot ``(*B, N)``. ``leading`` is the number
    of dimensions ``*K`` that the action lacks; with it, every shape has one meaning. Without it the
    first that fits of one-hot, ``(*B, 1)`` and ``(*B,)`` is taken.

    Raises ``ValueError`` when there is a single action, ``action`` fits none of the shapes, or its
    indices are floats.
    """
    num_actions = values.shape[-1]
    if num_actions < 2:
        raise ValueError(
            f"values have shape {tuple(values.shape)}: the last dimension must hold one value per "
            "action, at least two. A critic of (state, action) pairs belongs in IQLLoss."
        )
    index = _action_index(values, action, leading).long()
    index = index.expand(values.shape[:-1]).unsqueeze(-1)
    return values.gather(-1, index).squeeze(-1)


def _action_index(values: Tensor, action: Tensor, leading: int | None) -> Tensor:
    batch = values.shape[:-1]
    # Dimensions that the action lacks if its last one is of its own, and if it is one of the batch's.
    own, shared = values.ndim - action.ndim, values.ndim - action.ndim - 1
    if leading is not None:
        own = shared = leading
    one_hot = action.shape == (*batch[own:], values.shape[-1])
    if one_hot and (leading is not None or action.ndim > 1 or values.ndim == 1):
        return action.long().argmax(-1)
    trailing = action.shape == (*batch[own:], 1)
    if not trailing and action.shape != batch[shared:]:
        raise ValueError(
            f"action has shape {tuple(action.shape)} but the values have shape "
            f"{tuple(values.shape)}; expected one-hot (*B, {values.shape[-1]}), or indices of shape "
            "(*B, 1) or (*B,)."
        )
    if action.is_floating_point():
        raise ValueError(
            f"action has {action.dtype} indices of shape {tuple(action.shape)}; expected whole "
            "numbers, which action.long() gives, or one-hot."
        )
    return action.squeeze(-1) if trailing else action


def effective_sample_size(weight: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Kish's ``(sum w)**2 / sum w**2``: the equivalent number of equally weighted samples.

    In [1, count]. Far below the batch size the policy
    learns from few samples: lower ``temperature``, or scale the rewards down. Zero when no weight
    is positive. Kish 1965, Survey Sampling.
    """
    weight, _ = _unmasked(weight, mask, None)
    largest = weight.amax() if weight.numel() else weight.sum()
    weight = weight / torch.where(largest > 0, largest, torch.ones_like(largest))  # no underflow
    square = weight.square().sum()
    return torch.where(square > 0, weight.sum().square() / square, torch.zeros_like(square))


def weighted_mean(
    value: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """``sum(weight * value) / sum(weight)`` over the samples where ``mask`` is true.

    ``mask`` (bool) and ``weight`` have the shape of
    ``value``. Masked samples are not read, so they may be ``nan``. If all are masked, the mean is 0
    and its gradient is zero. Raises ``ValueError`` on another shape, or a mask that is not bool.
    """
    value, weight = _unmasked(value, mask, weight)
    if weight is None:
        if mask is None:
            return value.mean()
        weight = mask.to(value.dtype)
    total = weight.sum()
    return (weight * value).sum() / torch.where(total == 0, torch.ones_like(total), total)


def reduce(
    value: Tensor,
    *,
    reduction: str,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Reduce per-sample losses: ``"mean"`` (:func:`weighted_mean`), ``"sum"``, or ``"none"``.

    With ``"none"`` the shape is kept and masked samples
    are 0. Raises ``ValueError`` on another name, and as :func:`weighted_mean`.
    """
    if reduction == "mean":
        return weighted_mean(value, mask=mask, weight=weight)
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; choose 'mean', 'sum' or 'none'.")
    value, weight = _unmasked(value, mask, weight)
    value = value if weight is None else value * weight
    return value.sum() if reduction == "sum" else value


def _unmasked(
    value: Tensor, mask: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``value`` and ``weight`` with zeros where ``mask`` is false; raises on other shapes."""
    for name, entry in (("mask", mask), ("weight", weight)):
        if entry is not None and entry.shape != value.shape:
            raise ValueError(
                f"{name} has shape {tuple(entry.shape)} but the values have shape "
                f"{tuple(value.shape)}; expand it first, so that nothing broadcasts by accident."
            )
    if mask is None:
        return value, weight
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; expected torch.bool: pass mask.bool().")
    value = value.masked_fill(~mask, 0.0)
    return value, None if weight is None else weight.masked_fill(~mask, 0.0)


def cosine_factor(update: int, *, updates: int, intervals: int) -> float:
    """Factor of a learning rate that falls from 1 to 0 over ``updates``, along half a cosine.

    ``0.5 (1 + cos(pi i / intervals))`` in interval i of ``intervals`` equal ones, in each of which it
    is constant; 0 after the last update. With 0 intervals the factor is always 1.
    """
    if intervals == 0:
        return 1.0
    interval = min(update, updates) * intervals // updates
    return 0.5 * (1 + math.cos(math.pi * interval / intervals))
