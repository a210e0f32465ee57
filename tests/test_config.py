"""IQLConfig refuses what cannot work; presets are the official code's."""

from __future__ import annotations

import json
import math
import re
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch

from iql_torchrl import PRESETS, IQLConfig
from iql_torchrl.config import knobs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expectile", 0.3),
        ("expectile", 1.1),
        ("expectile", 0.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("max_weight", 0.0),
        ("discount", 1.0),
        ("polyak", 0.0),
        ("updates", 0),
        ("batch_size", 0),
        ("num_critics", 0),
        ("dropout", 1.0),
        ("actor_lr", 0.0),
        ("max_grad_norm", 0.0),
        ("seed", -1),
        ("policy", "diffusion"),
        ("actor_objective", "ddpg"),
        ("bc_weight", -0.1),
        ("flow_steps", 0),
        ("num_samples", 0),
        ("activation", "swish"),
        ("initialisation", "zeros"),
        ("norm_after_activation", True),
        ("order", "random"),
        ("optimizer", "sgd"),
        ("reward", "log"),
        ("schedule", "linear"),
        ("hidden", ()),
        ("hidden", (256, 0)),
        ("weight_decay", 0.1),
        ("schedule_steps", 0),
        ("max_weight", math.inf),
        ("max_grad_norm", math.inf),
        ("actor_lr", math.inf),
        ("discount", math.nan),
        ("max_grad_norm", math.nan),
        # kinds
        ("seed", True),
        ("updates", 1e4),
        ("updates", "10"),
        ("batch_size", np.float64(256)),
        ("seed", None),
        ("schedule_steps", 1.5),
        ("temperature", True),
        ("temperature", "3"),
        ("temperature", None),
        ("polyak", 10**400),
        ("compile", 1),
        ("standardise", "no"),
        ("policy", None),
        ("hidden", [64, 64]),
        ("hidden", 64),
        ("hidden", (64.0,)),
        ("hidden", (True,)),
        # devices
        ("device", "gpu"),
        ("device", ""),
        ("device", "cuda:x"),
        ("device", "meta"),  # holds no numbers
        ("device", "vulkan"),  # has no fused Adam
        ("device", torch.device("cpu")),
    ],
)
def test_impossible_values_are_refused_and_shown(field, value):
    with pytest.raises(ValueError, match=f"{field} is") as error:
        IQLConfig(**{field: value})
    assert str(value) in str(error.value)


def test_a_schedule_in_steps_needs_a_schedule():
    with pytest.raises(ValueError, match="schedule_steps is 10 and schedule is 'constant'"):
        IQLConfig(schedule="constant", schedule_steps=10)
    assert IQLConfig(schedule="cosine", schedule_steps=10).schedule_steps == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "flow", "actor_objective": "ddpg_bc"}, "a flow is trained with 'flow'"),
        ({"policy": "mixture", "actor_objective": "flow"}, "a flow is trained with 'flow'"),
        ({"policy": "deterministic", "actor_objective": "log_prob"}, "no density; choose 'mse'"),
        ({"policy": "deterministic", "num_samples": 2}, "num_samples is 2 and policy is 'determ"),
    ],
)
def test_policies_and_their_losses_fit_together(options, words):
    with pytest.raises(ValueError, match=words):
        IQLConfig(**options)
    IQLConfig(policy="flow", actor_objective="flow", num_samples=4)
    IQLConfig(policy="deterministic", actor_objective="ddpg_bc")


@pytest.mark.parametrize("name", ["ogbench", "ifql"])
def test_presets_of_fql(name):
    # github.com/seohongpark/fql, 719d044: agents/iql.py, agents/ifql.py, main.py
    preset = PRESETS[name]
    assert (preset.updates, preset.batch_size, preset.hidden) == (1_000_000, 256, (512,) * 4)
    assert (preset.actor_lr, preset.critic_lr, preset.value_lr) == (3e-4, 3e-4, 3e-4)
    assert (preset.activation, preset.layer_norm, preset.norm_after_activation) == (
        "gelu", True, True,
    )  # fmt: skip
    assert (preset.discount, preset.polyak, preset.expectile) == (0.99, 0.005, 0.9)
    assert (preset.optimizer, preset.schedule, preset.order) == ("adam", "constant", "simultaneous")
    assert (preset.num_critics, preset.dropout, preset.max_weight) == (2, 0.0, 100.0)
    assert (preset.standardise, preset.reward) == (False, "raw")
    assert PRESETS["ogbench"].temperature == 10.0
    ifql = PRESETS["ifql"]
    assert (ifql.policy, ifql.temperature, ifql.flow_steps, ifql.num_samples) == (
        "flow",
        0.0,
        10,
        32,
    )


