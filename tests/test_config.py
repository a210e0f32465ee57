"""IQLConfig refuses what cannot work; presets are the official code's; every field is an option."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch

from iql_torchrl import PRESETS, IQLConfig
from iql_torchrl.cli import add_settings, settings
from iql_torchrl.config import CHOICES, field_help


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
    with pytest.raises(ValueError, match=r"settings are \[1\]; wanted a dict"):
        IQLConfig.from_dict([1])
    with pytest.raises(ValueError, match=r"expectile is '0\.7'"):
        IQLConfig.from_dict(IQLConfig().to_dict() | {"expectile": "0.7"})


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
    texts = field_help()
    assert set(texts) == {field.name for field in fields(IQLConfig)}
    assert all(len(text) > 10 and "\n" not in text for text in texts.values())


# -- options of a script ---------------------------------------------------------------------------


def read(*arguments, presets=PRESETS):
    parser = argparse.ArgumentParser(prog="script")
    add_settings(parser, presets)
    return settings(parser.parse_args(arguments))


def option(name, value):
    """What one types for a field's value."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    texts = value if isinstance(value, tuple) else ("none" if value is None else value,)
    return [flag, *map(str, texts)]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_field_is_an_option(preset):
    assert read("--preset", preset) == PRESETS[preset]
    wanted = IQLConfig(
        seed=5,
        updates=11,
        batch_size=12,
        discount=0.5,
        expectile=0.8,
        temperature=0.25,
        max_weight=7.0,
        polyak=0.125,
        reward="minus_one",
        standardise=not PRESETS[preset].standardise,
        policy="mixture",
        hidden=(9,),
        layer_norm=True,
        dropout=0.25,
        num_critics=3,
        value_objective="quantile",
        loss_function="l1",
        optimizer="adamw",
        weight_decay=0.5,
        actor_lr=0.1,
        critic_lr=0.2,
        value_lr=0.3,
        schedule="cosine",
        schedule_steps=None if PRESETS[preset].schedule_steps else 4,
        max_grad_norm=2.0,
        order="simultaneous",
        compile=True,
        device="cpu:0",
    )
    differing = [
        field.name
        for field in fields(IQLConfig)
        if getattr(wanted, field.name) != getattr(PRESETS[preset], field.name)
    ]
    assert len(differing) >= len(fields(IQLConfig)) - 4
    typed = [text for name in differing for text in option(name, getattr(wanted, name))]
    assert read("--preset", preset, *typed) == wanted


def test_the_first_preset_is_the_default_and_none_is_a_value():
    mine = {"mine": IQLConfig(max_grad_norm=1.0, compile=True), "other": IQLConfig()}
    assert read(presets=mine) == mine["mine"]
    given = read("--max-grad-norm", "none", "--no-compile", presets=mine)
    assert given == IQLConfig()
    with pytest.raises(ValueError, match="presets is empty"):
        read(presets={})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--expectile 0.3", "worse actions of the log"),
        ("--temperature nan", "temperature is nan"),
        ("--temperature warm", "'warm' is no number"),
        ("--temperature none", "'none' is no number"),
        ("--updates 1e6", "'1e6' is no whole number"),
        ("--hidden 64 x", "'x' is no whole number"),
        ("--schedule-steps 1.5", "'1.5' is no whole number"),
        ("--schedule constant --schedule-steps 3", "schedule_steps is 3"),
        ("--weight-decay 0.1", "weight_decay is 0.1 and needs"),
        ("--policy diffusion", "invalid choice: 'diffusion'"),
        ("--preset fast", "invalid choice: 'fast'"),
        ("--device gpu", "device is 'gpu'"),
        ("--device hpu", "device is 'hpu', which this machine cannot use"),
    ],
)
def test_impossible_options_leave_through_the_parser(capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        read(*arguments.split())
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "script: error: " in error
    assert words in error


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        read("--help", presets={"50%": IQLConfig()})
    text = capsys.readouterr().out
    for name, words in field_help().items():
        assert f"--{name.replace('_', '-')}" in text
        assert words in text
    assert "(50%: 256 256)" in text
    assert all(choice in text for choices in CHOICES.values() for choice in choices)


def test_options_of_another_parser_are_refused():
    with pytest.raises(TypeError, match="call add_settings"):
        settings(argparse.Namespace(seed=1))
