"""IQLConfig refuses what cannot work; presets are the official code's."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from iql_torchrl import PRESETS, IQLConfig
from iql_torchrl.config import field_help


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
    ],
)
def test_impossible_values_are_refused_and_shown(field, value):
    with pytest.raises(ValueError, match=f"{field} is") as error:
        IQLConfig(**{field: value})
    assert str(value) in str(error.value)


def test_a_low_expectile_is_explained():
    with pytest.raises(ValueError, match="worse actions of the log"):
        IQLConfig(expectile=0.3)


def test_presets_are_the_official_configs():
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


def test_frozen_and_replaceable():
    config = IQLConfig()
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    assert replace(config, seed=1).seed == 1


def test_every_field_is_explained():
    texts = field_help()
    assert set(texts) == {field.name for field in fields(IQLConfig)}
    assert all(len(text) > 10 and "\n" not in text for text in texts.values())
