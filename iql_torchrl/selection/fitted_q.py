"""Fitted Q evaluation of several policies at once, from logged episodes alone.

Le, Voloshin, Yue 2019, "Batch policy learning under constraints" (arXiv:1903.08738), algorithm 3,
with a slowly moving target instead of a regression solved to the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tqdm import tqdm

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.bounds import mean_bounds
from iql_torchrl.selection.candidates import resolve_members
from iql_torchrl.selection.coverage import Coverage
from iql_torchrl.selection.episodes import check_logs, last_rows, open_ended, return_range
from iql_torchrl.selection.regression import Layers, Regression, Steps, chooser, stacked_critics
from iql_torchrl.selection.scores import EpisodeScores
from iql_torchrl.selection.table import finite_states, table_scores
from iql_torchrl.selection.visits import network_scores

__all__ = ["FittedQ", "fitted_q_evaluation"]

FloatArray = NDArray[np.float64]

TABLE_BYTES = 2**31
ERROR_ROWS = 20_000
DRAWN_TOGETHER = 256
MODELS = ("auto", "table", "network")


@dataclass(frozen=True)
class FittedQ:
    """What :func:`fitted_q_evaluation` gives; P members, E held-out episodes, raw reward units.

    Attributes:
        names: of the members, ``(P,)``.
        discount: of the values.
        episodes: :class:`~iql_torchrl.selection.scores.EpisodeScores`: doubly robust scores of each
            held-out episode, and what the log does not cover.
        td_error, td_error_training: mean squared one-step error of the networks on held-out steps
            and on those trained on, ``(P,)``. It is not 0 for the exact Q where rewards or dynamics
            are random. NaN for a table.
        backups: how often targets were renewed, ``updates`` times ``polyak``; rewards travel one
            step back each time. passes: how often every step of the data was seen. Both are
            infinite for a table, whose equations are solved exactly.
        deterministic: whether the members take their deterministic or most probable action, or sample.
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
        """Estimated value of each member, ``(P,)``: the mean of its scores over held-out episodes."""
        return self.episodes.scores.mean(axis=1)

    def intervals(self, *, confidence: float = 0.95, seed: int = 0) -> FloatArray:
        """Bounds of each of ``values`` by itself, ``(P, 2)``; see :func:`bounds.mean_bounds`.

        They contain the error of the estimate as far as held-out steps can show it.
        """
        episodes = self.episodes
        bounds = mean_bounds(
            episodes.scores,
            self.values - episodes.surprise,
            episodes.scores_high.mean(1) + episodes.surprise,
            upper_samples=episodes.scores_high,
            together=False,
            confidence=confidence,
            seed=seed,
        )
        return np.stack(bounds, axis=1)


