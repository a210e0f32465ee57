"""What a run records: losses that are not finite, and the best score."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from iql_torchrl.trainers.events import Progress


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value):
    progress = Progress()
    progress.tally(TensorDict({"loss_value": torch.tensor(1.0), "entropy": torch.tensor(value)}))
    assert progress.new_row(1)["loss_value"] == 1.0  # only losses must be finite
    progress.tally(TensorDict({"loss_value": torch.tensor(value), "entropy": torch.tensor(0.0)}))
    with pytest.raises(FloatingPointError, match=r"loss_value became .* before update 2"):
        progress.new_row(2)


def test_an_equal_score_is_no_better_one():
    progress = Progress()
    assert [progress.improves(n, x) for n, x in ((1, 5.0), (2, 5.0), (3, 5.5), (4, math.nan))] == [
        True,
        False,
        True,
        False,
    ]
    assert (progress.best, progress.best_update) == (5.5, 3)
