"""A policy that begins with an encoder of its observations."""

from __future__ import annotations

from typing import Any

from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictSequential,
)

__all__ = ["EncodedPolicy", "encoded"]


class EncodedPolicy(TensorDictSequential):
    """What :func:`encoded` returns for a policy that does not end in a distribution."""

    @property
    def critics(self) -> list[TensorDictSequential] | None:
        """The critics of a ``policies.best_of``, each after the encoder; None for other policies."""
        encoder, policy = self
        critics = getattr(policy, "critics", None)
        return None if critics is None else [TensorDictSequential(encoder, c) for c in critics]


def encoded(
    encoder: TensorDictModuleBase, policy: TensorDictModuleBase
) -> ProbabilisticTensorDictSequential | EncodedPolicy:
    """``encoder``, then ``policy``, which reads what the encoder writes.

    It holds both modules and no copies. A policy of modules and a distribution at the end, such as
    a TorchRL ``ProbabilisticActor``, keeps ``get_dist`` and ``log_prob``.
    """
    parts: Any = policy
    if isinstance(policy, ProbabilisticTensorDictSequential):
        return ProbabilisticTensorDictSequential(encoder, *parts)
    return EncodedPolicy(encoder, parts)
