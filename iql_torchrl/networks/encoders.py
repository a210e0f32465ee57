"""First layers of networks: modules that turn one observation into a vector of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iql_torchrl.config import check_choice, check_whole

DEEP_ENOUGH = 36  # shortest side of an image for the layers of Mnih et al. 2015
MNIH = ((32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0))  # channels, kernel, stride, padding
HALVING = ((32, 3, 2, 1), (64, 3, 2, 1), (64, 3, 2, 1))


class CastToFloat(nn.Module):
    """Base of layers that cast integers to float, in a dtype that ``module.to(dtype)`` changes.

    ``dtype``: of the output, at first torch's default. It is an attribute and not a buffer, so that
    states stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.get_default_dtype()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.zeros((), dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class OneHot(CastToFloat):
    """Integers in ``[0, num_classes)``, shape ``(*B,)``, to ones and zeros ``(*B, num_classes)``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        check_whole(num_classes=num_classes)
        self.num_classes = num_classes

    def forward(self, observation: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(observation.long(), self.num_classes)
        return one_hot.to(self.dtype)


class Flatten(CastToFloat):
    """``(*B, *shape)`` to ``(*B, F)`` floats, F the product of ``shape``; a scalar gives F = 1."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, observation: Tensor) -> Tensor:
        rows = batch_shape(observation, self.shape)
        flat = observation.reshape(*rows, -1)
        return flat if flat.is_floating_point() else flat.to(self.dtype)


class OneHots(CastToFloat):
    """Several categories to ones and zeros: ``(*B, *shape)`` to ``(*B, sum(counts))``.

    ``counts``: number of categories of each entry, in the order of the flattened ``shape`` (by
    default one dimension). Values are integers in ``[0, count)``.
    """

    def __init__(self, counts: Sequence[int], shape: Sequence[int] | None = None) -> None:
        super().__init__()
        check_whole(**{f"counts[{number}]": count for number, count in enumerate(counts)})
        self.counts = tuple(int(count) for count in counts)
        self.shape = (len(self.counts),) if shape is None else tuple(shape)

    def extra_repr(self) -> str:
        return f"counts={self.counts}"

    def forward(self, observation: Tensor) -> Tensor:
        rows = batch_shape(observation, self.shape)
        columns = observation.long().reshape(*rows, -1).unbind(-1)
        parts = [
            nn.functional.one_hot(column, count)
            for column, count in zip(columns, self.counts, strict=True)
        ]
        return torch.cat(parts, -1).to(self.dtype)


class ImageEncoder(nn.Module):
    """A convolutional network: images ``(*B, *shape)`` to ``(*B, features)`` in (-1, 1).

    Images are uint8 in [0, 255], which are divided by 255 here, so that buffers hold bytes; or floats
    in [0, 1]. After the convolutions: a linear layer, layer normalisation and tanh, as in DrQ
    (Yarats, Kostrikov, Fergus 2021, arXiv:2004.13649).

    Args:
        shape: of one image, ``(H, W, C)`` or ``(C, H, W)``: the shorter of the two outer dimensions is
            the channels, and the last where they are equal. With a dimension before these it is a
            stack of k images, as Gymnasium's ``FrameStackObservation`` gives; their channels become
            ``k * C`` channels of one image, the first image's first.
        features: width of the output.
        kind: ``"small"``: three convolutions, those of Mnih et al. 2015 ("Human-level control
            through deep reinforcement learning") for sides of at least 36, else of 3 x 3 with
            stride 2. ``"residual"``: three stages of 16, 32 and 32 channels, each a convolution, a
            maximum over 3 x 3 with stride 2, and two residual blocks (Espeholt et al. 2018,
            arXiv:1802.01561).

    Raises ``ValueError`` on a shape that is not of three or four dimensions, images smaller than 8 x 8,
    and another kind; a call raises it on images of another size.
    """

    def __init__(self, shape: Sequence[int], features: int = 64, *, kind: str = "small") -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        check_whole(features=features)
        check_choice("kind", kind, ("small", "residual"))
        if len(self.shape) not in (3, 4):
            raise ValueError(
                f"shape is {self.shape}; expected that of one image, (height, width, channels) or "
                "(channels, height, width), or of a stack of images, with their number before these."
            )
        self.kind, self.image = kind, self.shape[-3:]
        self.stacked = self.shape[0] if len(self.shape) == 4 else 1
        self.channels = "first" if channels_come_first(self.image) else "last"
        first = self.channels == "first"
        depth, *self.size = self.image if first else (self.image[2], *self.image[:2])
        if min(self.size) < 8:
            raise ValueError(
                f"shape is {self.shape}, with channels {self.channels} an image of "
                f"{' x '.join(map(str, self.size))}; expected at least 8 x 8. Use Flatten and an MLP "
                "for smaller ones."
            )
        layers = MNIH if min(self.size) >= DEEP_ENOUGH else HALVING
        depth *= self.stacked
        self.convolutions = _small(depth, layers) if kind == "small" else _residual(depth)
        with torch.no_grad():
            outputs = self.convolutions(torch.zeros(1, depth, *self.size)).numel()
        self.linear = nn.Linear(outputs, features)
        self.norm = nn.LayerNorm(features)
        for parameter in (*self.convolutions.parameters(), *self.linear.parameters()):
            if parameter.ndim > 1:
                nn.init.orthogonal_(parameter, 2.0**0.5)
            else:
                nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, kind={self.kind!r}, channels={self.channels!r}"

    def forward(self, images: Tensor) -> Tensor:
        rows = batch_shape(images, self.shape)
        dtype = self.linear.weight.dtype
        x = images.reshape(-1, *self.image)
        if self.channels == "last":
            # One channel is moved without a permutation: after one, its strides would be those of both
            # memory formats, and a traced program and torch choose different ones.
            one = self.image[2] == 1
            x = x.reshape(-1, 1, *self.size) if one else x.permute(0, 3, 1, 2)
        if self.stacked != 1:
            x = x.reshape(-1, self.stacked * x.shape[1], *self.size)
        x = x.to(dtype) if images.is_floating_point() else x.to(dtype) / 255
        out: Tensor = self.norm(self.linear(self.convolutions(x).flatten(1)))
        return out.tanh().reshape(*rows, -1)

    def shifted(self, images: Tensor, offset: Tensor, pixels: int) -> Tensor:
        """Images ``(*B, *shape)``, each moved by up to ``pixels`` in both directions.

        ``offset``: uniform numbers on [0, 1), ``(*B, 2)``: vertical and horizontal. The image is
        continued by its outermost pixels, and the window of its size that starts
        ``floor(offset * (2 * pixels + 1))`` into it is taken: the random shift of DrQ.
        """
        rows = batch_shape(images, self.shape)
        x = images.reshape(-1, *self.image)
        start = (offset.reshape(-1, 2) * (2 * pixels + 1)).long().clamp(max=2 * pixels) - pixels
        if self.stacked != 1:  # all images of a stack are moved alike
            start = start.repeat_interleave(self.stacked, 0)
        down, right = (
            (torch.arange(size, device=x.device) + start[:, i : i + 1]).clamp(0, size - 1)
            for i, size in enumerate(self.size)
        )
        number = torch.arange(len(x), device=x.device)[:, None, None]
        where = (number, down[:, :, None], right[:, None, :])
        if self.channels == "last":
            return x[where].reshape(*rows, *self.shape)
        return x.permute(0, 2, 3, 1)[where].permute(0, 3, 1, 2).reshape(*rows, *self.shape)


class JoinedEncoders(nn.Module):
    """One encoder for each observation; their features are joined: ``(*B, F_1 + F_2 + ...)``."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, *observations: Tensor) -> Tensor:
        pairs = zip(self.encoders, observations, strict=True)
        return torch.cat([encoder(observation) for encoder, observation in pairs], -1)

    @property
    def shortest_side(self) -> int | None:
        """Shortest side, in pixels, of images that :meth:`shifted` moves; None without images."""
        sides = [min(each.size) for each in self.encoders if isinstance(each, ImageEncoder)]
        return min(sides, default=None)

    def shifted(
        self, observations: Sequence[Tensor], offset: Tensor, pixels: int
    ) -> Sequence[Tensor]:
        """The observations with images moved, all of a step by the same ``offset`` ``(*B, 2)``."""
        return [
            encoder.shifted(observation, offset, pixels)
            if isinstance(encoder, ImageEncoder)
            else observation
            for encoder, observation in zip(self.encoders, observations, strict=True)
        ]


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def _small(depth: int, layers: Sequence[tuple[int, int, int, int]]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for channels, kernel, stride, padding in layers:
        parts += [nn.Conv2d(depth, channels, kernel, stride, padding), nn.ReLU()]
        depth = channels
    return nn.Sequential(*parts)


def _residual(depth: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for channels in (16, 32, 32):
        parts += [
            nn.Conv2d(depth, channels, 3, padding=1),
            nn.MaxPool2d(3, stride=2, padding=1),
            _ResidualBlock(channels),
            _ResidualBlock(channels),
        ]
        depth = channels
    return nn.Sequential(*parts, nn.ReLU())


def channels_come_first(shape: Sequence[int]) -> bool:
    """Return whether the channels of an image are the first of its three dimensions.

    The shorter of the two outer ones, and the last one where they are equal.
    """
    return shape[0] < shape[2]


def batch_shape(observation: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions before those of one observation; ``ValueError`` where these are not ``shape``."""
    dims = observation.ndim - len(shape)
    if dims < 0 or tuple(observation.shape[dims:]) != shape:
        raise ValueError(
            f"the observation has shape {tuple(observation.shape)}; expected the batch's dimensions, "
            f"then {shape}, as this encoder was made for. Make it for the size that the data have."
        )
    return tuple(observation.shape[:dims])
