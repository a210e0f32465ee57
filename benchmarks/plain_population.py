"""IQL as CORL trains it, in plain torch, for several seeds at once.

An independent implementation for ``bench_hopper.py``: it uses this package for nothing. What
``algorithms/offline/iql.py`` of github.com/tinkoff-ai/CORL (commit 2b19dd1) computes in one update:
V, the critics, and the policy on one batch, in this order, the last two with the values that V had
before its step; torch's own initial weights; three Adam optimizers; a cosine for the policy's rate.
Adam works entry by entry, so the seeds are one more dimension of every tensor and stay independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

EXPECTILE, TEMPERATURE, DISCOUNT, POLYAK, MAX_WEIGHT = 0.7, 3.0, 0.99, 0.005, 100.0
RATE, STD_EPSILON, LOG_STD = 3e-4, 1e-3, (-20.0, 2.0)

#: Weights ``(P, in, out)`` and biases ``(P, 1, out)`` of each layer, in turn.
Layers = list[Tensor]


def forward(layers: Layers, x: Tensor) -> Tensor:
    """Perceptrons with ReLU: ``(P, B, in)`` to ``(P, B, out)``."""
    for number in range(0, len(layers), 2):
        x = torch.baddbmm(layers[number + 1], x, layers[number])
        x = x if number == len(layers) - 2 else x.relu()
    return x


class PlainPopulation:
    """One run for each of ``seeds``; each draws its own batches.

    ``rows``: transitions ``(N,)`` in TorchRL's layout with raw observations and scaled rewards;
    actions lie in [-1, 1]. The policy's rate falls to 0 over ``total`` updates.
    """

    def __init__(
        self, rows: TensorDict, seeds: Sequence[int], *, width: int, total: int, batch: int = 256
    ) -> None:
        mean = rows["observation"].mean(0)
        std = rows["observation"].std(0, correction=0) + STD_EPSILON
        self.mean, self.std, self.batch, self.updates = mean, std, batch, 0
        self.observation = (rows["observation"] - mean) / std
        self.following = (rows["next", "observation"] - mean) / std
        self.action, self.reward = rows["action"], rows["next", "reward"]
        self.going_on = (~rows["next", "terminated"]).float()
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size, actions = self.observation.shape[1], self.action.shape[1]
        widths = [width, width]
        drawn = []
        with torch.random.fork_rng():
            for seed in seeds:
                torch.manual_seed(seed)
                one, two = ([size + actions, *widths, 1] for _ in range(2))
                drawn.append(
                    [draw(w) for w in (one, two, [size, *widths, 1], [size, *widths, actions])]
                )
        first, second, self.value, self.actor = (stack(nets) for nets in zip(*drawn, strict=True))
        self.critics = [first, second]
        self.targets = [[p.detach().clone() for p in layers] for layers in self.critics]
        self.log_std = nn.Parameter(torch.zeros(len(seeds), 1, actions))
        self.value_adam, self.critic_adam, self.actor_adam = (
            torch.optim.Adam(parameters, lr=RATE, fused=True)
            for parameters in (self.value, first + second, [*self.actor, self.log_std])
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_adam, total)

    def update(self) -> None:
        """One update of every run on a batch ``(P, B)``."""
        count = len(self.observation)
        index = torch.stack(
            [torch.randint(count, (self.batch,), generator=g) for g in self.generators]
        )
        s, a = self.observation[index], self.action[index]
        pair = torch.cat([s, a], -1)
        with torch.no_grad():
            next_v = forward(self.value, self.following[index])
            goal = self.reward[index] + DISCOUNT * self.going_on[index] * next_v
            target_q = torch.minimum(*(forward(layers, pair) for layers in self.targets))
        advantage = target_q - forward(self.value, s)
        side = (EXPECTILE - (advantage < 0).float()).abs()
        descend(self.value_adam, side * advantage.square())
        errors = [(forward(layers, pair) - goal).square() for layers in self.critics]
        descend(self.critic_adam, (errors[0] + errors[1]) / 2)
        with torch.no_grad():
            for critic, target in zip(self.critics, self.targets, strict=True):
                for live, slow in zip(critic, target, strict=True):
                    slow.lerp_(live, POLYAK)
            weight = (TEMPERATURE * advantage).exp().clamp(max=MAX_WEIGHT)
        scale = self.log_std.clamp(*LOG_STD).exp()
        policy = torch.distributions.Normal(
            forward(self.actor, s).tanh(), scale, validate_args=False
        )
        descend(self.actor_adam, -weight * policy.log_prob(a).sum(-1, keepdim=True))
        self.schedule.step()
        self.updates += 1

    def policy(self, number: int) -> TensorDictModule:
        """The mean action of run ``number``, for ``iql_torchrl.evaluate``."""
        layers = [p.detach()[number : number + 1].clone() for p in self.actor]

        def act(observation: Tensor) -> Tensor:
            state = (observation - self.mean) / self.std
            return forward(layers, state[None])[0].tanh()

        return TensorDictModule(act, in_keys=["observation"], out_keys=["action"])


def draw(widths: Sequence[int]) -> Layers:
    """Weights ``(in, out)`` and biases ``(1, out)`` of a perceptron as ``nn.Linear`` draws them."""
    made = [nn.Linear(*pair) for pair in pairwise(widths)]
    return [p for layer in made for p in (layer.weight.detach().T, layer.bias.detach()[None])]


def stack(nets: Sequence[Layers]) -> Layers:
    return [nn.Parameter(torch.stack(tensors)) for tensors in zip(*nets, strict=True)]


def descend(optimizer: torch.optim.Optimizer, per_sample: Tensor) -> None:
    """A step on the mean over the batch, for the sum over runs: no run changes another one's."""
    optimizer.zero_grad()
    per_sample.mean((1, 2)).sum().backward()
    optimizer.step()