def test_numbers_become_plain():
    config = IQLConfig(
        seed=np.int64(3), temperature=3, polyak=np.float64(0.25), hidden=(np.int8(4),)
    )
    assert config == IQLConfig(seed=3, temperature=3.0, polyak=0.25, hidden=(4,))
    assert [type(config.seed), type(config.temperature)] == [int, float]
    assert [type(config.polyak), type(config.hidden[0])] == [float, int]


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:7", "mps", "xpu"])
def test_a_config_for_another_machine_can_be_read(device):
    assert IQLConfig(device=device).device == device


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_survive_json(preset):
    config = replace(PRESETS[preset], max_grad_norm=0.1, seed=7, hidden=(3, 5, 7))
    values = config.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert IQLConfig.from_dict(values) == config
    assert values["hidden"] == [3, 5, 7]  # what the caller gave is left as it was
    assert list(values) == [field.name for field in fields(IQLConfig)]


def test_other_keys_are_named():
    values = IQLConfig().to_dict()
    del values["seed"], values["polyak"]
    with pytest.raises(ValueError, match=r"unknown: dataset, tau; missing: seed, polyak"):
        IQLConfig.from_dict(values | {"tau": 1, "dataset": "x"})
    with pytest.raises(ValueError, match=r"settings are \[1\]; expected a dict"):
        IQLConfig.from_dict([1])
    with pytest.raises(ValueError, match=r"expectile is '0\.7'"):
        IQLConfig.from_dict(IQLConfig().to_dict() | {"expectile": "0.7"})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("updates", 0, "updates is 0; it must be >= 1."),
        ("actor_lr", math.inf, "actor_lr is inf; it must be > 0 and finite."),
        ("discount", 1.0, "discount is 1.0; it must lie in [0, 1)."),
        ("temperature", -1.0, "must be >= 0 and finite: 0 is behaviour cloning, and a negative"),
        ("max_weight", math.inf, "lie in (0, 3e+38]: the paper's is 100. IQLLoss itself accepts"),
        ("hidden", (3, 0), "hidden is (3, 0); give at least one number, each >= 1."),
        ("order", "random", "order is 'random'; choose one of 'sequential', 'simultaneous'."),
        ("seed", True, "seed is True; expected a whole number, written without a point."),
        ("max_grad_norm", "1", "max_grad_norm is '1'; expected a number, or None."),
    ],
)
def test_errors_say_what_is_allowed(field, value, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        IQLConfig(**{field: value})


def test_a_low_expectile_is_explained():
    with pytest.raises(ValueError, match="worse actions of the log"):
        IQLConfig(expectile=0.3)


def test_presets_are_the_official_configs():
    # github.com/ikostrikov/implicit_q_learning, 09d7002: configs/*.py, train_offline.py, learner.py
    expected = {  # expectile, temperature, dropout, reward map
        "locomotion": (0.7, 3.0, 0.0, "return_range"),
        "antmaze": (0.9, 10.0, 0.0, "minus_one"),
        "kitchen": (0.7, 0.5, 0.1, "raw"),
        "adroit": (0.7, 0.5, 0.1, "raw"),
    }
    for name, values in expected.items():
        preset = PRESETS[name]
        assert (preset.expectile, preset.temperature, preset.dropout, preset.reward) == values
        assert (preset.updates, preset.batch_size, preset.hidden) == (1_000_000, 256, (256, 256))
        assert (preset.actor_lr, preset.critic_lr, preset.value_lr) == (3e-4, 3e-4, 3e-4)
        assert (preset.discount, preset.polyak, preset.order) == (0.99, 0.005, "sequential")
        assert (preset.optimizer, preset.schedule, preset.schedule_steps) == (
            "adam",
            "cosine_actor",
            None,
        )
        assert (preset.max_weight, preset.num_critics, preset.loss_function) == (100.0, 2, "l2")
        assert (preset.policy, preset.value_objective) == ("auto", "expectile")
        assert (preset.standardise, preset.layer_norm, preset.max_grad_norm) == (False, False, None)
        assert preset.initialisation == "orthogonal"  # common.py


def test_adamw_cosine():
    preset = PRESETS["adamw_cosine"]
    assert (preset.optimizer, preset.weight_decay) == ("adamw", 0.0)
    assert (preset.actor_lr, preset.critic_lr, preset.value_lr) == (1e-4, 1e-3, 1e-3)
    assert (preset.schedule, preset.schedule_steps) == ("cosine", 100)
    assert (preset.discount, preset.expectile, preset.temperature) == (0.97, 0.7, 2.0)
    assert preset.reward == "raw"


def test_frozen_and_replaceable():
    config = IQLConfig()
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    assert replace(config, seed=1).seed == 1


def test_every_field_is_explained():
    described = knobs(IQLConfig)
    assert list(described) == [field.name for field in fields(IQLConfig)]
    texts = [knob.help_with_range for knob in described.values()]
    assert all(len(text) > 10 and "\n" not in text for text in texts)


def test_an_unknown_preset_is_refused_with_the_names():
    with pytest.raises(
        KeyError, match=r"no preset 'locomotive'; the presets are quick, .*locomotion"
    ):
        PRESETS["locomotive"]
    assert "locomotive" not in PRESETS
