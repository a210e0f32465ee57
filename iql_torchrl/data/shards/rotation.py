"""Which shards are loaded, and in which order they are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Rotation"]


class Rotation:
    """``loaded`` of ``shards`` shards at a time, the oldest replaced by the next of a random order.

    The order consists of passes: permutations of all shards, drawn from ``seed`` and the number of the
    pass. The first ``loaded`` shards of the first pass are loaded at the start. So in each pass every
    shard is loaded once, and stays for ``loaded`` replacements. No shard is loaded while it is loaded
    already: one that the previous pass loaded last comes no earlier in the next pass than its
    replacement is due. Other than that, each position of a pass is drawn uniformly from the shards
    that are left.

    Attributes:
        loaded: the shard at each place.
        oldest: the place whose shard is replaced next.
        turn: the number of the pass.
        order: the shards of that pass, in order.
        position: how many of ``order`` have been loaded.
    """

    def __init__(self, shards: int, loaded: int, seed: int) -> None:
        self.shards, self.seed = shards, seed
        self.loaded: list[int] = []
        self.oldest, self.turn = 0, 0
        self.order = self._draw()
        self.loaded, self.position = self.order[:loaded], loaded
        self._begin_pass_if_due()

    @property
    def coming(self) -> int:
        """The shard that is loaded next."""
        return self.order[self.position]

    def advance(self) -> int:
        """Replace the oldest shard by ``coming``; the place at which it is."""
        place = self.oldest
        self.loaded[place] = self.coming
        self.oldest = (place + 1) % len(self.loaded)
        self.position += 1
        self._begin_pass_if_due()
        return place

    def _begin_pass_if_due(self) -> None:
        if self.position == self.shards:
            self.turn, self.position = self.turn + 1, 0
            self.order = self._draw()

    def _draw(self) -> list[int]:
        """A permutation in which a loaded shard comes no earlier than its replacement."""
        generator = np.random.default_rng([self.seed, self.turn])
        by_age = [*self.loaded[self.oldest :], *self.loaded[: self.oldest]]
        left = [shard for shard in range(self.shards) if shard not in by_age]
        order = []
        for position in range(self.shards):
            left += by_age[position : position + 1]
            order.append(left.pop(int(generator.integers(len(left)))))
        return order

    def state_dict(self) -> dict[str, Any]:
        return {
            "shards": self.shards, "seed": self.seed, "loaded": list(self.loaded),
            "oldest": self.oldest, "turn": self.turn, "order": list(self.order),
            "position": self.position,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed, self.loaded = int(state["seed"]), [int(s) for s in state["loaded"]]
        self.oldest, self.turn = int(state["oldest"]), int(state["turn"])
        self.order, self.position = [int(s) for s in state["order"]], int(state["position"])
