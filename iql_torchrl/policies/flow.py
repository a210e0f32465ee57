"""A policy that turns noise into actions by following a learned velocity (flow matching)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type

from iql_torchrl.networks import join_observations
from iql_torchrl.policies.actors import Bounds, _bounds, _Head

__all__ = ["FlowHead", "FlowPolicy", "fixed_noise", "flow", "is_deterministic"]


class FlowHead(_Head):
    """The velocity ``v(s, x, t)``, in units in which the action's bounds are -1 and 1."""

    mlp_reads_first = False

    def __init__(self, in_features: int, bounds: Bounds, *rest: Any) -> None:
        size = bounds[0].numel()
        super().__init__(in_features + size + 1, size, bounds, *rest)

    def around(
        self, first: Callable[..., Tensor], mlp: Callable[..., Tensor], *inputs: Tensor
    ) -> Tensor:
        observation, action, time = inputs
        return self.step(mlp, first(observation), action, time)

    @staticmethod
    def step(mlp: Callable[..., Tensor], features: Tensor, action: Tensor, time: Tensor) -> Tensor:
        """The velocity from the output of the first layer; leading dimensions are broadcast."""
        time = time.unsqueeze(-1) if time.ndim < action.ndim else time
        parts = (features, action, time.to(action.dtype))
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return mlp(torch.cat([x.expand(*shape, x.shape[-1]) for x in parts], -1))


class FlowPolicy(TensorDictModuleBase):
    """What :func:`flow` returns: reads ``in_keys`` and, if it is there, ``noise_key``."""

    fixed_noise: Tensor

    def __init__(
        self, head: FlowHead, in_keys: Sequence[NestedKey], num_steps: int, noise_key: NestedKey
    ) -> None:
        super().__init__()
        self.head = head
        self.in_keys, self.out_keys = list(in_keys), ["action"]
        self.num_steps, self.noise_key = num_steps, noise_key
        self.register_buffer("fixed_noise", fixed_noise(self.noise_features).to(head.centre))

    @property
    def action_features(self) -> int:
        """Number of action dimensions A."""
        return self.head.centre.numel()

    @property
    def noise_features(self) -> int:
        """Number of standard normal numbers that one action is made from: A."""
        return self.action_features

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, noise_key={self.noise_key!r}"

    def normalise(self, action: Tensor) -> Tensor:
        """``action`` in units in which its bounds are -1 and 1."""
        return (action - self.head.centre) / self.head.half_range

    def velocity(self, observation: Tensor, action: Tensor, time: Tensor) -> Tensor:
        """``v(s, x, t)``, ``(*B, A)``.

        ``observation``: as the policy reads it (several keys joined on the last dimension).
        ``action``: x, ``(*B, A)``, in the units of :meth:`normalise`. ``time``: ``(*B,)`` or
        ``(*B, 1)``, 0 at the noise and 1 at the action. The result is in those units per unit of
        time.
        """
        velocity: Tensor = self.head(observation, action, time)
        return velocity

    def from_noise(self, tensordict: TensorDictBase, noise: Tensor) -> Tensor:
        """Actions ``(*N, *B, A)`` inside the bounds from standard normal ``noise`` of that shape."""
        observation = join_observations([tensordict.get(key) for key in self.in_keys])
        features = self.head.preprocess(observation)
        x = noise
        for number in range(self.num_steps):
            time = torch.full_like(x[..., :1], number / self.num_steps)
            x = x + self.head.step(self.head.mlp, features, x, time).to(x.dtype) / self.num_steps
        return self.head.centre + self.head.half_range * x.clamp(-1, 1)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        noise = tensordict.get(self.noise_key, None)
        if noise is None:
            shape = (*tensordict.batch_size, self.action_features)
            still = self.fixed_noise
            if is_deterministic():
                noise = still.expand(shape)
            else:
                noise = torch.randn(shape, dtype=still.dtype, device=still.device)
        return tensordict.set(self.out_keys[0], self.from_noise(tensordict, noise))


def flow(
    in_features: int,
    action_spec: TensorSpec,
    *,
    num_steps: int = 10,
    in_keys: Sequence[NestedKey] = ("observation",),
    noise_key: NestedKey = "noise",
    preprocess: nn.Module | None = None,
    **mlp: Any,
) -> FlowPolicy:
    """A flow policy, for ``IQLLoss(actor_objective="flow")``: any distribution of actions.

    ``num_steps`` Euler steps ``x <- x + v(s, x, t) / num_steps`` with t = 0, 1/num_steps, ... lead
    from standard normal noise x to an action, in units in which the bounds are -1 and 1; the last x
    is clamped to the bounds. Lipman et al. 2023, "Flow Matching for Generative Modeling"
    (arXiv:2210.02747); as a policy, with 10 steps: Park, Li, Levine 2025, "Flow Q-Learning"
    (arXiv:2502.02538).

    The entry ``noise_key`` of the TensorDict, ``(*B, A)``, is used as the noise where it exists.
    Otherwise noise is drawn from torch's default generator; with the interaction type
    ``DETERMINISTIC`` it is one fixed vector, the same in every state and every flow policy of A
    dimensions: the action is one possible sample, not the most probable one, so evaluate a flow by
    itself with ``deterministic=False``. Few Euler steps make modes narrower and leave some samples
    between them. The policy has no log-probability: importance sampling refuses it.

    Raises ``ValueError`` on an unbounded spec or ``num_steps < 1``.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}; expected a whole number >= 1.")
    head = FlowHead(in_features, _bounds(action_spec), preprocess, mlp)
    keys = [in_keys] if isinstance(in_keys, str) else list(in_keys)
    return FlowPolicy(head, keys, num_steps, noise_key)


def fixed_noise(*shape: int) -> Tensor:
    """Standard normal numbers that are the same everywhere: drawn on the CPU from seed 0."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu")


def is_deterministic() -> bool:
    """Whether actions are to be without randomness."""
    return exploration_type() in (
        ExplorationType.DETERMINISTIC,
        ExplorationType.MODE,
        ExplorationType.MEAN,
    )
