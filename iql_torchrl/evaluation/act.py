"""A policy's action outside a rollout: from NumPy observations to NumPy actions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl.descriptions import describe_space
from iql_torchrl.evaluation import gym_interface as interface
from iql_torchrl.evaluation.environment_actions import environment_actions
from iql_torchrl.networks import History, history_of

__all__ = [
    "act",
    "as_in_evaluation",
    "needs_mask",
    "one_observation",
    "private_random_numbers",
    "whole_limits",
]


def act(
    policy: TensorDictModuleBase,
    observation: Any,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    *,
    dtype: torch.dtype = torch.float32,
    deterministic: bool = True,
    action_mask: Any = None,
    seed: int | None = None,
) -> Any:
    """The policy's action for ``env.step``: with the space's dtype and shape, within bounds.

    ``observation``: one, as the environment gives it, or a batch, with a leading dimension on every
    leaf. In a batch, ``action_mask`` (``(n,)`` booleans) and the result have that dimension too.
    A policy with a history (``networks.with_history``) takes ``(T, *shape)``: the last T observations
    of an episode, oldest first, the current one included, with T at most the history's length, and
    all of the episode where it had fewer; ``(B, T, *shape)`` is a batch of them.
    :class:`~iql_torchrl.evaluation.Acting` collects them. A single observation is refused.
    Runs in evaluation mode without gradients. The caller's torch random state does not change,
    except when a sample is drawn without ``seed``.

    Raises:
        TypeError: ``policy`` is not a TensorDict module.
        ValueError: a missing or unknown key, a wrong shape, a category out of range, numbers that
            are not finite, a mask that is missing or not read by the policy, or an action that the
            environment does not accept.
    """
    interface.check_policy(policy)
    if seed is not None and (
        isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63
    ):
        raise ValueError(f"seed is {seed!r}; expected a whole number in [0, 2**63), or None.")
    history = history_of(policy)
    leaves, leading = _checked(observation, observation_space, history)
    rows, count = _rows(leaves, leading, history)
    masks = None
    if needs_mask(policy, observation_space):
        masks = _masks(action_mask, action_space, count)
    elif action_mask is not None:
        raise ValueError(
            f"action_mask was given, but the policy reads only {list(policy.in_keys)}; leave it "
            "out, or train on data with an action mask."
        )
    flat = interface.reads_names_at_top_level(policy.in_keys, observation_space)
    device = interface.policy_device(policy, None)
    batch = interface.policy_input(
        rows, observation_space, flat=flat, masks=masks, history=history, dtype=dtype
    ).to(device)
    with as_in_evaluation(policy, device, deterministic=deterministic, seed=seed):
        action = policy(batch).get("action", None)
    if not isinstance(action, Tensor):
        raise ValueError(
            f"policy wrote a {type(action).__name__} under 'action'; it must write a tensor."
        )
    moments = [(row, 0) for row in range(len(rows))]
    actions = np.asarray(environment_actions(action, action_space, moments), action_space.dtype)
    if count is not None:
        return actions
    return actions[0] if isinstance(action_space, spaces.Discrete) else np.asarray(actions[0])


def needs_mask(policy: TensorDictModuleBase, observation_space: spaces.Space[Any]) -> bool:
    """Whether ``policy`` reads an ``action_mask`` that is not part of the observation itself."""
    observed = isinstance(observation_space, spaces.Dict) and (
        "action_mask" in observation_space.spaces
    )
    return "action_mask" in list(policy.in_keys) and not observed


@contextmanager
def as_in_evaluation(
    policy: nn.Module, device: torch.device, *, deterministic: bool = True, seed: int | None = None
) -> Iterator[None]:
    """A context with evaluation mode, no gradients, and the exploration type.

    Training modes are restored afterwards, and so are the caller's generators, unless samples are
    drawn without ``seed``.
    """
    modes = [(module, module.training) for module in policy.modules()]
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    private = deterministic or seed is not None
    try:
        policy.eval()
        with (
            private_random_numbers(seed, device) if private else nullcontext(),
            torch.no_grad(),
            set_exploration_type(kind),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def private_random_numbers(seed: int | None, *devices: torch.device | str) -> Iterator[None]:
    """A context after which torch's generators, the CPU's and those of ``devices``, are as before.

    Inside they start from ``seed``; with None, from where they were. No other device is touched, so
    that CUDA is not initialised for work on the CPU.
    """
    given = {torch.device(device) for device in devices}
    cuda = sorted((device for device in given if device.type == "cuda"), key=str)
    with torch.random.fork_rng(devices=cuda):
        if seed is not None:
            # torch.manual_seed would also reseed devices that are not forked here
            torch.default_generator.manual_seed(int(seed))
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(int(seed))
        yield


def _checked(
    observation: Any, space: spaces.Space[Any], history: History | None
) -> tuple[Any, tuple[int, ...]]:
    """The observation as arrays that fit ``space``, and the dimensions before those of one."""
    found: dict[str, tuple[int, ...]] = {}
    leaves = _fit(observation, space, "observation", found, history)
    if len(set(found.values())) != 1:
        numbers = ", ".join(
            f"{k}: {' x '.join(map(str, n)) if n else 'one'}" for k, n in found.items()
        )
        raise ValueError(
            f"the observation's leaves have different numbers of observations ({numbers}); give "
            "every leaf the same leading dimensions, or none."
        )
    (leading,) = set(found.values())
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


def one_observation(observation: Any, space: spaces.Space[Any]) -> Any:
    """A single observation as arrays, nested as ``space`` is.

    Raises ``ValueError`` as :func:`act`, and on a batch.
    """
    leaves, leading = _checked(observation, space, None)
    if leading:
        raise ValueError(
            f"the observation is a batch of {leading[0]}; expected one, of {describe_space(space)}."
        )
    return leaves


def _rows(
    leaves: Any, leading: tuple[int, ...], history: History | None
) -> tuple[list[Any], int | None]:
    """What ``policy_input`` takes for each action, and the batch size (None for a single one)."""
    if history is None:
        single = not leading
        return ([leaves], None) if single else (_unbound(leaves, leading[0]), leading[0])
    if len(leading) < 2:
        return [_unbound(leaves, leading[0])], None
    return [_unbound(row, leading[1]) for row in _unbound(leaves, leading[0])], leading[0]


def _fit(
    value: Any,
    space: spaces.Space[Any],
    path: str,
    found: dict[str, tuple[int, ...]],
    history: History | None,
) -> Any:
    if isinstance(space, spaces.Dict):
        names = sorted(space.spaces)
        if not isinstance(value, Mapping) or sorted(value) != names:
            given = sorted(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise ValueError(f"{path} must be a dict of {names}, found {given}.")
        return {
            name: _fit(value[name], inner, f"{path}[{name!r}]", found, history)
            for name, inner in space.spaces.items()
        }
    array = _array(value, path)
    shape = tuple(space.shape or ())
    dims = array.ndim - len(shape)
    if not 0 <= dims <= (1 if history is None else 2) or array.shape[dims:] != shape:
        one, batch = f"{shape} for one observation, or ", f"{('B', *shape)} for a batch"
        if history is not None:
            one = ""
            batch = (
                f"{('T', *shape)} for the last T of an episode, {('B', 'T', *shape)} for a batch"
            )
        raise ValueError(
            f"{path} has shape {array.shape}; expected {one}{batch}, of {describe_space(space)}."
        )
    floating = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if array.dtype.kind not in ("fiub" if floating else "iub"):
        raise ValueError(
            f"{path} holds {array.dtype}; expected {space.dtype} for {describe_space(space)}."
        )
    _check_values(array, space, path)
    found[path] = array.shape[:dims]
    return array


def _array(value: Any, path: str) -> NDArray[Any]:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        kind = type(value).__name__
        raise ValueError(
            f"{path} is a {kind} that NumPy cannot convert to an array; pass the observation alone, "
            "as the environment gives it (the first of the values that env.reset() and env.step() "
            "return)."
        ) from error


def whole_limits(space: spaces.Space[Any]) -> tuple[Any, Any] | None:
    """The smallest and the largest value of a space of whole numbers, inclusive; None for floats.

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


