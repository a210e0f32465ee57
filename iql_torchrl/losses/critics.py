"""From one module, a list or a factory to K critics; the critics of a loss as one module.

TorchRL's ``LossModule.convert_to_functional`` draws the weights of critics again, uniformly; here they
keep the scale of the module's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn

from iql_torchrl import functional as F
from iql_torchrl.config import number_dtype
from iql_torchrl.losses.batch import output_of

Critics: TypeAlias = TensorDictModule | Sequence[TensorDictModule] | Callable[[], TensorDictModule]


def list_critics(critics: Critics, num_critics: int) -> TensorDictModule | list[TensorDictModule]:
    """The module alone, or a list of exactly ``num_critics`` modules (a factory is called K times).

    Raises ``ValueError`` when a list has another length or its critics parameters of other shapes,
    ``TypeError`` on anything else, and ``ValueError`` when a single module that must become K critics
    has uninitialised (lazy) weights.
    """
    if isinstance(critics, nn.Module):
        if num_critics > 1:
            _refuse_lazy(critics)
        return critics
    if callable(critics):
        critics = [critics() for _ in range(num_critics)]
    if not isinstance(critics, Sequence) or not all(isinstance(c, nn.Module) for c in critics):
        raise TypeError(
            f"qvalue_network is {type(critics).__name__}; expected a TensorDictModule, a list of "
            "them, or a function without arguments that returns one."
        )
    if len(critics) != num_critics:
        raise ValueError(
            f"qvalue_network lists {len(critics)} critics and num_qvalue_nets is {num_critics}; "
            f"pass num_qvalue_nets={len(critics)}."
        )
    lazy = nn.parameter.is_lazy
    shapes = [
        {
            name: None if lazy(each) else tuple(each.shape)
            for name, each in critic.named_parameters()
        }
        for critic in critics
    ]
    for number, other in enumerate(shapes):
        for name in other | shapes[0]:
            if other.get(name) != shapes[0].get(name):
                raise ValueError(
                    f"qvalue_network: {name!r} has shape {other.get(name)} in critic {number} and "
                    f"{shapes[0].get(name)} in critic 0; listed critics are evaluated together, and "
                    "need parameters of the same names and shapes."
                )
    return critics[0] if num_critics == 1 else list(critics)


def _refuse_lazy(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"qvalue_network's parameter {name!r} is not initialised yet (a lazy layer); run "
                "one batch through the network before building the loss."
            )


def draw_critics(tensor: Tensor, num_critics: int) -> Tensor:
    """``num_critics`` initialisations stacked, shape ``(K, *tensor.shape)``.

    Critic 0 keeps ``tensor``. The others are independent draws at the same scale:

    - a frozen tensor (``requires_grad=False``) or one whose entries are all equal (zero biases,
      unit norm scales) is copied;
    - for a matrix or kernel whose rows or columns are orthogonal with one common norm, another
      orthogonal matrix with that norm is drawn (Saxe et al. 2014);
    - any other tensor is drawn entry by entry, with replacement, from its own entries.
    """
    source = tensor.detach()
    if not tensor.requires_grad or bool((source == source.flatten()[:1]).all()):
        draws = [source] * (num_critics - 1)
    elif (gain := _orthogonal_gain(source)) is not None:
        draws = [
            nn.init.orthogonal_(torch.empty_like(source), gain) for _ in range(num_critics - 1)
        ]
    else:
        flat = source.flatten()
        index = torch.randint(flat.numel(), (num_critics - 1, flat.numel()), device=flat.device)
        draws = list(flat[index].unflatten(-1, source.shape).unbind(0))
    return torch.stack([source, *draws])


def _orthogonal_gain(weight: Tensor) -> float | None:
    """Common norm of the orthogonal rows (or columns, if fewer) of a matrix, else ``None``."""
    if weight.ndim < 2:
        return None
    matrix = weight.flatten(1).to(number_dtype(weight.device))
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    if matrix.shape[0] < 2:  # a single row does not show how it was drawn
        return None
    gram = matrix @ matrix.T
    square = gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    tolerance = 1e-3 * square
    if not bool(((gram - square * identity).abs() <= tolerance).all()):
        return None
    return float(square.sqrt())


def initialise_critics(
    online: TensorDictParams, target: TensorDictParams, module: nn.Module
) -> None:
    """Write :func:`draw_critics` of ``module``'s parameters into ``online`` and ``target`` in place."""
    num_critics = online.shape[0]
    with torch.no_grad():
        for key, parameter in TensorDict.from_module(module).items(True, True):
            leaf = online.get(key)
            if leaf.requires_grad:  # neither a buffer nor a trunk that another network owns
                draws = draw_critics(parameter, num_critics)
                leaf.data.copy_(draws)
                target.get(key).data.copy_(draws)
                leaf.requires_grad_(parameter.requires_grad)


class LossCritics(TensorDictModuleBase):
    """Writes the smallest value over the critics of ``loss``, ``(*B, 1)``.

    With ``pessimism`` in the loss's value objective it is ``mean - pessimism * std``.

    The online critics, as they are at every call: training changes them. Their parameters here
    require no gradient. A copy (``copy.deepcopy``, ``pickle``) has weights of its own and no longer
    follows the loss. Where the loss has
    an encoder, these critics read its features: ``policies.encoded(encoder, LossCritics(loss))`` reads
    the observations.
    """

    pessimism: float | None = None  # also of what an earlier version pickled

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self._source: Any = (loss,)  # in a tuple, so that it is not a submodule
        self._key = loss.tensor_keys.state_action_value
        network, count = loss.qvalue_network, loss.num_qvalue_nets
        self.in_keys, self.out_keys = list(network.in_keys), [self._key]
        self.networks = nn.ModuleList(copy.deepcopy(network) for _ in range(count))
        self._follow()
        self.train(False)

    def _follow(self) -> None:
        """Put the loss's tensors, buffers too, in as parameters, which share their storage."""
        if self._source is None:
            return
        pessimism = self._source[0].value_objective.hyperparameters.get("pessimism")
        self.pessimism = None if pessimism is None else float(pessimism)
        params = self._source[0].qvalue_network_params
        tables = [params] if len(self.networks) == 1 else params.data.unbind(0)
        for critic, table in zip(self.networks, tables, strict=True):
            for key, leaf in table.items(True, True):
                *path, name = key if isinstance(key, tuple) else (key,)
                module = critic.get_submodule(".".join(path))
                own = getattr(module, name)
                is_alike = own.device == leaf.device and own.dtype == leaf.dtype
                if not is_alike or own.data_ptr() != leaf.data_ptr():
                    setattr(module, name, nn.Parameter(leaf.data, requires_grad=False))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._follow()
        inputs = tensordict.select(*self.in_keys, strict=False)
        values = [output_of(critic(inputs.copy()), self._key, "critic") for critic in self.networks]
        value = F.pessimistic_value(torch.stack(values), pessimism=self.pessimism)
        return tensordict.set(self._key, value)

    def train(self, mode: bool = True) -> LossCritics:
        """Always in evaluation mode: values without dropout, statistics that do not change."""
        super().train(False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}
