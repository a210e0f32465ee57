"""Changes of a step, each of which its next update must follow."""

from __future__ import annotations

import copy

import torch
from torchrl.objectives import ValueEstimators

from iql_torchrl.losses import AdvantageWeighted, Quantile, WeightedFunction


def moment_twice(step):
    state = copy.deepcopy(step.state_dict())
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] *= 2
    step.load_state_dict(state)


def another_state(step):
    state = {
        k: v * 1.1 if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in step.loss.state_dict().items()
    }
    step.loss.load_state_dict(state)


def moved(step):
    for parameter in step.loss.parameters():
        parameter.data = parameter.data.clone()


def set_all(name, value):
    return lambda step: [group.update({name: value}) for group in step.optimizer.param_groups]


def to_loss(name, value):
    return lambda step: setattr(step.loss, name, value)


def squared(actor, batch):
    return (actor.get_dist(batch).mean - batch["action"]).square().sum(-1)


def absolute(actor, batch):
    return (actor.get_dist(batch).mean - batch["action"]).abs().sum(-1)


CHANGES = {
    "clip": to_loss("max_weight", 1.0),
    "a loaded optimizer": moment_twice,
    "loaded weights": another_state,
    "a group's rate": lambda step: step.optimizer.param_groups[0].update(lr=0.01),
    "betas": set_all("betas", (0.5, 0.9)),
    "decay": set_all("weight_decay", 0.5),
    "temperature": to_loss("temperature", 0.5),
    "gamma": lambda step: step.loss.make_value_estimator(gamma=0.5),
    "estimator": lambda step: step.loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.5),
    "frozen": lambda step: step.loss.value_network_params.requires_grad_(False),
    "free again": lambda step: step.loss.value_network_params.requires_grad_(True),
    "keys": lambda step: step.loss.set_keys(reward="other"),
    "clipping": lambda step: setattr(step, "max_grad_norm", 0.01),
    "order": lambda step: setattr(step, "order", "simultaneous"),
    "targets": lambda step: setattr(step.target_updater, "eps", 0.5),
    "objective": to_loss("actor_objective", WeightedFunction(absolute)),
    "another objective": to_loss("actor_objective", WeightedFunction(squared)),
    "objective again": to_loss("actor_objective", AdvantageWeighted()),
    "reduction": to_loss("reduction", "sum"),
    "value objective": to_loss("value_objective", Quantile()),
    "moved storage": moved,
    "no gradient in what rests": lambda step: step.loss.actor_network_params.requires_grad_(False),
}
