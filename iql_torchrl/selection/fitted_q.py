"""Fitted Q evaluation of several policies at once, from logged episodes alone.

Le, Voloshin, Yue 2019, "Batch policy learning under constraints" (arXiv:1903.08738), algorithm 3,
with a slowly moving target instead of a regression solved to the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDictBase
from torch import Tensor, nn
from tqdm import tqdm

from iql_torchrl import functional as F
from iql_torchrl.config.arithmetic import check_usable
from iql_torchrl.config.knobs import check_choice, check_whole
from iql_torchrl.data import ObservationStatistics, OfflineDataset
from iql_torchrl.networks import Standardise
from iql_torchrl.networks.perceptrons import chain
from iql_torchrl.selection.bounds import FloatArray
from iql_torchrl.selection.candidates import (
    Candidate,
    actions,
    log_probabilities,
    resolve_candidates,
    states,
)
from iql_torchrl.selection.coverage import USUAL, Coverage, features_of
from iql_torchrl.selection.episodes import Episodes, EpisodeScores, read_datasets, return_range
from iql_torchrl.selection.tabular import finite_states, table_scores
from iql_torchrl.tolerance import rounding

Layers = list[Tensor]

TABLE_BYTES = 2**31
DRAWN_TOGETHER = 256
MODELS = ("auto", "table", "network")
ROWS_AT_ONCE = 4096
MAX_FEATURES = 2048
RIDGE = 1e-3
WORST_SHARE = 0.05
VISITS_COMPARED = 5_000


@dataclass(frozen=True)
class FittedQ:
    """What :func:`fitted_q_evaluation` gives; P candidates, E held-out episodes, raw reward units.

    Attributes:
        names: of the candidates, ``(P,)``.
        discount: of the values.
        episodes: :class:`~iql_torchrl.selection.episodes.EpisodeScores`: doubly robust scores of each
            held-out episode, and what the log does not cover.
        td_error, td_error_training: mean squared one-step error of the networks on held-out steps
            and on those trained on, ``(P,)``. It is not 0 for the exact Q where rewards or dynamics
            are random. NaN for a table.
        backups: how often targets were renewed, ``updates`` times ``polyak``; rewards travel one
            step back each time. passes: how often every step of the data was seen. Both are
            infinite for a table, whose equations are solved exactly.
        deterministic: True: candidates take their deterministic or most probable action; False:
            they sample.
    """

    names: tuple[str, ...]
    discount: float
    episodes: EpisodeScores
    td_error: FloatArray
    td_error_training: FloatArray
    backups: float
    passes: float
    deterministic: bool

    @property
    def initial_values(self) -> FloatArray:
        """``E_{a~pi(s)} Q(s, a)`` at each held-out episode's first state, ``(P, E)``."""
        return self.episodes.initial_values

    @property
    def values(self) -> FloatArray:
        """Estimated value of each candidate, ``(P,)``: the mean of its scores."""
        return self.episodes.scores.mean(axis=1)

    def intervals(self, *, confidence: float = 0.95, seed: int = 0) -> FloatArray:
        """Bounds of each of ``values`` by itself, ``(P, 2)``; see :func:`bounds.mean_bounds`.

        They contain the error of the estimate as far as held-out steps can show it.
        """
        return np.stack(self.episodes.value_bounds(confidence, seed), axis=1)


