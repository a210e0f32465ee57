"""Conversion of Gymnasium's observations and masks into a policy's TensorDict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iql_torchrl.descriptions import describe_space, describe_values
from iql_torchrl.evaluation.environment_actions import Moments, environment_actions
from iql_torchrl.networks import HISTORY_MASK, History, history_of, stack_frames

__all__ = [
    "action_chooser",
    "action_mask",
    "check_policy",
    "policy_device",
    "policy_dtype",
    "policy_input",
    "reads_names_at_top_level",
]

Chooser = Callable[[Sequence[Any], Sequence[Mapping[str, Any]], Moments], list[Any]]


def check_policy(policy: Any) -> None:
    """Raise ``TypeError`` for other than TensorDict modules, ``ValueError`` without ``action``."""
    # The class is not compared: a compiled TensorDict module has another class but the same keys.
    written = getattr(policy, "out_keys", None)
    if not isinstance(policy, nn.Module) or written is None or not hasattr(policy, "in_keys"):
        advice = (
            'wrap a plain network as TensorDictModule(network, in_keys=["observation"], '
            'out_keys=["action"])'
        )
        raise TypeError(
            f"policy must be a TensorDict module (TensorDictModule, ProbabilisticActor, ...), "
            f"found {type(policy).__name__}; "
            f"{'pass its .policy' if hasattr(policy, 'policy') else advice}"
        )
    if "action" not in list(written):
        raise ValueError(
            f"policy must write 'action', but its out_keys are {list(written)}; name its output "
            f"'action'"
        )


def policy_device(policy: nn.Module, device: torch.device | str | None) -> torch.device:
    """``device``, or where the policy's first parameter or buffer is."""
    if device is not None:
        return torch.device(device)
    for tensor in (*policy.parameters(), *policy.buffers()):
        return tensor.device
    return torch.device("cpu")


