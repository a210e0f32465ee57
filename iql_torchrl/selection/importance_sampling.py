"""Values of policies from logged rewards and propensities alone, without a fitted model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl import functional as F
from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.bounds import FloatArray, mean_bounds
from iql_torchrl.selection.candidates import (
    Candidate,
    has_density,
    logged_log_prob,
    resolve_candidate,
    resolve_candidates,
)
from iql_torchrl.selection.episodes import Episodes, read_datasets, return_range
from iql_torchrl.selection.estimators import (
    LoggedLogProb,
    episode_weights,
    largest_weight,
    per_decision,
    propensities_are_wrong,
)

LOG_PROB = "action_log_prob"
ENOUGH, ENOUGH_SHARE = 100.0, 0.1
TINY = 1e-300


@dataclass(frozen=True)
class Importance:
    """The result of :func:`importance_sampling` for P candidates, in raw reward units.

    Attributes:
        names: of the candidates, ``(P,)``.
        discount: of the values.
        values: estimates, ``(P,)``; NaN where at some step no episode has weight.
        low, high: bounds of each single value, ``(P,)``; the whole range of returns for NaN, and
            where the mean weight shows that the propensities are wrong.
        effective_sample_size: Kish's, of the weights of complete episodes, ``(P,)``, in
            [0, episodes].
        mean_weight: mean weight of complete episodes, ``(P,)``; 1 but for chance.
        wrong: where ``mean_weight`` is so far above 1 that the propensities are wrong, ``(P,)``.
        episodes: number of episodes.
    """

    names: tuple[str, ...]
    discount: float
    values: FloatArray
    low: FloatArray
    high: FloatArray
    effective_sample_size: FloatArray
    mean_weight: FloatArray
    wrong: NDArray[np.bool_]
    episodes: int


def importance_sampling(
    candidates: Mapping[str, Any],
    dataset: OfflineDataset,
    *,
    behaviour: Any,
    discount: float,
    deterministic: bool = False,
    confidence: float = 0.95,
    return_limits: tuple[float, float] | None = None,
    seed: int = 0,
) -> Importance:
    """Value of each candidate from logged rewards alone: :func:`estimators.per_decision`.

    Args:
        candidates: name to ``Agent`` or TorchRL actor; continuous ones need a density.
        dataset: episodes that the candidates were not trained on.
        behaviour: the policy that chose the logged actions: a key of its log-probabilities in the
            data (``"action_log_prob"``; exact if these are correct), or a model of it: an ``Agent``
            or actor, such as behaviour cloning trained on other episodes.
        discount: in [0, 1].
        deterministic: evaluate the policy that takes the most probable discrete action, instead of
            the policy that samples. Continuous policies always sample.
        confidence: of each candidate's interval, in (0, 1).
        return_limits: smallest and largest possible return; None takes both from the dataset,
            :func:`episodes.return_range`.
        seed: of the bounds' draws.

    Raises:
        TypeError, ValueError: a candidate that is not a policy, has no density or does not fit the
            data, a key that the data lack, or a logged action with probability 0 under
            ``behaviour``.
    """
    resolved = resolve_candidates(candidates)
    episodes, _ = read_datasets(dataset, dataset, discount)
    logged = behaviour_log_prob(behaviour, dataset)
    limits = return_range(episodes) if return_limits is None else return_limits
    weights, scores = [], []
    for candidate in resolved:
        policy = logged_log_prob(candidate, dataset, deterministic=deterministic).numpy()
        weights.append(episode_weights(episodes, policy, logged))
        scores.append(
            [per_decision(episodes, policy, logged, continued=c) for c in (None, *limits)]
        )
    value, least, most = np.array(scores).swapaxes(0, 1)
    values, mean = value.mean(1), np.mean(weights, axis=1)
    reach = np.array(
        [
            largest_weight(weight / max(each, 1.0), weight / max(each, TINY))
            for weight, each in zip(weights, mean, strict=True)
        ]
    )
    low, high = mean_bounds(
        least, values - reach * (values - limits[0]), values + reach * (limits[1] - values),
        upper_samples=most, together=False, confidence=confidence, seed=seed,
    )  # fmt: skip
    wrong = np.array([propensities_are_wrong(weight) for weight in weights])
    unknown = np.isnan(values) | wrong
    return Importance(
        names=tuple(candidate.name for candidate in resolved),
        discount=discount,
        values=values,
        low=np.where(unknown, limits[0], np.clip(low, *limits)),
        high=np.where(unknown, limits[1], np.clip(high, *limits)),
        effective_sample_size=np.array([kish(weight) for weight in weights]),
        mean_weight=mean,
        wrong=wrong,
        episodes=len(episodes),
    )


def behaviour_log_prob(behaviour: Any, dataset: OfflineDataset) -> FloatArray:
    """log b(a|s) of the logged actions, float64 ``(N,)``, from a key of the data or a model."""
    if isinstance(behaviour, (str, tuple)):
        source = f"{behaviour!r} of {dataset.name}"
        values = dataset.transitions.get(behaviour, None)
        if not isinstance(values, Tensor):
            keys = sorted(map(str, dataset.transitions.keys(include_nested=True, leaves_only=True)))
            raise ValueError(
                f"the data have no {behaviour!r}; they have {keys}. Give the key of the logged "
                "actions' log-probabilities, or a behaviour model: an agent of temperature 0."
            )
        if values.numel() != len(dataset):
            raise ValueError(
                f"{source} has shape {tuple(values.shape)}; expected one number for each of the "
                f"{len(dataset)} steps."
            )
        result = values.reshape(-1).double().cpu()
    else:
        source = "the behaviour model"
        result = logged_log_prob(resolve_candidate("behaviour", behaviour), dataset)
    impossible = ~result.isfinite()
    if isinstance(dataset.action_space, spaces.Discrete):
        impossible |= result > 1e-6
    if bool(impossible.any()):
        row = int(impossible.nonzero()[0])
        raise ValueError(
            f"{source} gives log-probability {float(result[row]):g} to the logged action in row "
            f"{row}, and there are {int(impossible.sum())} such rows; expected finite logarithms, at "
            "most 0 for discrete actions, because a logged action has a probability above 0."
        )
    return np.asarray(result.numpy())


def kish(weight: FloatArray) -> float:
    """Kish's effective number of episodes from their weights ``(E,)``; 0 where all are 0."""
    relative = torch.from_numpy(weight / max(float(weight.max()), TINY))
    return float(F.effective_sample_size(relative))