def fitted_q_evaluation(
    members: Mapping[str, Any],
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
    """Value of each member's policy, fitted on ``train`` and corrected by ``held_out``.

    With few distinct states and discrete actions (``model="table"``), Q solves the equations of the
    log's empirical model exactly (:func:`table.table_scores`). Otherwise P critics are trained
    together: critic i regresses ``r + discount * E_{a'~pi_i(s')} Q'_i(s', a')`` with squared error,
    Q' a target network. Nothing is bootstrapped where ``terminated``; past ``truncated`` it is,
    unless the log describes no such state: then the members get the least return that either log
    was seen to lead to. All critics start from the same weights and see the same batches, so a
    member's estimate does not depend on which others are evaluated with it, and differences come
    from the policies.

    Held-out steps correct the critics' errors, see :func:`visits.network_scores`. Rewards are mapped
    back by each dataset's ``reward_map`` and divided by the deviation of the log's returns while
    training; results are in raw units whatever map the members saw.

    Args:
        members: name to ``Agent`` or TorchRL actor.
        train: episodes to learn from; best ones that the members were not trained on, whose noise
            they have not fitted. held_out: episodes that correct the estimate; other ones.
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
        table_bytes: members' choices at all next states are kept if they fit in so many bytes,
            else computed again for each batch.
        progress: a progress bar of the critics' updates; None shows it on terminals only.

    Raises:
        TypeError, ValueError: a member that is no policy or does not fit the data, two logs of
            different tasks, observations that are neither vectors nor a category, states that are
            too many for a table, or a number out of range.
    """
    resolved = resolve_members(members)
    check_logs(train, held_out, discount)
    _check_numbers(updates, batch_size, hidden, lr, polyak, action_samples, min_count)
    _check_ends(train, held_out, discount)
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; choose one of {', '.join(MODELS)}.")
    names = tuple(member.name for member in resolved)
    continuous = not isinstance(train.action_space, spaces.Discrete)
    deterministic = continuous if deterministic is None else bool(deterministic)
    finite = None if model == "network" else finite_states(train, held_out)
    if model == "table" and finite is None:
        raise ValueError(
            "model is 'table', but the log has continuous actions or too many distinct states; "
            "choose 'network'."
        )
    if finite is not None:
        episodes = table_scores(
            resolved, train, held_out, finite, discount=discount, min_count=min_count,
            deterministic=deterministic,
        )  # fmt: skip
        unknown = np.full(len(names), np.nan)
        return FittedQ(names, discount, episodes, unknown, unknown, np.inf, np.inf, deterministic)
    choose = chooser(train, deterministic, action_samples, seed)
    data = Regression(train, resolved, _device(device), discount, choose)
    coverage = Coverage(train, held_out, min_count=min_count, seed=seed)
    limits = return_range(discount, train, held_out)
    fitted, fresh = (
        Steps(data, log, table_bytes, _stopped(log, coverage), limits) for log in (train, held_out)
    )
    layers = _trained(data, fitted, updates, batch_size, hidden, lr, polyak, seed, progress)
    scores = network_scores(data, layers, train, held_out, (fitted, fresh), coverage, limits)
    error, error_training = (_td_error(data, layers, steps) for steps in (fresh, fitted))
    passes = updates * batch_size / len(train)
    backups = updates * polyak
    return FittedQ(names, discount, scores, error, error_training, backups, passes, deterministic)


def _trained(
    data: Regression, steps: Steps, updates: int, batch_size: int, hidden: Sequence[int],
    lr: float, polyak: float, seed: int, progress: bool | None,
) -> Layers:  # fmt: skip
    live = stacked_critics(data, hidden, seed)
    target = [(weight.detach().clone(), bias.detach().clone()) for weight, bias in live]
    leaves = [leaf for layer in live for leaf in layer]
    optimizer = torch.optim.Adam(leaves, lr=lr)
    batches = torch.Generator().manual_seed(seed)  # the same batches on every device
    for update in tqdm(
        range(updates), "fitted Q evaluation", unit="update", leave=False,
        disable=None if progress is None else not progress,
    ):  # fmt: skip
        place = update % DRAWN_TOGETHER
        if place == 0:  # one copy to the device for many updates: each would wait for it
            coming = (min(DRAWN_TOGETHER, updates - update), batch_size)
            drawn = torch.randint(steps.rows, coming, generator=batches)
            indices = drawn.to(data.device)
        with torch.no_grad():
            regressed = steps.target(target, indices[place], drawn[place])
        loss = (steps.value(live, indices[place]) - regressed).square().mean(-1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
        optimizer.step()
        for old, new in zip(target, live, strict=True):
            for kept, leaf in zip(old, new, strict=True):
                kept.lerp_(leaf.detach(), polyak)
    return [(weight.detach(), bias.detach()) for weight, bias in live]


def _stopped(log: OfflineDataset, coverage: Coverage) -> torch.Tensor:
    """Rows that end an episode in a state which the log never describes, bool ``(N,)``."""
    result = torch.zeros(len(log), dtype=torch.bool)
    ends = torch.from_numpy(last_rows(log)[open_ended(log)])
    if len(ends):
        rows = log.transitions[ends]
        result[ends] = coverage.unsupported_states(rows, following=True)
    return result


@torch.no_grad()
def _td_error(data: Regression, layers: Layers, steps: Steps) -> FloatArray:
    """Mean square over at most ERROR_ROWS evenly spaced steps, ``(P,)``, raw units squared."""
    rows = torch.linspace(0, steps.rows - 1, min(steps.rows, ERROR_ROWS)).long()
    total = torch.zeros(len(data.members) + 1, dtype=torch.float64)
    for drawn in rows.split(4096):
        index = drawn.to(data.device)
        error = steps.target(layers, index, drawn) - steps.value(layers, index)
        total += error.double().square().sum(-1).cpu()
    return np.asarray((total / len(rows)).numpy()[:-1] * data.unit**2)


def _device(name: torch.device | str) -> torch.device:
    device = torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"device is {str(name)!r}, which cannot be used here: {reason}") from error
    return device


def _check_ends(train: OfflineDataset, held_out: OfflineDataset, discount: float) -> None:
    """Undiscounted values past a truncation have no bound."""
    for name, log in (("train", train), ("held_out", held_out)):
        cut = int(open_ended(log).sum())
        if discount == 1 and cut:
            raise ValueError(
                f"discount is 1 and {cut} of {len(log.episode_lengths)} episodes of {name} end without "
                "termination, past which undiscounted values have no bound; choose a discount "
                "below 1."
            )


def _check_numbers(
    updates: int,
    batch_size: int,
    hidden: Sequence[int],
    lr: float,
    polyak: float,
    action_samples: int,
    min_count: int,
) -> None:
    counts = {"updates": updates, "batch_size": batch_size, "action_samples": action_samples}
    counts["min_count"] = min_count
    counts |= {f"hidden[{place}]": width for place, width in enumerate(hidden)}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1.")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr is {lr}; expected a rate above 0.")
    if not 0 < polyak <= 1:
        raise ValueError(f"polyak is {polyak}; it must lie in (0, 1].")