def policy_dtype(policy: nn.Module) -> torch.dtype:
    """Of the floats that the policy reads: float64 where it has any float64, else float32."""
    tensors = (*policy.parameters(), *policy.buffers())
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def action_chooser(
    policy: TensorDictModuleBase, env: gymnasium.Env[Any, Any], device: torch.device
) -> Chooser:
    """``choose(observations, infos, moments) -> actions`` for environments like ``env``.

    ``observations``: of each episode; for a policy with a history those so far, oldest first, at
    most as many as it reads.

    Raises ``ValueError`` as :func:`reads_names_at_top_level` and ``networks.history_of``, and, when
    called, as :func:`policy_input`, :func:`action_mask` and :func:`environment_actions` do.
    """
    observation_space, action_space = env.observation_space, env.action_space
    in_keys, history = list(policy.in_keys), history_of(policy)
    dtype = policy_dtype(policy)
    flat = reads_names_at_top_level(in_keys, observation_space)
    observes_mask = isinstance(observation_space, spaces.Dict) and (
        "action_mask" in observation_space.spaces
    )
    masked = "action_mask" in in_keys and not observes_mask

    def choose(
        observations: Sequence[Any], infos: Sequence[Mapping[str, Any]], moments: Moments
    ) -> list[Any]:
        batch = policy_input(
            observations,
            observation_space,
            flat=flat,
            masks=[action_mask(info, action_space) for info in infos] if masked else None,
            history=history,
            dtype=dtype,
        )
        try:
            action = policy(batch.to(device)).get("action", None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise RuntimeError(
                f"the policy failed on observations of {describe_space(observation_space)}: "
                f"{reason}. Check that it was made for observations of this form."
            ) from error
        if not isinstance(action, Tensor):
            raise ValueError(
                f"policy wrote a {type(action).__name__} under 'action'; it must write a tensor"
            )
        return environment_actions(action, action_space, moments)

    return choose


def reads_names_at_top_level(in_keys: Sequence[Any], space: spaces.Space[Any]) -> bool:
    """Whether a policy with ``in_keys`` reads a Dict observation's names at the top level.

    False means the nested layout, ``("observation", name)``, or a space that is not a Dict.

    Raises:
        ValueError: a key is in neither layout, or a complete Dict is read as one tensor.
    """
    names = set(space.spaces) if isinstance(space, spaces.Dict) else set()
    given = {"action_mask", HISTORY_MASK} - names  # from elsewhere than the observation
    observed = [key for key in in_keys if key not in given]
    flat = any(isinstance(key, str) and key != "observation" and key in names for key in observed)
    if names and not flat and "observation" in observed:
        raise ValueError(
            f"policy reads 'observation' as one tensor, but the environment gives a Dict of "
            f"{sorted(names)}; read its leaves, ('observation', name), or wrap the environment "
            f"so that it joins them in the same way as the training data"
        )
    for key in observed:
        path = (key,) if isinstance(key, str) else tuple(key)
        leaf: Any = space if flat or path[0] == "observation" else None
        for name in path if flat else path[1:]:
            leaf = leaf.spaces.get(name) if isinstance(leaf, spaces.Dict) else None
        if leaf is None:
            raise ValueError(
                f"policy reads {key!r}, which the environment does not give: it offers "
                f"'observation' from {describe_space(space)}, and 'action_mask' where info has "
                f"one; change the policy's in_keys or wrap the environment"
            )
    return flat


def policy_input(
    observations: Sequence[Any],
    observation_space: spaces.Space[Any],
    *,
    flat: bool,
    masks: Sequence[Tensor] | None = None,
    history: History | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """B observations as one TensorDict of batch size ``(B,)`` on the CPU.

    With ``history`` each is a sequence of at most ``history.length`` observations, and the result has
    the windows and masks of ``data.Windows``.

    As in the training data: Boxes of floats become ``dtype``, other Boxes keep their dtype, and
    Discrete, MultiDiscrete and MultiBinary become int64, counted from zero. With ``flat`` a
    Dict's names are at the top level, otherwise below ``observation``. ``masks``, if given, are
    stacked under ``action_mask``.
    """
    if history is None:
        encoded = _encode(observations, observation_space, dtype)
    else:
        encoded = _encode_windows(observations, observation_space, history, dtype)
    batch = encoded
    if not flat:
        batch = TensorDict({"observation": encoded}, batch_size=len(observations))
    if history is not None and not history.stack:
        batch[HISTORY_MASK] = torch.stack([history.mask(len(seen)) for seen in observations])
    if masks is not None:
        batch["action_mask"] = torch.stack(list(masks))
    elif flat and "action_mask" in batch:
        batch["action_mask"] = batch["action_mask"].bool()
    return batch


def _encode_windows(
    observations: Sequence[Sequence[Any]],
    space: spaces.Space[Any],
    history: History,
    dtype: torch.dtype,
) -> Any:
    """Of every leaf the windows ``(B, T, *shape)``, or the frames of each as one observation."""
    padded = [frame for seen in observations for frame in history.padded(seen)]
    batch = (len(observations), history.length)

    def window(values: Tensor) -> Tensor:
        frames = values.unflatten(0, batch)
        return stack_frames(frames, values.ndim - 1) if history.stack else frames

    encoded = _encode(padded, space, dtype)
    if isinstance(encoded, Tensor):
        return window(encoded)
    return encoded.apply(window, batch_size=batch[:1])


def _encode(observations: Sequence[Any], space: spaces.Space[Any], dtype: torch.dtype) -> Any:
    if isinstance(space, spaces.Dict):
        encoded = {
            name: _encode([observation[name] for observation in observations], inner, dtype)
            for name, inner in space.spaces.items()
        }
        return TensorDict(encoded, batch_size=len(observations))
    values = np.stack([np.asarray(observation) for observation in observations])
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return torch.as_tensor(values - space.start, dtype=torch.int64)
    if isinstance(space, spaces.MultiBinary):
        return torch.as_tensor(values, dtype=torch.int64)
    if isinstance(space, spaces.Box):
        if np.issubdtype(space.dtype, np.floating):
            return torch.as_tensor(values).to(dtype)
        return torch.as_tensor(values.astype(space.dtype))
    raise ValueError(
        f"observations must come from Box, Discrete, MultiDiscrete, MultiBinary or a Dict of "
        f"these, found {describe_space(space)}; wrap the environment"
    )


def action_mask(info: Mapping[str, Any], space: spaces.Space[Any]) -> Tensor:
    """The boolean mask ``(n,)`` of the actions that ``info`` allows in a Discrete ``space``.

    It is read from ``info["action_mask"]`` (n values) or ``info["admissible_actions"]``
    (indices from zero).
    """
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"an action mask needs a Discrete action space, found {describe_space(space)}"
        )
    count = int(space.n)
    if "action_mask" in info:
        mask = _boolean(np.asarray(info["action_mask"]))
    elif "admissible_actions" in info:
        mask = torch.zeros(count, dtype=torch.bool)
        mask[torch.as_tensor(list(info["admissible_actions"]), dtype=torch.int64)] = True
    else:
        raise ValueError(
            f"policy reads 'action_mask', but info holds only {sorted(info)}; it must hold "
            f"'action_mask' ({count} booleans) or 'admissible_actions' (indices)"
        )
    if mask.shape != (count,) or not mask.any():
        raise ValueError(
            f"an action mask must hold {count} booleans, at least one of them true, found "
            f"shape {tuple(mask.shape)} with {int(mask.sum())} true"
        )
    return mask


def _boolean(mask: NDArray[Any]) -> Tensor:
    if mask.dtype.kind not in "biuf" or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"an action mask must hold booleans (0 or 1), found {describe_values(mask)}"
            if mask.dtype.kind in "biuf"
            else f"an action mask must hold booleans (0 or 1), found {mask.dtype}"
        )
    return torch.as_tensor(mask, dtype=torch.bool)