def fitted_q_evaluation(
    candidates: Mapping[str, Any],
    train: OfflineDataset,
    held_out: OfflineDataset,
    *,
    discount: float,
    model: str = "auto",
    min_count: int = 2,
    updates: int = 10_000,
    batch_size: int = 512,
    hidden: Sequence[int] = (128, 128),
    lr: float = 1e-3,
    polyak: float = 0.05,
    deterministic: bool | None = None,
    action_samples: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    table_bytes: int = TABLE_BYTES,
    progress: bool | None = None,
) -> FittedQ:
    """Value of each candidate's policy, fitted on ``train`` and corrected by ``held_out``.

    With few distinct states and discrete actions (``model="table"``), Q solves the equations of the
    log's empirical model exactly (:func:`tabular.table_scores`). Otherwise P critics are trained
    together: critic i regresses ``r + discount * E_{a'~pi_i(s')} Q'_i(s', a')`` with squared error,
    Q' a target network. Nothing is bootstrapped where ``terminated``; past ``truncated`` it is,
    unless the log describes no such state: then the candidates get the least return that either log
    was seen to lead to. All critics start from the same weights and see the same batches, so a
    candidate's estimate does not depend on which others are evaluated with it, and differences come
    from the policies.

    Held-out steps correct the critics' errors, see :func:`network_scores`. Rewards are mapped
    back by each dataset's ``reward_map`` and divided by the deviation of the log's returns while
    training; results are in raw units whatever map the candidates saw.

    Args:
        candidates: name to ``Agent`` or TorchRL actor.
        train: episodes to learn from; best ones that the candidates were not trained on, whose noise
            they have not fitted.
        held_out: episodes that correct the estimate; other ones.
        discount: in [0, 1]; with 1 every episode must terminate.
        model: ``"table"``, ``"network"``, or ``"auto"``: a table where states are few.
        min_count: an action that a state was logged with less often is unsupported.
        updates, batch_size, lr: of Adam, whose rate falls linearly to 0; networks only.
        hidden: widths of the critics; networks only.
        polyak: fraction of the live critics entering the targets at each update, in (0, 1].
        deterministic: price the most probable (the deterministic) action instead of the policy as
            it samples. None: only for continuous actions. Discrete expectations are exact, over
            the actions that ``action_mask`` allows; continuous ones the mean of
            ``action_samples`` draws per state, drawn once.
        table_bytes: candidates' choices at all next states are kept if they fit in so many bytes,
            else computed again for each batch.
        progress: a progress bar of the critics' updates; None shows it on terminals only.

    Raises:
        TypeError, ValueError: a candidate that is no policy or does not fit the data, two logs of
            different tasks, observations that are neither vectors nor a category, states that are
            too many for a table, or a number out of range.
    """
    resolved, (fit, fresh) = (
        resolve_candidates(candidates),
        read_datasets(train, held_out, discount),
    )
    check_choice("model", model, MODELS)
    check_whole(
        updates=updates, batch_size=batch_size, action_samples=action_samples, min_count=min_count,
        **{f"hidden[{number}]": width for number, width in enumerate(hidden)},
    )  # fmt: skip
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr is {lr}; expected a rate above 0.")
    if not 0 < polyak <= 1:
        raise ValueError(f"polyak is {polyak}; it must lie in (0, 1].")
    if discount == 1:
        _check_ends(train=fit, held_out=fresh)
    if deterministic is None:
        deterministic = not isinstance(train.action_space, spaces.Discrete)
    finite = None if model == "network" else finite_states(train, held_out)
    if finite is None and model == "table":
        raise ValueError(
            "model is 'table', but the log has continuous actions or too many distinct states; "
            "choose 'network'."
        )
    passes = backups = np.inf
    if finite is not None:
        scores = table_scores(
            resolved, fit, fresh, finite,
            discount=discount, min_count=min_count, deterministic=deterministic,
        )  # fmt: skip
        error = error_training = np.full(len(resolved), np.nan)
    else:
        check_usable(str(device))
        limits, samples = return_range(discount, fit, fresh), 0 if deterministic else action_samples
        critics = Critics(resolved, fit, torch.device(device), discount, limits, samples, seed)
        coverage = Coverage(train, held_out, min_count=min_count, seed=seed)
        fitted, unseen = (Steps(critics, log, coverage, table_bytes) for log in (fit, fresh))
        critics.fit(fitted, hidden, updates, batch_size, lr, polyak, progress)
        scores, error, error_training = network_scores(fitted, unseen)
        passes, backups = updates * batch_size / len(train), updates * polyak
    names = tuple(candidate.name for candidate in resolved)
    return FittedQ(names, discount, scores, error, error_training, backups, passes, deterministic)


