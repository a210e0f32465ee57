"""How a loss evaluates its networks: as TorchRL's losses do, for any TensorDictModule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.host import (
    DETACHED_CRITICS,
    LIVE_CRITICS,
    LIVE_ENCODER,
    TARGET_CRITICS,
    TARGET_ENCODER,
    children_of,
)
from iql_torchrl.objectives.batch import output_of
from iql_torchrl.objectives.ensembles import unlocked

__all__ = ["GENERAL", "Evaluator", "GeneralEvaluator"]


class Evaluator(Protocol):
    """Raw outputs of the networks of ``loss`` on the entries of ``data``, batch shape ``(*B,)``."""

    def state_value(self, loss: Any, data: TensorDictBase) -> Tensor:
        """V, ``(*B, 1)``."""

    def state_values(
        self, loss: Any, first: TensorDictBase, second: TensorDictBase
    ) -> Sequence[Tensor] | None:
        """V of two batches of one shape from one evaluation; None where that is not possible."""

    def critic_outputs(self, loss: Any, data: TensorDictBase, name: str) -> Tensor:
        """K critics, ``(K, *B, n)``.

        ``name``: ``LIVE_CRITICS``, ``TARGET_CRITICS`` or ``DETACHED_CRITICS``, the live ones, through
        which a gradient reaches the inputs and no parameter.
        """

    def features(self, loss: Any, data: TensorDictBase, target: bool) -> TensorDictBase:
        """What the encoder writes for ``data``, with its own or the target's parameters."""

    def policy(self, loss: Any) -> AbstractContextManager[Any]:
        """The actor with its parameters in it, inside the context."""

    def is_outdated(self) -> bool:
        """Whether a network was changed so that another evaluator is needed."""

    def follow_modes(self) -> None:
        """Take over training or evaluation mode from the networks; called before an update."""


class GeneralEvaluator:
    """The evaluator of any network: parameters are put into it for each call, critics are mapped."""

    def state_value(self, loss: Any, data: TensorDictBase) -> Tensor:
        params = loss.shared.live(loss, "value_network")
        inputs = data.select(*loss.value_network.in_keys, strict=False)
        with params.to_module(loss.value_network, preserve_module_state=False):
            return output_of(loss.value_network(inputs), loss.tensor_keys.value, "value_network")

    def state_values(
        self, loss: Any, first: TensorDictBase, second: TensorDictBase
    ) -> Sequence[Tensor] | None:
        return None

    def critic_outputs(self, loss: Any, data: TensorDictBase, name: str) -> Tensor:
        network, key = loss.qvalue_network, loss.tensor_keys.state_action_value
        live = loss.shared.live(loss, "qvalue_network")
        params = children_of(loss)[name] if name == TARGET_CRITICS else live
        if name != LIVE_CRITICS:
            params = loss.shared.with_spare_buffers("qvalue_network", params)
        if name == DETACHED_CRITICS:
            params = unlocked(params).detach()
        inputs = data.select(*network.in_keys, strict=False)
        if loss.num_qvalue_nets > 1:
            if torch.compiler.is_compiling():  # vmap would lock it again, which warns in a graph
                params = unlocked(params)
            return output_of(loss.map_critics(inputs, params), key, "qvalue_network")
        with params.to_module(network, preserve_module_state=False):
            return output_of(network(inputs), key, "qvalue_network").unsqueeze(0)

    def features(self, loss: Any, data: TensorDictBase, target: bool) -> TensorDictBase:
        encoder = loss.encoder_network
        params = children_of(loss).get(TARGET_ENCODER if target else LIVE_ENCODER)
        # TorchRL keeps no parameters of an encoder without any, such as OneHots
        with (
            nullcontext()
            if params is None
            else params.to_module(encoder, preserve_module_state=False)
        ):
            written: TensorDictBase = encoder(data).select(*encoder.out_keys)
        return written

    @contextmanager
    def policy(self, loss: Any) -> Iterator[Any]:
        params = loss.actor_network_params
        with params.to_module(loss.actor_network, preserve_module_state=False):
            yield loss.actor_network

    def is_outdated(self) -> bool:
        return False

    def follow_modes(self) -> None:
        """Nothing to do: the networks are the loss's own."""


GENERAL = GeneralEvaluator()
