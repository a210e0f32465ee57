"""An encoder that actor, critics and V of a loss share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import unravel_key
from torch import nn

from iql_torchrl.config import IQLConfig, check_choice, config_settings
from iql_torchrl.losses.batch import IMAGE_SHIFT, Batch
from iql_torchrl.private_apis import keeps_batch_statistics


@dataclass(frozen=True)
class SharedEncoder:
    """A network whose output actor, critics and V read, for ``IQLLoss(encoder_network=...)``.

    An update evaluates it once for s, once for s' and once for s with the weights of its target, which
    the target critics read; with ``gradient="all"`` in sequential order again for s after V's step.
    ``SoftUpdate`` moves that target too. The other networks hold none of its
    parameters.

    Attributes:
        network: a TensorDictModule: it reads entries of the batch, and the others read what it writes.
        gradient: ``"critics"``: ``loss_qvalue`` alone trains it. ``"all"``: all losses do; in the
            sequential order V's step moves it too.
        random_shift: move the images of a batch by up to that many pixels, by other numbers before and
            after the step, for a network that is ``networks.JoinedEncoders`` with a
            ``networks.ImageEncoder`` (Yarats, Kostrikov, Fergus 2021, arXiv:2004.13649). The entries
            ``"image_shift"`` and ``"next_image_shift"`` ``(*B, 2)`` replace the uniform numbers.

    Raises ``TypeError`` or ``ValueError`` where it does not fit, or keeps statistics of batches.
    """

    network: TensorDictModule
    gradient: str = IQLConfig.encoder_gradient
    random_shift: int = IQLConfig.random_shift

    def __post_init__(self) -> None:
        described = config_settings(IQLConfig)
        check_choice("gradient", self.gradient, described["encoder_gradient"].choices)
        described["random_shift"].plain(self.random_shift)

    @classmethod
    def of(cls, encoder: Any) -> SharedEncoder | None:
        """``encoder`` itself, a module with the default settings, or None."""
        return encoder if encoder is None or isinstance(encoder, cls) else cls(encoder)

    def read(self, batch: Batch) -> TensorDictBase:
        """The entries of the batch that the network reads, images moved."""
        network: Any = self.network
        data = batch.data.select(*network.in_keys, strict=False)
        if self.random_shift:
            images = [data.get(key) for key in network.in_keys]
            moved = network.module.shifted(images, batch.draws[IMAGE_SHIFT], self.random_shift)
            for key, observation in zip(network.in_keys, moved, strict=True):
                data.set(key, observation)
        return data

    def check(self, networks: Mapping[str, Sequence[Any]]) -> None:
        """Raise ``TypeError`` or ``ValueError`` where it does not fit the other networks."""
        encoder: Any = self.network
        pixels = self.random_shift
        if not (isinstance(encoder, nn.Module) and hasattr(encoder, "in_keys")):
            raise TypeError(
                f"encoder_network is {type(encoder).__name__}; it must be a TensorDictModule: "
                "TensorDictModule(network, in_keys=[...], out_keys=['features'])."
            )
        for module in encoder.modules():
            if keeps_batch_statistics(module):  # the target's would change too
                raise ValueError(
                    f"encoder_network holds a {type(module).__name__}, which keeps statistics of the "
                    "batches, and is evaluated with the weights of the target too. Use LayerNorm or "
                    "GroupNorm."
                )
        side: Any = getattr(getattr(encoder, "module", None), "shortest_side", None)
        if pixels and side is None:
            raise ValueError(
                f"random_shift is {pixels} and encoder_network has no images to move; it must be a "
                "TensorDictModule of networks.JoinedEncoders with a networks.ImageEncoder in it."
            )
        if pixels and pixels >= side:
            raise ValueError(
                f"random_shift is {pixels} pixels and an image has a side of {side}, so it could be "
                "moved out of sight; DrQ uses 4 for 84 x 84."
            )
        own = {id(parameter) for parameter in encoder.parameters()}
        out_keys = list(self.network.out_keys)
        written = {unravel_key(key) for key in out_keys}
        read: set[NestedKey] = set()
        for name, modules in networks.items():
            for module in modules:
                read |= {unravel_key(key) for key in module.in_keys}
                if any(id(parameter) in own for parameter in module.parameters()):
                    raise ValueError(
                        f"{name} holds parameters of encoder_network; let it read the encoder's output "
                        f"{out_keys} instead: the loss evaluates the encoder itself."
                    )
        if not written & read:
            raise ValueError(
                f"encoder_network writes {out_keys}, which no other network reads; they "
                f"read {sorted(map(str, read))}. Give them in_keys={out_keys}."
            )
