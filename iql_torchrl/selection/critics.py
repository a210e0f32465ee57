"""Critics of several candidates fitted together, and the scores that they give held-out episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDictBase
from torch import Tensor, nn
from tqdm import tqdm

from iql_torchrl import functional as F
from iql_torchrl.data import ObservationStatistics
from iql_torchrl.networks import Standardise
from iql_torchrl.networks.perceptrons import chain
from iql_torchrl.selection.bounds import FloatArray
from iql_torchrl.selection.candidates import Candidate, actions, log_probabilities, states
from iql_torchrl.selection.coverage import USUAL, Coverage, features_of
from iql_torchrl.selection.episodes import Episodes, EpisodeScores
from iql_torchrl.selection.estimators import (
    DEVIATIONS,
    LARGEST_LOG_WEIGHT,
    LoggedLogProb,
    ModelValues,
    episode_scores,
)
from iql_torchrl.tolerance import rounding

Layers = list[Tensor]

TABLE_BYTES = 2**31
DRAWN_TOGETHER = 256
ROWS_AT_ONCE = 4096
MAX_FEATURES = 2048
RIDGE = 1e-3
WORST_SHARE = 0.05
VISITS_COMPARED = 5_000


@dataclass
class Critics:
    """Critics of P candidates and of the behaviour policy, and how they read the dataset ``train``.

    The last of the P + 1 critics estimates V of the behaviour policy from logged transitions: its
    action input is always the mean action, or it averages over the outputs of discrete actions.
    ``layers``: weight ``(P + 1, out, in)`` and bias ``(P + 1, out)`` of each layer in turn. Values are
    in units of the deviation of the dataset's returns, ``unit``.

    ``limits``: smallest and largest return. ``samples``: draws of a continuous action per state; 0: the
    deterministic or most probable action.
    """

    candidates: tuple[Candidate, ...]
    train: Episodes
    device: torch.device
    limits: tuple[float, float]
    samples: int = 0
    seed: int = 0
    layers: Layers = field(default_factory=list)

    def __post_init__(self) -> None:
        dataset, returns = self.train.dataset, self.train.returns_to_go
        # If all returns are equal, their deviation is 0 but for rounding and cannot be the unit.
        spread, size = float(returns.std()), float(np.abs(returns).mean())
        self.unit = spread if spread > rounding(np.float64) * size else size or 1.0
        self.mean_return = float(returns.mean())
        self.discrete = isinstance(dataset.action_space, spaces.Discrete)
        self.outputs = int(dataset.action_space.n) if self.discrete else 1  # type: ignore[attr-defined]
        if not self.discrete:
            logged = ObservationStatistics.of(dataset.transitions["action"].float())
            self.scale = Standardise(logged.mean, logged.std).to(self.device)

    def choices(self, table: TensorDictBase) -> Tensor:
        """Probabilities ``(P + 1, N, n)`` or actions ``(P + 1, N, K, A)``; behaviour policy last."""
        chosen = [
            log_probabilities(m, table, self.outputs, deterministic=self.samples == 0).exp().float()
            if self.discrete
            else actions(m, table, samples=self.samples, seed=self.seed)
            for m in self.candidates
        ]
        every = torch.stack(chosen).to(self.device)
        behaviour = torch.full_like(every[:1], 1 / self.outputs)
        if not self.discrete:
            behaviour = self.scale.mean.float().expand_as(behaviour)
        return torch.cat([every, behaviour])

    def logged(self, action: Tensor) -> Tensor:
        """Logged actions ``(B, ...)`` in the form of :meth:`choices`."""
        if self.discrete:
            taken = nn.functional.one_hot(action.reshape(-1), self.outputs).float()
            return taken.expand(len(self.candidates) + 1, -1, -1)
        every = action.expand(len(self.candidates) + 1, -1, -1).clone()
        every[-1] = self.scale.mean
        return every[:, :, None]

    def inputs(self, features: Tensor, choices: Tensor) -> Tensor:
        """What the critics of these choices read: ``(B, D)``, or ``(P, B * K, D + A)`` with actions."""
        if self.discrete:
            return features
        repeated = features.repeat_interleave(choices.shape[2], 0)
        action = self.scale(choices.flatten(1, 2))
        return torch.cat([repeated.expand(len(action), -1, -1), action], -1)

    def expected(self, layers: Layers, features: Tensor, choices: Tensor) -> Tensor:
        """``E_{a~pi} Q(s, a)``: ``(P + 1, B)`` from the choices at B states."""
        values = chain(self.inputs(features, choices), layers)
        if self.discrete:
            return (choices * values).sum(-1)
        return values.unflatten(1, (-1, choices.shape[2])).mean((2, 3))

    def value(self, layers: Layers, steps: Steps, index: Tensor) -> Tensor:
        """Q(s, a) of logged actions, and V(s) of the behaviour policy, ``(P + 1, B)``."""
        features, action = steps.features[index], steps.action[index]
        if not self.discrete:
            return chain(self.inputs(features, self.logged(action)), layers).squeeze(-1)
        every = chain(features, layers)
        values = F.pick_action(every, action, leading=1)
        return torch.cat([values[:-1], every[-1:].mean(-1)])

    def target(self, layers: Layers, steps: Steps, index: Tensor) -> Tensor:
        """``r + discount * E Q'(s', .)``, ``(P + 1, B)``, of the transitions ``index`` ``(B,)``."""
        following = self.expected(layers, steps.following[index], steps.choices(index))
        following = torch.where(steps.out_of_support[index], steps.end_values, following)
        terminated = steps.terminated[index].expand_as(following)
        return F.td_target(steps.reward[index], following, terminated, gamma=self.train.discount)

    def fit(
        self, steps: Steps, hidden: Sequence[int], updates: int, batch_size: int, lr: float,
        polyak: float, progress: bool | None = None,
    ) -> None:  # fmt: skip
        """P + 1 equal MLPs with the mean return as output, then ``updates`` of Adam."""
        size = self.inputs(steps.features[:1], self.logged(steps.action[:1])).shape[-1]
        online = self._first_layers([size, *hidden, self.outputs])
        target = [leaf.detach().clone() for leaf in online]
        optimizer = torch.optim.Adam(online, lr=lr)
        batches = torch.Generator().manual_seed(self.seed)  # the same batches on every device
        for update in tqdm(
            range(updates), "fitted Q evaluation", unit="update", leave=False,
            disable=None if progress is None else not progress,
        ):  # fmt: skip
            place = update % DRAWN_TOGETHER
            if place == 0:  # one copy to the device for many updates: each would wait for it
                coming = (min(DRAWN_TOGETHER, updates - update), batch_size)
                indices = torch.randint(len(steps.reward), coming, generator=batches).to(
                    self.device
                )
            with torch.no_grad():
                regressed = self.target(target, steps, indices[place])
            error = self.value(online, steps, indices[place]) - regressed
            optimizer.zero_grad()
            error.square().mean(-1).sum().backward()
            optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
            optimizer.step()
            for kept, leaf in zip(target, online, strict=True):
                kept.lerp_(leaf.detach(), polyak)
        self.layers = [leaf.detach() for leaf in online]

    def _first_layers(self, widths: Sequence[int]) -> Layers:
        generator, layers = torch.Generator().manual_seed(self.seed), []
        for number, (before, after) in enumerate(pairwise(widths), 2):
            layers += [torch.zeros(before, after), torch.zeros(after)]
            if number < len(widths):
                nn.init.orthogonal_(layers[-2], 2.0**0.5, generator=generator)
        layers[-1] += self.mean_return / self.unit
        size = len(self.candidates) + 1
        copies = [leaf.expand(size, *leaf.shape).contiguous().to(self.device) for leaf in layers]
        return [(leaf.mT if leaf.ndim == 3 else leaf).requires_grad_() for leaf in copies]

    def state_values(self, features: Tensor, choices: Tensor) -> FloatArray:
        """Every policy's value of N states, ``(P + 1, N)``, raw units."""
        parts = zip(features.split(ROWS_AT_ONCE), choices.split(ROWS_AT_ONCE, 1), strict=True)
        values = torch.cat([self.expected(self.layers, *part).cpu() for part in parts], 1)
        return np.asarray(values.double().numpy() * self.unit)

    def visit_features(self, policy: int, features: Tensor, choices: Tensor) -> Tensor:
        """The last hidden features of states, averaged over the policy's actions there, ``(B, F)``."""
        chosen = choices[policy : policy + 1]
        hidden = self.inputs(features, chosen)
        if len(self.layers) > 2:
            hidden = chain(hidden, [leaf[policy : policy + 1] for leaf in self.layers[:-2]]).relu()
        hidden = hidden if hidden.ndim == 2 else hidden[0]
        hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], -1)
        if not self.discrete:
            return hidden.unflatten(0, (-1, chosen.shape[2])).mean(1)
        if policy == len(self.candidates):
            return hidden
        if hidden.shape[-1] * self.outputs > MAX_FEATURES:
            return torch.cat([hidden, chosen[0]], -1)
        return (hidden[:, :, None] * chosen[0, :, None, :]).flatten(1)


