"""Rollouts of a policy in freshly made environments, and what their returns say.

Every episode that is started is finished and counted, so short episodes are not favoured, and
episode ``e`` always starts from ``env.reset(seed=seed + e)``, whichever environment runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl.interface import (
    action_mask,
    environment_actions,
    policy_input,
    reads_names_at_top_level,
)

__all__ = ["Evaluation", "evaluate"]

FloatArray = NDArray[np.float64]

BOOTSTRAP_RESAMPLES = 2000
SUCCESS_KEYS = ("success", "is_success")
REFERENCE_NAMES = (
    ("random", "expert"),
    ("minimum", "maximum"),
    ("ref_min_score", "ref_max_score"),
)


@dataclass(frozen=True)
class Evaluation:
    """Results of :func:`evaluate`; every array has one entry per episode, in episode order.

    Attributes:
        returns: undiscounted sum of the rewards, float64.
        lengths: steps taken, int64.
        successes: whether ``info`` reported ``success`` (or ``is_success``) at any step; None
            if some episode never reported either.
        scores: ``100 * (return - random) / (expert - random)``; None without reference scores.
    """

    returns: FloatArray
    lengths: NDArray[np.int64]
    successes: NDArray[np.bool_] | None = None
    scores: FloatArray | None = None

    def summary(self, *, seed: int = 0) -> dict[str, float]:
        """Plain floats, ready for a logger.

        Standard errors are the sample deviation (``ddof=1``) over ``sqrt(episodes)``: NaN for
        one episode. ``return_low`` and ``return_high`` bound the mean return with 95 %
        confidence (percentile bootstrap over episodes, resampled from ``seed``). The spread is
        that of episodes under one trained policy; it says nothing about other training seeds.
        """
        low, high = _bootstrap_interval(self.returns, seed)
        result = {
            "episodes": float(len(self.returns)),
            "return_mean": float(self.returns.mean()),
            "return_standard_error": _standard_error(self.returns),
            "return_min": float(self.returns.min()),
            "return_max": float(self.returns.max()),
            "return_low": low,
            "return_high": high,
            "length_mean": float(self.lengths.mean()),
        }
        if self.scores is not None:
            result["score_mean"] = float(self.scores.mean())
            result["score_standard_error"] = _standard_error(self.scores)
        if self.successes is not None:
            result["success_rate"] = float(self.successes.mean())
        return result


@dataclass
class _Episode:
    """One running episode and the environment it runs in."""

    env: gymnasium.Env[Any, Any]
    number: int = -1
    observation: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)
    total: float = 0.0
    length: int = 0
    success: bool | None = None

    def start(self, number: int, seed: int) -> None:
        self.number, self.total, self.length, self.success = number, 0.0, 0, None
        self.observation, self.info = self.env.reset(seed=seed + number)

    def step(self, action: Any) -> bool:
        """Apply ``action``; True when the environment says that the episode is over."""
        self.observation, reward, terminated, truncated, self.info = self.env.step(action)
        self.total += float(reward)
        self.length += 1
        for key in SUCCESS_KEYS:
            if key in self.info:
                self.success = bool(self.success) or bool(np.asarray(self.info[key]).item())
                break
        return bool(terminated or truncated)


def evaluate(
    policy: TensorDictModuleBase,
    make_env: Callable[[], gymnasium.Env[Any, Any]],
    *,
    episodes: int,
    num_envs: int = 8,
    seed: int,
    reference_scores: Any = None,
    deterministic: bool = True,
    max_steps: int | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Run ``policy`` for exactly ``episodes`` episodes.

    The policy reads ``observation`` and writes ``action``, with one leading batch dimension of
    1 to ``num_envs``. Observations arrive as in the training data: Boxes of floats as float32,
    other Boxes in their own dtype, Discrete and MultiDiscrete as int64 counted from zero. A Dict
    space arrives nested, ``("observation", name)``; if the policy asks for one of its names at
    the top level, all of them are at the top level (the layout of TorchRL's ``GymEnv``). A policy
    with ``action_mask`` among its ``in_keys`` gets that boolean mask from
    ``info["action_mask"]``, or built from the indices in ``info["admissible_actions"]``.

    Discrete actions may be indices counted from zero, ``(B,)`` or ``(B, 1)``, or one value per
    action, ``(B, n)``, of which the largest is taken (one-hot included). Box actions must be
    finite and lie within the bounds; an excess up to 1e-6 (relative to bounds beyond 1) is
    clipped.

    Args:
        policy: a TensorDict module; its training mode is restored afterwards.
        make_env: called ``min(num_envs, episodes)`` times; each call must return a new
            ``gymnasium.Env``. All are closed in the end, also after an error.
        episodes: how many episodes count, at least 1.
        num_envs: how many run side by side, in this process. With a deterministic policy it
            changes results only through rounding in batched arithmetic.
        seed: episode ``e`` starts from ``env.reset(seed=seed + e)``. Sampled actions are drawn
            from ``seed`` too; the caller's torch generators are left untouched.
        reference_scores: None, ``(random, expert)`` mean returns, or an object with both under
            such names (``random, expert``; ``minimum, maximum``; Minari's ``ref_min_score,
            ref_max_score``).
        deterministic: take the distribution's deterministic sample; if False, sample (results
            then depend on ``num_envs``).
        max_steps: cut an episode after that many steps and count it as it stands. Without it an
            environment that never ends keeps this function running for ever.
        device: where the policy runs; by default where its first parameter or buffer is.

    Raises:
        TypeError: ``policy`` or ``make_env`` is of the wrong kind.
        ValueError: an argument is out of range, a key or mask is missing, or an action is not
            one the environment accepts.
    """
    _check_arguments(policy, make_env, episodes, num_envs, seed, max_steps)
    references = _reference_pair(reference_scores)
    where = _policy_device(policy, device)
    with ExitStack() as stack:
        slots = _make_slots(make_env, min(num_envs, episodes), stack)
        stack.enter_context(_prepared(policy, int(seed), where, deterministic))
        finished = _run(policy, slots, episodes, int(seed), max_steps, where)
    finished.sort(key=lambda row: row[0])
    returns = np.array([row[1] for row in finished], dtype=np.float64)
    successes = [row[3] for row in finished]
    scores = None
    if references is not None:
        scores = 100.0 * (returns - references[0]) / (references[1] - references[0])
    return Evaluation(
        returns=returns,
        lengths=np.array([row[2] for row in finished], dtype=np.int64),
        successes=None if None in successes else np.array(successes, dtype=np.bool_),
        scores=scores,
    )


