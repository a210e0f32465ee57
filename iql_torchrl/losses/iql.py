"""Implicit Q-Learning for critics of state and action, and for critics with one value per action."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import unravel_key
from torch import Tensor, distributions, nn
from torchrl.data.tensor_specs import Composite, TensorSpec
from torchrl.data.utils import ACTION_SPACE_MAP
from torchrl.modules import MaskedOneHotCategorical, OneHotCategorical

from iql_torchrl import functional as F
from iql_torchrl.losses.batch import Batch
from iql_torchrl.losses.critics import Critics
from iql_torchrl.losses.loss import ACTOR_OBJECTIVES, ImplicitQLoss

ONE_HOT_DISTRIBUTIONS = (
    OneHotCategorical,
    MaskedOneHotCategorical,
    distributions.OneHotCategorical,
)


class IQLLoss(ImplicitQLoss):
    r"""Implicit Q-Learning for critics of state and action (Kostrikov et al. 2021).

    Learns from logged steps ``(s, a, r, s')`` alone; no action outside the log is ever valued.
    With target critics ``Q'`` and ``A = min_k Q'_k(s, a) - V(s)``:

    - ``loss_value``: ``|expectile - 1(A < 0)| A**2``, so V becomes an upper expectile of Q over
      the log's actions (eq. 5);
    - ``loss_qvalue``: ``sum_k d(Q_k(s, a), r + gamma V(s'))``, nothing past termination (eq. 6);
    - ``loss_actor``: ``-min(exp(temperature A), max_weight) log pi(a|s)`` (eq. 7).

    Drop-in for ``torchrl.objectives.IQLLoss`` of TorchRL 0.14, with the paper's defaults.

    Args:
        actor_network: policy with ``get_dist`` (any TensorDictModule for other objectives).
        qvalue_network: Q(s, a), one output. A module alone is critic 0 with its weights kept and
            the others are drawn at its scale; a list, or a function called once per critic,
            keeps every initialisation.
        value_network: V(s), one output. May read other keys than the actor.

    Keyword Args:
        num_qvalue_nets: number of critics K >= 1.
        loss_function: distance of the critics: ``"l2"`` (the paper's), ``"l1"``, ``"smooth_l1"``.
        temperature: inverse temperature beta >= 0. 0 is behaviour cloning; larger is greedier.
        expectile: tau in (0, 1]. 0.5 values the log's policy; towards 1, its best actions.
        max_weight: ceiling of a sample's weight, > 0.
        bc_weight: of the cloning error in ``actor_objective="ddpg_bc"``, >= 0.
        actor_ema: decay d in [0, 1) of an average of the policy's parameters: ``IQLStep`` sets
            ``average = d average + (1 - d) parameters`` after every update, starting at the initial
            parameters. ``loss.averaged_actor`` is a copy of the policy that acts with the average;
            buffers are the live ones. 0: no average, and ``averaged_actor`` is None.
        value_objective: ``"expectile"``, ``"quantile"``, ``"sarsa_expectile"``, ``"sparse"``,
            ``"exponential"`` or ``"gumbel"`` (:meth:`value_term`), or a callable ``(target_qvalue
            (*B,), value (*B,)) -> per-sample loss (*B,)``.
        alpha: of ``"sparse"``, ``"exponential"`` and ``"gumbel"``, > 0, in units of the values, in
            place of ``expectile``. Large: the mean over the log's actions; near 0: the maximum.
        pessimism: None: targets of V and advantages take ``min_k Q'_k``. rho >= 0: they take ``mean -
            rho std`` over the critics, with a std that divides by K
            (:func:`iql_torchrl.functional.pessimistic_value`). ``LossCritics`` follow; ``"ddpg_bc"``
            has ``q_reduction``.
        actor_objective: ``"log_prob"``; ``"mse"`` for deterministic actors; ``"flow"`` for
            ``policies.flow``; ``"conditioned_flow"`` for ``policies.flow(..., conditioned=True)``;
            ``"ddpg_bc"``; or a callable ``(actor, batch) -> per-sample loss (*B,)``.
        advantage_weight: ``"exponential"``, ``min(exp(temperature * A), max_weight)``; ``"positive"``,
            ``min(max(A, 0), max_weight)``; ``"sparse"``, ``min(max(1 + A / (2 alpha), 0),
            max_weight)``; ``"auto"``, which is "positive" for the value objectives "sparse" and
            "exponential", as in their authors' code, and else "exponential"; or a callable
            ``(advantage (*B,)) -> weight (*B,)``, which leaves temperature and max_weight unused.
        advantage_condition: of ``"conditioned_flow"``, the flow's input for a sample's advantage:
            ``"positive"``, 1 where A > 0, else 0; or a callable ``(advantage (*B,)) -> (*B,)``, which
            should give 1 to the actions that the policy is to prefer.
        condition_dropout: of ``"conditioned_flow"``, the probability in (0, 1) that a sample's
            condition is unknown.
        q_reduction, q_source: of ``"ddpg_bc"``: ``"min"`` or ``"mean"`` over the critics; ``"live"``
            or ``"target"`` critics. Defaults as in OGBench.
        diagnostics: add means that show how training goes (``advantage_mean``, ``weight_mean``,
            ``weight_at_ceiling``, ``effective_sample_size``, ``qvalue_mean``, ``value_mean``,
            ``td_error_mean``); for ``"conditioned_flow"`` also ``condition_mean``, the share of
            positive advantages; for ``"ddpg_bc"`` also
            ``policy_value_gap``, the mean of ``min_k Q_k(s, pi(s)) - min_k Q_k(s, a)``: by how much the
            critics (those of ``q_source``) value the policy's actions above the logged ones. It
            grows where the policy exploits errors of the critics. The best of N candidates is not
            known to the loss, and its N evaluations per step would cost more than the update:
            :func:`iql_torchrl.evaluation.value_gap` measures it.
        encoder_network: a TensorDictModule that the others share: it reads entries of the batch,
            and they read what it writes. An update evaluates it once for s, once for s' and once for
            s with the weights of its target, which the target critics read; ``SoftUpdate`` moves that
            target too. The other networks hold none of its parameters.
        encoder_gradient: ``"critics"``: ``loss_qvalue`` alone trains the encoder. ``"all"``: all
            losses do; in the sequential order V's descent moves it too.
        random_shift: move the images of a batch by up to that many pixels, by other numbers before
            and after the step; for an encoder that is ``networks.JoinedEncoders`` with a
            ``networks.ImageEncoder`` (Yarats, Kostrikov, Fergus 2021, arXiv:2004.13649). The entries
            ``"image_shift"`` and ``"next_image_shift"`` ``(*B, 2)`` replace the uniform numbers.
        action_chunk: number h of actions that the critics value and the policy proposes at once.
            Batches are those of ``dataset.chunks(h)``: ``action`` ``(*B, h * A)``, ``("next",
            "reward")`` and ``"chunk_mask"`` ``(*B, h)``. With k the number of actions that the mask
            marks, the target of the critics is ``sum_i gamma**i r_i + gamma**k V(s_k)``, and the
            policy's error is that of these actions. Li, Zhou, Levine 2025, "Reinforcement Learning
            with Action Chunking" (arXiv:2507.07969).
        separate_losses: parameters shared with the actor learn from the actor's loss alone.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.
        deactivate_vmap: evaluate the critics in a loop.
        scalar_output_mode: with ``reduction="none"``, ``"exclude"`` or ``"non_tensor"`` scalars.
        priority_key, gamma: refused as in TorchRL; use ``set_keys`` and ``make_value_estimator``.

    ``actor_objective="flow"`` is conditional flow matching, weighted as the other regressions: ``w``
    times the mean over action dimensions of ``(v(s, x_t, t) - (a - noise))**2`` with ``x_t = (1 - t)
    noise + t a`` (Lipman et al. 2023, arXiv:2210.02747). Noise and time are drawn when the batch is
    read, or are its entries ``"flow_noise"`` ``(*B, A)`` and ``"flow_time"`` ``(*B,)``.
    ``temperature=0`` is the plain clone; with ``policies.best_of`` that is IFQL (Park, Li, Levine
    2025, "Flow Q-Learning", arXiv:2502.02538).

    ``actor_objective="conditioned_flow"`` is the same error of ``v(s, x_t, t, c)`` without weights: c
    is :func:`iql_torchrl.functional.condition_input` of ``advantage_condition``, and of whether a
    uniform number, the entry ``"flow_drop"`` ``(*B,)``, is at least ``condition_dropout``.
    ``temperature``, ``max_weight`` and ``advantage_weight`` are unused. Frans, Park, Abbeel, Levine
    2025, "Diffusion Guidance Is a Controllable Policy Improvement Operator" (arXiv:2505.23458), whose
    code drops a tenth of the conditions.

    ``actor_objective="ddpg_bc"`` maximises the critics' value of the policy's own action:
    ``-Q(s, pi(s)) / mean|Q(s, pi(s))|`` plus ``bc_weight`` times the cloning error, minus the
    log-probability of the logged action, or ``|pi(s) - a|**2`` (a sum) where the policy has no
    density. Fujimoto and Gu 2021, "A Minimalist Approach to Offline RL" (arXiv:2106.06860), eq. 3 to 5
    (its ``alpha`` is the reciprocal of the weight of a mean over action dimensions); extraction
    after IQL: Park, Frans, Levine, Kumar 2024 (arXiv:2406.09329). ``pi(s)`` is the mode (deterministic
    sample) of the distribution, which OGBench's code uses for policies with a constant scale: no
    random numbers. ``temperature``, ``max_weight`` and ``advantage_weight`` are unused. No gradient
    reaches the critics. It is known to exploit errors of the critics at actions outside of the
    log; on small logs weighted regression (``"log_prob"``) can be better. A learned scale lets the
    log-probability outweigh Q as it shrinks: compare several ``bc_weight``.

    Raises:
        ValueError: a value out of range or an unknown name (the message shows it), or an encoder that
            does not fit the other networks or keeps statistics of batches (BatchNorm).
        TypeError: ``gamma`` given, a number that is none, a network that is no TensorDictModule
            (``qvalue_network``: nor a list or function of such), or a policy without ``get_dist``
            for ``actor_objective="log_prob"``, or a flow policy with another objective than "flow".
    """

    @staticmethod
    def loss_value_diff(diff: Tensor, expectile: float = 0.8) -> Tensor:
        """TorchRL's name for :func:`iql_torchrl.functional.expectile_loss`."""
        return F.expectile_loss(diff, expectile=expectile)


class DiscreteIQLLoss(ImplicitQLoss):
    """IQL when the critic returns one value per action: ``(*B, N)``, N >= 2.

    The logged action is an index, ``(*B,)`` or ``(*B, 1)``, or one-hot ``(*B, N)``, whatever the
    policy's distribution takes. All else is :class:`IQLLoss`'s.

    Keyword Args:
        action_space: ``"categorical"``, ``"one-hot"`` or a TorchRL spec; documents the data, which
            is recognised by shape in any case. Other spaces are refused with ``ValueError``.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: Critics,
        value_network: TensorDictModule,
        *,
        action_space: str | TensorSpec | None = None,
        **kwargs: Any,
    ) -> None:
        if (objective := kwargs.get("actor_objective")) in ACTOR_OBJECTIVES[1:]:
            raise ValueError(
                f"actor_objective={objective!r} needs continuous actions; these are discrete."
            )
        if (chunk := kwargs.get("action_chunk", 1)) != 1:
            raise ValueError(
                f"action_chunk={chunk!r} needs continuous actions; these are discrete."
            )
        super().__init__(actor_network, qvalue_network, value_network, **kwargs)
        if action_space is not None and not isinstance(action_space, str | TensorSpec):
            raise TypeError(
                f"action_space is {action_space!r}; choose 'categorical' or 'one-hot', or pass a "
                "TorchRL spec: dataset.action_spec."
            )
        self.action_space = _name_of(action_space or "categorical")
        if self.action_space not in ("categorical", "one_hot"):
            raise ValueError(
                f"action_space is {action_space!r}; choose 'categorical' or 'one-hot': one action "
                "out of N per step."
            )

    def pick(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.pick_action(outputs, batch.data.get(self.tensor_keys.action), leading=1)

    def logged_action(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        action = batch.data.get(self.tensor_keys.action)
        dims = len(dist.batch_shape)
        is_one_hot = action.ndim > dims and action.shape[-1] > 1
        if isinstance(dist, ONE_HOT_DISTRIBUTIONS):
            if is_one_hot:
                return action.long() if action.dtype == torch.bool else action
            index = action if action.ndim == dims else action.squeeze(-1)
            return nn.functional.one_hot(index.long(), dist.param_shape[-1])
        if is_one_hot:
            return action.long().argmax(-1)
        return action if action.ndim == dims else action.squeeze(-1)


def _name_of(action_space: str | TensorSpec) -> str | None:
    """TorchRL's name of an action space, None where it has none."""
    if isinstance(action_space, Composite):
        leaves = {unravel_key(key): spec for key, spec in action_space.items(True, True)}
        action_space = leaves.get("action", action_space)
    space = type(action_space) if isinstance(action_space, TensorSpec) else action_space
    name: str | None = ACTION_SPACE_MAP.get(space)
    return name
