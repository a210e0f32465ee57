"""Digests of data: equal transitions, and episodes that two datasets have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase

IntArray = NDArray[np.int64]

SKETCH = 2048
AT_ONCE = 65_536  # transitions


def digest(parts: Iterable[bytes]) -> str:
    """128-bit BLAKE2b digest of bytes that come in parts, as hexadecimal digits."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(part)
    return total.hexdigest()


def fingerprint(transitions: TensorDictBase) -> dict[str, str]:
    """Per leaf, by name: dtype, shape and a 128-bit BLAKE2b digest of its bytes.

    Digests are equal exactly if all values are equal bit for bit. Reads every byte once, about a
    second per gigabyte; memory-mapped transitions are read in parts.
    """
    digests = {}
    for name in sorted(transitions.keys(include_nested=True, leaves_only=True), key=str):
        values = transitions.get(name)
        parts = (part.detach().cpu().contiguous().view(-1) for part in values.split(AT_ONCE))
        content = digest(part.view(torch.uint8).numpy().tobytes() for part in parts)
        key = name if isinstance(name, str) else ".".join(name)
        dtype = str(values.dtype).removeprefix("torch.")
        digests[key] = f"{dtype} {tuple(values.shape)} {content}"
    return digests


def episode_digests(
    transitions: TensorDictBase, returns: NDArray[np.float64], lengths: IntArray
) -> IntArray:
    """One 64-bit number per episode, ``(E,)``: equal for equal episodes of any two datasets.

    BLAKE2b digest of the length, of the first and last transition's observation and action, and of the
    raw return to four significant digits, so that it is the same under another reward scaling.
    """
    ends = np.cumsum(lengths) - 1
    selected = transitions.select("observation", "action")
    both = selected[np.stack([ends - lengths + 1, ends], 1).reshape(-1)]
    parts = [lengths.astype(np.int64)[:, None].view(np.uint8)]
    for key in sorted(both.keys(include_nested=True, leaves_only=True), key=str):
        values = both.get(key).cpu().contiguous().numpy()
        parts.append(np.ascontiguousarray(values).reshape(len(ends), -1).view(np.uint8))
    joined = np.concatenate(parts, axis=1)
    digests = [
        hashlib.blake2b(episode.tobytes() + f"{value:.3e}".encode(), digest_size=8).digest()
        for episode, value in zip(joined, returns, strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.int64)


def sketch_of(digests: IntArray) -> IntArray:
    """The ``SKETCH`` smallest of ``digests``, ascending; all of them if there are fewer.

    Enough to estimate the share of another dataset's episodes that this one contains (Broder 1997, "On
    the resemblance and containment of documents").
    """
    result: IntArray = np.sort(digests)[:SKETCH]
    return result


def shared_share(sketch: IntArray, digests: IntArray) -> float:
    """Share of the episodes ``digests`` that are in the dataset of ``sketch``, beyond coincidence.

    If episodes repeat (few states, few rewards), those of independent datasets are equal by chance: as
    often as an episode of the sketched dataset equals another one of it (Good 1953, "The population
    frequencies of species and the estimation of population parameters"). A share within three standard
    errors of that is 0. In [0, 1]; 0 if nothing can be compared.
    """
    limit = np.iinfo(np.int64).max if len(sketch) < SKETCH else sketch[-1]
    compared = digests[digests <= limit]
    if not len(compared) or not len(sketch):
        return 0.0
    shared = float(np.isin(compared, sketch).mean())
    _, count = np.unique(sketch, return_counts=True)
    coincidence = 1 - float((count == 1).sum()) / len(sketch)
    variance = coincidence * (1 - coincidence) * (1 / len(compared) + 1 / len(sketch))
    if shared - coincidence <= 3 * variance**0.5:
        return 0.0
    return (shared - coincidence) / (1 - coincidence)
