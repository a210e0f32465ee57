"""Distributions of actions that stay inside the action spec.

No distribution checks its arguments: such a check reads a tensor, which on a GPU waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch import distributions as D
from torch.distributions import constraints

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class BoundedDistribution(D.Distribution):
    """Base of distributions of actions ``(*B, A)`` in ``[low, high]``, made from Gaussian noise.

    What a distribution here does not define (``cdf``, ``entropy``, ...) raises
    ``NotImplementedError``, as every :class:`torch.distributions.Distribution` does.

    Args:
        loc (Tensor): location of the Gaussian, ``(*B, A)``; of a mixture ``(*B, M, A)``.
        scale (Tensor): its standard deviation, of a shape that broadcasts with ``loc``.

    Keyword Args:
        low (Tensor): lower bound of the actions, ``(A,)``.
        high (Tensor): upper bound of the actions, ``(A,)``.
        varying (Tensor, optional): bool ``(A,)``; a dimension where it is ``False`` is constant and
            does not count in log-probabilities. Default: all dimensions vary.
    """

    #: Names of the parameters, in the order of the constructor.
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = True
    extra_noise = 0  # noise values of a sample besides one for each dimension
    component_dims = 0  # dimensions of ``loc`` between the batch and the action

    def __init__(
        self, loc: Tensor, scale: Tensor, *,
        low: Tensor, high: Tensor, varying: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.base_dist = D.Normal(loc, scale, validate_args=False)
        self.loc, self.scale = self.base_dist.loc, self.base_dist.scale
        self.low, self.high = low.to(self.loc.device), high.to(self.loc.device)
        self.varying = None if varying is None else varying.to(self.loc.device)
        batch_shape = self.loc.shape[: -1 - self.component_dims]
        super().__init__(batch_shape, self.loc.shape[-1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The box ``[low, high]``, which contains every sample."""
        box: constraints.Constraint = constraints.interval(self.low, self.high)
        return constraints.independent(box, 1)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> BoundedDistribution:
        dims = len(self.batch_shape)
        parameters = [getattr(self, name) for name in self.arg_constraints]
        expanded = [each.expand(*batch_shape, *each.shape[dims:]) for each in parameters]
        return type(self)(*expanded, low=self.low, high=self.high, varying=self.varying)

    def action(self, x: Tensor) -> Tensor:
        """Action inside ``[low, high]`` from a value ``x`` of the Gaussian."""
        return torch.minimum(torch.maximum(x, self.low.to(x)), self.high.to(x))

    @property
    def deterministic_sample(self) -> Tensor:
        """The action of the Gaussian's mean: the median of each dimension."""
        return self.action(self.loc)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Samples ``(*N, *B, A)`` from standard normal ``noise`` ``(*N, *B, A + extra_noise)``."""
        return self.action(self.loc + self.scale * noise)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        size = self.event_shape.numel() + self.extra_noise
        shape = (*sample_shape, *self.batch_shape, size)
        return self.from_noise(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return BoundedDistribution.rsample(self, sample_shape)

    def log_probs(self, value: Tensor) -> Tensor:
        """Log-density of each dimension of an action, ``(*B, A)``."""
        error = (value - self.loc) / self.scale
        return -(0.5 * error.square() + self.scale.log() + HALF_LOG_2PI)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.masked_log_prob(value)

    def masked_log_prob(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log_prob`` of the dimensions where ``mask`` ``(*B, A)`` is ``True``, ``(*B,)``."""
        return self._sum(self.log_probs(value), mask)

    def _sum(self, each: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum over the dimensions of the action that vary and are in ``mask``."""
        for counted in (self.varying, mask):
            each = each if counted is None else each.where(counted, 0)
        return each.sum(-1)

    def _clipped_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the Gaussian's values clipped to ``[low, high]``."""
        below, above = ((bound - self.loc) / self.scale for bound in (self.low, self.high))
        p_low, p_high = torch.special.ndtr(below), torch.special.ndtr(-above)
        d_low, d_high = ((-0.5 * x.square() - HALF_LOG_2PI).exp() for x in (below, above))
        mean = below * p_low + above * p_high + d_low - d_high
        square = below.square() * p_low + above.square() * p_high + 1 - p_low - p_high
        square = square + below * d_low - above * d_high
        variance = (square - mean.square()).clamp(min=0)
        return self.action(self.loc + self.scale * mean), self.scale.square() * variance


class ClippedGaussian(BoundedDistribution):
    """Diagonal Gaussian whose samples are clipped to ``[low, high]``; its density is not.

    Logged actions on the bounds have an ordinary log-probability, unlike under a squashed Gaussian.
    The official IQL code clips at sampling too. ``mean``, ``mode`` and ``variance`` are those of the
    clipped samples; ``log_prob``, ``entropy`` and the KL divergence are those of the Gaussian.

    Examples:
        >>> low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
        >>> dist = ClippedGaussian(torch.zeros(5, 2), torch.ones(5, 2), low=low, high=high)
        >>> dist.sample((7,)).shape, dist.log_prob(high.expand(5, 2)).shape
        (torch.Size([7, 5, 2]), torch.Size([5]))
    """

    mode = BoundedDistribution.deterministic_sample

    @property
    def mean(self) -> Tensor:
        return self._clipped_moments()[0]

    @property
    def variance(self) -> Tensor:
        return self._clipped_moments()[1]

    def entropy(self) -> Tensor:
        return self._sum(self.base_dist.entropy())


class SquashedGaussian(BoundedDistribution):
    """``centre + half_range * tanh(x)`` with x a diagonal Gaussian: TorchRL's ``TanhNormal``.

    Centre and half range are those of ``[low, high]``. The log-density at an action ``a`` is that of
    the Gaussian at ``x = atanh((a - centre) / half_range)`` less the sum of
    ``log(half_range * (1 - tanh(x)**2))``. The tanh is clamped to ``1 - resolution`` of its dtype,
    so an action on a bound has a finite, very negative log-probability.

    Mean, mode, variance and entropy have no closed form and raise ``NotImplementedError``. A TorchRL
    actor averages 1,000 samples under ``ExplorationType.MEAN``, as with ``TanhNormal``.
    """

    @property
    def mode(self) -> Tensor:
        raise NotImplementedError(
            "SquashedGaussian has no closed form of its mean, mode and variance. Use "
            "ExplorationType.DETERMINISTIC, or estimate them from dist.sample((1000,))."
        )

    mean = variance = mode

    def action(self, x: Tensor) -> Tensor:
        limit = 1 - torch.finfo(x.dtype).resolution
        centre, half_range = centre_and_half_range(self.low, self.high)
        return centre + half_range * x.tanh().clamp(-limit, limit)

    def log_probs(self, value: Tensor) -> Tensor:
        centre, half_range = centre_and_half_range(self.low, self.high)
        unit = unit_of(half_range, self.varying)
        y = (value - centre) / unit
        limit = 1 - torch.finfo(y.dtype).resolution
        x = y.clamp(-limit, limit).atanh()
        slope = 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
        return super().log_probs(x) - slope - unit.log()


@D.register_kl(ClippedGaussian, ClippedGaussian)
@D.register_kl(SquashedGaussian, SquashedGaussian)
def _kl_divergence(p: BoundedDistribution, q: BoundedDistribution) -> Tensor:
    """The Gaussians': no map of actions that both share changes it."""
    return p._sum(D.kl_divergence(p.base_dist, q.base_dist))


class ClippedMixture(BoundedDistribution):
    """Mixture of M diagonal Gaussians, samples clipped to ``[low, high]``.

    ``mode``, which is the deterministic sample too, is the mean of the component that is densest at
    its own mean: exact for components that do not overlap. ``mean`` and ``variance`` are those of the
    clipped samples, ``log_prob`` is that of the mixture without clipping. Samples have no gradient.

    Args:
        logits (Tensor): unnormalised log-weights of the components, ``(*B, M)``.
        loc (Tensor): means of the components, ``(*B, M, A)``.
        scale (Tensor): standard deviations of the components, of the shape of ``loc``.

    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": constraints.real_vector,
        **BoundedDistribution.arg_constraints,
    }
    has_rsample = False
    # raises: the choice of a component has no gradient
    rsample = D.Distribution.rsample  # type: ignore[assignment]
    extra_noise = component_dims = 1

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, *,
        low: Tensor, high: Tensor, varying: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.logits = logits.log_softmax(-1)
        super().__init__(loc, scale, low=low, high=high, varying=varying)

    @property
    def mode(self) -> Tensor:
        density = self.logits - self._sum(self.scale.log())
        return self.action(select(self.loc, density.argmax(-1)))

    deterministic_sample = mode

    @property
    def mean(self) -> Tensor:
        means, _ = self._clipped_moments()
        return self._weighted(means)

    @property
    def variance(self) -> Tensor:
        means, variances = self._clipped_moments()
        between = (means - self._weighted(means).unsqueeze(-2)).square()
        return self._weighted(variances + between)

    def _weighted(self, each: Tensor) -> Tensor:
        return (self.logits.exp().unsqueeze(-1) * each).sum(-2)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Samples ``(*N, *B, A)`` from standard normal ``noise`` ``(*N, *B, A + 1)``.

        The last number chooses the component, by its quantile; the others are its sample.
        """
        ends = self.logits.exp().cumsum(-1)[..., :-1]
        index = (torch.special.ndtr(noise[..., -1:]) >= ends).sum(-1)
        return select(super().from_noise(noise[..., None, :-1]), index)

    def masked_log_prob(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = None if mask is None else mask.unsqueeze(-2)
        return (self.logits + super().masked_log_prob(value.unsqueeze(-2), mask)).logsumexp(-1)


class Choice(D.Categorical):
    """Choice among N by ``logits`` ``(*B, N)``, where ``mask`` (bool, ``(*B, N)``) allows.

    Samples are indices, int64 ``(*B,)``. Ties of the mode go to the first action. ``mean`` raises:
    an average of indices is not an action.

    Args:
        logits (Tensor): unnormalised log-probabilities, ``(*B, N)``.
        mask (Tensor, optional): bool ``(*B, N)``, ``True`` where an action is allowed. Default: all
            are.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        super().__init__(logits=_allowed(logits, mask), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Choice:
        return super().expand(batch_shape, self.__new__(type(self)))

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    deterministic_sample = mode

    @property
    def mean(self) -> Tensor:
        raise RuntimeError(
            "Choice has no mean: its samples are indices of actions. Use ExplorationType.MODE."
        )


class OneHotChoice(D.OneHotCategorical):
    """One-hot choice among N by ``logits`` ``(*B, N)``, where ``mask`` (bool, ``(*B, N)``) allows.

    Samples have the spec's ``dtype``. Ties of the mode go to the first action. ``mean`` is the
    vector of probabilities.

    Args:
        logits (Tensor): unnormalised log-probabilities, ``(*B, N)``.
        mask (Tensor, optional): bool ``(*B, N)``, ``True`` where an action is allowed. Default: all
            are.

    Keyword Args:
        dtype (torch.dtype): dtype of the actions. Default: ``torch.bool``.
    """

    def __init__(
        self, logits: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.bool
    ) -> None:
        self.dtype = dtype
        super().__init__(logits=_allowed(logits, mask), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> OneHotChoice:
        new: OneHotChoice = super().expand(batch_shape, self.__new__(type(self)))
        new.dtype = self.dtype
        return new

    @property
    def mode(self) -> Tensor:
        return nn.functional.one_hot(self.logits.argmax(-1), self.logits.shape[-1]).to(self.dtype)

    deterministic_sample = mode

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return super().enumerate_support(expand).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.to(self.logits.dtype))


def centre_and_half_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and half range of ``[low, high]``."""
    return (high + low) / 2, (high - low) / 2


def unit_of(half_range: Tensor, varying: Tensor | None) -> Tensor:
    """Unit of standard deviations: ``half_range``, 1 where an action's dimension is constant."""
    return half_range if varying is None else half_range.where(varying, 1.0)


def select(values: Tensor, index: Tensor) -> Tensor:
    """Entries ``(*N, A)`` of ``values`` ``(*N, M, A)`` at the places ``index`` ``(*N,)``."""
    # not take_along_dim, with which torch.export 2.14 fixes the batch size
    return values.gather(-2, index[..., None, None].expand_as(values[..., :1, :])).squeeze(-2)


def _allowed(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits if mask is None else logits.masked_fill(~mask, -torch.inf)
