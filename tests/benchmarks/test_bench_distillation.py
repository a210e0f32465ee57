"""``benchmarks/bench_distillation.py``: a flow whose one-step form is known, and a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded

from iql_torchrl import IQLConfig, load_dataset, policies

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_distillation
import small_agents

STEPS = 4


class Linear(nn.Module):
    """The velocity ``m s - x``, of weights ``w`` on observation, point and time."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 0.0]))

    def forward(self, joined):
        return (joined * self.w).sum(-1, keepdim=True)


def linear_flow():
    spec = Bounded(-torch.ones(1), torch.ones(1), (1,))
    flow = policies.flow(1, spec, num_steps=STEPS)
    flow.head.mlp = Linear()
    return flow


def test_one_step_learns_the_flow_of_a_linear_velocity():
    """Euler steps give ``k z + (1 - k) s / 2`` with k = (3/4)^4: a linear velocity gives it at once."""
    flow = linear_flow()
    generator = torch.Generator().manual_seed(0)
    # few samples beyond the bounds, where the flow is clamped and a linear function is not
    rows = TensorDict(
        {"observation": 0.1 * torch.randn(500, 1, generator=generator)}, batch_size=[500]
    )
    one = bench_distillation.distil(flow, rows, 1500, rate=0.02, seed=0)
    assert one.num_steps == 1
    assert flow.num_steps == STEPS
    assert flow.head.mlp.w.tolist() == [0.5, -1.0, 0.0]
    share = (1 - 1 / STEPS) ** STEPS
    assert one.head.mlp.w[0].item() == pytest.approx((1 - share) / 2, abs=0.02)
    assert one.head.mlp.w[1].item() == pytest.approx(share - 1, abs=0.02)
    assert bench_distillation.unexplained(one, flow, rows) < 0.01
    # The same flow with one step gives s / 2 whatever the noise: the error is k (z - s / 2), of mean
    # square k^2 (1 + 0.01 / 4), and the flow's variance over the noise is k^2.
    control = bench_distillation.unexplained(
        bench_distillation.with_steps(flow, 1), flow, rows, seed=2
    )
    assert control == pytest.approx(1.0025, rel=0.05)


def test_a_small_run(tmp_path, monkeypatch, capsys):
    space = spaces.Box(-np.ones(2, np.float32), np.ones(2, np.float32))
    data = load_dataset(small_agents.log(), action_space=space)
    config = IQLConfig(hidden=(8,), batch_size=16, reward="raw")
    monkeypatch.setitem(bench_distillation.TASKS, "pendulum", lambda o: (data, config))
    monkeypatch.setattr(bench_distillation, "RESULTS", tmp_path)
    evaluated = []
    monkeypatch.setattr(
        bench_distillation,
        "returns",
        lambda o, data, policy, deterministic: float(len(evaluated.append(policy) or evaluated)),
    )
    sizes = {"updates": 2, "distil-updates": 2, "seeds": 2, "rounds": 2, "block": 0.001}
    options = [f"--{name}={number}" for name, number in sizes.items()]
    bench_distillation.main([*options, "--batches", "1", "4"])
    (task,) = json.loads((tmp_path / "distillation.json").read_text())["tasks"]
    names = ["flow", "one step, distilled", *(f"flow with {n} steps" for n in (1, 2, 5))]
    names += [f"{name}, best of 32" for name in names]
    assert list(task["scores"]) == names
    assert list(task["unexplained"]) == names[:5]
    assert task["unexplained"]["flow"] == [0.0, 0.0]
    assert task["scores"]["flow"] == [1.0, 11.0]
    assert [getattr(p, "actor", p).num_steps for p in evaluated[:10]] == [10, 1, 1, 2, 5] * 2
    assert all(len(p) == 2 for times in task["acting_ms"].values() for p in times.values())
    assert list(task["acting_ms"]) == ["1", "4"]
    assert "one step, distilled, best of 32" in capsys.readouterr().out
