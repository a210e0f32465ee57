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

from iql_torchrl.config.arithmetic import check_usable
from iql_torchrl.config.settings import check_choice, check_whole
from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.bounds import FloatArray
from iql_torchrl.selection.candidates import resolve_candidates
from iql_torchrl.selection.coverage import Coverage
from iql_torchrl.selection.critics import TABLE_BYTES, Critics, Steps, network_scores
from iql_torchrl.selection.episodes import (
    EpisodeScores,
    check_all_terminate,
    read_datasets,
    return_range,
)
from iql_torchrl.selection.estimators import exact_weights
from iql_torchrl.selection.tabular import finite_states, table_scores

MODELS = ("auto", "table", "network")


@dataclass(frozen=True)
class FittedQ:
    """What :func:`fitted_q_evaluation` gives; P candidates, E held-out episodes, raw reward units.

    Attributes:
        names: of the candidates, ``(P,)``.
        discount: of the values.
        episodes: doubly robust scores of each held-out episode, and what the dataset lacks.
        td_error, td_error_training: mean squared one-step error of the networks on held-out steps
            and on those trained on, ``(P,)``. NaN for a table.
        backups: how often targets were renewed, ``updates`` times ``polyak``; rewards travel one
            step back each time. passes: how often every step of the data was seen. Both are
            infinite for a table.
        deterministic: whether candidates take their deterministic or most probable action; False:
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
        """Bounds of each of ``values`` by itself, ``(P, 2)``; see :func:`bounds.mean_bounds`."""
        return np.stack(self.episodes.value_bounds(confidence, seed), axis=1)


def fitted_q_evaluation(
    candidates: Mapping[str, Any],
    train: OfflineDataset,
    held_out: OfflineDataset,
    *,
    discount: float,
    model: str = "auto",
    behaviour: Any = None,
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
    dataset's empirical model exactly (:func:`tabular.table_scores`). Otherwise P critics are trained
    together: critic i regresses ``r + discount * E_{a'~pi_i(s')} Q'_i(s', a')`` with squared error,
    Q' a target network. Bootstrapping stops at ``terminated``, and at ``truncated`` where the dataset
    lacks the state: then the candidates get the smallest return. All critics start from the same
    weights and see the same batches, so an estimate does not depend on the other candidates.

    Held-out steps correct the critics' errors, see :func:`network_scores`. Results are in raw reward
    units, also where the candidates were trained with reward scaling.

    Args:
        candidates: name to ``Agent`` or TorchRL actor.
        train: episodes to learn from; best ones that the candidates were not trained on.
        held_out: other episodes, which correct the estimate.
        discount: in [0, 1]; with 1 every episode must terminate.
        model: ``"table"``, ``"network"``, or ``"auto"``: a table where the dataset can fill it, see
            :func:`tabular.finite_states`.
        behaviour: key of the logged actions' log-probabilities in ``held_out``; None:
            ``"action_log_prob"`` if any. Where they are known, values are doubly robust with exact
            weights, see :func:`estimators.exact_weights`. False: never.
        min_count: an action that a state was logged with less often is unsupported.
        updates, batch_size, lr: of Adam, whose learning rate falls linearly to 0; networks only.
        hidden: widths of the critics; networks only.
        polyak: fraction of the critics entering the target critics at each update, in (0, 1].
        deterministic: evaluate the most probable (the deterministic) action instead of the policy as
            it samples. None: only for continuous actions. Discrete expectations are exact, over
            the actions that ``action_mask`` allows; continuous ones the mean of ``action_samples``
            draws per state.
        table_bytes: candidates' choices at all next states are kept if they fit in so many bytes,
            else computed again for each batch.
        progress: a progress bar of the critics' updates; None shows it on terminals only.

    Raises:
        TypeError, ValueError: a candidate that is not a policy or does not fit the data, datasets of
            different tasks, image observations, too many states for a table, or a number out of range.
    """
    resolved = resolve_candidates(candidates)
    fit, fresh = read_datasets(train, held_out, discount)
    _check_settings(
        model, lr, polyak, hidden, updates=updates, batch_size=batch_size,
        action_samples=action_samples, min_count=min_count,
    )  # fmt: skip
    if discount == 1:
        check_all_terminate(train=fit, held_out=fresh)
    if deterministic is None:
        deterministic = fit.continuous
    finite = None if model == "network" else finite_states(train, held_out)
    if finite is None and model == "table":
        raise ValueError(
            "model is 'table', but the dataset has continuous actions or too many distinct states; "
            "choose 'network'."
        )
    passes = backups = np.inf
    logged = exact_weights(resolved, fresh, behaviour, deterministic=deterministic)
    if finite is not None:
        scores = table_scores(
            resolved, fit, fresh, finite, logged,
            min_count=min_count, deterministic=deterministic,
        )  # fmt: skip
        error = error_training = np.full(len(resolved), np.nan)
    else:
        check_usable(str(device))
        limits, samples = return_range(fit, fresh), 0 if deterministic else action_samples
        critics = Critics(resolved, fit, torch.device(device), limits, samples, seed)
        coverage = Coverage(train, held_out, min_count=min_count, seed=seed)
        fitted, unseen = (Steps(critics, part, coverage, table_bytes) for part in (fit, fresh))
        critics.fit(fitted, hidden, updates, batch_size, lr, polyak, progress)
        scores, error, error_training = network_scores(fitted, unseen, logged)
        passes, backups = updates * batch_size / len(train), updates * polyak
    names = tuple(candidate.name for candidate in resolved)
    return FittedQ(names, discount, scores, error, error_training, backups, passes, deterministic)


def _check_settings(
    model: str, lr: float, polyak: float, hidden: Sequence[int], **whole: int
) -> None:
    check_choice("model", model, MODELS)
    widths = {f"hidden[{number}]": width for number, width in enumerate(hidden)}
    check_whole(**whole, **widths)
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr is {lr}; expected a learning rate above 0.")
    if not 0 < polyak <= 1:
        raise ValueError(f"polyak is {polyak}; it must lie in (0, 1].")
