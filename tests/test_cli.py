"""Every setting of IQLConfig is an option of a script, beside the script's own."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

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


def another(knob, value):
    """A value that differs from ``value``."""
    if knob.choices:
        return next(choice for choice in knob.choices[::-1] if choice != value)
    if isinstance(value, bool):
        return not value
    if knob.plain_kind is int:
        return 4 if value is None else value + 1
    return 2.0 if value is None else (value + 1) / 2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_field_is_an_option(preset):
    start = PRESETS[preset]
    assert read("--preset", preset) == start
    fit_together = {
        "policy": "mixture",
        "actor_objective": "log_prob",
        "hidden": (9,),
        "residual": "policy",
        "layer_norm": True,
        "norm_after_activation": True,
        "optimizer": "adamw",
        "schedule": "cosine",
        "schedule_steps": None if start.schedule_steps else 4,
        "device": "cpu:0",
    }
    changed = {
        name: fit_together[name] if name in fit_together else another(knob, getattr(start, name))
        for name, knob in knobs(IQLConfig).items()
    }
    typed = [text for name, value in changed.items() for text in option(name, value)]
    assert read("--preset", preset, *typed) == IQLConfig(**changed)


def test_the_first_preset_is_the_default_and_none_is_a_value():
    own_presets = {"mine": IQLConfig(max_grad_norm=1.0, compile=True), "other": IQLConfig()}
    assert read(presets=own_presets) == own_presets["mine"]
    for none in ("none", "None"):
        given = read("--max-grad-norm", none, "--no-compile", presets=own_presets)
        assert given == IQLConfig()
    with pytest.raises(ValueError, match="presets is empty"):
        read(presets={})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rows 0", "rows is 0; it must be >= 1."),
        ("--rwos 1", "Unrecognized options: --rwos"),
        ("--hidden", "hidden is (); it must hold at least one number"),
        ("--expectile 0.3", "worse actions of the log"),
        ("--temperature nan", "temperature is nan"),
        ("--temperature warm", "Error parsing --temperature: could not convert string to float"),
        ("--temperature none", "Error parsing --temperature: could not convert string to float"),
        ("--updates 1e6", "Error parsing --updates: invalid literal for int() with base 10: '1e6'"),
        ("--hidden 64 x", "Error parsing --hidden: Could not find valid parse"),
        ("--schedule-steps 1.5", "Error parsing --schedule-steps: no type matching none|INT"),
        ("--schedule constant --schedule-steps 3", "schedule_steps is 3"),
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
    with pytest.raises(SystemExit, match="0"):
        read("--preset", "other", "--help", presets=presets, description="Does 1% of it.")
    text = plain(capsys.readouterr().out)
    assert text.startswith("usage: script.py")
    assert "Does 1% of it." in text
    assert "--dataset STR which log (default: mine)" in text
    for name, knob in knobs(IQLConfig).items():
        assert f"--{name.replace('_', '-')}" in text
        assert knob.help_with_range in text
        assert all(choice in text for choice in knob.choices)
    for default in (
        "(default: 256 256)",
        "(default: none)",
        "gradient updates (>= 1) (default: 8)",
    ):
        assert default in text


def test_own_options_and_settings_are_apart(monkeypatch, capsys):
    own, config = parse(Own, ["--rows", "5", "--seed", "4"], presets=PRESETS)
    assert (own, config) == (Own(rows=5), replace(PRESETS["quick"], seed=4))
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "6"])
    assert parse(Own, presets=PRESETS)[1].seed == 6
    assert parse_options(Own, ["--dataset", "b"]) == Own(dataset="b")
    mine = {"presets": {"mine": IQLConfig(seed=9)}, "without": ("seed",)}
    assert read("--updates", "3", **mine) == IQLConfig(seed=9, updates=3)
    with pytest.raises(SystemExit, match="2"):
        read("--seed", "1", **mine)
    assert "Unrecognized options: --seed" in plain(capsys.readouterr().err)


def test_refusals_of_a_script_and_of_a_config_are_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        refuse(ValueError("rows is 0."))
    assert capsys.readouterr().err == "error: rows is 0.\n"
    with pytest.raises(SystemExit, match="2"):
        read("--weight-decay", "0.1")
    error = capsys.readouterr().err
    assert error == "error: weight_decay is 0.1 and needs optimizer='adamw'.\n"
