"""A policy's actions for an environment, outside a rollout and for one."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl.descriptions import bounds_in_words, describe_space, describe_values
from iql_torchrl.evaluation.policy_input import (
    action_masks,
    checked_observation,
    needs_mask,
    policy_input,
    reads_names_at_top_level,
    stacked,
)
from iql_torchrl.files import first_line
from iql_torchrl.networks import History, chunk_of, history_of
from iql_torchrl.tolerance import outside_bounds

Moments = Sequence[tuple[int, int]]


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
    :class:`Acting` collects them. A single observation is refused.
    Of a policy with chunks (``networks.with_chunk``) the result has the actions of the next h steps,
    ``(h, *shape)``, in a batch ``(B, h, *shape)``; :class:`Acting` executes them one by one.
    Runs in evaluation mode without gradients. The caller's torch random state does not change,
    except when a sample is drawn without ``seed``.

    Raises:
        TypeError: ``policy`` is not a TensorDict module.
        ValueError: a missing or unknown key, a wrong shape, a category out of range, numbers that
            are not finite, a mask that is missing or not read by the policy, or an action that the
            environment does not accept.
    """
    check_policy(policy)
    if seed is not None:
        check_seed(seed)
    history, masks = history_of(policy), None
    leaves, leading = checked_observation(observation, observation_space, history)
    single = len(leading) == (history is not None)
    count = 1 if single else leading[0]
    if needs_mask(policy, observation_space):
        masks = action_masks(action_mask, action_space, None if single else count)
    elif action_mask is not None:
        raise ValueError(
            f"action_mask was given, but the policy reads only {list(policy.in_keys)}; leave it "
            "out, or train on data with an action mask."
        )
    steps = [1 if history is None else leading[-1]] * count
    device, moments = policy_device(policy), [(row, 0) for row in range(count)]
    both = observation_space, action_space
    with as_in_evaluation(policy, device, deterministic=deterministic, seed=seed):
        chosen = chosen_actions(policy, leaves, steps, masks, moments, both, dtype, device)
    actions = np.asarray(chosen, action_space.dtype)
    if chunk_of(policy) is None:
        actions = actions[:, 0]
    if single:
        return actions[0] if isinstance(action_space, spaces.Discrete) else np.asarray(actions[0])
    return actions


class Acting:
    """Actions of ``policy`` in one episode after the other, with the observations that it still reads.

    Call ``reset()`` at the start of every episode, then ``act(observation)`` at each of its steps.
    Actions are those of ``evaluate``. Policies without a history work too. A policy with chunks is
    asked when the actions of its last chunk are executed; in between, observations are remembered.

    Args:
        policy, observation_space, action_space, dtype, deterministic: as for :func:`act`.

    Raises ``TypeError`` and ``ValueError`` as :func:`act`; a call of ``act`` that raises leaves the
    episode as it was.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        dtype: torch.dtype = torch.float32,
        deterministic: bool = True,
    ) -> None:
        check_policy(policy)
        self.policy = policy
        self._spaces = observation_space, action_space
        self._options: dict[str, Any] = {"dtype": dtype, "deterministic": deterministic}
        self.reset()

    def reset(self) -> None:
        """Begin an episode: the next observation is its first."""
        self._seen, self._planned = memory(history_of(self.policy)), list[Any]()

    def act(self, observation: Any, *, action_mask: Any = None, seed: int | None = None) -> Any:
        """The action for ``env.step``; ``observation`` is the current one, as ``env`` gives it.

        ``action_mask`` and ``seed``: as for :func:`act`.
        """
        current, leading = checked_observation(observation, self._spaces[0], None)
        if leading:
            raise ValueError(
                f"the observation is a batch of {leading[0]}; expected one, of "
                f"{describe_space(self._spaces[0])}."
            )
        seen = self._seen.copy()
        remember(seen, current)
        chunk, planned = chunk_of(self.policy), self._planned
        if not planned:
            given = current if history_of(self.policy) is None else stacked(seen, self._spaces[0])
            options = self._options | {"action_mask": action_mask, "seed": seed}
            action = act(self.policy, given, *self._spaces, **options)
            planned = [action] if chunk is None else list(action[: chunk.executed])
        self._seen, self._planned = seen, planned[1:]
        return planned[0]


def memory(history: History | None) -> deque[Any]:
    """An empty store for the last observations of one episode: as many as the policy reads."""
    return deque(maxlen=1 if history is None else history.length)


def remember(seen: deque[Any], observation: Any) -> None:
    """Append a copy, because environments may change an array that they have returned."""
    seen.append(copy.deepcopy(observation) if seen.maxlen != 1 else observation)


def check_seed(seed: Any) -> None:
    """Raise ``ValueError`` unless ``seed`` is one that torch's generators accept."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; expected an integer in [0, 2**63).")


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
            "policy must be a TensorDict module (TensorDictModule, ProbabilisticActor, ...), found "
            f"{type(policy).__name__}; "
            f"{'pass its .policy' if hasattr(policy, 'policy') else advice}"
        )
    if "action" not in list(written):
        raise ValueError(
            f"policy must write 'action', but its out_keys are {list(written)}; name its output "
            "'action'"
        )


