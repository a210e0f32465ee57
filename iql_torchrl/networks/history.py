"""Windows of the last observations of an episode: their padding, their masks, stacks of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from iql_torchrl.networks.encoders import channels_come_first
from iql_torchrl.networks.perceptrons import check_whole

__all__ = [
    "HISTORY_MASK",
    "History",
    "history_of",
    "repeat_first",
    "stack_frames",
    "with_history",
]

Policy = TypeVar("Policy", bound=nn.Module)
Observation = TypeVar("Observation")

#: Key of the bool ``(B, T)`` that is True at the steps of a window that are real.
HISTORY_MASK = "history_mask"


@dataclass(frozen=True)
class History:
    """What a policy reads of the past: its last ``length`` observations, the current one included.

    ``stack=False``: windows ``(B, length, *shape)``, oldest first, and their mask under
    ``"history_mask"``. ``stack=True``: the frames of a window as one observation, without a mask
    (:func:`stack_frames`). A policy has it as its attribute ``history`` (:func:`with_history`).
    """

    length: int
    stack: bool = False

    def __post_init__(self) -> None:
        check_whole("length", self.length)

    def padded(self, observations: Sequence[Observation]) -> list[Observation]:
        """``length`` observations: those of an episode so far, the first one repeated before them."""
        return [observations[0]] * (self.length - len(observations)) + [*observations]

    def mask(self, steps: int) -> Tensor:
        """Bool ``(length,)`` of a window of ``steps`` real observations."""
        return torch.arange(self.length) >= self.length - steps


def with_history(policy: Policy, length: int, *, stack: bool = False) -> Policy:
    """``policy`` itself, from now on with the attribute ``history``: ``History(length, stack)``.

    ``evaluate``, ``act`` and the export then give it windows of the last ``length`` observations.
    """
    policy.history = History(length, stack)  # type: ignore[assignment]
    return policy


def history_of(policy: Any) -> History | None:
    """A policy's ``history``; None for one that reads the current observation alone.

    Raises ``ValueError`` where the policy reads ``"history_mask"`` and has no history, and where it
    has one of another type.
    """
    history = getattr(policy, "history", None)
    if history is None and HISTORY_MASK in list(getattr(policy, "in_keys", ())):
        raise ValueError(
            f"the policy reads {HISTORY_MASK!r} and has no history, so that the length of its "
            "windows is unknown; pass networks.with_history(policy, length)."
        )
    if history is not None and not isinstance(history, History):
        raise ValueError(
            f"the policy's history is {history!r}; set it by networks.with_history(policy, length)."
        )
    return history


def stack_frames(window: Tensor, dims: int) -> Tensor:
    """Windows ``(B, T, *shape)`` as single observations, oldest frame first; ``dims``: of ``shape``.

    Scalars become ``(B, T)``, vectors ``(B, T * F)``. Matrices, such as grey images, get a last
    dimension: ``(B, H, W, T)``. Images of three dimensions are joined on their channels: the
    shorter of the two outer dimensions, the last one where they are equal. Anything larger is joined
    on its last dimension. One frame (T = 1) stays as it is, ``(B, *shape)``.
    """
    if window.shape[1] == 1:
        return window.squeeze(1)
    if dims == 0:
        return window
    if dims == 2:
        return window.movedim(1, -1)
    first = dims == 3 and channels_come_first(window.shape[2:])
    return torch.cat(window.unbind(1), 1 if first else -1)


def repeat_first(window: Tensor, mask: Tensor) -> Tensor:
    """Windows ``(B, T, ...)`` with padding replaced by the first real step, as in training.

    ``mask``: bool ``(B, T)``, False and then True in every row.
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    place = torch.maximum(steps, (~mask).sum(1, keepdim=True).clamp(max=mask.shape[1] - 1))
    rows = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1)
    return window[rows, place]
