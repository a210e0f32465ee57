"""Action chunks: the actions of several steps in one output of a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from iql_torchrl.config import check_whole

Policy = TypeVar("Policy", bound=nn.Module)

#: Key of the bool ``(B, h)`` that is True at the actions of a chunk that are in the dataset.
CHUNK_MASK = "chunk_mask"


@dataclass(frozen=True)
class Chunk:
    """A policy proposes the actions of the next ``length`` steps, and acts with the first of them.

    ``replan_every``: how many of them, from 1 to ``length``, which is the default: the whole chunk,
    without a look at the observations in between. A policy has it as its attribute ``chunk``
    (:func:`with_chunk`).

    Raises ``ValueError`` on numbers that are not whole or out of range.
    """

    length: int
    replan_every: int | None = None

    def __post_init__(self) -> None:
        check_whole(length=self.length, replan_every=self.executed)
        if self.executed > self.length:
            raise ValueError(
                f"replan_every is {self.replan_every} and a chunk has {self.length} actions; choose at "
                f"most {self.length}."
            )

    @property
    def executed(self) -> int:
        """Actions of a chunk that are executed before the next one is asked for."""
        return self.length if self.replan_every is None else self.replan_every

    def steps(self, actions: Tensor, shape: Sequence[int]) -> Tensor:
        """Chunks ``(B, length * A)`` as actions of ``shape``: ``(B, length, *shape)``.

        Raises ``ValueError`` on another number of entries.
        """
        size = self.length * math.prod(shape)
        if actions.shape[1:] != (size,):
            raise ValueError(
                f"policy output 'action' has shape {tuple(actions.shape)}; expected {size} numbers in "
                f"each row, of {self.length} actions of shape {tuple(shape)}."
            )
        return actions.unflatten(1, (self.length, *shape))


def with_chunk(policy: Policy, length: int, replan_every: int | None = None) -> Policy:
    """``policy`` itself, from now on with the attribute ``chunk``: ``Chunk(length, replan_every)``.

    ``evaluate``, ``act`` and the export then take its ``action`` ``(B, length * A)`` for the actions
    of ``length`` steps.
    """
    policy.chunk = Chunk(length, replan_every)  # type: ignore[assignment]
    return policy


def chunk_of(policy: Any) -> Chunk | None:
    """A policy's ``chunk``; None for one that proposes the action of one step."""
    chunk = getattr(policy, "chunk", None)
    return chunk if isinstance(chunk, Chunk) else None
