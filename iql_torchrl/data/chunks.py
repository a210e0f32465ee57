"""Action chunks: each transition with the actions and rewards of the following steps."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.config import check_whole
from iql_torchrl.data.replay import leaf_keys
from iql_torchrl.data.schema import DatasetError, Key
from iql_torchrl.data.windows import Windows, plain
from iql_torchrl.networks import CHUNK_MASK

LOG_PROB = "action_log_prob"  # of one action, which has no meaning for several


class Chunks(Windows):
    """The transitions of a dataset as steps of ``size`` actions: windows forwards.

    A chunk begins at each transition. It has the actions of ``size`` transitions, or of fewer if one
    before terminates, is the last of its episode (a truncation), or has a next observation that is not
    the observation of the following transition (a discontinuity). With k the number of its actions,
    ``chunks[numbers]`` is a TensorDict with

    - ``observation``: that of the first transition;
    - ``action``: ``(B, size * A)``, the actions in their order. After the k-th comes padding: 0, so
      that critics can tell a chunk that was cut short from a complete one; if the k-th transition
      terminates, the actions of the transitions that follow in the dataset, as the value does not
      depend on them;
    - ``"chunk_mask"``: bool ``(B, size)``, True at the first k;
    - ``("next", "reward")``: ``(B, size)``, each step's reward; 0 at padding;
    - the other entries of ``next``, observation included: those of the k-th transition.

    ``IQLLoss(action_chunk=size)`` makes of these the target ``sum_i gamma**i r_i + gamma**k V(s_k)``,
    without the last term if the k-th transition terminates. With ``size=1`` the entries are those of
    the transitions, and the mask.

    Nothing is stored ``size`` times: actions and rewards are those of ``transitions``, observations
    as in ``Windows``.

    Args:
        transitions, lengths, jumps, name: as for ``Windows``; ``jumps="restart"`` ends a chunk at a
            discontinuity.
        size: number of actions h.
        history: observations that the networks read, as the ``length`` of ``Windows``; with 1 there
            are no windows or masks of histories.
        stack: as for ``Windows``.

    Attributes:
        size: h.
        count: int64 ``(N,)``, the number k of actions of the chunk that begins at a transition.

    Raises as ``Windows``, and ``DatasetError`` on actions other than vectors ``(A,)`` of floats and on
    chunks that are longer than every episode.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        lengths: NDArray[Any],
        size: int,
        *,
        history: int = 1,
        stack: bool = False,
        jumps: str = "error",
        name: str = "dataset",
    ) -> None:
        check_whole(size=size)
        stack = stack or history == 1
        super().__init__(transitions, lengths, history, stack=stack, jumps=jumps, name=name)
        self.size = size
        actions = plain(transitions.get("action"))
        if actions.ndim != 2 or not actions.is_floating_point():
            raise DatasetError(
                f"{name}: the actions are {actions.dtype} of shape "
                f"{tuple(actions.shape[1:])}; chunks are for vectors of floats (A,). For a Box of "
                "another shape pass dataset.flatten_actions(); Discrete actions have no chunks: "
                "each sequence of them would need another value."
            )
        following = transitions.get("next").exclude("observation")
        #: By key what chunks are made of: ``actions``, ``count``, ``rewards`` and entries of ``next``.
        self.chunks: dict[Key, Tensor] = {
            ("next", *key): plain(following.get(key)) for key in leaf_keys(following)
        }
        self.chunks["actions",] = actions
        self.chunks["rewards",] = self.chunks.pop(("next", "reward"))
        self.rest = self.rest.exclude("action", LOG_PROB, "next")
        ends = (self.final_place >= 0) | self.chunks["next", "terminated"].squeeze(1)
        places = torch.arange(len(ends), device=ends.device)
        last = torch.where(ends, places, len(ends)).flip(0).cummin(0).values.flip(0)
        self.chunks["count",] = (last - places + 1).clamp(max=size)
        if int(self.count.max()) < size:
            raise DatasetError(
                f"{name}: chunks of {size} actions are longer than every episode, of which the longest "
                f"has {int(self.count.max())}; choose a size of at most that."
            )

    def entries(self, numbers: Tensor) -> dict[Key, Tensor]:
        """All entries of the chunks from ``numbers`` ``(B,)`` but those of ``rest``, by key."""
        stored = self.chunks
        count = stored["count",].index_select(0, numbers)
        last = numbers + count - 1
        steps = torch.arange(self.size, device=numbers.device)
        mask = steps < count.unsqueeze(1)
        place = (numbers.unsqueeze(1) + steps).clamp(max=len(self) - 1).flatten()
        length = self.history.length
        entries = self._sides(
            self._frames(numbers, 1 - length, 0), self._frames(last, 2 - length, 1)
        )
        entries |= {key: v.index_select(0, last) for key, v in stored.items() if key[0] == "next"}
        shown = mask | entries["next", "terminated"]
        actions = stored["actions",].index_select(0, place).unflatten(0, mask.shape)
        entries["action",] = actions.where(shown.unsqueeze(-1), 0).flatten(1)
        rewards = stored["rewards",].index_select(0, place).view(mask.shape)
        entries["next", "reward"] = rewards.where(mask, 0)
        entries[CHUNK_MASK,] = mask
        return entries

    @property
    def count(self) -> Tensor:
        return self.chunks["count",]
