"""Compiled and captured updates on two ranks; compilation takes minutes."""

from __future__ import annotations

import population_cases
import pytest
import torch
from compiled_cases import CASE, calls_by_hand
from rank_cases import trained
from two_ranks import run_ranks

from iql_torchrl.distributed import Ranks

pytestmark = pytest.mark.slow


def test_compiled_and_captured_updates_of_two_ranks_are_eager_ones_of_one_process(tmp_path):
    alone = {"compiled": trained(CASE, Ranks()), "captured": calls_by_hand()}
    first, second = run_ranks("compiled_cases.py", tmp_path)
    for form, part in ((f, p) for f in alone for p in ("state", "metrics")):
        for key, value in alone[form][part].items():
            found = first[form][part][key]
            assert torch.equal(found, second[form][part][key]), (form, key)
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9, msg=f"{form} {key}")
    assert first["sums"] == second["sums"] == [3]  # one graph: V; actor and critics; metrics
    population = population_cases.of_one_process("own batches, adamw")
    population_cases.check(first["population"], population, 1e-9)
