"""IQL in plain JAX and optax, from the paper (Kostrikov et al. 2021, arXiv:2110.06169).

``jax_scan``: every loss from the same old parameters, many updates in one ``lax.scan``.
``jax_step``: V, then actor and critics with the new V, then the targets, eight updates a call.
Both sample on the device. JAX is not a dependency of the project, so import this file only where it
is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from step_rivals import Sizes, Update

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensordict import TensorDict

GAMMA, POLYAK, EXPECTILE, TEMPERATURE, MAX_WEIGHT = 0.99, 0.005, 0.7, 3.0, 100.0
ADAM = optax.adam(3e-4)
#: torch's name of a precision of float32 products: JAX's
PRECISIONS = {"highest": "highest", "high": "high", "medium": "default"}
Tree = dict[str, Any]
Batch = dict[str, jax.Array]
Function = Callable[[Tree, Batch], tuple[Tree, jax.Array]]


def initial_state(sizes: Sizes, seed: int = 0) -> Tree:
    """``live`` and ``target`` parameters and Adam's states; a layer is ``(inputs, outputs)``."""
    generator = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
        tall = generator.normal(size=(max(inputs, outputs), min(inputs, outputs)))
        orthogonal = 2**0.5 * np.linalg.qr(tall)[0]
        weight = orthogonal if inputs >= outputs else orthogonal.T
        return jnp.asarray(weight, jnp.float32), jnp.zeros(outputs)

    def net(inputs: int, outputs: int) -> list[tuple[jax.Array, jax.Array]]:
        return [layer(a, b) for a, b in pairwise([inputs, sizes.width, sizes.width, outputs])]

    critics = [net(sizes.observation + sizes.action, 1) for _ in range(sizes.critics)]
    actor = {"mean": net(sizes.observation, sizes.action), "log_std": jnp.zeros(sizes.action)}
    return with_adam({"actor": actor, "value": net(sizes.observation, 1), "critics": critics})


def with_adam(live: Tree) -> Tree:
    """The state in which training starts: targets equal to the critics, Adam's averages zero."""
    target = jax.tree.map(jnp.copy, live["critics"])
    return {"live": live, "target": target, "adam": {k: ADAM.init(v) for k, v in live.items()}}


def forward(layers: list[tuple[jax.Array, jax.Array]], x: jax.Array, dtype: str) -> jax.Array:
    for number, (weight, bias) in enumerate(layers):
        x = x.astype(dtype) @ weight.astype(dtype) + bias.astype(dtype)
        x = jax.nn.relu(x) if number < len(layers) - 1 else x
    return x.astype(jnp.float32)


def lowest(critics: list[Any], batch: Batch, dtype: str) -> jax.Array:
    """The smallest critic's value of the logged actions."""
    sa = jnp.concatenate([batch["observation"], batch["action"]], 1)
    return jnp.stack([forward(net, sa, dtype)[:, 0] for net in critics]).min(0)


def value_loss(value: Any, batch: Batch, target_q: jax.Array, dtype: str) -> jax.Array:
    """Equation 5."""
    error = target_q - forward(value, batch["observation"], dtype)[:, 0]
    return jnp.mean(jnp.where(error < 0, 1 - EXPECTILE, EXPECTILE) * error**2)


def actor_loss(actor: Tree, value: Any, batch: Batch, target_q: jax.Array, dtype: str) -> jax.Array:
    """Equation 7 with the official code's clip; no gradient reaches V."""
    advantage = target_q - forward(value, batch["observation"], dtype)[:, 0]
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(TEMPERATURE * advantage), MAX_WEIGHT))
    mean = jnp.tanh(forward(actor["mean"], batch["observation"], dtype))
    log_std = jnp.clip(actor["log_std"], -5.0, 2.0)
    density = -0.5 * ((batch["action"] - mean) / jnp.exp(log_std)) ** 2 - log_std
    return -jnp.mean(weight * (density - 0.5 * jnp.log(2 * jnp.pi)).sum(1))


def critic_loss(critics: list[Any], value: Any, batch: Batch, dtype: str) -> jax.Array:
    """Equation 6, summed over critics; no gradient reaches V."""
    following = forward(value, batch["next_observation"], dtype)[:, 0]
    goal = jax.lax.stop_gradient(batch["reward"] + GAMMA * batch["going_on"] * following)
    sa = jnp.concatenate([batch["observation"], batch["action"]], 1)
    return sum(jnp.mean((forward(net, sa, dtype)[:, 0] - goal) ** 2) for net in critics)


