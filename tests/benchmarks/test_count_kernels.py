"""The number of operations of one update that become kernels cannot grow unnoticed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "count_kernels.py"
# of the paper's agent: width 256, two critics
LIMITS = {"products": 22, "reductions": 27, "elementwise": 69, "kernels": 118, "unfused": 421}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("count_kernels", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["count_kernels"] = module
    spec.loader.exec_module(module)
    return module


def test_an_update_has_no_more_kernels_than_now(script):
    step, batch = script.paper_step(), script.paper_batch()
    counts = script.count_kernels(script.traced_program(step, batch))
    assert counts.keys() == LIMITS.keys()
    assert all(counts[kind] <= limit for kind, limit in LIMITS.items()), counts


def test_counts_by_hand(script):
    """``relu(x @ w + b)`` and its mean, then two updates: 1 product, 1 reduction, 3 groups."""

    def program(x, w, b, first, second):
        hidden = torch.mm(x, w)
        hidden = torch.relu(hidden + b).t()
        total = hidden.sum()
        return total, first.mul(2).add(1), second.sub(3)

    arguments = [torch.ones(2, 2), torch.ones(2, 2), torch.ones(2), torch.ones(3), torch.ones(4)]
    graph = torch.fx.experimental.proxy_tensor.make_fx(program)(*arguments)
    assert script.count_kernels(graph) == {
        "products": 1,
        "reductions": 1,
        "elementwise": 3,
        "kernels": 5,
        "unfused": 7,
    }
