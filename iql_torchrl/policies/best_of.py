"""A policy that draws several actions of another one, and takes one by the critics' values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torchrl.modules import Delta

from iql_torchrl.policies.flow import fixed_noise, is_deterministic

__all__ = ["BestOf", "best_of"]

SELECTIONS = ("max", "softmax")
ROWS_AT_ONCE = 65_536  # candidates that are evaluated together


class BestOf(TensorDictModuleBase):
    """What :func:`best_of` returns."""

    actor: Any
    critics: Any
    fixed_noise: Tensor | None

    def __init__(
        self,
        actor: TensorDictModuleBase,
        critics: nn.ModuleList,
        num_samples: int,
        select: str,
        temperature: float,
        value_key: NestedKey,
        noise_key: NestedKey,
    ) -> None:
        super().__init__()
        self.actor = actor
        self.critics = critics
        self.num_samples, self.select, self.temperature = num_samples, select, temperature
        self.value_key, self.noise_key = value_key, noise_key
        read = [k for c in self.critics for k in c.in_keys if k != "action"]
        self.in_keys = list(dict.fromkeys([*actor.in_keys, *read]))
        self.out_keys = ["action"]
        size = noise_features(actor)
        noise = None if size is None else fixed_noise(num_samples, size)
        like = next(actor.parameters(), None)
        self.register_buffer(
            "fixed_noise", noise if noise is None or like is None else noise.to(like)
        )

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, select={self.select!r}"

    def candidates(self, tensordict: TensorDictBase) -> Tensor:
        """Actions of the actor, ``(*B, N, A)``."""
        size = tensordict.batch_size
        noise = tensordict.get(self.noise_key, None)
        if self.fixed_noise is None:
            return self._sampled(tensordict)
        if noise is not None:
            noise = noise.movedim(len(size), 0)
        else:
            still = self.fixed_noise
            shape = (*still.shape[:1], *(1,) * len(size), *still.shape[1:])
            full = (len(still), *size, still.shape[-1])
            if is_deterministic():
                noise = still.view(shape).expand(full)
            else:
                noise = torch.randn(full, dtype=still.dtype, device=still.device)
        return from_noise(self.actor, tensordict, noise).movedim(0, len(size))

    def _sampled(self, tensordict: TensorDictBase) -> Tensor:
        """Of an actor whose distribution is not one of this package's."""
        dist = self.actor.get_dist(tensordict.select(*self.actor.in_keys, strict=False))
        if not is_deterministic():
            drawn: Tensor = dist.sample((self.num_samples,))
        else:
            cuda = [tensordict.device] if getattr(tensordict.device, "type", "") == "cuda" else []
            with torch.random.fork_rng(devices=cuda):
                # torch.manual_seed would also reseed devices that are not forked here
                torch.default_generator.manual_seed(0)
                if cuda:
                    torch.cuda.manual_seed(0)
                drawn = dist.sample((self.num_samples,))
        return drawn.movedim(0, tensordict.ndim)

    def values(self, tensordict: TensorDictBase, actions: Tensor) -> Tensor:
        """Smallest value over the critics of ``actions`` ``(*B, N, A)``: ``(*B, N)``."""
        keys = [key for key in self.in_keys if tensordict.get(key, None) is not None]
        dims, count = tensordict.ndim, actions.shape[-2]
        entries = {}
        for key in keys:
            entry = tensordict.get(key)
            entry = entry.unsqueeze(dims).expand(*entry.shape[:dims], count, *entry.shape[dims:])
            entries[key] = entry
        data = TensorDict(batch_size=actions.shape[:-1])
        for key, entry in (*entries.items(), ("action", actions)):
            data.set(key, entry)
        values = [critic(data.copy()).get(self.value_key) for critic in self.critics]
        return torch.stack([v.squeeze(-1) for v in values]).amin(0)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        rows = tensordict.batch_size[0] if tensordict.ndim else 1
        at_once = max(1, ROWS_AT_ONCE // self.num_samples)
        if torch.compiler.is_compiling() or tensordict.ndim != 1 or rows <= at_once:
            return tensordict.set("action", self._choose(tensordict))
        chosen = [self._choose(chunk) for chunk in tensordict.split(at_once)]
        return tensordict.set("action", torch.cat(chosen))

    def _choose(self, tensordict: TensorDictBase) -> Tensor:
        actions = self.candidates(tensordict)
        scores = self.values(tensordict, actions)
        if self.select == "softmax" and not is_deterministic():
            exponential = torch.empty_like(scores).exponential_()
            # argmax of score + Gumbel number is a draw from the softmax
            scores = self.temperature * scores - exponential.log()
        best = scores.argmax(-1)[..., None, None].expand(*scores.shape[:-1], 1, actions.shape[-1])
        return actions.gather(-2, best).squeeze(-2)


def best_of(
    actor: TensorDictModuleBase,
    critics: TensorDictModuleBase | Sequence[TensorDictModuleBase],
    num_samples: int = 32,
    *,
    select: str = "max",
    temperature: float = 1.0,
    value_key: NestedKey = "state_action_value",
    noise_key: NestedKey = "noise",
) -> BestOf:
    """Of ``num_samples`` actions of ``actor``, the one that the critics value most.

    The value of a candidate is the smallest over the critics. ``select="max"`` takes the best
    candidate (the first of equal ones); ``"softmax"`` draws one with probability proportional to
    ``exp(temperature * value)``, an inverse temperature per unit of value: 0 is the actor itself.
    With a clone of the log as the actor this is the policy of IDQL (Hansen-Estruch et al. 2023,
    arXiv:2304.10573) and, with a flow and 32 candidates, of IFQL (Park, Li, Levine 2025,
    arXiv:2502.02538). It is known to exploit errors of the critics, the more so the more candidates
    there are; on small logs weighted regression without it can be better.

    Noise is drawn from torch's default generator, so the same seed gives the same actions; the
    entry ``noise_key`` of the TensorDict, ``(*B, N, F)``, replaces it (F standard normal numbers an
    action: ``noise_features`` of the flow, the distribution's of the other policies here). With the
    interaction type ``DETERMINISTIC`` the candidates are made from one fixed set of noise, the same
    in every state, and the best is taken. The policy has no log-probability: importance sampling
    refuses it, and fitted Q evaluation accepts it.

    Args:
        actor: ``policies.flow``, or a TorchRL actor with ``get_dist`` that draws its actions.
        critics: TensorDict modules that read ``action`` and write ``value_key``, ``(*B, 1)``; those
            of a loss: ``iql_torchrl.losses.LossCritics(loss)``.

    Raises ``ValueError`` on ``num_samples < 1``, ``temperature < 0``, another ``select`` or no
    critics; ``TypeError`` on an actor without randomness or modules of another kind.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; expected a whole number >= 1.")
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}; choose one of 'max', 'softmax'.")
    number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; expected a finite number >= 0.")
    listed = list(critics) if isinstance(critics, Sequence | nn.ModuleList) else [critics]
    if not listed:
        raise ValueError("critics is empty; expected at least one TensorDict module.")
    for critic in listed:
        if not isinstance(critic, nn.Module) or "action" not in getattr(critic, "in_keys", ()):
            raise TypeError(
                f"critics hold {type(critic).__name__}; expected TensorDict modules that read "
                "'action', such as ValueOperator(networks.Critic(...), in_keys=['observation', "
                "'action']), or losses.LossCritics(loss)."
            )
    _check_actor(actor)
    return BestOf(
        actor, nn.ModuleList(listed), num_samples, select, float(temperature), value_key, noise_key
    )


def _check_actor(actor: Any) -> None:
    if not isinstance(actor, nn.Module) or not hasattr(actor, "in_keys"):
        raise TypeError(f"actor is {type(actor).__name__}; expected a TensorDict module.")
    if hasattr(actor, "from_noise"):
        return
    kind = _distribution_class(actor)
    if not hasattr(actor, "get_dist") or (kind is not None and issubclass(kind, Delta)):
        raise TypeError(
            f"actor is a {type(actor).__name__} without randomness, so all of its candidates would "
            "be equal; use policies.flow, mixture, gaussian or tanh_normal."
        )


def _distribution_class(actor: Any) -> type | None:
    kinds = [m.distribution_class for m in actor.modules() if hasattr(m, "distribution_class")]
    return kinds[-1] if kinds and isinstance(kinds[-1], type) else None


def noise_features(actor: Any) -> int | None:
    """Standard normal numbers that one action of ``actor`` is made from; None where unknown."""
    if hasattr(actor, "from_noise"):
        return int(actor.noise_features)
    kind = _distribution_class(actor)
    count: Callable[[int], int] | None = getattr(kind, "noise_features", None)
    limits = [m.limits for m in actor.modules() if getattr(m, "limits", None)]
    return None if count is None or not limits else count(limits[0]["low"].numel())


def from_noise(actor: Any, tensordict: TensorDictBase, noise: Tensor) -> Tensor:
    """Actions ``(N, *B, A)`` from ``noise`` ``(N, *B, F)``."""
    if hasattr(actor, "from_noise"):
        actions: Tensor = actor.from_noise(tensordict, noise)
        return actions
    dist = actor.get_dist(tensordict.select(*actor.in_keys, strict=False))
    return torch.as_tensor(dist.from_noise(noise))