def descend(state: Tree, gradients: Tree) -> Tree:
    """One step of Adam on the networks that ``gradients`` names."""
    live, adam = dict(state["live"]), dict(state["adam"])
    for name, gradient in gradients.items():
        change, adam[name] = ADAM.update(gradient, adam[name])
        live[name] = optax.apply_updates(live[name], change)
    return state | {"live": live, "adam": adam}


def move_targets(state: Tree) -> Tree:
    live = state["live"]["critics"]
    moved = jax.tree.map(lambda q, p: q + POLYAK * (p - q), state["target"], live)
    return state | {"target": moved}


def simultaneous(state: Tree, batch: Batch, *, dtype: str) -> tuple[Tree, jax.Array]:
    target_q, old = lowest(state["target"], batch, dtype), state["live"]

    def total(live: Tree) -> jax.Array:
        return (
            value_loss(live["value"], batch, target_q, dtype)
            + actor_loss(live["actor"], old["value"], batch, target_q, dtype)
            + critic_loss(live["critics"], old["value"], batch, dtype)
        )

    loss, gradients = jax.value_and_grad(total)(old)
    return move_targets(descend(state, gradients)), loss


def sequential(state: Tree, batch: Batch, *, dtype: str) -> tuple[Tree, jax.Array]:
    target_q = lowest(state["target"], batch, dtype)
    about_value = jax.value_and_grad(value_loss)(state["live"]["value"], batch, target_q, dtype)
    state = descend(state, {"value": about_value[1]})
    live, value = state["live"], state["live"]["value"]
    about_actor = jax.value_and_grad(actor_loss)(live["actor"], value, batch, target_q, dtype)
    about_critics = jax.value_and_grad(critic_loss)(live["critics"], value, batch, dtype)
    state = descend(state, {"actor": about_actor[1], "critics": about_critics[1]})
    return move_targets(state), about_value[0] + about_actor[0] + about_critics[0]


def on_device(rows: TensorDict, place: Any) -> Batch:
    table = {
        "observation": rows["observation"],
        "action": rows["action"],
        "next_observation": rows["next", "observation"],
        "reward": rows["next", "reward"][:, 0],
        "going_on": (~rows["next", "terminated"][:, 0]).float(),
    }
    return {name: jax.device_put(values.cpu().numpy(), place) for name, values in table.items()}


def looped(
    rows: TensorDict, sizes: Sizes, device: str, function: Function, updates: int
) -> tuple[Update, int]:
    """``updates`` updates a call, each from rows drawn on the device; returns the last loss."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    place = jax.devices("gpu" if device.startswith("cuda") else device)[0]
    table = on_device(rows, place)
    with jax.default_device(place):
        state, key = initial_state(sizes), jax.random.PRNGKey(1)

    @partial(jax.jit, donate_argnums=(0, 1))
    def many(state: Tree, key: jax.Array, table: Batch) -> tuple[Tree, jax.Array, jax.Array]:
        def one(carry: tuple[Tree, jax.Array], _: None) -> tuple[Any, jax.Array]:
            state, key = carry
            key, entry = jax.random.split(key)
            index = jax.random.randint(entry, (sizes.batch,), 0, sizes.rows)
            batch = {name: values[index] for name, values in table.items()}
            state, loss = function(state, batch, dtype=sizes.dtype)
            return (state, key), loss

        (state, key), losses = jax.lax.scan(one, (state, key), length=updates)
        return state, key, losses[-1]

    def update() -> jax.Array:
        nonlocal state, key
        with jax.default_matmul_precision(PRECISIONS[sizes.matmul_precision]):
            state, key, loss = many(state, key, table)
        return loss

    return update, updates


def jax_scan(rows: TensorDict, sizes: Sizes, device: str) -> tuple[Update, int]:
    """200 updates a call, fewer (at least 25) where the sizes make an update longer."""
    work = sizes.batch * sizes.width * sizes.width * (1 + sizes.critics)
    updates = max(25, min(200, 200 * 256**3 * 3 // work))
    return looped(rows, sizes, device, simultaneous, updates)


def jax_step(rows: TensorDict, sizes: Sizes, device: str) -> tuple[Update, int]:
    return looped(rows, sizes, device, sequential, 8)
