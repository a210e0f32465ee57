"""Implicit Q-Learning in plain torch: the complete algorithm in one short file.

Equation numbers: Kostrikov et al. 2021, arXiv:2110.06169. The order of the update is that of the
official code. A test shows that ``IQLStep`` computes the same update. Uses this package only to
load the data.
"""

import copy

from iql_torchrl import load_dataset
from iql_torchrl.data.builtin import ensure_dataset

import gymnasium
import torch
from torch import nn

EXPECTILE, TEMPERATURE, DISCOUNT, POLYAK, MAX_WEIGHT = 0.7, 3.0, 0.99, 0.005, 100.0


def mlp(inputs: int, outputs: int, width: int = 64) -> nn.Sequential:
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class IQL:
    """Policy pi(a|s), critics Q(s, a) with target copies, state value V(s), and their update."""

    def __init__(self, state_size: int, action_size: int, bound: float, lr: float = 1e-3) -> None:
        self.bound = bound  # actions lie in [-bound, bound]
        self.mean = mlp(state_size, action_size)
        self.log_std = nn.Parameter(torch.zeros(action_size))
        self.critics = nn.ModuleList(mlp(state_size + action_size, 1) for _ in range(2))
        self.targets = copy.deepcopy(self.critics)
        self.value = mlp(state_size, 1)
        others = [*self.mean.parameters(), self.log_std, *self.critics.parameters()]
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr)
        self.other_optimizer = torch.optim.Adam(others, lr)

    def policy(self, state):
        """A Gaussian: mean inside the bounds, standard deviation independent of the state."""
        std = self.log_std.clamp(-5, 2).exp()
        return torch.distributions.Normal(self.bound * self.mean(state).tanh(), self.bound * std)

    def update(self, state, action, reward, next_state, terminated):
        """One update; tensors (B, size), and (B, 1) for ``reward`` and the bool ``terminated``."""
        pair = torch.cat([state, action], -1)
        with torch.no_grad():
            target_q = torch.minimum(*(critic(pair) for critic in self.targets))
        # Equation 5: V(s) regresses on the expectile of Q(s, a) over the actions of the dataset.
        error = target_q - self.value(state)
        side = torch.where(error < 0, 1 - EXPECTILE, EXPECTILE)
        loss_value = (side * error.square()).mean()
        descend(self.value_optimizer, loss_value)
        with torch.no_grad():  # both use the V that has just been updated
            advantage = target_q - self.value(state)
            td_target = reward + DISCOUNT * ~terminated * self.value(next_state)
        # Equation 7: the policy imitates the logged actions, good ones with more weight.
        weight = (TEMPERATURE * advantage).exp().clamp(max=MAX_WEIGHT)
        log_prob = self.policy(state).log_prob(action).sum(-1, keepdim=True)
        loss_actor = -(weight * log_prob).mean()
        # Equation 6: each critic regresses on the reward plus the discounted V(s').
        loss_q = sum((critic(pair) - td_target).square().mean() for critic in self.critics)
        descend(self.other_optimizer, loss_actor + loss_q)
        # The target critics move a small step towards the critics (Polyak averaging).
        for target, online in zip(
            self.targets.parameters(), self.critics.parameters(), strict=True
        ):
            target.data.lerp_(online.data, POLYAK)
        return loss_value.item(), loss_actor.item(), loss_q.item()


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def evaluate(agent: IQL, episodes: int) -> float:
    env, total = gymnasium.make("Pendulum-v1"), 0.0
    for episode in range(episodes):
        state, ended = env.reset(seed=episode)[0], False
        while not ended:
            action = agent.policy(torch.as_tensor(state)).mean
            state, reward, terminated, truncated, _ = env.step(action.numpy())
            total, ended = total + reward, terminated or truncated
    env.close()
    return total / episodes


def main(updates: int = 5000, episodes: int = 20) -> float:
    torch.manual_seed(0)
    dataset = load_dataset(ensure_dataset("pendulum/mixed-v0"), reward="return_range")
    dataset.print_notes()
    state, action, after = (dataset.transitions[key] for key in ("observation", "action", "next"))
    reward, next_state, terminated = (after[key] for key in ("reward", "observation", "terminated"))
    agent = IQL(state_size=3, action_size=1, bound=2.0)
    for update in range(1, updates + 1):
        i = torch.randint(len(dataset), (256,))
        losses = agent.update(state[i], action[i], reward[i], next_state[i], terminated[i])
        if update % 1000 == 0:
            print("update {}: value {:.4f}, actor {:.4f}, critics {:.4f}".format(update, *losses))
    mean = evaluate(agent, episodes)
    print(f"mean return {mean:.1f} (the dataset: {dataset.episode_returns.mean():.1f})")
    return mean


if __name__ == "__main__":
    main()