def _check_values(array: NDArray[Any], space: spaces.Space[Any], path: str) -> None:
    limits = whole_limits(space)
    # Floats may be outside their bounds, as in the training data.
    bad = ~np.isfinite(array) if limits is None else (array < limits[0]) | (array > limits[1])
    if np.any(bad):
        raise ValueError(
            f"{path} holds {array[bad].flat[0]}; expected finite values of {describe_space(space)}."
        )


def _unbound(leaves: Any, count: int) -> list[Any]:
    """The ``count`` observations along the first dimension."""
    if isinstance(leaves, dict):
        parts = {name: _unbound(leaf, count) for name, leaf in leaves.items()}
        return [{name: part[index] for name, part in parts.items()} for index in range(count)]
    return [leaves[index] for index in range(count)]


def _masks(mask: Any, space: spaces.Space[Any], count: int | None) -> list[Tensor]:
    shape = f"({int(space.n)},)" if isinstance(space, spaces.Discrete) else "(n,)"
    if mask is None:
        raise ValueError(
            f"the policy reads an action mask: pass action_mask= with shape {shape}, True where "
            "the action is allowed."
        )
    array = np.asarray(mask)
    if array.ndim != (1 if count is None else 2) or (count is not None and len(array) != count):
        full = shape if count is None else f"({count}, {shape[1:-2]})"
        raise ValueError(f"action_mask has shape {array.shape}; expected {full}.")
    return [
        interface.action_mask({"action_mask": m}, space)
        for m in ([array] if count is None else array)
    ]