@dataclass
class Critics:
    """Critics of P candidates and of the log's own policy, and how they read the log ``train``.

    There are P + 1 critics. The last one is of the policy that made the log. It estimates the value
    of a state from the logged steps, so it does not depend on an action: its action input is always
    the log's mean action, or it averages over the outputs of discrete actions. ``layers`` are the
    weight ``(P + 1, out, in)`` and the bias ``(P + 1, out)`` of each layer in turn.

    Values are in units of the deviation of the log's returns, ``unit``. ``limits``: least and greatest
    return. ``samples``: draws of a continuous action per state; with 0 candidates take
    the deterministic or most probable action.
    """

    candidates: tuple[Candidate, ...]
    train: Episodes
    device: torch.device
    discount: float
    limits: tuple[float, float]
    samples: int = 0
    seed: int = 0
    layers: Layers = field(default_factory=list)

    def __post_init__(self) -> None:
        log, returns = self.train.log, self.train.returns_to_go(self.discount)
        # If all returns are equal, their deviation is 0 but for rounding and cannot be the unit.
        spread, size = float(returns.std()), float(np.abs(returns).mean())
        self.unit = spread if spread > rounding(np.float64) * size else size or 1.0
        self.mean_return = float(returns.mean())
        self.discrete = isinstance(log.action_space, spaces.Discrete)
        self.outputs = int(log.action_space.n) if self.discrete else 1  # type: ignore[attr-defined]
        if not self.discrete:
            logged = ObservationStatistics.of(log.transitions["action"].float())
            self.scale = Standardise(logged.mean, logged.std).to(self.device)

    def choices(self, table: TensorDictBase) -> Tensor:
        """Of every candidate, then of the log's policy: ``(P + 1, N, n)`` or ``(P + 1, N, K, A)``."""
        chosen = [
            log_probabilities(m, table, self.outputs, deterministic=self.samples == 0).exp().float()
            if self.discrete
            else actions(m, table, samples=self.samples, seed=self.seed)
            for m in self.candidates
        ]
        every = torch.stack(chosen).to(self.device)
        own = torch.full_like(every[:1], 1 / self.outputs)
        if not self.discrete:
            own = self.scale.mean.float().expand_as(own)
        return torch.cat([every, own])

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
        """Q(s, a) of logged actions, and V(s) of the log's own policy, ``(P + 1, B)``."""
        features, action = steps.features[index], steps.action[index]
        if not self.discrete:
            return chain(self.inputs(features, self.logged(action)), layers).squeeze(-1)
        every = chain(features, layers)
        values = F.pick_action(every, action, leading=1)
        return torch.cat([values[:-1], every[-1:].mean(-1)])

    def target(self, layers: Layers, steps: Steps, index: Tensor) -> Tensor:
        """``r + discount * E Q'(s', .)``, ``(P + 1, B)``, of the rows numbered ``index`` ``(B,)``."""
        following = self.expected(layers, steps.following[index], steps.choices(index))
        following = torch.where(steps.out_of_support[index], steps.end_values, following)
        terminated = steps.terminated[index].expand_as(following)
        return F.td_target(steps.reward[index], following, terminated, gamma=self.discount)

    def fit(
        self, steps: Steps, hidden: Sequence[int], updates: int, batch_size: int, lr: float,
        polyak: float, progress: bool | None = None,
    ) -> None:  # fmt: skip
        """P + 1 equal MLPs with the log's mean as output, then ``updates`` of Adam."""
        size = self.inputs(steps.features[:1], self.logged(steps.action[:1])).shape[-1]
        live = self._first_layers([size, *hidden, self.outputs])
        target = [leaf.detach().clone() for leaf in live]
        optimizer = torch.optim.Adam(live, lr=lr)
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
            error = self.value(live, steps, indices[place]) - regressed
            optimizer.zero_grad()
            error.square().mean(-1).sum().backward()
            optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
            optimizer.step()
            for kept, leaf in zip(target, live, strict=True):
                kept.lerp_(leaf.detach(), polyak)
        self.layers = [leaf.detach() for leaf in live]

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
            own = [leaf[policy : policy + 1] for leaf in self.layers[:-2]]
            hidden = chain(hidden, own).relu()
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
    """Rows of a log as critics read them.

    ``starts``: features and choices of the first states. ``out_of_support`` ``(N,)``: transitions
    whose next observation does not occur in the dataset. The value of that state counts as the least
    return for the candidates and the greatest for the behaviour policy.
    """

    def __init__(
        self, critics: Critics, log: Episodes, coverage: Coverage, table_bytes: int = TABLE_BYTES
    ) -> None:
        table, device = log.log.transitions, critics.device
        self.critics, self.log, self.coverage = critics, log, coverage
        self.features = features_of(critics.train.log, table).to(device)
        following = features_of(critics.train.log, table, following=True)
        self.following = following.to(device)
        self.reward = torch.from_numpy(log.reward / critics.unit).float().to(device)
        self.terminated = torch.from_numpy(log.terminated).to(device)
        self.action = (table["action"] if critics.discrete else table["action"].float()).to(device)
        first, ends = torch.from_numpy(log.first), torch.from_numpy(log.last[log.never_terminated])
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
        """Every policy's choices in the states after the rows numbered ``index`` ``(B,)``."""
        if self.kept is None:
            return self.critics.choices(self.states[index.to(self.states.device or "cpu")])
        return self.kept.index_select(1, index)

    def visits(self, policy: int) -> Tensor:
        """Coefficients of one policy's discounted visits of a step, relative to the log's, ``(F,)``.

        The visits of the last policy, the log's own, are those after truncated ends of episodes.
        """
        critics, log, device = self.critics, self.log, self.critics.device
        visited = partial(critics.visit_features, policy)
        if policy < len(critics.candidates):
            begun = visited(*self.starts).mean(0).double()
        else:
            ends = torch.from_numpy(log.last).to(device)
            left = torch.from_numpy(log.truncation_weight(critics.discount)).float().to(device)
            after = visited(self.following[ends], self.choices(ends))
            begun = ((left * ~self.out_of_support[ends])[:, None] * after).mean(0).double()
        squares, change = torch.zeros_like(begun), torch.zeros_like(begun).diag()
        for index in self.parts:
            logged = visited(self.features[index], critics.logged(self.action[index]))
            going = ~(self.terminated[index] | self.out_of_support[index])
            after = visited(self.following[index], self.choices(index))
            step = logged - critics.discount * going[:, None] * after
            change += (step.T @ logged).double()
            squares += logged.double().square().sum(0)
        ridge = RIDGE * squares.mean().clamp(min=1e-12)
        change += ridge * torch.ones_like(begun).diag()
        return torch.linalg.solve(change, begun * len(log))

    def corrections(self, coefficients: Sequence[Tensor]) -> tuple[FloatArray, FloatArray]:
        """Weights (at least 0) and one-step errors of every step, each ``(P + 1, N)``, raw units."""
        critics, parts = self.critics, []
        for index in self.parts:
            features, taken = self.features[index], critics.logged(self.action[index])
            weight = [
                critics.visit_features(policy, features, taken).double() @ own
                for policy, own in enumerate(coefficients)
            ]
            error = critics.target(critics.layers, self, index)
            error = error - critics.value(critics.layers, self, index)
            parts.append(torch.stack([torch.stack(weight).clamp(min=0), error.double()]).cpu())
        weights, errors = torch.cat(parts, 2).numpy()
        return weights, errors * critics.unit

    def unsupported(self, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Share of each candidate's steps outside the log, and the mean over the worst of them.

        A candidate's steps are the first states and the states after the steps fitted on, weighted.
        """
        critics, rows, episodes = self.critics, len(self.reward), len(self.log)
        compared = torch.linspace(0, rows - 1, min(rows, VISITS_COMPARED)).long()
        later = self.following[compared], critics.choices(self.states[compared])
        parts = [self.coverage.unsupported_choices(*each) for each in (self.starts, later)]
        outside = torch.cat(parts, 1)[:-1].double().numpy()
        going = ~(self.terminated | self.out_of_support).cpu().numpy()[compared.numpy()]
        scale = critics.discount * rows / len(compared) / episodes
        followed = weight[:-1, compared.numpy()] * going * scale
        visits = np.concatenate([np.full((len(followed), episodes), 1 / episodes), followed], 1)
        visits /= visits.sum(1, keepdims=True)
        order = np.argsort(-outside, axis=1)
        tail = np.cumsum(np.take_along_axis(visits, order, 1), axis=1).clip(max=WORST_SHARE)
        most = np.diff(tail, prepend=0.0) * np.take_along_axis(outside, order, 1)
        share, worst = (outside * visits).sum(1), most.sum(1) / WORST_SHARE
        return np.clip(share, 0, 1), np.clip(worst, 0, 1)


@torch.no_grad()
def network_scores(fitted: Steps, fresh: Steps) -> tuple[EpisodeScores, FloatArray, FloatArray]:
    """Doubly robust scores of held-out episodes; see ``tabular.table_scores`` for the formula.

    The weight ``w(s, a)`` of a step is linear in the last hidden features ``f`` of the policy's own
    critic. Its coefficients solve ``mean_e sum_t w (f(s, a) - discount E f(s', .)) = mean_e f(s_0)``
    over the log fitted on, with a small ridge: minimax weight learning with a linear class (Uehara,
    Huang, Jiang 2020, arXiv:1910.12809, section 4). Negative weights count as 0.

    ``fitted``, ``fresh``: the steps fitted on and held out. Also returns the candidates' mean squared
    one-step errors of held-out steps and of those fitted on.
    """
    critics, held_out, discount = fitted.critics, fresh.log, fitted.critics.discount
    coefficients = [fitted.visits(policy) for policy in range(len(critics.candidates) + 1)]
    train_weight, train_error = fitted.corrections(coefficients)
    weight, error = fresh.corrections(coefficients)
    correction = np.array([held_out.sums(row) for row in weight * error])
    ends = torch.from_numpy(held_out.last).to(critics.device)
    initial = critics.state_values(*fresh.starts)[:-1]
    after = critics.state_values(fresh.following[ends], fresh.choices(ends))[-1]
    span = critics.limits[1] - critics.limits[0]
    left, out_of_support = (
        held_out.truncation_weight(discount),
        fresh.out_of_support[ends].cpu().numpy(),
    )
    ended = discount * (train_weight * fitted.out_of_support.cpu().numpy()).sum(1) / len(fitted.log)
    scores = initial + correction[:-1]
    behaviour_high = held_out.returns_to_go(discount)[held_out.first] + correction[-1]
    behaviour_high = behaviour_high + left * np.where(out_of_support, critics.limits[1], after)
    max_score_deviation = train_weight.max(1) * span
    share, worst = fitted.unsupported(train_weight)
    result = EpisodeScores(
        scores, behaviour_high - (left * out_of_support + ended[-1]) * span,
        scores + ended[:-1, None] * span, behaviour_high, initial,
        max_score_deviation[:-1], float(max_score_deviation[-1]),
        share, 1 - USUAL, worst, float((left * out_of_support).mean()), critics.limits,
        np.array([held_out.effective(row) for row in weight[:-1]]), {},
    )  # fmt: skip
    return result, np.square(error[:-1]).mean(1), np.square(train_error[:-1]).mean(1)


def _check_ends(**logs: Episodes) -> None:
    for name, log in logs.items():
        if cut := int(log.never_terminated.sum()):
            raise ValueError(
                f"discount is 1 and {cut} of {len(log)} episodes of {name} end without "
                "termination, past which undiscounted values have no bound; choose a discount "
                "below 1."
            )
