"""Policies that make actions from noise (flow matching) or take the best of several actions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictSequential,
    dispatch,
)
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import Delta

from iql_torchrl.config import IQLConfig, check_choice, check_whole, config_settings
from iql_torchrl.networks import join_observations
from iql_torchrl.policies.actors import OBSERVATION, Bounds, Head, Keys, bounds_of, listed
from iql_torchrl.policies.distributions import BoundedDistribution, select

ROWS_AT_ONCE = 65_536  # candidates that are evaluated together


class FlowHead(Head):
    """Velocity ``v(s, x, t)`` of a flow, in units in which the bounds of the action are -1 and 1.

    With ``conditioned`` ``v(s, x, t, c)``, c being :func:`iql_torchrl.functional.condition_input`.
    """

    def __init__(
        self, in_features: int, bounds: Bounds, conditioned: bool = False, **network: Any
    ) -> None:
        size = bounds[0].numel()
        super().__init__(in_features + size + 1 + 2 * conditioned, size, bounds, **network)

    def forward(self, *inputs: Tensor) -> Tensor:
        observation, action, time, *condition = inputs
        return self.step(self.preprocess(observation), action, time, *condition)

    def step(self, features: Tensor, action: Tensor, time: Tensor, *condition: Tensor) -> Tensor:
        """The velocity from the output of the first layer; leading dimensions are broadcast."""
        time = time.unsqueeze(-1) if time.ndim < action.ndim else time
        parts = (features, action, time.to(action.dtype), *condition)
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return self.layers(torch.cat([x.expand(*shape, x.shape[-1]) for x in parts], -1))


class FlowPolicy(TensorDictModuleBase):
    """Flow policy, which can represent any distribution of actions.

    ``num_steps`` Euler steps ``x <- x + v(s, x, t) / num_steps`` with t = 0, 1/num_steps, ... lead
    from standard normal noise x to an action, in units in which the bounds are -1 and 1; the last x
    is clamped to the bounds. Lipman et al. 2023, "Flow Matching for Generative Modeling"
    (arXiv:2210.02747); as a policy, with 10 steps: Park, Li, Levine 2025, "Flow Q-Learning"
    (arXiv:2502.02538). ``IQLLoss(actor_objective="flow")`` trains it. Few Euler steps make modes
    narrower and leave some samples between them.

    ``ExplorationType.RANDOM``, or none, draws noise from torch's default generator. All other types
    take one of ``deterministic_samples`` actions, whose noise is the same in every state: the action
    with the least sum of squared distances to the nearest quarter of the others. It is near a mode,
    where a single sample, the mean or the medoid may lie between two. The policy has no
    log-probability: importance sampling refuses it.

    Conditioned flows, for ``IQLLoss(actor_objective="conditioned_flow")``, have one more input c of
    the velocity: what the loss says of the logged action's advantage (by default 1 where it is
    positive, else 0), or that this is unknown. The policy acts with
    ``(1 - guidance) v(s, x, t, unknown) + guidance v(s, x, t, c = 1)``: ``guidance`` 0 imitates the
    behaviour policy, 1 its actions with positive advantage, and more extrapolates (Frans, Park,
    Abbeel, Levine 2025, arXiv:2505.23458; classifier-free guidance, Ho and Salimans 2022,
    arXiv:2207.12598).

    Args:
        in_features (int): number of features of the observation.
        action_spec (TensorSpec): a TorchRL ``Bounded`` of shape ``(A,)`` with finite bounds.

    Keyword Args:
        num_steps (int): number of Euler steps. Default: 10.
        conditioned (bool): whether the velocity has the input c. Default: ``False``.
        guidance (float): weight in [0, 1000] of the velocity given c = 1; may be set at any time, and
            is part of the state dict. Default: 1.
        deterministic_samples (int): number of samples of which one is the deterministic action; may be
            set at any time. 1 takes one fixed sample, in less time. Default: 8.
        in_keys (sequence of NestedKey): keys of the observations. Default: ``("observation",)``.
        noise_key (NestedKey): key of the noise ``(*B, A)``, which a TensorDict may have. Default:
            ``"noise"``.
        **network: keyword arguments of :class:`iql_torchrl.networks.AroundPerceptron`.

    Raises ``ValueError`` on a spec without finite bounds, on numbers out of range, and on a
    ``guidance`` other than 1 without ``conditioned``.
    """

    fixed_noise: Tensor
    guidance_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        action_spec: TensorSpec,
        *,
        num_steps: int = 10,
        conditioned: bool = False,
        guidance: float = 1.0,
        deterministic_samples: int = 8,
        in_keys: Keys = OBSERVATION,
        noise_key: NestedKey = "noise",
        **network: Any,
    ) -> None:
        super().__init__()
        check_whole(num_steps=num_steps)
        self.head = FlowHead(in_features, bounds_of(action_spec), conditioned, **network)
        self.in_keys, self.out_keys = listed(in_keys), ["action"]
        self.num_steps, self.noise_key = num_steps, noise_key
        still = _fixed_noise(self.action_features).to(self.head.centre)
        self.register_buffer("fixed_noise", still)
        self.deterministic_samples = deterministic_samples
        weight = torch.ones_like(self.head.centre[0]) if conditioned else None
        self.register_buffer("guidance_weight", weight)
        if conditioned or guidance != 1:
            self.guidance = guidance

    @property
    def conditioned(self) -> bool:
        """True if the velocity has the input c."""
        return self.guidance_weight is not None

    @property
    def guidance(self) -> float | None:
        """Weight >= 0 of the velocity given c = 1; None without ``conditioned``."""
        return None if self.guidance_weight is None else float(self.guidance_weight)

    @guidance.setter
    def guidance(self, weight: float) -> None:
        if self.guidance_weight is None:
            raise ValueError(
                f"guidance is {weight!r} and this flow has no condition to be guided to; make it with "
                "policies.flow(..., conditioned=True), or train with "
                "actor_objective='conditioned_flow'."
            )
        weight = config_settings(IQLConfig)["guidance"].plain(weight)
        self.guidance_weight.fill_(weight)  # in place: copies with the averaged weights share it

    @property
    def deterministic_samples(self) -> int:
        """Number of samples of which one is the deterministic action; not in the state dict."""
        return len(self._still)

    @deterministic_samples.setter
    def deterministic_samples(self, count: int) -> None:
        check_whole(deterministic_samples=count)
        self._still = _fixed_noise(count, self.action_features)

    @property
    def action_features(self) -> int:
        """Number of action dimensions A."""
        return self.head.centre.shape[-1]  # of a population's stacked policies too

    noise_features = action_features  # number of noise values of one action

    def extra_repr(self) -> str:
        guided = f", guidance={self.guidance}" if self.conditioned else ""
        return f"num_steps={self.num_steps}, noise_key={self.noise_key!r}{guided}"

    def normalise(self, action: Tensor) -> Tensor:
        """``action`` in units in which its bounds are -1 and 1."""
        return (action - self.head.centre) / self.head.unit

    def velocity(
        self, observation: Tensor, action: Tensor, time: Tensor, *condition: Tensor
    ) -> Tensor:
        """``v(s, x, t)``, ``(*B, A)``; with ``conditioned`` ``v(s, x, t, c)``.

        ``observation``: as the policy reads it (several keys joined on the last dimension).
        ``action``: x, ``(*B, A)``, in the units of :meth:`normalise`. ``time``: ``(*B,)`` or
        ``(*B, 1)``, 0 at the noise and 1 at the action. ``condition``: c, ``(*B, 2)``. The result is in
        those units per unit of time.
        """
        velocity: Tensor = self.head(observation, action, time, *condition)
        return velocity

    def _field(self, features: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The velocity with which the policy acts, from the output of the first layer."""
        step, weight = self.head.step, self.guidance_weight
        if weight is None:
            return step(features, x, time)
        known = torch.stack([torch.zeros_like(time), torch.ones_like(time)])
        both = step(features, x, time, known.expand(*known.shape[:-1], 2))
        return (1 - weight) * both[0] + weight * both[1]

    def from_noise(self, tensordict: TensorDictBase, noise: Tensor) -> Tensor:
        """Actions ``(*N, *B, A)`` inside the bounds from standard normal ``noise`` of that shape."""
        observation = join_observations([tensordict.get(key) for key in self.in_keys])
        features = self.head.preprocess(observation)
        x = noise
        for number in range(self.num_steps):
            time = torch.full_like(x[..., :1], number / self.num_steps)
            x = x + self._field(features, x, time).to(x.dtype) / self.num_steps
        return self.head.centre + self.head.half_range * x.clamp(-1, 1)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        noise = tensordict.get(self.noise_key, None)
        if noise is None and self.deterministic_samples > 1 and _is_deterministic():
            action = _best(self._by_density, tensordict, self.deterministic_samples)
            return tensordict.set("action", action)
        if noise is None:
            noise = _noise(self.fixed_noise, tensordict.batch_size)
        return tensordict.set("action", self.from_noise(tensordict, noise))

    def _by_density(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        still = self._still.to(self.fixed_noise)
        actions = self.from_noise(tensordict, _noise(still, tensordict.batch_size)).movedim(0, -2)
        unit = self.normalise(actions)
        distance = (unit.unsqueeze(-2) - unit.unsqueeze(-3)).square().sum(-1)
        # each sample is the nearest of itself
        nearest = distance.topk(1 + max(1, len(still) // 4), largest=False).values
        return actions, -nearest.sum(-1)


flow = FlowPolicy  # the name in scripts, as those of the other policies


class BestOf(TensorDictModuleBase):
    """The action of ``actor``, out of ``num_samples``, that the critics value most.

    The value of a candidate is the smallest over the critics. With behaviour cloning as the actor
    this is the policy of IDQL (Hansen-Estruch et al. 2023, arXiv:2304.10573) and, with a flow and 32
    candidates, of IFQL (Park, Li, Levine 2025, arXiv:2502.02538). It is known to exploit errors of
    the critics, the more so the more candidates there are; on small datasets weighted regression
    without it can be better.

    ``ExplorationType.RANDOM``, or none, draws noise from torch's default generator, so the same seed
    gives the same actions. All other types make the candidates from one fixed set of noise, the same
    in every state, and take the best. The policy has no log-probability: importance sampling refuses
    it, and fitted Q evaluation accepts it.

    Args:
        actor (TensorDictModuleBase): ``policies.flow``, or a TorchRL actor with ``get_dist`` that
            draws its actions.
        critics (TensorDictModuleBase or sequence): modules that read ``action`` and write
            ``value_key``, ``(*B, 1)``; those of a loss: ``iql_torchrl.losses.LossCritics(loss)``.
        num_samples (int): number of candidates N. Default: 32.

    Keyword Args:
        select (str): ``"max"`` takes the best candidate, the first of equal ones; ``"softmax"`` draws
            one with probability proportional to ``exp(temperature * value)``. Default: ``"max"``.
        temperature (float): inverse temperature per unit of value, >= 0; 0 is the actor itself.
            Default: 1.
        value_key (NestedKey): key that the critics write. Default: ``"state_action_value"``.
        noise_key (NestedKey): key of the noise ``(*B, N, F)``, which a TensorDict may have: F standard
            normal numbers an action, one for each dimension and one more for a mixture. Default:
            ``"noise"``.

    Raises ``ValueError`` on numbers or a ``select`` out of range and on no critics; ``TypeError`` on
    an actor without randomness or modules of another kind.
    """

    critics: Any
    fixed_noise: Tensor | None

    def __init__(
        self,
        actor: TensorDictModuleBase,
        critics: TensorDictModuleBase | Sequence[TensorDictModuleBase],
        num_samples: int = 32,
        *,
        select: str = "max",
        temperature: float = 1.0,
        value_key: NestedKey = "state_action_value",
        noise_key: NestedKey = "noise",
    ) -> None:
        super().__init__()
        check_whole(num_samples=num_samples)
        check_choice("select", select, ("max", "softmax"))
        number = isinstance(temperature, Real) and not isinstance(temperature, bool)
        if not number or not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature!r}; expected a finite number >= 0.")
        self.actor, self.critics = _checked_actor(actor), _checked_critics(critics)
        self.num_samples, self.select, self.temperature = num_samples, select, temperature
        self.value_key, self.noise_key = value_key, noise_key
        read = [k for c in self.critics for k in c.in_keys if k != "action"]
        self.in_keys = list(dict.fromkeys([*actor.in_keys, *read]))
        self.out_keys = ["action"]
        size = _noise_features(actor)
        still = None if size is None else _fixed_noise(num_samples, size)
        like = next(actor.parameters(), still)
        self.register_buffer("fixed_noise", None if still is None else still.to(like))

    def candidates(self, tensordict: TensorDictBase) -> Tensor:
        """Actions of the actor, ``(*B, N, A)``."""
        dims, noise = tensordict.ndim, tensordict.get(self.noise_key, None)
        if noise is not None:
            noise = noise.movedim(dims, 0)
        elif self.fixed_noise is not None:
            noise = _noise(self.fixed_noise, tensordict.batch_size)
        if hasattr(self.actor, "from_noise"):
            actions = self.actor.from_noise(tensordict, noise)
        else:
            dist = self.actor.get_dist(tensordict.select(*self.actor.in_keys, strict=False))
            foreign = self.fixed_noise is None
            actions = self._sampled(dist) if foreign else dist.from_noise(noise)
        found: Tensor = actions.movedim(0, dims)
        return found

    def _sampled(self, dist: Any) -> Any:
        """Samples ``(N, *B, A)`` of a distribution that is not one of this package's."""
        if not _is_deterministic():
            return dist.sample((self.num_samples,))
        device = next(self.parameters(), torch.empty(0)).device
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            # torch.manual_seed would also reseed devices that are not forked here
            torch.default_generator.manual_seed(0)
            if cuda:
                torch.cuda.manual_seed(0)
            return dist.sample((self.num_samples,))

    def values(self, tensordict: TensorDictBase, actions: Tensor) -> Tensor:
        """Smallest value over the critics of ``actions`` ``(*B, N, A)``: ``(*B, N)``."""
        dims, count = tensordict.ndim, actions.shape[-2]
        data = TensorDict(batch_size=actions.shape[:-1])
        for key in self.in_keys:
            entry = tensordict.get(key, None)
            if entry is not None:
                shape = (*entry.shape[:dims], count, *entry.shape[dims:])
                data.set(key, entry.unsqueeze(dims).expand(shape))
        data.set("action", actions)
        values = [critic(data.copy()).get(self.value_key) for critic in self.critics]
        return torch.stack([v.squeeze(-1) for v in values]).amin(0)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("action", _best(self._by_value, tensordict, self.num_samples))

    def _by_value(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        actions = self.candidates(tensordict)
        scores = self.values(tensordict, actions)
        if self.select == "softmax" and not _is_deterministic():
            exponential = torch.empty_like(scores).exponential_()
            # argmax of score + Gumbel number is a draw from the softmax
            scores = self.temperature * scores - exponential.log()
        return actions, scores


best_of = BestOf  # the name in scripts, as those of the other policies


Policy = TypeVar("Policy", bound=nn.Module)


def guided(policy: Policy, guidance: float) -> Policy:
    """Copy ``policy`` with another ``guidance`` of its conditioned flow, for a sweep over it.

    Args:
        policy (nn.Module): a conditioned flow, or a module that contains one (``best_of``, the policy
            of an agent). Later changes of its weights do not reach the copy.
        guidance (float): weight in [0, 1000], as in :class:`FlowPolicy`.

    Raises ``ValueError`` if ``policy`` contains no such flow, and on a ``guidance`` out of range.
    """
    copied = copy.deepcopy(policy)
    flows = [each for each in copied.modules() if isinstance(each, FlowPolicy)]
    if not flows:
        raise ValueError(
            f"guidance is {guidance!r} and the policy, a {type(policy).__name__}, contains no flow; "
            "expected policies.flow(..., conditioned=True)."
        )
    for each in flows:
        each.guidance = guidance
    return copied


class EncodedPolicy(TensorDictSequential):
    """Encoder and policy of :func:`encoded` for a policy that does not end in a distribution."""

    @property
    def critics(self) -> list[TensorDictSequential] | None:
        """The critics of a ``policies.best_of``, each after the encoder; None for other policies."""
        encoder, policy = self
        critics = getattr(policy, "critics", None)
        return None if critics is None else [TensorDictSequential(encoder, c) for c in critics]


def encoded(
    encoder: TensorDictModuleBase, policy: TensorDictModuleBase
) -> ProbabilisticTensorDictSequential | EncodedPolicy:
    """Put ``encoder`` before ``policy``, which reads what the encoder writes.

    The result holds both modules and no copies. A policy of modules and a distribution at the end,
    such as a TorchRL ``ProbabilisticActor``, keeps ``get_dist`` and ``log_prob``.
    """
    parts: Any = policy
    if isinstance(policy, ProbabilisticTensorDictSequential):
        return ProbabilisticTensorDictSequential(encoder, *parts)
    return EncodedPolicy(encoder, parts)


def _checked_critics(critics: Any) -> nn.ModuleList:
    listed_critics = list(critics) if isinstance(critics, Sequence | nn.ModuleList) else [critics]
    if not listed_critics:
        raise ValueError("critics is empty; expected at least one TensorDict module.")
    for critic in listed_critics:
        if not isinstance(critic, nn.Module) or "action" not in getattr(critic, "in_keys", ()):
            raise TypeError(
                f"critics hold {type(critic).__name__}; expected TensorDict modules that read "
                "'action', such as ValueOperator(networks.Critic(...), in_keys=['observation', "
                "'action']), or losses.LossCritics(loss)."
            )
    return nn.ModuleList(listed_critics)


def _checked_actor(actor: Any) -> Any:
    if not isinstance(actor, nn.Module) or not hasattr(actor, "in_keys"):
        raise TypeError(f"actor is {type(actor).__name__}; expected a TensorDict module.")
    draws = hasattr(actor, "get_dist") and not issubclass(_distribution(actor)[0], Delta)
    if not draws and not hasattr(actor, "from_noise"):
        raise TypeError(
            f"actor is a {type(actor).__name__} without randomness, so all of its candidates would "
            "be equal; use policies.flow, mixture, gaussian or tanh_normal."
        )
    return actor


def _distribution(actor: nn.Module) -> tuple[Any, Mapping[str, Any]]:
    """Class and keyword arguments of the last distribution; ``object`` if the class is unknown."""
    found = [m for m in actor.modules() if isinstance(m, ProbabilisticTensorDictModule)]
    if not found or not isinstance(found[-1].distribution_class, type):
        return object, {}
    return found[-1].distribution_class, found[-1].distribution_kwargs


def _noise_features(actor: Any) -> int | None:
    """Number of noise values of one action of ``actor``; None if unknown."""
    if hasattr(actor, "from_noise"):
        return int(actor.noise_features)
    kind, options = _distribution(actor)
    known = issubclass(kind, BoundedDistribution)
    return options["low"].numel() + kind.extra_noise if known else None


def _best(
    scored: Callable[[TensorDictBase], tuple[Tensor, Tensor]],
    tensordict: TensorDictBase,
    samples: int,
) -> Tensor:
    """Candidate ``(*B, A)`` of the greatest score in each state.

    ``scored`` returns candidates ``(*B, N, A)`` and scores ``(*B, N)`` of a limited number of states.
    """
    at_once = max(1, ROWS_AT_ONCE // samples)
    eager = not torch.compiler.is_compiling()
    if eager and tensordict.ndim == 1 and len(tensordict) > at_once:
        return torch.cat([_best(scored, part, samples) for part in tensordict.split(at_once)])
    actions, scores = scored(tensordict)
    return select(actions, scores.argmax(-1))


def _fixed_noise(*shape: int) -> Tensor:
    """Standard normal noise that is the same on every device: drawn on the CPU from seed 0."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu")


def _noise(still: Tensor, batch: Sequence[int]) -> Tensor:
    """Noise ``(*N, *batch, F)``: ``still`` ``(*N, F)`` in every state if actions are deterministic."""
    *number, features = still.shape
    shape = (*number, *batch, features)
    if _is_deterministic():
        return still.view(*number, *(1,) * len(batch), features).expand(shape)
    return torch.randn(shape, dtype=still.dtype, device=still.device)


def _is_deterministic() -> bool:
    return exploration_type() not in (None, ExplorationType.RANDOM)
