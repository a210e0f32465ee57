"""Policies with a history: evaluate, act and Acting give them the windows that training has."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from torch import nn

from iql_torchrl import evaluate, load_dataset
from iql_torchrl.evaluation import Acting
from iql_torchrl.evaluation.acting import act
from iql_torchrl.evaluation.background import run_task, serialize_call
from iql_torchrl.networks import History, LSTMEncoder, history_of, with_history

LENGTHS = (1, 3, 7, 2)  # steps of the episodes that start with seeds 0, 1, ...


class Counter(gymnasium.Env):
    """Episode of a fixed length; observes its seed and step, in one array that it changes in place."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, nested: bool = False):
        vector = spaces.Box(-np.inf, np.inf, (2,))
        image = spaces.Box(0, 255, (4, 5, 3), np.uint8)
        self.nested = nested
        self.observation_space = (
            spaces.Dict({"at": vector, "camera": image, "kind": spaces.Discrete(9, start=2)})
            if nested
            else vector
        )
        self.state = np.zeros(2, np.float32)

    def observe(self):
        if not self.nested:
            return self.state
        image = np.full((4, 5, 3), 10 * self.state[0] + self.state[1], np.uint8)
        return {"at": self.state, "camera": image, "kind": np.int64(2 + self.state[1] % 9)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state[:] = (seed, 0)
        return self.observe(), {}

    def step(self, action):
        self.state[1] += 1
        over = self.state[1] >= LENGTHS[int(self.state[0])]
        return self.observe(), 0.0, False, bool(over), {}


class Recorder(nn.Module):
    """A policy that keeps what it reads; its action is 0."""

    def __init__(self):
        super().__init__()
        self.read = []

    def forward(self, *inputs):
        for row in zip(*(x.clone() for x in inputs), strict=True):
            self.read.append(row)
        return torch.zeros(len(inputs[0]), 1)


def recorder(in_keys, length, stack=False):
    module = Recorder()
    policy = TensorDictModule(module, in_keys=in_keys, out_keys=["action"])
    return with_history(policy, length, stack=stack), module


def logged(nested: bool):
    """The episodes of all seeds as a dataset, and the environment's observations row by row."""
    now, following, ends = [], [], []
    env = Counter(nested)
    for seed in range(len(LENGTHS)):
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            now.append(copy_of(observation))
            observation, _, _, over, _ = env.step(None)
            following.append(copy_of(observation))
            ends.append(over)
    rows = len(ends)
    table = {
        "observation": column(now), "next_observation": column(following),
        "action": np.linspace(-1, 1, rows, dtype=np.float32)[:, None],
        "reward": np.zeros(rows, np.float32),
        "terminated": np.zeros(rows, bool), "truncated": np.array(ends),
    }  # fmt: skip
    return load_dataset(table)


def copy_of(observation):
    if isinstance(observation, dict):  # categories as logs have them, counted from zero
        return {k: v - 2 if k == "kind" else np.array(v) for k, v in observation.items()}
    return observation.copy()


def column(observations):
    if isinstance(observations[0], dict):
        return {name: np.stack([o[name] for o in observations]) for name in observations[0]}
    return np.stack(observations)


def of_dataset(windows, keys):
    """The windows of all rows, as tuples of the entries that a policy reads."""
    batch = windows[:]
    return list(zip(*(batch[key] for key in keys), strict=True))


def in_order(read, first):
    """What a recorder read, by episode and step: ``first`` gives the row's newest vector."""
    return sorted(read, key=lambda row: tuple(first(row).tolist()))


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


NESTED = [("observation", "at"), ("observation", "camera"), ("observation", "kind")]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_evaluate_reads_the_windows_of_the_log(length, num_envs):
    keys = ["observation", "history_mask"]
    policy, module = recorder(keys, length)
    evaluate(policy, Counter, episodes=len(LENGTHS), num_envs=num_envs, seed=0)
    found = in_order(module.read, lambda row: row[0][-1])
    same(found, of_dataset(logged(False).windows(length), keys))


def test_evaluate_reads_the_windows_of_dicts():
    keys = [*NESTED, "history_mask"]
    policy, module = recorder(keys, 3)
    evaluate(policy, lambda: Counter(True), episodes=len(LENGTHS), num_envs=2, seed=0)
    found = in_order(module.read, lambda row: row[0][-1])
    same(found, of_dataset(logged(True).windows(3), keys))
    flat, module = recorder(["at", "kind", "history_mask"], 3)  # the layout of TorchRL's GymEnv
    evaluate(flat, lambda: Counter(True), episodes=len(LENGTHS), num_envs=2, seed=0)
    same(in_order(module.read, lambda row: row[0][-1]), [(at, kind, m) for at, _, kind, m in found])


def test_evaluate_reads_stacked_frames():
    policy, module = recorder(NESTED, 3, stack=True)
    evaluate(policy, lambda: Counter(True), episodes=len(LENGTHS), num_envs=2, seed=0)
    found = in_order(module.read, lambda row: row[0][-2:])
    same(found, of_dataset(logged(True).frame_stack(3), NESTED))
    assert found[0][1].shape == (4, 5, 9)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("stack", [False, True])
def test_acting_reads_the_windows_of_the_log(nested, stack):
    keys = [*(NESTED if nested else ["observation"]), *([] if stack else ["history_mask"])]
    policy, module = recorder(keys, 3, stack)
    env = Counter(nested)
    acting = Acting(policy, env.observation_space, env.action_space)
    for seed in range(len(LENGTHS)):
        acting.reset()
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = acting.act(observation)
            assert env.action_space.contains(action)
            observation, _, _, over, _ = env.step(action)
    same(module.read, of_dataset(logged(nested).windows(3, stack=stack), keys))


def test_a_call_takes_the_last_observations_of_an_episode():
    keys = ["observation", "history_mask"]
    policy, module = recorder(keys, 3)
    env = Counter()
    episode = np.stack([np.full(7, 2.0), np.arange(7.0)], 1)
    spaces_ = env.observation_space, env.action_space
    for step in range(7):
        assert act(policy, episode[max(0, step - 2) : step + 1], *spaces_).shape == (1,)
    dataset = logged(False)
    rows = dataset.transitions["observation"][:, 0] == 2
    expected = of_dataset(dataset.windows(3), keys)[int(rows.int().argmax()) :][:7]
    same(module.read, expected)
    module.read.clear()
    batch = np.stack([episode[i : i + 3] for i in range(5)])
    assert act(policy, batch, *spaces_).shape == (5, 1)
    same(module.read, expected[2:])
    with pytest.raises(ValueError, match="is a single one and the policy reads the last 3;"):
        act(policy, episode[0], *spaces_)


def small_policy(length: int):
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = LSTMEncoder(2, 8), nn.Linear(8, 1)

        def forward(self, window, mask):
            return self.head(self.encoder(window, mask)).tanh()

    module = TensorDictModule(
        Policy(), in_keys=["observation", "history_mask"], out_keys=["action"]
    )
    return with_history(module, length)


def test_steps_that_are_refused_are_no_part_of_the_history():
    policy, env, rows = small_policy(3), Counter(), logged(False).transitions["observation"]
    acting, again = (Acting(policy, env.observation_space, env.action_space) for _ in range(2))
    for each in (acting, again):
        each.act(rows[0])
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(2,\)"):
        acting.act(np.zeros(3))
    with pytest.raises(ValueError, match="is a batch of 4; expected one"):
        acting.act(np.zeros((4, 2)))
    assert np.array_equal(acting.act(rows[1]), again.act(rows[1]))


def test_what_does_not_fit_a_history_is_refused():
    policy, spaces_ = small_policy(3), (Counter().observation_space, Counter.action_space)
    for wrong, message in (
        (np.zeros((4, 2)), "has 4 steps and the policy reads the last 3; give at most 3"),
        (np.zeros((5, 4, 2)), "has 4 steps"),
        (np.zeros((0, 2)), "batch of size 0"),
        (np.zeros((3, 3)), r"\('T', 2\) for the last T of an episode, \('B', 'T', 2\) for a batch"),
        (np.zeros((1, 1, 1, 2)), r"shape \(1, 1, 1, 2\)"),
        (np.full((2, 2), np.nan), "observation holds nan"),
    ):
        with pytest.raises(ValueError, match=message):
            act(policy, wrong, *spaces_)
    bare = TensorDictModule(nn.Identity(), in_keys=["history_mask"], out_keys=["action"])
    with pytest.raises(ValueError, match=r"history_mask'\] and its history is None.*with_history"):
        evaluate(bare, Counter, episodes=1, seed=0)
    bare.history = 3
    with pytest.raises(ValueError, match=r"history is 3, .*; set it by networks.with_history"):
        evaluate(bare, Counter, episodes=1, seed=0)


def test_the_history_goes_to_another_process_with_the_policy():
    policy = small_policy(3)
    assert history_of(run_task(serialize_call(lambda: policy))) == History(3)
