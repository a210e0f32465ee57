"""What V learns from the critics: one small module for each objective.

A new objective is a class with a ``forward``: see :class:`ValueObjective`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor

from iql_torchrl import functional as F
from iql_torchrl.config import IQLConfig
from iql_torchrl.config.iql_config import OWN_WEIGHTS
from iql_torchrl.losses.batch import Batch, per_sample
from iql_torchrl.losses.objective import Objective, as_objective


class ValueObjective(Objective):
    """The loss of V at each sample; abstract.

    ``forward(target, value, batch)`` gets the target critics' value of the logged action and V(s),
    both ``(*B,)``, and returns the loss of each sample, ``(*B,)``. ``batch`` has what goes over all
    samples (:meth:`Batch.mean`, :meth:`Batch.largest`).

    Keyword Args:
        pessimism: how K target critics become one target, also that of the advantages. None: their
            minimum. rho >= 0: ``mean - rho std``, with a std that divides by K
            (:func:`iql_torchrl.functional.pessimistic_value`).

    Class attributes that a subclass may set: ``reads_td_target``, to get ``r + gamma V(s')`` in place
    of the target critics' value; ``advantage_weight``, the policy's weight that goes with this
    objective (of :class:`~iql_torchrl.losses.AdvantageWeighted`).
    """

    reads_td_target = False
    advantage_weight = "exponential"

    def __init__(self, *, pessimism: float | None = None, **hyperparameters: float) -> None:
        given = {} if pessimism is None else {"pessimism": pessimism}
        super().__init__(**hyperparameters, **given)

    def target_of(self, qvalues: Tensor) -> Tensor:
        """The target from the values of K critics: ``(K, *B)`` to ``(*B,)``."""
        return F.pessimistic_value(qvalues, pessimism=self.hyperparameters.get("pessimism"))

    @abstractmethod
    def forward(self, target: Tensor, value: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, ``(*B,)``."""


class TailObjective(ValueObjective):
    """An objective with the hyperparameter ``expectile`` in (0, 1]; abstract."""

    expectile: Tensor

    def __init__(
        self, expectile: float = IQLConfig.expectile, *, pessimism: float | None = None
    ) -> None:
        super().__init__(expectile=expectile, pessimism=pessimism)


class Expectile(TailObjective):
    """``|expectile - 1(A < 0)| A**2`` of ``A = target - value`` (eq. 5 of the paper).

    ``expectile`` in (0, 1]: 0.5 gives the value of the behaviour policy; towards 1, that of its best
    actions.
    """

    def forward(self, target: Tensor, value: Tensor, batch: Batch) -> Tensor:
        return F.expectile_loss(target - value, expectile=self.expectile)


class SarsaExpectile(Expectile):
    """:class:`Expectile` of ``r + gamma V(s') - V(s)``: V does not read the critics."""

    reads_td_target = True


class Quantile(TailObjective):
    """Pinball loss of ``target - value``: V becomes the quantile ``expectile`` in (0, 1]."""

    def forward(self, target: Tensor, value: Tensor, batch: Batch) -> Tensor:
        return F.quantile_loss(target - value, quantile=self.expectile)


class Sparse(ValueObjective):
    """The loss of SQL, :func:`iql_torchrl.functional.sparse_loss` (Xu et al. 2023).

    ``alpha`` > 0, in units of the values: large gives the mean over dataset actions, near 0 the
    maximum.
    """

    advantage_weight = OWN_WEIGHTS["sparse"]
    alpha: Tensor

    def __init__(self, alpha: float = IQLConfig.alpha, *, pessimism: float | None = None) -> None:
        super().__init__(alpha=alpha, pessimism=pessimism)

    def forward(self, target: Tensor, value: Tensor, batch: Batch) -> Tensor:
        return F.sparse_loss(target - value, alpha=self.alpha)


class Gumbel(ValueObjective):
    """The loss of XQL, :func:`iql_torchrl.functional.gumbel_loss` (Garg et al. 2023).

    ``alpha`` as of :class:`Sparse`. ``clip``: the largest ``(target - value) / alpha``; 7 in the
    authors' code. A sample above it has no gradient.
    """

    alpha: Tensor
    clip: Tensor

    def __init__(
        self,
        alpha: float = IQLConfig.alpha,
        *,
        clip: float = 7.0,
        pessimism: float | None = None,
    ) -> None:
        super().__init__(alpha=alpha, clip=clip, pessimism=pessimism)

    def forward(self, target: Tensor, value: Tensor, batch: Batch) -> Tensor:
        error = target - value
        largest = batch.largest(error)
        return F.gumbel_loss(error, alpha=self.alpha, clip=self.clip, largest=largest)


class Exponential(Gumbel):
    """The loss of EQL (Xu et al. 2023): :class:`Gumbel` with the authors' ``clip``, 5."""

    advantage_weight = OWN_WEIGHTS["exponential"]

    def __init__(
        self,
        alpha: float = IQLConfig.alpha,
        *,
        clip: float = 5.0,
        pessimism: float | None = None,
    ) -> None:
        super().__init__(alpha, clip=clip, pessimism=pessimism)


class ValueFunction(ValueObjective):
    """A function ``(target (*B,), value (*B,)) -> loss (*B,)`` of yours as an objective."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], *, pessimism: float | None = None
    ) -> None:
        super().__init__(pessimism=pessimism)
        self.function = function

    def forward(self, target: Tensor, value: Tensor, batch: Batch) -> Tensor:
        loss = self.function(target, value)
        return per_sample(loss, value.shape, "value_objective's result")


#: By their names in ``IQLConfig.value_objective``.
VALUE_OBJECTIVES: Mapping[str, type[ValueObjective]] = MappingProxyType(
    {
        "expectile": Expectile,
        "quantile": Quantile,
        "sarsa_expectile": SarsaExpectile,
        "sparse": Sparse,
        "exponential": Exponential,
        "gumbel": Gumbel,
    }
)
#: An object, a name or a function as an objective: ``(given, hyperparameters, **choices)``.
as_value_objective = partial(
    as_objective, "value_objective", ValueObjective, VALUE_OBJECTIVES, ValueFunction
)
