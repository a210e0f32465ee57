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
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.data import OfflineDataset
from iql_torchrl.members import check_logs, first_rows, open_ended, resolve_members, states
from iql_torchrl.regression import Choices, Layers, Regression, Steps, chooser, stacked_critics
from iql_torchrl.residuals import optimism, td_error
from iql_torchrl.results import bootstrap_interval

__all__ = ["FittedQ", "fitted_q_evaluation"]

FloatArray = NDArray[np.float64]

TABLE_BYTES = 2**31


@dataclass(frozen=True)
class FittedQ:
    """What :func:`fitted_q_evaluation` found; P members, E held-out episodes, raw reward units.

    Attributes:
        names: of the members, ``(P,)``.
        discount: of the values.
        initial_values: ``E_{a~pi(s)} Q(s, a)`` at each episode's first state, ``(P, E)``.
        end_values: ``discount**T`` times the value of the state in which an episode of T steps was
            truncated, 0 where it terminated, ``(P, E)``.
        td_error, td_error_training: mean squared one-step error on held-out steps and on those
            trained on, ``(P,)``. It is not 0 for the exact Q where rewards or dynamics are random.
        optimism, optimism_error: how much less held-out steps earn than the critics say, summed
            along an episode, and its standard error, ``(P,)``; see :func:`residuals.optimism`.
            Well above 0 where critics saw the transitions that the policy was fitted to.
        backups: how often targets were renewed, ``updates`` times ``polyak``; rewards travel one
            step back each time. passes: how often every step of the data was seen.
    """

    names: tuple[str, ...]
    discount: float
    initial_values: FloatArray
    end_values: FloatArray
    td_error: FloatArray
    td_error_training: FloatArray
    optimism: FloatArray
    optimism_error: FloatArray
    backups: float
    passes: float

    @property
    def values(self) -> FloatArray:
        """Estimated value of each member, the mean over held-out first states, ``(P,)``."""
        return self.initial_values.mean(axis=1)

    def intervals(self, *, seed: int = 0) -> FloatArray:
        """95 % bootstrap bounds of ``values`` over held-out episodes, ``(P, 2)``.

        They say how the choice of episodes moves the estimate, nothing about the critics' error.
        """
        return np.array([bootstrap_interval(row, seed=seed) for row in self.initial_values])


