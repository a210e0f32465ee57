"""Input of a policy: observations and masks of an environment as tensors, shaped as in the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from iql_torchrl.descriptions import describe_space, describe_values
from iql_torchrl.networks import HISTORY_MASK, History, stack_frames


def reads_names_at_top_level(in_keys: Sequence[Any], space: spaces.Space[Any]) -> bool:
    """Return True if a policy with ``in_keys`` reads a Dict observation's names at the top level.

    False: the nested layout, ``("observation", name)``, or a space that is not a Dict. Raises
    ``ValueError`` for a key in neither layout, and where a complete Dict is read as one tensor.
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


def needs_mask(policy: TensorDictModuleBase, observation_space: spaces.Space[Any]) -> bool:
    """Return True if ``policy`` reads an ``action_mask`` that is not part of the observation itself."""
    names = observation_space.spaces if isinstance(observation_space, spaces.Dict) else ()
    return "action_mask" in list(policy.in_keys) and "action_mask" not in names


def stacked(observations: Sequence[Any], space: spaces.Space[Any]) -> Any:
    """Observations of an environment as one, with a leading dimension on every leaf."""
    if isinstance(space, spaces.Dict):
        return {
            name: stacked([observation[name] for observation in observations], inner)
            for name, inner in space.spaces.items()
        }
    return np.stack([np.asarray(observation) for observation in observations])


def policy_input(
    frames: Any,
    steps: Sequence[int],
    space: spaces.Space[Any],
    *,
    flat: bool,
    masks: Sequence[Tensor] | None = None,
    history: History | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """The observations of B episodes as one TensorDict of batch size ``(B,)`` on the CPU.

    ``frames``: arrays whose leading dimensions hold one observation for each episode; with
    ``history`` the same number T for each, at most its length. ``steps``: of each episode the number
    of those that are real, not padding. Then the result has the windows and masks of
    ``data.Windows``.

    As in the training data: Boxes of floats become ``dtype``, other Boxes keep their dtype, and
    Discrete, MultiDiscrete and MultiBinary become int64, counted from zero. With ``flat`` a
    Dict's names are at the top level, otherwise below ``observation``. ``masks``, if given, are
    stacked under ``action_mask``.
    """
    encoded = _encoded(frames, space, dtype)
    batch = encoded if flat else TensorDict({"observation": encoded}, batch_size=len(encoded))
    if history is not None:

        def window(values: Tensor) -> Tensor:
            every = values.unflatten(0, (len(steps), -1))
            if every.shape[1] < history.length:
                every = every[:, history.padded(range(every.shape[1]))]
            return stack_frames(every, values.ndim - 1) if history.stack else every

        batch = batch.apply(window, batch_size=(len(steps),))
        if not history.stack:
            batch[HISTORY_MASK] = torch.stack([history.mask(number) for number in steps])
    if masks is not None:
        batch["action_mask"] = torch.stack(list(masks))
    elif flat and "action_mask" in batch:
        batch["action_mask"] = batch["action_mask"].bool()
    return batch


def _encoded(values: Any, space: spaces.Space[Any], dtype: torch.dtype) -> Any:
    """Arrays as tensors, a TensorDict for a Dict, with one leading dimension."""
    if isinstance(space, spaces.Dict):
        leaves = {name: _encoded(values[name], leaf, dtype) for name, leaf in space.spaces.items()}
        return TensorDict(leaves, batch_size=len(next(iter(leaves.values()))))
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        tensor = torch.as_tensor(values - space.start, dtype=torch.int64)
    elif isinstance(space, spaces.MultiBinary):
        tensor = torch.as_tensor(values, dtype=torch.int64)
    elif not isinstance(space, spaces.Box):
        raise ValueError(
            f"observations must come from Box, Discrete, MultiDiscrete, MultiBinary or a Dict of "
            f"these, found {describe_space(space)}; wrap the environment"
        )
    elif np.issubdtype(space.dtype, np.floating):
        tensor = torch.as_tensor(values).to(dtype)
    else:
        tensor = torch.as_tensor(values.astype(space.dtype))
    shape = space.shape or ()
    return tensor if tensor.ndim == 1 + len(shape) else tensor.reshape(-1, *shape)


def action_mask(info: Mapping[str, Any], space: spaces.Space[Any]) -> Tensor:
    """Bools ``(n,)``: ``info["action_mask"]``, or the actions in ``info["admissible_actions"]``."""
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"an action mask needs a Discrete action space, found {describe_space(space)}"
        )
    count = int(space.n)
    if "action_mask" in info:
        given = np.asarray(info["action_mask"])
        number = given.dtype.kind in "biuf"
        if not number or not ((given == 0) | (given == 1)).all():
            values = describe_values(given) if number else given.dtype
            raise ValueError(f"an action mask must hold booleans (0 or 1), found {values}")
        mask = torch.as_tensor(given, dtype=torch.bool)
    elif "admissible_actions" in info:
        allowed = np.asarray(list(info["admissible_actions"]), np.int64)
        if wrong := [each for each in allowed.tolist() if not space.contains(each)]:
            raise ValueError(
                f"info['admissible_actions'] holds {wrong[0]}; expected actions of "
                f"{describe_space(space)}"
            )
        mask = torch.zeros(count, dtype=torch.bool)
        mask[torch.from_numpy(allowed - int(space.start))] = True
    else:
        raise ValueError(
            f"policy reads 'action_mask', but info holds only {sorted(info)}; it must hold "
            f"'action_mask' ({count} booleans) or 'admissible_actions' (actions)"
        )
    if mask.shape != (count,) or not mask.any():
        raise ValueError(
            f"an action mask must hold {count} booleans, at least one of them true, found "
            f"shape {tuple(mask.shape)} with {int(mask.sum())} true"
        )
    return mask


