"""Every setting of IQLConfig is an option of a script, beside the script's own."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace

import pytest

from iql_torchrl import PRESETS, IQLConfig
from iql_torchrl.config import knobs
from iql_torchrl.config.cli import parse, parse_options, refuse


@dataclass
class Own:
    dataset: str = "mine"
    """which log"""
    rows: int = 3

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}; it must be >= 1.")


@pytest.fixture(autouse=True)
def _named_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/folder/script.py"])


def read(*arguments, presets=PRESETS, **how):
    return parse(Own, arguments, presets=presets, **how)[1]


def plain(text: str) -> str:
    """What tyro prints, without the lines of its boxes and without line breaks."""
    return " ".join(" ".join(line.strip("│|").strip() for line in text.splitlines()).split())


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
    expected = IQLConfig(
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
        actor_objective="log_prob",
        bc_weight=0.75,
        actor_ema=0.5,
        flow_steps=3,
        num_samples=6,
        hidden=(9,),
        activation="mish",
        initialisation="torch",
        layer_norm=True,
        norm_after_activation=True,
        residual="policy",
        dropout=0.25,
        history=4,
        history_encoder="stack",
        history_features=6,
        image_encoder="residual",
        image_features=7,
        encoder_gradient="all",
        random_shift=2,
        num_critics=3,
        value_objective="quantile",
        loss_function="l1",
        optimizer="adamw",
        weight_decay=0.5,
        actor_lr=0.1,
        critic_lr=0.2,
        encoder_lr=0.4,
        value_lr=0.3,
        schedule="cosine",
        schedule_steps=None if PRESETS[preset].schedule_steps else 4,
        max_grad_norm=2.0,
        order="simultaneous",
        precision="bfloat16",
        compile=True,
        device="cpu:0",
    )
    differing = [
        field.name
        for field in fields(IQLConfig)
        if getattr(expected, field.name) != getattr(PRESETS[preset], field.name)
    ]
    assert len(differing) >= len(fields(IQLConfig)) - 4
    typed = [text for name in differing for text in option(name, getattr(expected, name))]
    assert read("--preset", preset, *typed) == expected


def test_the_first_preset_is_the_default_and_none_is_a_value():
    own_presets = {"mine": IQLConfig(max_grad_norm=1.0, compile=True), "other": IQLConfig()}
    assert read(presets=own_presets) == own_presets["mine"]
    given = read("--max-grad-norm", "none", "--no-compile", presets=own_presets)
    assert given == IQLConfig()
    with pytest.raises(ValueError, match="presets is empty"):
        read(presets={})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rows 0", "rows is 0; it must be >= 1."),
        ("--rwos 1", "Unrecognized options: --rwos"),
        ("--hidden", "hidden is (); give at least one number"),
        ("--expectile 0.3", "worse actions of the log"),
        ("--temperature nan", "temperature is nan"),
        ("--temperature warm", "'warm' is no number"),
        ("--temperature none", "'none' is no number"),
        ("--updates 1e6", "'1e6' is no whole number"),
        ("--hidden 64 x", "'x' is no whole number"),
        ("--schedule-steps 1.5", "'1.5' is no whole number"),
        ("--schedule constant --schedule-steps 3", "schedule_steps is 3"),
        ("--weight-decay 0.1", "weight_decay is 0.1 and needs"),
        ("--policy diffusion", "invalid choice 'diffusion'"),
        ("--preset fast", "invalid choice 'fast'"),
        ("--device gpu", "device is 'gpu'"),
        ("--device hpu", "device is 'hpu', which this machine cannot use"),
    ],
)
def test_impossible_options_exit_with_a_message(capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        read(*arguments.split())
    assert left.value.code == 2
    assert words in plain(capsys.readouterr().err)


def test_help_explains_every_option(capsys):
    presets = {"50%": IQLConfig(updates=7), "other": IQLConfig(updates=8)}
    with pytest.raises(SystemExit) as left:
        read("--preset", "other", "--help", presets=presets, description="Does 1% of it.")
    assert left.value.code == 0
    text = plain(capsys.readouterr().out)
    assert text.startswith("usage: script.py")
    assert "Does 1% of it." in text
    assert "--dataset STR which log (default: mine)" in text
    for name, knob in knobs(IQLConfig).items():
        assert f"--{name.replace('_', '-')}" in text
        assert knob.help_with_range in text
        assert all(choice in text for choice in knob.choices)
    assert "(default: 256 256)" in text
    assert "(default: none)" in text
    assert "number of gradient updates (>= 1) (default: 8)" in text


def test_own_options_and_settings_are_apart(monkeypatch):
    own, config = parse(Own, ["--rows", "5", "--seed", "4"], presets=PRESETS)
    assert (own, config) == (Own(rows=5), replace(PRESETS["quick"], seed=4))
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "6"])
    assert parse(Own, presets=PRESETS)[1].seed == 6
    assert parse_options(Own, ["--dataset", "b"]) == Own(dataset="b")


def test_settings_may_be_left_out(capsys):
    own_presets = {"mine": IQLConfig(seed=9)}
    assert read("--updates", "3", presets=own_presets, without=("seed",)) == IQLConfig(
        seed=9, updates=3
    )
    with pytest.raises(SystemExit, match="2"):
        read("--seed", "1", presets=own_presets, without=("seed",))
    assert "Unrecognized options: --seed" in plain(capsys.readouterr().err)


def test_a_scripts_own_refusal_is_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        refuse(ValueError("rows is 0."))
    assert capsys.readouterr().err == "error: rows is 0.\n"


def test_a_setting_that_is_refused_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        read("--weight-decay", "0.1")
    error = capsys.readouterr().err
    assert error == "error: weight_decay is 0.1 and needs optimizer='adamw'.\n"