def fitted_q_evaluation(
    members: Mapping[str, Any],
    train: OfflineDataset,
    held_out: OfflineDataset,
    *,
    discount: float,
    updates: int = 10_000,
    batch_size: int = 512,
    hidden: Sequence[int] = (128, 128),
    lr: float = 1e-3,
    polyak: float = 0.05,
    target_every: int | None = None,
    deterministic: bool | None = None,
    action_samples: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    table_bytes: int = TABLE_BYTES,
) -> FittedQ:
    """Value of each member's policy, by P critics trained together on ``train``.

    Critic i regresses ``r + discount * E_{a'~pi_i(s')} Q'_i(s', a')`` with squared error, Q' a
    target network. Nothing is bootstrapped where ``terminated``; past ``truncated`` it is. All
    critics start from the same weights and see the same batches, so a member's estimate does not
    depend on which others are evaluated with it, and differences come from the policies.

    Rewards are mapped back by each dataset's ``reward_map`` and divided by the deviation of the
    log's returns while training; results are in raw units whatever map the members saw.

    Args:
        members: name to ``Agent`` or TorchRL actor.
        train: episodes to learn from; best ones that the members were not trained on, whose noise
            they have not fitted. held_out: episodes whose first states are priced.
        discount: in [0, 1]; with 1 every episode must terminate.
        updates, batch_size, lr: of Adam, whose rate falls linearly to 0.
        hidden: widths of the critics; ``()`` with one category as observation is a table.
        polyak: fraction of the live critics entering the targets at each update, in (0, 1].
        target_every: instead, copy them whole after so many updates.
        deterministic: price the most probable (the deterministic) action instead of the policy as
            it samples. None: only for continuous actions. Discrete expectations are exact, over
            the actions that ``action_mask`` allows; continuous ones the mean of
            ``action_samples`` draws per state, drawn once.
        table_bytes: members' choices at all next states are kept if they fit in so many bytes,
            else asked for at each batch.

    Raises:
        TypeError, ValueError: a member that is no policy or does not fit the data, two logs of
            different tasks, observations that are neither vectors nor a category, or a number out
            of range.
    """
    resolved = resolve_members(members)
    check_logs(train, held_out, discount)
    _check_numbers(updates, batch_size, hidden, lr, polyak, target_every, action_samples)
    _check_ends(train, held_out, discount)
    choose = chooser(train, deterministic, action_samples, seed)
    data = Regression(train, resolved, _device(device), discount, choose)
    live = stacked_critics(data, hidden, seed)
    target = [(weight.detach().clone(), bias.detach().clone()) for weight, bias in live]
    leaves = [leaf for layer in live for leaf in layer]
    optimizer = torch.optim.Adam(leaves, lr=lr)
    batches = torch.Generator().manual_seed(seed)
    steps = Steps(data, train, None, table_bytes)
    for update in range(updates):
        index = torch.randint(steps.rows, (batch_size,), generator=batches).to(data.device)
        with torch.no_grad():
            wanted = steps.target(target, index)
        loss = (steps.value(live, index) - wanted).square().mean(-1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
        optimizer.step()
        _follow(target, live, polyak, target_every, update + 1)
    del steps
    fraction = polyak if target_every is None else 1 / target_every
    passes = updates * batch_size / len(train)
    return _estimates(data, live, train, held_out, updates * fraction, passes)


def _follow(
    target: Layers, live: Layers, polyak: float, target_every: int | None, update: int
) -> None:
    if target_every is not None and update % target_every:
        return
    fraction = polyak if target_every is None else 1.0
    for old, new in zip(target, live, strict=True):
        for kept, leaf in zip(old, new, strict=True):
            kept.lerp_(leaf.detach(), fraction)


@torch.no_grad()
def _estimates(
    data: Regression,
    layers: Layers,
    train: OfflineDataset,
    held_out: OfflineDataset,
    backups: float,
    passes: float,
) -> FittedQ:
    starts = torch.from_numpy(first_rows(held_out))
    ends = starts + torch.from_numpy(held_out.episode_lengths) - 1
    first, last = held_out.transitions[starts], held_out.transitions[ends]
    left = data.discount**held_out.episode_lengths * open_ended(held_out)
    after = states(last, following=True)
    return FittedQ(
        tuple(member.name for member in data.members),
        data.discount,
        _values(data, layers, states(first), data.features(first)),
        left * _values(data, layers, after, data.features(last, following=True)),
        td_error(data, layers, held_out),
        td_error(data, layers, train),
        *optimism(data, layers, held_out),
        backups,
        passes,
    )


def _values(
    data: Regression, layers: Layers, table: TensorDictBase, features: Tensor
) -> FloatArray:
    choices = Choices(data, table, 0)
    parts = [
        data.expected(layers, features[index].to(data.device), choices(index)).cpu()
        for index in torch.arange(len(table)).split(4096)
    ]
    return torch.cat(parts, 1).double().numpy() * data.unit


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
    target_every: int | None,
    action_samples: int,
) -> None:
    counts = {"updates": updates, "batch_size": batch_size, "action_samples": action_samples}
    if target_every is not None:
        counts["target_every"] = target_every
    counts |= {f"hidden[{place}]": width for place, width in enumerate(hidden)}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; wanted a whole number, at least 1.")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr is {lr}; wanted a rate above 0.")
    if not 0 < polyak <= 1:
        raise ValueError(f"polyak is {polyak}; it must lie in (0, 1].")
