"""Exported programs of policies with a history: windows and their mask are inputs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from gymnasium import spaces
from only_torch import run_with_only_torch
from tensordict.nn import TensorDictModule
from torch import nn

from iql_torchrl.agent.export import export_policy
from iql_torchrl.agent.task import Task
from iql_torchrl.evaluation.act import act
from iql_torchrl.networks import LSTMEncoder, OneHot, with_history

T = 3
VECTOR = spaces.Box(-np.inf, np.inf, (3,))
NESTED = spaces.Dict({"at": VECTOR, "kind": spaces.Discrete(5, start=3)})
ACTIONS = spaces.Box(np.array([-2, 0], np.float32), np.array([1, 0.25], np.float32))


class Policy(nn.Module):
    """Actions inside the bounds from a window's features, or from stacked frames."""

    def __init__(self, encoder, features):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features, 2)

    def forward(self, *inputs):
        out = self.head(self.encoder(*inputs)).tanh()
        return torch.stack([1.5 * out[:, 0] - 0.5, 0.125 * out[:, 1] + 0.125], 1)


class Parts(nn.Module):
    def forward(self, at, kind):
        return torch.cat([at, OneHot(5)(kind)], -1)


KINDS = {
    "nested": (
        NESTED, lambda: LSTMEncoder(8, 8, preprocess=Parts()),
        [("observation", "at"), ("observation", "kind"), "history_mask"], False,
    ),
    "stacked": (VECTOR, lambda: nn.Linear(3 * T, 8), ["observation"], True),
}  # fmt: skip


def made(kind):
    space, encoder, keys, stack = KINDS[kind]
    module = TensorDictModule(Policy(encoder(), 8), in_keys=keys, out_keys=["action"])
    return with_history(module, T, stack=stack), Task(space, ACTIONS)


def windows_of(space, steps):
    """Windows as inputs of a program, and the real steps as ``act`` takes them."""
    generator = np.random.default_rng(steps)
    at = generator.normal(size=(T, 3)).astype(np.float32)
    kind = generator.integers(3, 8, T)
    mask = np.arange(T) >= T - steps
    nested = isinstance(space, spaces.Dict)
    seen = {"at": at[mask], "kind": kind[mask]} if nested else at[mask]
    at[~mask], kind[~mask] = np.nan, 99  # ignored
    leaves = [at, kind] if nested else [at]
    return [torch.as_tensor(x)[None] for x in (*leaves, mask)], seen


COMPARE = """
for name, cases in torch.load("cases.pt", weights_only=True).items():
    policy = torch.export.load(f"{name}.pt2").module()
    for arguments, expected in cases:
        found = policy(*arguments)
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        assert (found - expected).abs().max() <= 1e-6, (name, found, expected)
    joined = [torch.cat(parts) for parts in zip(*(arguments for arguments, _ in cases))]
    expected = torch.cat([expected for _, expected in cases])
    assert (policy(*joined) - expected).abs().max() <= 1e-6, name
    print(name)
"""


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """The policy and task of one kind, and its exported program."""
    policy, task = made("nested")
    path = tmp_path_factory.mktemp("program") / "nested.pt2"
    return policy, task, export_policy(policy, task, path)


def test_programs_act_as_the_policy_on_the_steps_so_far(nested, tmp_path):
    saved = {}
    for name in KINDS:
        policy, task = nested[:2] if name == "nested" else made(name)
        if name == "nested":
            shutil.copy(nested[2], tmp_path)
        else:
            export_policy(policy, task, tmp_path / f"{name}.pt2")
        saved[name] = []
        for steps in range(1, T + 1):
            arguments, seen = windows_of(task.observation_space, steps)
            action = act(policy, seen, task.observation_space, ACTIONS)
            saved[name].append((arguments, torch.as_tensor(action)[None]))
        assert len({str(action) for _, action in saved[name]}) == T
    torch.save(saved, tmp_path / "cases.pt")
    assert run_with_only_torch(COMPARE, tmp_path).split() == list(KINDS)


def test_the_description_says_what_a_window_is(nested):
    note = json.loads(nested[2].with_suffix(".json").read_text())
    at, kind, mask = note["inputs"]
    assert (at["name"], at["shape"], at["dtype"]) == ("at", ["B", T, 3], "float32")
    assert (kind["name"], kind["shape"], kind["dtype"]) == ("kind", ["B", T], "int64")
    assert kind["values"] == "whole numbers in [3, 7]"
    assert (mask["name"], mask["shape"], mask["dtype"]) == ("history_mask", ["B", T], "bool")
    assert "False at padding" in mask["values"]


def test_wrong_inputs_are_refused(nested):
    program = torch.export.load(nested[2]).module()
    (at, kind, mask), _ = windows_of(NESTED, 2)
    for wrong in ([[1, 0, 1]], [[1, 1, 0]], [[0, 0, 0]]):
        with pytest.raises(RuntimeError, match="history_mask must hold in every row False"):
            program(at, kind, torch.tensor(wrong).bool())
    with pytest.raises(RuntimeError, match="at must hold finite numbers"):
        program(at, kind, torch.ones(1, T, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="kind must hold whole numbers"):
        program(at.nan_to_num(), kind, torch.ones(1, T, dtype=torch.bool))
    with pytest.raises((RuntimeError, AssertionError), match=r"shape|dimension|Guard"):
        program(at[:, 1:], kind[:, 1:], mask[:, 1:])
