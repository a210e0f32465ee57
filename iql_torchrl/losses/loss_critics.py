"""The critics of a loss as one TensorDict module, for policies that choose among actions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iql_torchrl.losses.batch import output_of

__all__ = ["LossCritics"]


class LossCritics(TensorDictModuleBase):
    """Writes the smallest value over the critics of ``loss``, ``(*B, 1)``.

    The live critics, as they are at every call: training changes them. Their parameters here
    require no gradient. A copy (``copy.deepcopy``, ``pickle``) has weights of its own and no longer
    follows the loss. For losses of one run whose critics read a continuous action. Where the loss has
    an encoder, these critics read its features: ``policies.encoded(encoder, LossCritics(loss))`` reads
    the observations.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self._source: Any = (loss,)  # in a tuple, so that it is no submodule
        self._key = loss.tensor_keys.state_action_value
        network = loss.qvalue_network
        self.in_keys, self.out_keys = list(network.in_keys), [self._key]
        count = loss.num_qvalue_nets
        self.networks = nn.ModuleList(copy.deepcopy(network) for _ in range(count))
        for critic in self.networks:
            for module in critic.modules():
                for name in _parameters_of(module):
                    setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
        self._follow()
        self.train(False)

    def _leaves(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Where each tensor of the loss belongs here: module, name, the tensor."""
        (loss,) = self._source
        stacked = loss.qvalue_network_params
        tables = [stacked] if loss.num_qvalue_nets == 1 else stacked.data.unbind(0)
        leaves = []
        for critic, table in zip(self.networks, tables, strict=True):
            for key, leaf in table.items(True, True):
                path = key if isinstance(key, tuple) else (key,)
                module = critic.get_submodule(".".join(path[:-1]))
                leaves.append((module, path[-1], leaf.data))
        return leaves

    def _follow(self) -> None:
        """Use the storage of the loss's parameters, and take over the values of its buffers.

        Buffers are no views: a view would be copied and exported with the tensor that it is part of.
        """
        if self._source is None:
            return
        for module, name, leaf in self._leaves():
            parameter = _parameters_of(module).get(name)
            if parameter is None:
                buffer = getattr(module, name)
                if (buffer.shape, buffer.dtype, buffer.device) == (
                    leaf.shape,
                    leaf.dtype,
                    leaf.device,
                ):
                    buffer.copy_(leaf)
                else:
                    setattr(module, name, leaf.clone())
            elif (parameter.data_ptr(), parameter.dtype, parameter.device) != (
                leaf.data_ptr(),
                leaf.dtype,
                leaf.device,
            ):
                setattr(module, name, nn.Parameter(leaf, requires_grad=False))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._follow()
        inputs = tensordict.select(*self.in_keys, strict=False)
        values = [output_of(critic(inputs.copy()), self._key, "critic") for critic in self.networks]
        return tensordict.set(self._key, torch.stack(values).amin(0))

    def train(self, mode: bool = True) -> LossCritics:
        """Always in evaluation mode: values without dropout, statistics that do not change."""
        super().train(False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}


def _parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters by name, each as often as it is named."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))
