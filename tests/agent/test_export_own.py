"""export_policy: actors of the user's own, also with a history, and what cannot be exported."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from gymnasium import spaces
from only_torch import run_with_only_torch
from small_agents import masks
from tensordict.nn import TensorDictModule
from test_export import COMPARE
from torch import nn
from torchrl.data import Bounded, OneHot

from iql_torchrl import policies
from iql_torchrl.agent.export import export_policy
from iql_torchrl.agent.task import Task
from iql_torchrl.evaluation.act import act
from iql_torchrl.networks import LSTMEncoder, with_history
from iql_torchrl.networks import OneHot as OneHotLayer


class Own(nn.Module):
    """Two inputs of the user's own: a picture and a category, and an unbounded action."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12 + 3, 2)

    def forward(self, picture, kind):
        x = picture.flatten(1).float() / 255
        x = torch.cat([x, nn.functional.one_hot(kind, 3).to(x)], -1)
        return 10 * self.linear(x).double()


def test_an_actor_of_the_users_own(tmp_path):
    space = spaces.Dict(
        {
            "kind": spaces.Discrete(3, start=1),
            "inner": spaces.Dict({"picture": spaces.Box(0, 255, (2, 2, 3), np.uint8)}),
            "unread": spaces.Box(-1, 1, (4,)),
        }
    )
    task = Task(space, spaces.Box(np.float32([-1, -np.inf]), np.float32([1, np.inf])))
    keys = [("observation", "inner", "picture"), ("observation", "kind")]
    own = Own()
    actor = TensorDictModule(own, in_keys=keys, out_keys=["action"])
    program = torch.export.load(export_policy(actor, task, tmp_path / "own.pt2")).module()
    picture = torch.randint(0, 256, (6, 2, 2, 3), dtype=torch.uint8)
    kind = torch.tensor([1, 2, 3, 1, 2, 3])
    expected = own(picture, kind - 1).detach().float()
    expected[:, 0].clamp_(-1, 1)
    assert (expected[:, 0].abs() == 1).any()
    torch.testing.assert_close(program(picture, kind), expected)
    for wrong in ((picture, kind - 1), (picture, kind + 1)):
        with pytest.raises(RuntimeError, match=r"kind must hold whole numbers in \[1, 3\]"):
            program(*wrong)
    note = json.loads((tmp_path / "own.json").read_text())
    assert [(i["name"], i["dtype"]) for i in note["inputs"]] == [
        ("inner.picture", "uint8"),
        ("kind", "int64"),
    ]
    assert (note["output"]["low"], note["output"]["high"]) == ([-1, None], [1, None])


@pytest.mark.parametrize("shape", ["one_hot", "column", "scores"])
def test_every_form_of_discrete_action(tmp_path, shape):
    box, choice = spaces.Box(-1, 1, (3,)), spaces.Discrete(4, start=2)
    if shape == "one_hot":
        actor = policies.categorical(3, OneHot(4), hidden=(8,), mask_key="action_mask")
    else:
        net = nn.Linear(3, 4)
        if shape == "column":
            net = nn.Sequential(net, Column())
        actor = TensorDictModule(net, in_keys=["observation"], out_keys=["action"])
    program = torch.export.load(export_policy(actor, Task(box, choice), tmp_path / "p.pt2"))
    x, more = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32), {}
    if shape == "one_hot":
        more["action_mask"] = masks()
    result = program.module()(torch.tensor(x), *(torch.tensor(m) for m in more.values()))
    assert result.dtype == torch.int64
    assert result.tolist() == act(actor, x, box, choice, **more).tolist()
    assert len(set(result.tolist())) > 1