def _run(
    policy: TensorDictModuleBase,
    slots: list[_Episode],
    episodes: int,
    seed: int,
    max_steps: int | None,
    device: torch.device,
) -> list[tuple[int, float, int, bool | None]]:
    finished = []
    choose = _chooser(policy, slots[0].env, device)
    for number, slot in enumerate(slots):
        slot.start(number, seed)
    active, next_number = list(slots), len(slots)
    while active:
        for slot, action in zip(tuple(active), choose(active), strict=True):
            over = slot.step(action)
            if not over and (max_steps is None or slot.length < max_steps):
                continue
            finished.append((slot.number, slot.total, slot.length, slot.success))
            if next_number < episodes:
                slot.start(next_number, seed)
                next_number += 1
            else:
                active.remove(slot)
    return finished


def _chooser(
    policy: TensorDictModuleBase, env: gymnasium.Env[Any, Any], device: torch.device
) -> Callable[[list[_Episode]], list[Any]]:
    """The function from running episodes to their next actions."""
    observation_space, action_space = env.observation_space, env.action_space
    in_keys = list(policy.in_keys)
    flat = reads_names_at_top_level(in_keys, observation_space)
    observes_mask = isinstance(observation_space, spaces.Dict) and (
        "action_mask" in observation_space.spaces
    )
    masked = "action_mask" in in_keys and not observes_mask

    def choose(active: list[_Episode]) -> list[Any]:
        batch = policy_input(
            [slot.observation for slot in active],
            observation_space,
            flat=flat,
            masks=[action_mask(slot.info, action_space) for slot in active] if masked else None,
        )
        action = policy(batch.to(device)).get("action", None)
        if not isinstance(action, Tensor):
            raise ValueError(f"policy wrote {action!r} under 'action'; it must write a tensor")
        moments = [(slot.number, slot.length) for slot in active]
        return environment_actions(action, action_space, moments)

    return choose