def action_masks(mask: Any, space: spaces.Space[Any], count: int | None) -> list[Tensor]:
    """The masks of ``count`` actions, or of a single one."""
    number = int(space.n) if isinstance(space, spaces.Discrete) else "n"
    if mask is None:
        raise ValueError(
            f"the policy reads an action mask: pass action_mask= with shape ({number},), True "
            "where the action is allowed."
        )
    array = np.asarray(mask)
    if array.ndim != (1 if count is None else 2) or (count is not None and len(array) != count):
        expected = f"({number},)" if count is None else f"({count}, {number})"
        raise ValueError(f"action_mask has shape {array.shape}; expected {expected}.")
    rows = array[None] if count is None else array
    return [action_mask({"action_mask": row}, space) for row in rows]


def checked_observation(
    observation: Any, space: spaces.Space[Any], history: History | None
) -> tuple[Any, tuple[int, ...]]:
    """The observation as arrays that fit ``space``, and the dimensions before those of one."""
    counts: dict[str, tuple[int, ...]] = {}
    leaves = _fitted(observation, space, "observation", counts, history)
    if len(set(counts.values())) != 1:
        numbers = ", ".join(f"{k}: {' x '.join(map(str, n)) or 'one'}" for k, n in counts.items())
        raise ValueError(
            f"the observation's leaves have different numbers of observations ({numbers}); give "
            "every leaf the same leading dimensions, or none."
        )
    (leading,) = set(counts.values())
    if 0 in leading:
        raise ValueError("the observation is a batch of size 0; give at least one.")
    if history is not None and not leading:
        raise ValueError(
            f"the observation is a single one and the policy reads the last {history.length}; give "
            "the observations of the episode so far, the newest one last, (T, ...), or use "
            "evaluation.Acting(policy, observation_space, action_space), which collects them."
        )
    if history is not None and leading[-1] > history.length:
        raise ValueError(
            f"the observation has {leading[-1]} steps and the policy reads the last "
            f"{history.length}; give at most {history.length}, the newest one last."
        )
    return leaves, leading


def _fitted(
    value: Any,
    space: spaces.Space[Any],
    path: str,
    counts: dict[str, tuple[int, ...]],
    history: History | None,
) -> Any:
    """``value`` as arrays; ``counts`` receives the dimensions of each before those of ``space``."""
    if isinstance(space, spaces.Dict):
        names = sorted(space.spaces)
        if not isinstance(value, Mapping) or sorted(value) != names:
            given = sorted(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise ValueError(f"{path} must be a dict of {names}, found {given}.")
        return {
            name: _fitted(value[name], inner, f"{path}[{name!r}]", counts, history)
            for name, inner in space.spaces.items()
        }
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is a {type(value).__name__} that NumPy cannot convert to an array; pass the "
            "observation alone, as the environment gives it (the first of the values that "
            "env.reset() and env.step() return)."
        ) from error
    shape, limits = tuple(space.shape or ()), integer_limits(space)
    dims = array.ndim - len(shape)
    if not 0 <= dims <= (1 if history is None else 2) or array.shape[dims:] != shape:
        expected = f"{shape} for one observation, or {('B', *shape)} for a batch"
        if history is not None:
            batch = f"{('B', 'T', *shape)} for a batch"
            expected = f"{('T', *shape)} for the last T of an episode, {batch}"
        raise ValueError(
            f"{path} has shape {array.shape}; expected {expected}, of {describe_space(space)}."
        )
    if array.dtype.kind not in ("fiub" if limits is None else "iub"):
        raise ValueError(
            f"{path} holds {array.dtype}; expected {space.dtype} for {describe_space(space)}."
        )
    # Floats may be outside their bounds, as in the training data.
    bad = ~np.isfinite(array) if limits is None else (array < limits[0]) | (array > limits[1])
    if np.any(bad):
        raise ValueError(
            f"{path} holds {array[bad].flat[0]}; expected finite values of {describe_space(space)}."
        )
    counts[path] = array.shape[:dims]
    return array


def integer_limits(space: spaces.Space[Any]) -> tuple[Any, Any] | None:
    """The smallest and the largest value of a space of integers, inclusive; None for floats.

    Numbers, or arrays of the space's shape.
    """
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    assert isinstance(space, spaces.Box)
    return None if np.issubdtype(space.dtype, np.floating) else (space.low, space.high)