def policy_device(policy: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """``device``, or where the policy's first parameter or buffer is."""
    if device is not None:
        return torch.device(device)
    for tensor in (*policy.parameters(), *policy.buffers()):
        return tensor.device
    return torch.device("cpu")


def policy_dtype(policy: nn.Module) -> torch.dtype:
    """Dtype of the floats that the policy reads: float64 if it has any float64, else float32."""
    tensors = (*policy.parameters(), *policy.buffers())
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


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


def chosen_actions(
    policy: TensorDictModuleBase,
    frames: Any,
    steps: Sequence[int],
    masks: Sequence[Tensor] | None,
    moments: Moments,
    env_spaces: tuple[spaces.Space[Any], spaces.Space[Any]],
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[Any]]:
    """The next action of each of B episodes, or the actions of a chunk, for ``env.step``.

    ``frames``, ``steps``, ``masks``: see :func:`policy_input`; ``moments``:
    :func:`environment_actions`.
    """
    space, actions = env_spaces
    flat, history = reads_names_at_top_level(policy.in_keys, space), history_of(policy)
    batch = policy_input(frames, steps, space, flat=flat, masks=masks, history=history, dtype=dtype)
    try:
        action = policy(batch.to(device)).get("action", None)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the policy failed on observations of {describe_space(space)}: {first_line(error)}. "
            "Check that it was made for observations of this form."
        ) from error
    if not isinstance(action, Tensor):
        raise ValueError(
            f"policy wrote a {type(action).__name__} under 'action'; it must write a tensor"
        )
    chunk, size = chunk_of(policy), 1
    if chunk is not None:
        size = chunk.length
        action = chunk.steps(action, actions.shape or ()).flatten(0, 1)
        moments = [(episode, step + number) for episode, step in moments for number in range(size)]
    listed = environment_actions(action, actions, moments)
    return [listed[start : start + size] for start in range(0, len(listed), size)]


def environment_actions(actions: Tensor, space: spaces.Space[Any], moments: Moments) -> list[Any]:
    """The policy's actions ``(B, ...)``, checked, each in the form that the environment accepts.

    ``moments`` are the ``(episode, step)`` of each row, for messages. For Discrete: Python
    integers, from indices counted from zero or the largest of n values. For MultiDiscrete: arrays,
    from indices counted from zero. For Box: arrays in the space's dtype, clipped where they exceed a
    bound by rounding (``tolerance.outside_bounds``). Raises ``ValueError`` for an action that is NaN,
    infinite, out of bounds or of the wrong shape.
    """
    actions = actions.detach().cpu()
    values = (actions.double() if actions.is_floating_point() else actions).numpy()
    if values.shape[:1] != (len(moments),):
        raise ValueError(
            f"policy output 'action' must have a leading batch of {len(moments)}, found shape "
            f"{values.shape}"
        )
    if isinstance(space, spaces.Discrete):
        _refuse(np.isnan(values), values, moments, "is NaN; look for NaN in its parameters")
        return _discrete_actions(values, space, moments)
    if not isinstance(space, spaces.Box | spaces.MultiDiscrete):
        raise ValueError(
            f"the action space must be Box, Discrete or MultiDiscrete, found {describe_space(space)}; "
            "wrap the environment"
        )
    categories = isinstance(space, spaces.MultiDiscrete)
    integers = np.issubdtype(values.dtype, np.integer)
    if values.shape[1:] != space.shape or (categories and not integers):
        raise ValueError(
            f"policy output 'action' must have shape {(len(moments), *space.shape)}"
            f"{' and integers' if categories else ''} for {describe_space(space)}, found "
            f"{values.dtype} of shape {values.shape}"
        )
    if isinstance(space, spaces.MultiDiscrete):
        outside = (values < 0) | (values >= space.nvec)
        _refuse(outside, values, moments, f"is not in 0 <= index < n of {describe_space(space)}")
        return list((values + space.start).astype(space.dtype))
    bounds = f"the bounds {bounds_in_words(space.low, space.high)}"
    finite = np.isfinite(values)
    _refuse(~finite, values, moments, f"is not finite; it must be within {bounds}")
    advice = (
        "bound the policy, or wrap the environment in gymnasium.wrappers.ClipAction or "
        "RescaleAction if that is how the data was recorded"
    )
    outside = outside_bounds(values, space.low, space.high)
    _refuse(outside, values, moments, f"is outside {bounds}; {advice}")
    return list(np.clip(values, space.low, space.high).astype(space.dtype))


def _discrete_actions(values: NDArray[Any], space: spaces.Discrete, moments: Moments) -> list[int]:
    count = int(space.n)
    if values.shape[1:] == (count,) and count > 1:
        values = values.argmax(axis=1)
    if values.shape[1:] not in ((), (1,)) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"policy output 'action' must be integer indices (B,) or (B, 1), or (B, {count}) "
            f"one-hot, for {space}; found {values.dtype} of shape {values.shape}"
        )
    _refuse((values < 0) | (values >= count), values, moments, f"is not in 0..{count - 1}")
    return [int(index) + int(space.start) for index in values.reshape(-1)]


def _refuse(wrong: NDArray[np.bool_], values: NDArray[Any], moments: Moments, words: str) -> None:
    if wrong.any():
        row = int(wrong.reshape(len(moments), -1).any(axis=1).argmax())
        episode, step = moments[row]
        place = f" in dimension {wrong[row].argmax()}," if values[row].size > 1 else ""
        raise ValueError(
            f"policy output 'action' {describe_values(values[row])}{place} at step {step} of "
            f"episode {episode} {words}"
        )
