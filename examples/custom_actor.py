"""The loss in your own script: actor, critics, optimizer and loop are plain TorchRL.

Only the loss and the data come from this package.
"""

import sys

from iql_torchrl import IQLLoss, load_dataset
from iql_torchrl.data.builtin import ensure_dataset

import torch
import tyro
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs import GymEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SoftUpdate


class Residual(nn.Module):
    """Your own network: a block with a skip connection."""

    def __init__(self, in_features: int, out_features: int, width: int = 64) -> None:
        super().__init__()
        self.into = nn.Linear(in_features, width)
        self.block = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        return self.out(x + self.block(x))


def main(updates: int = 5000, seed: int = 0) -> float:
    """Train, evaluate, and return the mean return.

    Args:
        updates: number of gradient updates, >= 1.
        seed: seed of the initial weights and of the batches, >= 0.
    """
    if updates < 1 or seed < 0:
        print("error: --updates is a number of at least 1, --seed of at least 0.", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(seed)
    dataset = load_dataset(ensure_dataset("pendulum/mixed-v0"), reward="return_range")
    dataset.print_notes()
    buffer = dataset.replay_buffer(batch_size=256, seed=seed)
    action_spec = dataset.action_spec
    size = action_spec.shape[-1]

    body = nn.Sequential(Residual(3, 2 * size), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": action_spec.space.low, "high": action_spec.space.high},
    )

    def make_critic() -> ValueOperator:  # called once per critic: each keeps its initialisation
        net = MLP(in_features=3 + size, out_features=1, num_cells=[64, 64])
        return ValueOperator(net, in_keys=["observation", "action"])

    value = ValueOperator(
        MLP(in_features=3, out_features=1, num_cells=[64, 64]), in_keys=["observation"]
    )

    loss = IQLLoss(actor, make_critic, value, expectile=0.8, temperature=3.0)
    loss.make_value_estimator(gamma=0.99)
    target = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    for update in range(1, updates + 1):
        losses = loss(buffer.sample())
        total = losses["loss_value"] + losses["loss_qvalue"] + losses["loss_actor"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        target.step()
        if update % max(1, updates // 5) == 0:
            print(f"update {update:,}: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))

    env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(max_steps=200))
    env.set_seed(seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        returns = [env.rollout(200, actor)["next", "reward"].sum() for _ in range(20)]
    env.close()
    mean = torch.stack(returns).mean().item()
    print(
        f"mean return of 20 episodes: {mean:.1f} (the dataset: {dataset.episode_returns.mean():.1f})"
    )
    return mean


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n\n")[0])
