"""Whether states and actions of policies are far from those of a dataset of vectors."""

from __future__ import annotations

import torch
from gymnasium import spaces
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.data import ObservationStatistics, OfflineDataset
from iql_torchrl.data.codec import leaf_spaces
from iql_torchrl.data.spaces import is_image, usual_encoder
from iql_torchrl.descriptions import describe_space
from iql_torchrl.networks import Standardise

USUAL = 0.99
QUERIES_AT_ONCE = 256


def features_of(train: OfflineDataset, rows: TensorDictBase, *, following: bool = False) -> Tensor:
    """``(N, D)`` standardised by ``train``'s statistics; categories as one-hot vectors."""
    table = rows["next"] if following else rows
    parts = []
    for key, space in sorted(leaf_spaces(train.observation_space).items()):
        if is_image(space):
            raise ValueError(
                f"{'.'.join(key)} is {describe_space(space)}; fitted Q evaluation reads numbers and "
                "categories, no images. Load the data with features of a network instead."
            )
        statistics = train.statistics.get(key[0] if len(key) == 1 else key)
        encoder, _ = usual_encoder(space, statistics)
        parts.append(encoder(table[key]).float())
    return torch.cat(parts, -1)


class Coverage:
    """Which states and actions are farther from ``train`` than logged ones usually are.

    A conformal test (Bates, Candès, Lei, Romano, Sesia 2023, "Testing for outliers with conformal
    p-values", arXiv:2104.08279): unsupported is what has a larger score than 99 % of the steps of
    ``held_out``, so 1 % of the behaviour policy's steps are. Scores, with states and actions
    standardised:

    - of a state: distance to the nearest logged state;
    - of a continuous action in a state: distance to the nearest of the actions logged in the
      ``neighbours`` nearest states;
    - of a discrete action in a state: distance to the ``min_count``-th nearest logged state in
      which that action was taken.

    ``queries``, ``logged``: the largest numbers of transitions of ``held_out`` and ``train`` that are
    compared, drawn from ``seed``.
    """

    def __init__(
        self, train: OfflineDataset, held_out: OfflineDataset, *, min_count: int = 2,
        neighbours: int = 10, queries: int = 2_000, logged: int = 20_000, seed: int = 0,
    ) -> None:  # fmt: skip
        self.min_count = min_count
        generator = torch.Generator().manual_seed(seed)
        known = _drawn(train.transitions, logged, generator)
        usual = _drawn(held_out.transitions, queries, generator)
        self.features, self.action = features_of(train, known), known["action"]
        self.neighbours = min(neighbours, len(known))
        self.num_actions = 0
        features = features_of(train, usual)
        self.state_limit = _quantile(self._distances(features))
        if isinstance(train.action_space, spaces.Discrete):
            self.num_actions = int(train.action_space.n)
            scores = self._by_action(features).gather(1, usual["action"].reshape(-1, 1))
        else:
            statistics = ObservationStatistics.of(train.transitions["action"].float())
            self.scale = Standardise(statistics.mean, statistics.std)
            scores = self._gaps(features, usual["action"][None, :, None])
        self.action_limit = _quantile(scores.flatten())

    def unsupported_states(self, features: Tensor) -> Tensor:
        """Which states ``(N, D)``, see :func:`features_of`, are unsupported, bool ``(N,)``."""
        return self._distances(features) > self.state_limit

    def unsupported_choices(self, features: Tensor, choices: Tensor) -> Tensor:
        """Each policy's probability of an unsupported action in states ``(N, D)``, ``(P, N)``.

        ``choices``: probabilities ``(P, N, n)`` or actions ``(P, N, K, A)``.
        """
        features, choices = features.cpu(), choices.cpu()
        if self.num_actions:
            return (choices * (self._by_action(features) > self.action_limit).float()).sum(-1)
        return (self._gaps(features, choices) > self.action_limit).float().mean(-1)

    def _distances(self, features: Tensor) -> Tensor:
        parts = features.split(QUERIES_AT_ONCE)
        return torch.cat([torch.cdist(part, self.features).amin(-1) for part in parts])

    def _by_action(self, features: Tensor) -> Tensor:
        """Score of every discrete action, ``(N, n)``; infinite for fewer than ``min_count`` rows."""
        result = torch.full((len(features), self.num_actions), torch.inf)
        for action in range(self.num_actions):
            taken = self.features[self.action.reshape(-1) == action]
            if len(taken) >= self.min_count:
                nearest, _ = _nearest(features, taken, self.min_count)
                result[:, action] = nearest[:, -1]
        return result

    def _gaps(self, features: Tensor, choices: Tensor) -> Tensor:
        """Scores ``(P, N, K)`` of continuous actions ``(P, N, K, A)``."""
        _, nearest = _nearest(features, self.features, self.neighbours)
        logged = self.scale(self.action.float())[nearest]
        gaps = [torch.cdist(self.scale(choice.float()), logged).amin(-1) for choice in choices]
        return torch.stack(gaps)


def _nearest(features: Tensor, logged: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances to the ``count`` nearest of ``logged``, and their indices, both ``(N, count)``."""
    parts = features.split(QUERIES_AT_ONCE)
    nearest = [torch.cdist(part, logged).topk(count, largest=False) for part in parts]
    distances, indices = (torch.cat(each) for each in zip(*nearest, strict=True))
    return distances, indices


def _quantile(scores: Tensor) -> Tensor:
    """The 99 % quantile of the scores; the greatest finite one (or 0) where that is infinite."""
    finite = scores[scores.isfinite()].sort().values
    if not len(finite):
        return torch.zeros(())
    return finite[min(int(USUAL * len(scores)), len(finite) - 1)]


def _drawn(rows: TensorDictBase, count: int, generator: torch.Generator) -> TensorDictBase:
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count].sort().values]
