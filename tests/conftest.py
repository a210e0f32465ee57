"""Small networks, batches and paths that the tests share."""

from __future__ import annotations

import os
from pathlib import Path

from tensordict.nn import TensorDictModuleBase

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):  # before torch is imported
    os.environ["GOMP_SPINCOUNT"] = "2000"

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from iql_torchrl import networks, policies
from iql_torchrl.trainers import run_folder
from iql_torchrl.update import captured

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[2] / "shared"
OBS, ACT = 5, 3


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no curves, which takes a third of a second each time."""
    monkeypatch.setattr(run_folder, "draw", lambda *args, **kwargs: None)


@pytest.fixture
def minari_root(tmp_path, monkeypatch):
    """An empty folder of Minari's datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The test runs in an empty folder, with an empty Minari root below it."""
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def uncompiled(monkeypatch):
    """Programs run as Dynamo traced them, without the seconds that Inductor takes."""
    torch._dynamo.reset()
    compile = torch.compile

    def traced(function, *, backend="eager", options=None, **kwargs):
        filtered = {k: v for k, v in (options or {}).items() if k == "guard_filter_fn"}
        return compile(function, backend=backend, options=filtered, **kwargs)

    monkeypatch.setattr(captured, "compile_program", lambda graph, inputs, options: graph)
    monkeypatch.setattr(torch, "compile", traced)


def make_batch(*shape: int, obs: int = OBS, act: int = ACT, dtype=torch.float32) -> TensorDict:
    """Random logged steps of batch shape ``shape``, one in five terminal."""
    shape = shape or (32,)
    return TensorDict(
        {
            "observation": torch.randn(*shape, obs, dtype=dtype),
            "action": torch.rand(*shape, act, dtype=dtype) * 1.8 - 0.9,
            "next": {
                "observation": torch.randn(*shape, obs, dtype=dtype),
                "reward": torch.randn(*shape, 1, dtype=dtype),
                "terminated": torch.rand(*shape, 1) < 0.2,
                "done": torch.rand(*shape, 1) < 0.3,
            },
        },
        batch_size=shape,
    )


def make_networks(
    obs: int = OBS,
    act: int = ACT,
    hidden=(16, 16),
    policy=policies.gaussian,
    critic=None,
    value=None,
    critics: int = 0,
    **mlp,
):
    """Actor, one critic (a list, given ``critics``), V, all reading ``observation``.

    ``policy`` builds the actor, or is it; ``critic`` and ``value`` are modules to use instead.
    """
    spec = Bounded(-torch.ones(act), torch.ones(act), (act,))
    mlp["hidden"] = hidden
    actor = policy if isinstance(policy, nn.Module) else policy(obs, spec, **mlp)
    made = [
        ValueOperator(critic or networks.Critic(obs, act, **mlp), in_keys=["observation", "action"])
        for _ in range(critics or 1)
    ]
    if not isinstance(value, TensorDictModuleBase):
        value = ValueOperator(value or networks.StateValue(obs, **mlp), in_keys=["observation"])
    return actor, made if critics else made[0], value


class NormedCritic(nn.Module):
    """A critic with a BatchNorm layer: parameters, and statistics that are buffers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(OBS + ACT)
        self.linear = nn.Linear(OBS + ACT, 1)

    def forward(self, observation, action):
        return self.linear(self.norm(torch.cat([observation, action], -1)))