class Steps:
    """Transitions as critics read them.

    ``starts``: features and choices of the first states. ``out_of_support`` ``(N,)``: transitions
    whose next observation does not occur in the dataset. The value of that state counts as the
    smallest return for the candidates and the largest for the behaviour policy.
    """

    def __init__(
        self,
        critics: Critics,
        episodes: Episodes,
        coverage: Coverage,
        table_bytes: int = TABLE_BYTES,
    ) -> None:
        table, device = episodes.dataset.transitions, critics.device
        self.critics, self.episodes, self.coverage = critics, episodes, coverage
        self.features = features_of(critics.train.dataset, table).to(device)
        following = features_of(critics.train.dataset, table, following=True)
        self.following = following.to(device)
        self.reward = torch.from_numpy(episodes.reward / critics.unit).float().to(device)
        self.terminated = torch.from_numpy(episodes.terminated).to(device)
        self.action = (table["action"] if critics.discrete else table["action"].float()).to(device)
        first = torch.from_numpy(episodes.first)
        ends = torch.from_numpy(episodes.last[episodes.never_terminated])
        self.starts = self.features[first], critics.choices(states(table[first]))
        out_of_support = torch.zeros(len(table), dtype=torch.bool)
        if len(ends):
            out_of_support[ends] = coverage.unsupported_states(following[ends])
        self.out_of_support = out_of_support.to(device)
        low, high = (limit / critics.unit for limit in critics.limits)
        self.end_values = torch.tensor([[low]] * len(critics.candidates) + [[high]], device=device)
        self.states = states(table, following=True)
        one = critics.choices(self.states[:1])
        few = one.numel() * one.element_size() * len(table) <= table_bytes
        self.kept = critics.choices(self.states) if few else None
        self.parts = torch.arange(len(table), device=device).split(ROWS_AT_ONCE)

    def choices(self, index: Tensor) -> Tensor:
        """Every policy's choices in the next states of the transitions ``index`` ``(B,)``."""
        if self.kept is None:
            return self.critics.choices(self.states[index.to(self.states.device or "cpu")])
        return self.kept.index_select(1, index)

    def visits(self, policy: int) -> Tensor:
        """Coefficients of a policy's discounted visits relative to the dataset's, ``(F,)``.

        ``w`` is linear in the last hidden features ``f`` of the policy's critic, and solves
        ``mean_e sum_t w (f(s, a) - discount E f(s', .)) = mean_e f(s_0)`` over the dataset fitted on,
        with a small ridge: minimax weight learning with a linear class (Uehara, Huang, Jiang 2020,
        arXiv:1910.12809, section 4). The visits of the behaviour policy are those after truncation.
        """
        critics, episodes, device = self.critics, self.episodes, self.critics.device
        visited = partial(critics.visit_features, policy)
        if policy < len(critics.candidates):
            begun = visited(*self.starts).mean(0).double()
        else:
            ends = torch.from_numpy(episodes.last).to(device)
            left = torch.from_numpy(episodes.truncation_weight).float().to(device)
            after = visited(self.following[ends], self.choices(ends))
            begun = ((left * ~self.out_of_support[ends])[:, None] * after).mean(0).double()
        squares, change = torch.zeros_like(begun), torch.zeros_like(begun).diag()
        for index in self.parts:
            logged = visited(self.features[index], critics.logged(self.action[index]))
            going = ~(self.terminated[index] | self.out_of_support[index])
            after = visited(self.following[index], self.choices(index))
            step = logged - episodes.discount * going[:, None] * after
            change += (step.T @ logged).double()
            squares += logged.double().square().sum(0)
        ridge = RIDGE * squares.mean().clamp(min=1e-12)
        change += ridge * torch.ones_like(begun).diag()
        return torch.linalg.solve(change, begun * len(episodes))

    def corrections(
        self, coefficients: Sequence[Tensor]
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Weights (at least 0), one-step errors and Q of every step, each ``(P + 1, N)``, raw units."""
        critics, parts = self.critics, []
        for index in self.parts:
            features, taken = self.features[index], critics.logged(self.action[index])
            weight = [
                critics.visit_features(policy, features, taken).double() @ each
                for policy, each in enumerate(coefficients)
            ]
            value = critics.value(critics.layers, self, index)
            error = critics.target(critics.layers, self, index) - value
            every = torch.stack(weight).clamp(min=0), error.double(), value.double()
            parts.append(torch.stack(every).cpu())
        weights, errors, values = torch.cat(parts, 2).numpy()
        return weights, errors * critics.unit, values * critics.unit

    def unconfirmed(self, logged: Sequence[LoggedLogProb]) -> FloatArray:
        """Share of each candidate's unsupported actions that propensities do not show as supported.

        Where every action of a policy is supported, ``pi/b`` of the logged action has mean 1. The mean
        is over held-out steps, weighted by the probability that :class:`Coverage` calls the policy's
        action unsupported. 1 without propensities.
        """
        rows, result = len(self.reward), np.ones(len(logged))
        if all(known.behaviour is None for known in logged):
            return result
        compared = torch.linspace(0, rows - 1, min(rows, VISITS_COMPARED)).long()
        chosen = self.critics.choices(states(self.episodes.dataset.transitions[compared]))[:-1]
        outside = self.coverage.unsupported_choices(self.features[compared], chosen)
        for number, (policy, behaviour) in enumerate(logged):
            if behaviour is not None:
                weight = outside[number].double().numpy()
                ratio = np.exp(np.minimum(policy - behaviour, LARGEST_LOG_WEIGHT))[compared.numpy()]
                total = max(float(weight.sum()), 1e-300)
                mean = float((weight * ratio).sum()) / total
                error = float(np.square(weight * (ratio - mean)).sum()) ** 0.5 / total
                result[number] = np.clip(1 - mean - DEVIATIONS * error, 0, 1)
        return result

    def unsupported(self, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Share of each candidate's steps that are unsupported, and the mean over the worst of them.

        A candidate's steps are the first states and the states after the steps fitted on, weighted.
        """
        critics, rows, episodes = self.critics, len(self.reward), len(self.episodes)
        compared = torch.linspace(0, rows - 1, min(rows, VISITS_COMPARED)).long()
        later = self.following[compared], critics.choices(self.states[compared])
        parts = [self.coverage.unsupported_choices(*each) for each in (self.starts, later)]
        outside = torch.cat(parts, 1)[:-1].double().numpy()
        going = ~(self.terminated | self.out_of_support).cpu().numpy()[compared.numpy()]
        scale = self.episodes.discount * rows / len(compared) / episodes
        followed = weight[:-1, compared.numpy()] * going * scale
        visits = np.concatenate([np.full((len(followed), episodes), 1 / episodes), followed], 1)
        visits /= visits.sum(1, keepdims=True)
        order = np.argsort(-outside, axis=1)
        tail = np.cumsum(np.take_along_axis(visits, order, 1), axis=1).clip(max=WORST_SHARE)
        most = np.diff(tail, prepend=0.0) * np.take_along_axis(outside, order, 1)
        share, worst = (outside * visits).sum(1), most.sum(1) / WORST_SHARE
        return np.clip(share, 0, 1), np.clip(worst, 0, 1)


@torch.no_grad()
def network_scores(
    fitted: Steps, fresh: Steps, logged: Sequence[LoggedLogProb]
) -> tuple[EpisodeScores, FloatArray, FloatArray]:
    """Doubly robust scores of held-out episodes (:func:`estimators.doubly_robust`).

    Where ``logged`` has no propensities, weights are those of :meth:`Steps.visits`; negative ones count
    as 0. ``fitted``, ``fresh``: the transitions fitted on and held out. Also returns the candidates'
    mean squared one-step errors of held-out steps and of those fitted on.
    """
    critics, held_out = fitted.critics, fresh.episodes
    coefficients = [fitted.visits(policy) for policy in range(len(critics.candidates) + 1)]
    train_weight, train_error, _ = fitted.corrections(coefficients)
    weight, error, action_value = fresh.corrections(coefficients)
    ends = torch.from_numpy(held_out.last).to(critics.device)
    initial = critics.state_values(*fresh.starts)[:-1]
    after = critics.state_values(fresh.following[ends], fresh.choices(ends))[-1]
    span = critics.limits[1] - critics.limits[0]
    left, out_of_support = held_out.truncation_weight, fresh.out_of_support[ends].cpu().numpy()
    ended = held_out.discount * (train_weight * fitted.out_of_support.cpu().numpy()).sum(1)
    ended, largest = span * ended / len(fitted.episodes), train_weight.max(1)
    low = [ModelValues(*each) for each in zip(initial, action_value, error, weight, strict=False)]
    high = [each._replace(initial=each.initial + e) for each, e in zip(low, ended, strict=False)]
    behaviour_high = held_out.returns_to_go[held_out.first] + held_out.sums(weight[-1] * error[-1])
    behaviour_high = behaviour_high + left * np.where(out_of_support, critics.limits[1], after)
    share, worst = fitted.unsupported(train_weight)
    unconfirmed = fresh.unconfirmed(logged)
    result = episode_scores(
        held_out,
        logged,
        [*zip(low, high, strict=True)],
        critics.limits,
        largest[:-1],
        behaviour_scores=behaviour_high - left * out_of_support * span - ended[-1],
        behaviour_scores_high=behaviour_high,
        behaviour_max_deviation=float(largest[-1]) * span,
        unsupported=share * unconfirmed,
        behaviour_unsupported=1 - USUAL,
        worst_unsupported=worst * unconfirmed,
        uncovered_ends=float((left * out_of_support).mean()),
        history={},
    )
    return result, np.square(error[:-1]).mean(1), np.square(train_error[:-1]).mean(1)
