"""Rollouts of a policy in new environments.

Every episode that is started is finished and counted, so that the mean is not biased towards short
episodes. Episode ``e`` always starts with ``env.reset(seed=seed + e)``, in any of the environments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase

from iql_torchrl.config.settings import check_whole
from iql_torchrl.data.scaling import known_scores, normalised_score
from iql_torchrl.evaluation.acting import (
    as_in_evaluation,
    check_policy,
    check_seed,
    chosen_actions,
    memory,
    policy_device,
    policy_dtype,
    remember,
)
from iql_torchrl.evaluation.policy_input import action_mask, needs_mask, stacked
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.networks import chunk_of, history_of

SUCCESS_KEYS = ("success", "is_success")
MakeEnv = Callable[[], gymnasium.Env[Any, Any]]


def evaluate(
    policy: TensorDictModuleBase,
    make_env: MakeEnv,
    *,
    episodes: int,
    num_envs: int = 8,
    seed: int,
    goals: Sequence[Mapping[str, Any]] | None = None,
    reference_scores: Any = None,
    deterministic: bool = True,
    max_steps: int | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Run ``policy`` for exactly ``episodes`` episodes.

    The policy reads ``observation`` and writes ``action``, with one leading batch dimension of
    1 to ``num_envs``. Observations arrive as in the training data: Boxes of floats as float32,
    other Boxes in their own dtype, Discrete and MultiDiscrete as int64 counted from zero. A Dict
    space arrives nested, ``("observation", name)``; if the policy reads one of its names at
    the top level, all of them are at the top level (the layout of TorchRL's ``GymEnv``). A policy
    with ``action_mask`` among its ``in_keys`` gets that boolean mask from
    ``info["action_mask"]``, or built from the actions in ``info["admissible_actions"]``. A policy
    with a history (``networks.with_history``) gets windows of the last observations of each episode,
    padded and masked as those of ``dataset.windows``. Of a policy with chunks (``networks.with_chunk``)
    the first ``replan_every`` actions are executed before it is asked again, in each environment for
    itself; a reset drops what is left of them.

    Discrete actions may be indices counted from zero, ``(B,)`` or ``(B, 1)``, or one value per
    action, ``(B, n)``, of which the largest is taken (one-hot included). Box actions must be
    finite and lie within the bounds; an excess by rounding is clipped.

    Args:
        policy: a TensorDict module; its training mode is restored afterwards.
        make_env: called ``min(num_envs, episodes)`` times; each call must return a new
            ``gymnasium.Env``. All are closed at the end, also after an error.
        episodes: number of episodes, at least 1.
        num_envs: how many episodes run at the same time, in this process. With a deterministic
            policy it changes results only by the rounding of batched arithmetic.
        seed: episode ``e`` starts with ``env.reset(seed=seed + e)``. Sampled actions are drawn
            from ``seed`` too; the caller's torch generators do not change.
        goals: options of ``env.reset``, one dict for each of G goals: ``{"goal": ...}`` for a
            ``data.GoalEnv``, ``{"task_id": 1}`` in OGBench, ``{"goal_cell": ...}`` in
            gymnasium-robotics' mazes. Episode ``e`` has goal ``e % G``.
        reference_scores: None, ``(random, expert)`` mean returns, a task of ``REFERENCE_RETURNS``,
            or an object with both under such names (``random, expert``; ``minimum, maximum``;
            Minari's ``ref_min_score, ref_max_score``).
        deterministic: take the distribution's deterministic sample; if False, sample (results
            then depend on ``num_envs``).
        max_steps: end an episode after that many steps and count its return so far. Without it,
            this function does not return for an environment whose episodes do not end.
        device: where the policy runs; by default where its first parameter or buffer is.

    Raises:
        TypeError: ``policy`` or ``make_env`` is of the wrong kind.
        ValueError: an argument is out of range, a key or mask is missing, or an action is not
            one the environment accepts.
    """
    check_arguments(policy, make_env, episodes, num_envs, seed, max_steps, goals)
    references = known_scores(reference_scores)
    where, seed = policy_device(policy, device), int(seed)
    with ExitStack() as stack:
        slots = _make_slots(policy, make_env, min(num_envs, episodes), stack)
        stack.enter_context(as_in_evaluation(policy, where, deterministic=deterministic, seed=seed))
        finished = sorted(_run(policy, slots, episodes, seed, goals, max_steps, where))
    _, totals, lengths, successes = zip(*finished, strict=True)
    returns = np.array(totals, dtype=np.float64)
    return Evaluation(
        returns=returns,
        lengths=np.array(lengths, dtype=np.int64),
        successes=None if None in successes else np.array(successes, dtype=np.bool_),
        scores=None if references is None else normalised_score(returns, references),
        goals=None if goals is None else np.arange(episodes) % len(goals),
    )


