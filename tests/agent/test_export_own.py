"""export_policy: actors of the user's own, also with a history, and what cannot be exported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import masks
from tensordict.nn import TensorDictModule
from test_export import COMPARE, run_with_only_torch
from torch import nn
from torchrl.data import Bounded, OneHot

from iql_torchrl import policies
from iql_torchrl.agent.export import export_policy
from iql_torchrl.agent.task import Task
from iql_torchrl.evaluation.acting import act
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
    program = torch.export.load(
        export_policy(actor_of(own, keys), task, tmp_path / "own.pt2")
    ).module()
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
    described = [(i["name"], i["dtype"]) for i in note["inputs"]]
    assert described == [("inner.picture", "uint8"), ("kind", "int64")]
    assert (note["output"]["low"], note["output"]["high"]) == ([-1, None], [1, None])


class Pure(nn.Module):
    """The function ``call`` of one input."""

    def __init__(self, call):
        super().__init__()
        self.call, self.linear = call, nn.Linear(3, 4)

    def forward(self, x):
        return self.call(self.linear, x)


@pytest.mark.parametrize("shape", ["one_hot", "column", "scores"])
def test_every_form_of_discrete_action(tmp_path, shape):
    box, choice = spaces.Box(-1, 1, (3,)), spaces.Discrete(4, start=2)
    if shape == "one_hot":
        actor = policies.categorical(3, OneHot(4), hidden=(8,), mask_key="action_mask")
    else:
        column = Pure(lambda linear, x: linear(x).argmax(-1, keepdim=True))
        actor = actor_of(column if shape == "column" else nn.Linear(3, 4))
    program = torch.export.load(export_policy(actor, Task(box, choice), tmp_path / "p.pt2"))
    x = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    more = {"action_mask": masks()} if shape == "one_hot" else {}
    result = program.module()(torch.tensor(x), *(torch.tensor(m) for m in more.values()))
    assert result.dtype == torch.int64
    assert result.tolist() == act(actor, x, box, choice, **more).tolist()
    assert len(set(result.tolist())) > 1


def actor_of(net, keys=("observation",)):
    return TensorDictModule(net, in_keys=list(keys), out_keys=["action"])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda _, x: x if x.sum() > 0 else -x, "cannot be traced .*data-dependent"),
        (lambda _, x: x + torch.tensor([0.0] * len(x))[:, None], "cannot be traced .*batch"),
        (lambda _, x: torch.rand_like(x), "once traced, acts differently, by .* in a batch of 1"),
    ],
)
def test_the_error_names_what_cannot_be_exported(tmp_path, call, reason):
    task = Task(spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (2,)))
    with pytest.raises(RuntimeError, match=rf"TensorDictModule,? {reason}"):
        export_policy(actor_of(Pure(call)), task, tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(tmp_path):
    box, path, actor = spaces.Box(-1, 1, (2,)), tmp_path / "p.pt2", actor_of(nn.Linear(2, 3))
    masked = policies.categorical(2, OneHot(4), mask_key="action_mask")
    gaussian = policies.gaussian(2, Bounded(-1, 1, (2,)), in_keys=["hidden"])
    for policy, task, place, error, result in (
        (actor, Task(box, box), tmp_path / "p.pt", ValueError, r"'.*p.pt'; .* ends in .pt2"),
        (nn.Linear(2, 2), Task(box, box), path, TypeError, "TensorDict module .*found Linear"),
        (actor, Task(box, box), path, ValueError, r"rows of shape \(3,\), for Box of shape \(2,\)"),
        (actor, Task(box, spaces.Discrete(5)), path, ValueError, "float32.*shape .*one-hot"),
        (actor, Task(box, spaces.MultiBinary(3)), path, ValueError, "needs Box or Discrete"),
        (actor, Task(spaces.Dict(a=box), box), path, ValueError, "reads 'observation' as one"),
        (masked, Task(box, box), path, ValueError, "action_mask needs Discrete"),
        (gaussian, Task(box, box), path, ValueError, "reads 'hidden'"),
    ):
        with pytest.raises(error, match=result):
            export_policy(policy, task, place)
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
    path = export_policy(actor_of(Joined(), keys), task, tmp_path / "p.pt2")
    program = torch.export.load(path).module()
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
def programs(tmp_path_factory):
    """Policies that read nested or stacked frames, and the exported programs' paths, by name."""
    keys = [("observation", "at"), ("observation", "kind"), "history_mask"]
    lstm = actor_of(Policy(LSTMEncoder(8, 8, preprocess=Parts()), 8), keys)
    stack = actor_of(Policy(nn.Linear(3 * T, 8), 8))
    made = {
        "nested": (with_history(lstm, T, stack=False), Task(NESTED, ACTIONS)),
        "stacked": (with_history(stack, T, stack=True), Task(VECTOR, ACTIONS)),
    }
    folder = tmp_path_factory.mktemp("programs")
    return {k: (*each, export_policy(*each, folder / f"{k}.pt2")) for k, each in made.items()}


def test_programs_act_as_the_policy_on_the_steps_so_far(programs):
    saved = {}
    path = programs["nested"][2]
    for name, (policy, task, _) in programs.items():
        windows = [windows_of(task.observation_space, steps) for steps in range(1, T + 1)]
        actions = [act(policy, seen, task.observation_space, ACTIONS) for _, seen in windows]
        assert len(set(map(str, actions))) == T
        inputs = [torch.cat(each) for each in zip(*(given for given, _ in windows), strict=True)]
        saved[name] = inputs, torch.as_tensor(np.stack(actions))
    torch.save(saved, path.with_name("cases.pt"))
    ran = run_with_only_torch(COMPARE, path.parent)
    assert ran == [f"ran {name}" for name in programs]


def test_the_description_and_the_refusals_of_windows(programs):
    path = programs["nested"][2]
    at, kind, mask = json.loads(path.with_suffix(".json").read_text())["inputs"]
    assert (at["name"], at["shape"], at["dtype"]) == ("at", ["B", T, 3], "float32")
    assert (kind["name"], kind["shape"], kind["dtype"]) == ("kind", ["B", T], "int64")
    assert kind["values"] == "whole numbers in [3, 7]"
    assert (mask["name"], mask["shape"], mask["dtype"]) == ("history_mask", ["B", T], "bool")
    assert "False at padding" in mask["values"]
    program = torch.export.load(path).module()
    (at, kind, mask), _ = windows_of(NESTED, 2)
    full = torch.ones(1, T, dtype=torch.bool)
    for inputs, words in (
        *(((at, kind, torch.tensor([m]).bool()), "history_mask must hold in every row False")
          for m in ([1, 0, 1], [1, 1, 0], [0, 0, 0])),
        ((at, kind, full), "at must hold finite numbers"),
        ((at.nan_to_num(), kind, full), "kind must hold whole numbers"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=words):
            program(*inputs)
    with pytest.raises((RuntimeError, AssertionError), match=r"shape|dimension|Guard"):
        program(at[:, 1:], kind[:, 1:], mask[:, 1:])
