"""Policies with chunks: evaluate, act, Acting and TorchRL's wrapper execute their actions."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_history import LENGTHS, Counter
from torch import nn
from torchrl.modules import MultiStepActorWrapper

from iql_torchrl import evaluate
from iql_torchrl.evaluation import Acting
from iql_torchrl.evaluation.acting import act
from iql_torchrl.networks import Chunk, with_chunk, with_history
from iql_torchrl.selection.candidates import resolve_candidate

EXECUTED: dict[int, list[list[float]]] = {}


class Recording(Counter):
    """Keeps the actions of each episode by its seed; an action has two numbers."""

    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        EXECUTED[seed] = []
        return super().reset(seed=seed)

    def step(self, action):
        EXECUTED[int(self.state[0])].append([round(float(x), 1) for x in action])
        return super().step(action)


class Planner(nn.Module):
    """At step t of an episode it proposes ``(t / 10, i / 10)`` for the i-th action from there."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.rows = size, []

    def forward(self, observation):
        observation = observation[:, -1] if observation.ndim == 3 else observation
        self.rows.append(len(observation))
        planned = observation[:, 1:].repeat_interleave(self.size, 1)
        each = torch.arange(self.size).expand_as(planned)
        return torch.stack([planned, each], -1).flatten(1) / 10


def planner(size, replan_every=None):
    policy = TensorDictModule(Planner(size), in_keys=["observation"], out_keys=["action"])
    return with_chunk(policy, size, replan_every)


def expected(length: int, executed: int):
    return [[t // executed * executed / 10, t % executed / 10] for t in range(length)]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(("size", "every"), [(3, None), (3, 2), (3, 1), (1, None), (9, None)])
def test_chunks_are_executed_in_order_and_begin_again_at_each_reset(size, every, num_envs):
    """Episodes of 1, 3, 7 and 2 steps: with several environments they end at different times."""
    policy = planner(size, every)
    result = evaluate(policy, Recording, episodes=4, num_envs=num_envs, seed=0)
    assert result.lengths.tolist() == list(LENGTHS)
    executed = size if every is None else every
    assert {seed: EXECUTED[seed] for seed in range(4)} == {
        seed: expected(length, executed) for seed, length in enumerate(LENGTHS)
    }
    assert sum(policy.module.rows) == sum(-(-length // executed) for length in LENGTHS)


@pytest.mark.parametrize("history", [None, 2])
def test_acting_executes_the_chunks_of_evaluate(history):
    policy = planner(3, 2)
    if history:
        policy = with_history(policy, history)
    acting, env = Acting(policy, Recording().observation_space, Recording.action_space), Recording()
    for seed in (2, 1):
        observation, _ = env.reset(seed=seed)
        acting.reset()
        over = False
        while not over:
            with pytest.raises(ValueError, match="observation"):
                acting.act(np.zeros(5))
            observation, _, _, over, _ = env.step(acting.act(observation))
        assert EXECUTED[seed] == expected(LENGTHS[seed], 2)
    assert policy.module.rows == [1] * 6  # 4 of seven steps, 2 of three


def test_act_gives_the_whole_chunk():
    env, policy = Recording(), planner(3, 2)
    both = env.observation_space, env.action_space
    one = act(policy, np.float32([0, 4]), *both)
    np.testing.assert_allclose(one, [[0.4, 0], [0.4, 0.1], [0.4, 0.2]], atol=1e-6)
    assert (one.shape, one.dtype) == ((3, 2), np.float32)
    batch = act(policy, np.float32([[0, 4], [0, 5]]), *both)
    assert batch.shape == (2, 3, 2)
    np.testing.assert_array_equal(batch[0], one)


def test_an_action_that_does_not_fit_is_named():
    env, policy = Recording(), with_chunk(planner(3), 4)
    with pytest.raises(
        ValueError, match=r"shape \(1, 6\); expected 8 numbers .* 4 actions of shape"
    ):
        act(policy, np.float32([0, 4]), env.observation_space, env.action_space)
    late = planner(3)
    late.module.register_forward_hook(lambda *args: 2 * args[-1])
    with pytest.raises(ValueError, match=r"at step 3 of episode 0 is outside the bounds"):
        evaluate(late, lambda: Shifted(), episodes=1, seed=2)


class Shifted(gymnasium.ObservationWrapper):
    """The second plan of an episode begins with an action out of bounds."""

    def __init__(self):
        super().__init__(Recording())

    def observation(self, observation):
        return observation * np.float32([1, 2])


def test_torchrls_wrapper_executes_the_same_actions():
    """In a batch of three environments, of which the second is reset after two steps."""
    policy = planner(3, 2)
    steps = TensorDictModule(
        lambda action: action.unflatten(-1, (3, 2)), in_keys=["action"], out_keys=["action_chunk"]
    )
    wrapped = MultiStepActorWrapper(
        TensorDictSequential(policy, steps), n_steps=3, replan_interval=2, action_keys=["action"],
        chunk_keys=["action_chunk"],
    )  # fmt: skip
    data = TensorDict({"is_init": torch.ones(3, 1, dtype=torch.bool)}, [3])
    executed = []
    for t in range(5):
        at = torch.tensor([t, t - 3 if t >= 3 else t, t])
        data["observation"] = torch.stack([torch.zeros(3), at], 1)
        data["is_init"] = torch.tensor([[t == 0], [t in (0, 3)], [t == 0]])
        data = wrapped(data)
        executed.append(data["action"].clone())
    for column, lengths in ((0, [5]), (1, [3, 2]), (2, [5])):
        pairs = [pair for length in lengths for pair in expected(length, 2)]
        torch.testing.assert_close(torch.stack(executed)[:, column], torch.tensor(pairs))


def test_rankings_from_logs_refuse_chunks():
    with pytest.raises(ValueError, match=r"'mine' proposes 3 actions at once.* in an environment"):
        resolve_candidate("mine", planner(3))


@pytest.mark.parametrize("arguments", [(0,), (3, 0), (3, 4), (2.0,), (3, True)])
def test_impossible_chunks_are_refused(arguments):
    with pytest.raises(ValueError, match=r"replan_every is|length is"):
        Chunk(*arguments)