class Column(nn.Module):
    def forward(self, x):
        return x.argmax(-1, keepdim=True)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Draws(nn.Module):
    def forward(self, x):
        return torch.rand_like(x)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x + torch.tensor([0.0] * len(x))[:, None]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Branches(), "TensorDictModule cannot be traced .*data-dependent"),
        (FixedBatch(), "TensorDictModule cannot be traced .*batch"),
        (Draws(), "TensorDictModule, once traced, acts differently, by .* in a batch of 1"),
    ],
)
def test_the_error_names_what_cannot_be_exported(tmp_path, net, reason):
    task = Task(spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (2,)))
    actor = TensorDictModule(net, in_keys=["observation"], out_keys=["action"])
    with pytest.raises(RuntimeError, match=reason):
        export_policy(actor, task, tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(tmp_path):
    box, path = spaces.Box(-1, 1, (2,)), tmp_path / "p.pt2"
    actor = TensorDictModule(nn.Linear(2, 3), in_keys=["observation"], out_keys=["action"])
    for policy, task, place, error, result in (
        (actor, Task(box, box), tmp_path / "p.pt", ValueError, r"'.*p.pt'; .* ends in .pt2"),
        (nn.Linear(2, 2), Task(box, box), path, TypeError, "TensorDict module .*found Linear"),
        (actor, Task(box, box), path, ValueError, r"rows of shape \(3,\), for Box of shape \(2,\)"),
        (actor, Task(box, spaces.Discrete(5)), path, ValueError, "float32.*shape .*one-hot"),
        (actor, Task(box, spaces.MultiBinary(3)), path, ValueError, "needs Box or Discrete"),
        (actor, Task(spaces.Dict(a=box), box), path, ValueError, "reads 'observation' as one"),
    ):
        with pytest.raises(error, match=result):
            export_policy(policy, task, place)
    masked = policies.categorical(2, OneHot(4), mask_key="action_mask")
    with pytest.raises(ValueError, match="action_mask needs Discrete"):
        export_policy(masked, Task(box, box), path)
    gaussian = policies.gaussian(2, Bounded(-1, 1, (2,)), in_keys=["hidden"])
    with pytest.raises(ValueError, match="reads 'hidden'"):
        export_policy(gaussian, Task(box, box), path)
    assert not list(tmp_path.iterdir())


class Joined(nn.Module):
    def forward(self, *parts):
        return torch.cat([part.float() for part in parts], -1)[:, :2]


def test_whole_numbers_have_limits_of_their_own(tmp_path):
    """Limits by dimension, bounds of an integer Box, bits; a Box of all uint8 needs no check."""
    space = spaces.Dict(
        {
            "bits": spaces.MultiBinary(2),
            "choices": spaces.MultiDiscrete([2, 5], start=[1, 0]),
            "count": spaces.Box(-3, 3, (2,), np.int64),
            "pixels": spaces.Box(0, 255, (2,), np.uint8),
        }
    )
    task = Task(space, spaces.Box(-9, 9, (2,)))
    keys = [("observation", name) for name in space.spaces]
    actor = TensorDictModule(Joined(), in_keys=keys, out_keys=["action"])
    program = torch.export.load(export_policy(actor, task, tmp_path / "p.pt2")).module()
    right = [torch.tensor([[0, 1]]), torch.tensor([[2, 4]]), torch.tensor([[-3, 3]])]
    right.append(torch.tensor([[0, 255]], dtype=torch.uint8))
    assert program(*right).tolist() == [[0, 1]]
    for place, wrong, text in (
        (0, [[0, 2]], r"bits must hold whole numbers in \[0, 1\]"),
        (1, [[0, 4]], r"choices must hold whole numbers in low \[1, 0\], high \[2, 4\]"),
        (1, [[2, 5]], "choices must hold"),
        (2, [[-4, 0]], r"count must hold whole numbers in \[-3, 3\]"),
    ):
        inputs = list(right)
        inputs[place] = torch.tensor(wrong)
        with pytest.raises(RuntimeError, match=text):
            program(*inputs)
    note = json.loads((tmp_path / "p.json").read_text())
    assert note["inputs"][3]["values"] == "whole numbers in [0, 255]"


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
        return torch.cat([at, OneHotLayer(5)(kind)], -1)


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
        windows = [windows_of(task.observation_space, steps) for steps in range(1, T + 1)]
        actions = [act(policy, seen, task.observation_space, ACTIONS) for _, seen in windows]
        assert len(set(map(str, actions))) == T
        inputs = [torch.cat(each) for each in zip(*(given for given, _ in windows), strict=True)]
        saved[name] = inputs, torch.as_tensor(np.stack(actions))
    torch.save(saved, tmp_path / "cases.pt")
    ran = run_with_only_torch(COMPARE, tmp_path).splitlines()
    assert ran == [f"ran {name}" for name in KINDS]


def test_the_description_says_what_a_window_is(nested):
    note = json.loads(nested[2].with_suffix(".json").read_text())
    at, kind, mask = note["inputs"]
    assert (at["name"], at["shape"], at["dtype"]) == ("at", ["B", T, 3], "float32")
    assert (kind["name"], kind["shape"], kind["dtype"]) == ("kind", ["B", T], "int64")
    assert kind["values"] == "whole numbers in [3, 7]"
    assert (mask["name"], mask["shape"], mask["dtype"]) == ("history_mask", ["B", T], "bool")
    assert "False at padding" in mask["values"]


def test_wrong_windows_are_refused(nested):
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