@dataclass
class _Episode:
    """One running episode and the environment it runs in."""

    env: gymnasium.Env[Any, Any]
    seen: deque[Any]
    number: int = -1
    info: Mapping[str, Any] = field(default_factory=dict)
    total: float = 0.0
    length: int = 0
    success: bool | None = None
    planned: deque[Any] = field(default_factory=deque)

    def start(self, number: int, seed: int, goals: Sequence[Mapping[str, Any]] | None) -> None:
        self.number, self.total, self.length, self.success = number, 0.0, 0, None
        options = {} if goals is None else {"options": dict(goals[number % len(goals)])}
        observation, self.info = self.env.reset(seed=seed + number, **options)
        self.planned.clear()
        self.seen.clear()
        remember(self.seen, observation)

    def step(self) -> bool:
        """Apply the next planned action; True when the episode has ended."""
        action = self.planned.popleft()
        observation, reward, terminated, truncated, self.info = self.env.step(action)
        remember(self.seen, observation)
        self.total += float(np.asarray(reward).item())
        self.length += 1
        for key in SUCCESS_KEYS:
            if key in self.info:
                self.success = bool(self.success) or bool(np.asarray(self.info[key]).item())
                break
        return bool(terminated or truncated)


def _run(
    policy: TensorDictModuleBase,
    slots: list[_Episode],
    episodes: int,
    seed: int,
    goals: Sequence[Mapping[str, Any]] | None,
    max_steps: int | None,
    device: torch.device,
) -> list[tuple[int, float, int, bool | None]]:
    """Number, return, length and success of each episode, in the order in which they end."""
    env, history, dtype = slots[0].env, history_of(policy), policy_dtype(policy)
    both, chunk = (env.observation_space, env.action_space), chunk_of(policy)
    masked, executed = needs_mask(policy, both[0]), 1 if chunk is None else chunk.executed
    for number, slot in enumerate(slots):
        slot.start(number, seed, goals)
    finished, active, next_number = [], list(slots), len(slots)
    while active:
        asking = [slot for slot in active if not slot.planned]
        if asking:
            windows = [
                slot.seen if history is None else history.padded(slot.seen) for slot in asking
            ]
            plans = chosen_actions(
                policy,
                stacked([observation for window in windows for observation in window], both[0]),
                [len(slot.seen) for slot in asking],
                [action_mask(slot.info, both[1]) for slot in asking] if masked else None,
                [(slot.number, slot.length) for slot in asking],
                both,
                dtype,
                device,
            )
            for slot, plan in zip(asking, plans, strict=True):
                slot.planned.extend(plan[:executed])
        for slot in tuple(active):
            over = slot.step()
            if not over and (max_steps is None or slot.length < max_steps):
                continue
            finished.append((slot.number, slot.total, slot.length, slot.success))
            if next_number < episodes:
                slot.start(next_number, seed, goals)
                next_number += 1
            else:
                active.remove(slot)
    return finished


def check_arguments(
    policy: Any,
    make_env: Any,
    episodes: Any,
    num_envs: Any,
    seed: Any,
    max_steps: Any,
    goals: Any = None,
) -> None:
    """Raise what :func:`evaluate` raises for arguments of the wrong kind or out of range."""
    check_policy(policy)
    if not callable(make_env):
        raise TypeError(
            f"make_env must be callable and return a new gymnasium.Env, found "
            f"{type(make_env).__name__}; pass e.g. lambda: gymnasium.make('Pendulum-v1')"
        )
    most = {} if max_steps is None else {"max_steps": max_steps}
    check_whole(episodes=episodes, num_envs=num_envs, **most)
    check_seed(seed)
    if goals is None:
        return
    listed = isinstance(goals, Sequence) and all(isinstance(each, Mapping) for each in goals)
    if not listed or not 0 < len(goals) <= episodes:
        given = f"{len(goals)} for {episodes} episodes" if listed else type(goals).__name__
        raise ValueError(
            f"goals must be a list of 1 to {episodes} dicts, options of env.reset such as "
            f"{{'goal': [1.0, 2.0]}}, found {given}; give at least one episode for each goal"
        )


def _make_slots(
    policy: TensorDictModuleBase, make_env: MakeEnv, count: int, stack: ExitStack
) -> list[_Episode]:
    """Environments, which ``stack`` closes."""
    slots: list[_Episode] = []
    for _ in range(count):
        env = make_env()
        if not isinstance(env, gymnasium.Env):
            raise TypeError(
                f"make_env must return a gymnasium.Env, found {type(env).__name__}; evaluate "
                "batches single environments itself"
            )
        if any(env is slot.env for slot in slots):
            raise ValueError(
                "make_env returned the same environment twice; return a new one at each call"
            )
        stack.callback(env.close)
        slots.append(_Episode(env, memory(history_of(policy))))
    return slots