def exact_weights(
    candidates: Sequence[Candidate], held_out: Episodes, behaviour: Any, *, deterministic: bool
) -> list[LoggedLogProb]:
    """Log-probabilities of the held-out actions where values rest on known propensities.

    They do for episodes of one step. For longer ones the product of ratios must leave at least 100
    effective episodes and a tenth of all; otherwise the model's weights, which need no products,
    have smaller errors. Continuous actions need a density, so they must be sampled.
    """
    dataset = held_out.dataset
    if behaviour is None and LOG_PROB in dataset.transitions:
        behaviour = LOG_PROB
    unknown = LoggedLogProb(np.empty(0), None)
    discrete = isinstance(dataset.action_space, spaces.Discrete)
    if not isinstance(behaviour, (str, tuple)) or (deterministic and not discrete):
        return [unknown] * len(candidates)
    logged, result = behaviour_log_prob(behaviour, dataset), []
    for candidate in candidates:
        result.append(unknown)
        if discrete or has_density(candidate, dataset):
            policy = logged_log_prob(candidate, dataset, deterministic=deterministic).numpy()
            size = kish(episode_weights(held_out, policy, logged))
            if held_out.lengths.max() == 1 or size >= max(ENOUGH, ENOUGH_SHARE * len(held_out)):
                result[-1] = LoggedLogProb(policy, logged)
    return result