def _check_arguments(
    policy: Any, make_env: Any, episodes: Any, num_envs: Any, seed: Any, max_steps: Any
) -> None:
    # Duck-typed: torch.compile hides a TensorDict module's class but passes its keys on.
    written = getattr(policy, "out_keys", None)
    if not isinstance(policy, nn.Module) or written is None or not hasattr(policy, "in_keys"):
        raise TypeError(
            f"policy must be a TensorDict module (TensorDictModule, ProbabilisticActor, ...), "
            f"found {type(policy).__name__}; wrap a plain network as TensorDictModule(network, "
            f'in_keys=["observation"], out_keys=["action"])'
        )
    if "action" not in list(written):
        raise ValueError(
            f"policy must write 'action', but its out_keys are {list(written)}; name its output "
            f"'action'"
        )
    if not callable(make_env):
        raise TypeError(
            f"make_env must be callable and return a new gymnasium.Env, found "
            f"{type(make_env).__name__}; pass e.g. lambda: gymnasium.make('Pendulum-v1')"
        )
    limits = {"episodes": (episodes, 1), "num_envs": (num_envs, 1), "seed": (seed, 0)}
    if max_steps is not None:
        limits["max_steps"] = (max_steps, 1)
    for name, (value, least) in limits.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}")


def _reference_pair(reference_scores: Any) -> tuple[float, float] | None:
    if reference_scores is None:
        return None
    pair = None
    if isinstance(reference_scores, (tuple, list)):
        pair = tuple(reference_scores)
    else:
        for names in REFERENCE_NAMES:
            if all(hasattr(reference_scores, name) for name in names):
                pair = tuple(getattr(reference_scores, name) for name in names)
                break
    if pair is None or len(pair) != 2:
        raise ValueError(
            f"reference_scores must be None, (random, expert) or an object with attributes "
            f"{' or '.join(map(str, REFERENCE_NAMES))}, found {reference_scores!r}"
        )
    random, expert = float(pair[0]), float(pair[1])
    if not (math.isfinite(random) and math.isfinite(expert) and expert > random):
        raise ValueError(
            f"reference_scores must be finite with expert > random, found random={random}, "
            f"expert={expert}"
        )
    return random, expert


def _policy_device(policy: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    for tensor in (*policy.parameters(), *policy.buffers()):
        return tensor.device
    return torch.device("cpu")


def _make_slots(
    make_env: Callable[[], gymnasium.Env[Any, Any]], count: int, stack: ExitStack
) -> list[_Episode]:
    slots: list[_Episode] = []
    for _ in range(count):
        env = make_env()
        if not isinstance(env, gymnasium.Env):
            raise TypeError(
                f"make_env must return a gymnasium.Env, found {type(env).__name__}; evaluate "
                f"batches single environments itself"
            )
        if any(env is slot.env for slot in slots):
            raise ValueError(
                "make_env returned the same environment twice; return a new one at each call"
            )
        stack.callback(env.close)
        slots.append(_Episode(env))
    return slots


@contextmanager
def _prepared(
    policy: nn.Module, seed: int, device: torch.device, deterministic: bool
) -> Iterator[None]:
    """Evaluation mode, no gradients, exploration type and private random numbers."""
    modes = [(module, module.training) for module in policy.modules()]
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    cuda = [device] if device.type == "cuda" else []
    try:
        policy.eval()
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), set_exploration_type(kind):
            # torch.manual_seed would also reseed devices that are not forked here.
            torch.default_generator.manual_seed(seed)
            for each in cuda:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        for module, training in modes:
            module.training = training


def _standard_error(values: FloatArray) -> float:
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _bootstrap_interval(values: FloatArray, seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(len(values), size=len(values))].mean()
        for _ in range(BOOTSTRAP_RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
