"""The official JAX code's recorded updates, replayed."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch
from conftest import SHARED, make_networks
from tensordict import TensorDict
from torch.optim.lr_scheduler import LambdaLR
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, captured, compiled, networks
from iql_torchrl.data import DeviceSampler

FILES = [SHARED / "oracle" / f"official_{name}.npz" for name in "ab"]
pytestmark = pytest.mark.skipif(
    not all(file.exists() for file in FILES), reason="the recorded updates are not here"
)


def recorded_mlp(data, prefix: str, depth: int, last: str | None = None) -> list[tuple]:
    """Weights and biases in the layout of torch."""
    keys = [f"{prefix}/MLP_0/Dense_{i}" for i in range(depth)] + ([last] if last else [])
    parts = ([data[f"{key}/kernel"].T, data[f"{key}/bias"]] for key in keys)
    return [tuple(map(torch.from_numpy, pair)) for pair in parts]


def load_mlp(mlp: torch.nn.Module, recorded: list[tuple]) -> None:
    layers = [layer for layer in mlp if isinstance(layer, torch.nn.Linear)]
    for layer, (weight, bias) in zip(layers, recorded, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})


def mlp_error(params, recorded: list[tuple], index: int | None = None) -> float:
    """Largest difference between an MLP's parameters and the recorded ones."""
    errors = []
    linear = sorted({int(key[0]) for key in params.keys(True, True)})
    for layer, pair in zip(linear, recorded, strict=True):
        for name, theirs in zip(("weight", "bias"), pair, strict=True):
            ours = params[str(layer), name].detach()
            errors.append(float(((ours if index is None else ours[index]) - theirs).abs().max()))
    return max(errors)


def build(data, config):
    hidden = config["hidden"]
    obs, act = config["obs_dim"], config["action_dim"]
    actor, _, value = make_networks(obs, act, hidden)
    head = actor.module[0].module
    load_mlp(head.mlp, recorded_mlp(data, "initial/actor", len(hidden), "initial/actor/Dense_0"))
    head.log_std.data.copy_(torch.from_numpy(data["initial/actor/log_stds"]))
    depth = len(hidden) + 1
    load_mlp(value.module.mlp, recorded_mlp(data, "initial/value", depth))
    critics = []
    for k in range(2):
        critic = networks.Critic(obs, act, hidden=hidden)
        load_mlp(critic.mlp, recorded_mlp(data, f"initial/critic/Critic_{k}", depth))
        critics.append(ValueOperator(critic, in_keys=["observation", "action"]))
    options = {name: config[name] for name in ("expectile", "temperature")}
    loss = IQLLoss(actor, critics, value, diagnostics=True, **options)
    return loss.make_value_estimator(gamma=config["discount"])


def recorded_batch(data, i: int) -> TensorDict:
    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(data[f"batch/{name}"][i])

    terminated = (get("masks") == 0).unsqueeze(-1)
    return TensorDict(
        {
            "observation": get("observations"),
            "action": get("actions"),
            "next": {
                "observation": get("next_observations"),
                "reward": get("rewards").unsqueeze(-1),
                "terminated": terminated,
                "done": terminated,
            },
        },
        batch_size=[len(terminated)],
    )


def captured_in_order(step, batches, monkeypatch):
    """``captured`` one update a call, over the recorded batches, drawn in their order."""
    call = captured(step, DeviceSampler(torch.cat(batches), len(batches[0])), updates=1)
    rows = iter(torch.arange(sum(map(len, batches))).split(len(batches[0])))
    monkeypatch.setattr(DeviceSampler, "draw", lambda _, out: out.copy_(next(rows)))
    return lambda batch: call()


@pytest.mark.parametrize(
    "form", ["eager", *(pytest.param(f, marks=pytest.mark.slow) for f in ("compiled", "captured"))]
)
@pytest.mark.parametrize("file", FILES)
def test_replays_the_official_updates(file, form, monkeypatch):
    """Traced updates are compared with eager ones in test_compilation.py and test_capture.py too."""
    data = np.load(file)
    config = ast.literal_eval(str(data["config"]))
    loss = build(data, config)
    groups = [
        {"params": list(getattr(loss, f"{name}_network_params").parameters())}
        for name in ("actor", "qvalue", "value")
    ]
    optimizer = torch.optim.Adam(groups, lr=config["lr"], eps=config["adam_eps"])
    scheduler = None
    if config["actor_lr_schedule"] == "cosine":

        def cosine(update: int) -> float:
            return 0.5 * (1 + np.cos(np.pi * update / config["max_steps"]))

        scheduler = LambdaLR(optimizer, [cosine, lambda _: 1.0, lambda _: 1.0])
    step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=config["tau"]), lr_scheduler=scheduler)
    batches = [recorded_batch(data, i) for i in range(config["steps"])]
    if form != "eager":
        torch._dynamo.reset()  # the shapes of another test's networks are none of this one's
    if form == "compiled":
        step = compiled(step)
    elif form == "captured":
        step = captured_in_order(step, batches, monkeypatch)

    depth = len(config["hidden"]) + 1
    for i, batch in enumerate(batches):
        metrics = step(batch)
        for ours, theirs in (
            ("loss_value", "value_loss"),
            ("loss_actor", "actor_loss"),
            ("loss_qvalue", "critic_loss"),
        ):
            np.testing.assert_allclose(metrics[ours], data[f"info/{theirs}"][i], rtol=2e-4)
        if i in (0, config["steps"] - 1):
            when = "after_1" if i == 0 else "final"
            actor = loss.actor_network_params["module", "0", "module"]
            last = f"{when}/actor/Dense_0"
            value = loss.value_network_params["module", "mlp"]
            online, target = loss.qvalue_network_params, loss.target_qvalue_network_params
            errors = [
                np.abs(actor["log_std"].detach().numpy() - data[f"{when}/actor/log_stds"]).max(),
                mlp_error(actor["mlp"], recorded_mlp(data, f"{when}/actor", depth - 1, last)),
                mlp_error(value, recorded_mlp(data, f"{when}/value", depth)),
            ]
            for params, name in ((online, "critic"), (target, "target_critic")):
                for k in range(2):
                    recorded = recorded_mlp(data, f"{when}/{name}/Critic_{k}", depth)
                    errors.append(mlp_error(params["module", "mlp"], recorded, k))
            assert max(errors) < 2e-5, errors
