"""IQLConfig refuses what cannot work; presets are their sources'; every setting is an option."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import make_batch, make_networks
from small_agents import small_columns
from small_losses import make_step

from iql_torchrl import (
    PRESETS,
    IQLConfig,
    IQLLoss,
    IQLPopulation,
    OfflineTrainer,
    captured,
    load_dataset,
    make_agent,
    networks,
    policies,
)
from iql_torchrl import functional as F
from iql_torchrl.agent import build
from iql_torchrl.config import Setting, config_settings, setting
from iql_torchrl.config.cli import parse, refuse
from iql_torchrl.data import DeviceSampler
from iql_torchrl.files import CheckpointError
from iql_torchrl.losses import (
    ACTOR_OBJECTIVES,
    VALUE_OBJECTIVES,
    ActorObjective,
    AdvantageWeighted,
    Sparse,
)
from iql_torchrl.trainers.checkpoints import check_same_run

OUT_OF_RANGE = {
    "expectile": (0.3, 1.1, 0.0),
    "temperature": (-0.1, math.nan),
    "max_weight": (0.0, math.inf),
    "discount": (1.1, math.nan),
    "max_grad_norm": (0.0, math.inf, math.nan),
    "actor_lr": (0.0, math.inf),
    "hidden": ((), (256, 0)),
    **dict.fromkeys(("polyak", "updates", "batch_size", "num_critics", "schedule_steps"), (0,)),
    **dict.fromkeys(("action_chunk", "replan_every"), (0, 1.5)),
    **dict.fromkeys(("flow_steps", "num_samples"), (0,)),
    **dict.fromkeys(("seed", "bc_weight"), (-1,)),
    "dropout": (1.0,),
    "weight_decay": (0.1,),  # without adamw
    "norm_after_activation": (True,),  # without layer_norm
}
NO_CHOICE = {
    n: ("random", None)[: 2 - each.optional]
    for n, each in config_settings(IQLConfig).items()
    if each.choices
}
WRONG_KIND = {
    "seed": (True, None),
    "updates": (1e4, "10"),
    "batch_size": (np.float64(256),),
    "schedule_steps": (1.5,),
    "temperature": (True, "3", None),
    "polyak": (10**400,),
    "compile": (1,),
    "standardise": ("no",),
    "hidden": ([64, 64], 64, (64.0,), (True,)),
    # meta holds no numbers, vulkan has no fused Adam
    "device": ("gpu", "", "cuda:x", "meta", "vulkan", torch.device("cpu")),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for table in (OUT_OF_RANGE, NO_CHOICE, WRONG_KIND)
        for field, values in table.items()
        for value in values
    ],
)
def test_impossible_values_are_refused_and_shown(field, value):
    with pytest.raises(ValueError, match=f"{field} is") as error:
        IQLConfig(**{field: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "flow", "actor_objective": "ddpg_bc"}, "a flow is trained with 'flow'"),
        ({"policy": "mixture", "actor_objective": "flow"}, "a flow is trained with 'flow'"),
        ({"policy": "deterministic", "actor_objective": "log_prob"}, "no density; choose 'mse'"),
        ({"policy": "deterministic", "num_samples": 2}, "num_samples is 2 and policy is 'determ"),
        ({"schedule": "constant", "schedule_steps": 10}, "steps is 10 and schedule is 'constant'"),
    ],
)
def test_settings_that_do_not_fit_together(options, words):
    with pytest.raises(ValueError, match=words):
        IQLConfig(**options)
    IQLConfig(policy="flow", actor_objective="flow", num_samples=4, schedule_steps=10)
    IQLConfig(policy="deterministic", actor_objective="ddpg_bc")


def test_numbers_become_plain_and_stay():
    config = IQLConfig(
        seed=np.int64(3), temperature=3, polyak=np.float64(0.25), hidden=(np.int8(4),)
    )
    assert config == IQLConfig(seed=3, temperature=3.0, polyak=0.25, hidden=(4,))
    values = (config.seed, config.temperature, config.polyak, config.hidden[0])
    assert [type(value) for value in values] == [int, float, float, int]
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    for device in ("cpu", "cuda", "cuda:7", "mps", "xpu"):  # of another machine
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
        ("updates", 0, "updates is 0; it must be >= 1: number of gradient updates."),
        ("actor_lr", math.inf, "actor_lr is inf; it must be > 0 and finite: learning rate of"),
        ("discount", 1.1, "discount is 1.1; it must lie in [0, 1]: discount factor gamma"),
        ("temperature", -1.0, "must be >= 0 and finite: inverse temperature"),
        ("temperature", -1.0, "0 is behaviour cloning, and a negative one would prefer"),
        ("expectile", 0.3, "below 0.5 V follows the worse logged actions"),
        ("max_weight", math.inf, "must lie in (0, 3e+38]: "),
        ("max_weight", math.inf, "the paper's is 100. IQLLoss itself accepts (0, inf]."),
        ("hidden", (3, 0), "hidden is (3, 0); it must hold at least one number, each >= 1: width"),
        ("order", "random", "order is 'random'; choose one of 'sequential', 'simultaneous'."),
        ("seed", True, "seed is True; expected an integer, written without a point."),
        ("max_grad_norm", "1", "max_grad_norm is '1'; expected a number, or None."),
    ],
)
def test_errors_say_what_is_allowed(field, value, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        IQLConfig(**{field: value})


RATES = {"actor_lr": 3e-4, "critic_lr": 3e-4, "value_lr": 3e-4}
COMMON = {"updates": 1_000_000, "batch_size": 256, **RATES, "discount": 0.99, "polyak": 0.005}
COMMON |= {"optimizer": "adam", "max_weight": 100.0, "num_critics": 2, "standardise": False}
# github.com/ikostrikov/implicit_q_learning, 09d7002: configs/*.py, train_offline.py, learner.py,
# common.py (orthogonal weights)
OFFICIAL = {**COMMON, "hidden": (256, 256), "order": "sequential", "schedule": "cosine_actor"}
OFFICIAL |= {"schedule_steps": None, "loss_function": "l2", "policy": "auto", "layer_norm": False}
OFFICIAL |= {"value_objective": "expectile", "max_grad_norm": None, "initialisation": "orthogonal"}
# github.com/seohongpark/fql, 719d044: agents/iql.py, agents/ifql.py, main.py
FQL = {**COMMON, "hidden": (512,) * 4, "activation": "gelu", "layer_norm": True, "dropout": 0.0}
FQL |= {"norm_after_activation": True, "expectile": 0.9, "schedule": "constant", "reward": "raw"}
FQL |= {"order": "simultaneous"}
# measured in benchmarks/bench_small.py
SMALL = {"updates": 2000, "hidden": (64, 64), "schedule": "constant", "batch_size": 256}
SMALL |= {"actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3, "discount": 0.99}
ADAMW = {"optimizer": "adamw", "weight_decay": 0.0, **dict.fromkeys(RATES, 1e-3), "actor_lr": 1e-4}
ADAMW |= {"schedule": "cosine", "schedule_steps": 100, "discount": 0.97, "expectile": 0.7}


@pytest.mark.parametrize(
    ("name", "source", "own"),
    [
        ("locomotion", OFFICIAL, (0.7, 3.0, 0.0, "return_range")),
        ("antmaze", OFFICIAL, (0.9, 10.0, 0.0, "minus_one")),
        ("kitchen", OFFICIAL, (0.7, 0.5, 0.1, "raw")),
        ("adroit", OFFICIAL, (0.7, 0.5, 0.1, "raw")),
        ("ogbench", FQL, (0.9, 10.0, 0.0, "raw")),
        ("ifql", FQL | {"policy": "flow", "flow_steps": 10, "num_samples": 32}, (0.9, 0.0, 0.0, "raw")),
        ("small", SMALL, (0.7, 3.0, 0.0, "return_range")),
        ("adamw_cosine", ADAMW, (0.7, 2.0, 0.0, "raw")),
    ],
)  # fmt: skip
def test_presets_are_those_of_their_sources(name, source, own):
    preset = PRESETS[name]
    assert (preset.expectile, preset.temperature, preset.dropout, preset.reward) == own
    assert {key: getattr(preset, key) for key in source} == source


# -- the command line


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


def another(described, value):
    """A value that differs from ``value``."""
    if described.choices:
        return next(choice for choice in described.choices[::-1] if choice != value)
    if isinstance(value, bool):
        return not value
    if described.plain_kind is int:
        return 4 if value is None else value + 1
    return 2.0 if value is None else (value + 1) / 2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_field_is_an_option(preset):
    start = PRESETS[preset]
    assert read("--preset", preset) == start
    fit_together = {"policy": "mixture", "actor_objective": "log_prob", "residual": "policy"}
    fit_together |= {"layer_norm": True, "norm_after_activation": True, "optimizer": "adamw"}
    fit_together |= {"hidden": (9,), "device": "cpu:0", "schedule": "cosine"}
    fit_together |= {"action_chunk": 4, "replan_every": 3}
    fit_together["schedule_steps"] = None if start.schedule_steps else 4
    rest = {n: each for n, each in config_settings(IQLConfig).items() if n not in fit_together}
    changed = fit_together | {n: another(each, getattr(start, n)) for n, each in rest.items()}
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


def test_refusals_of_a_script_and_of_a_config_are_one_line_and_name_the_presets(capsys):
    for call, line in (
        (lambda: refuse(ValueError("rows is 0.")), "rows is 0."),
        (lambda: read("--weight-decay", "0.1"), "weight_decay is 0.1 and needs optimizer='adamw'."),
    ):
        with pytest.raises(SystemExit, match="2"):
            call()
        assert capsys.readouterr().err == f"error: {line}\n"
    assert "locomotive" not in PRESETS
    with pytest.raises(
        KeyError, match=r"no preset 'locomotive'; the presets are quick, .*locomotion"
    ):
        PRESETS["locomotive"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rows 0", "rows is 0; it must be >= 1."),
        ("--rwos 1", "Unrecognized options: --rwos"),
        ("--hidden", "hidden is (); it must hold at least one number"),
        ("--temperature warm", "Error parsing --temperature: could not convert string to float"),
        ("--temperature none", "Error parsing --temperature: could not convert string to float"),
        ("--updates 1e6", "Error parsing --updates: invalid literal for int() with base 10: '1e6'"),
        ("--hidden 64 x", "Error parsing --hidden: Could not find valid parse"),
        ("--schedule-steps 1.5", "Error parsing --schedule-steps: no type matching none|INT"),
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
    assert list(config_settings(IQLConfig)) == [field.name for field in fields(IQLConfig)]
    for name, described in config_settings(IQLConfig).items():
        assert len(described.help_with_range) > 8
        assert f"--{name.replace('_', '-')}" in text
        assert described.help_with_range in text
        assert all(choice in text for choice in described.choices)
    for default in ("256 256", "none", "8"):
        assert f"(default: {default})" in text
    assert "gradient updates (>= 1) (default: 8)" in text


def test_own_options_and_settings_are_apart(monkeypatch, capsys):
    own, config = parse(Own, ["--rows", "5", "--seed", "4"], presets=PRESETS)
    assert (own, config) == (Own(rows=5), replace(PRESETS["quick"], seed=4))
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "6"])
    assert parse(Own, presets=PRESETS)[1].seed == 6
    mine = {"presets": {"mine": IQLConfig(seed=9)}, "without": ("seed",)}
    assert read("--updates", "3", **mine) == IQLConfig(seed=9, updates=3)
    with pytest.raises(SystemExit, match="2"):
        read("--seed", "1", **mine)
    assert "Unrecognized options: --seed" in plain(capsys.readouterr().err)


# -- A setting is described once: a new one reaches every check, option and comparison by itself


@dataclass(frozen=True, kw_only=True)
class Config(IQLConfig):
    """IQLConfig with four more settings: one of each kind of use."""

    sharpness: float = setting(
        1.0, "exponent of the weights; 1 leaves them",
        interval="(0, 10]", loss_interval="(0, 20]", per_run=True,
    )  # fmt: skip
    rounding: Literal["up", "down"] = setting("up", "how weights are rounded")
    width: int = setting(2, "of the extra head", interval="[1, inf)")
    verbose: bool = setting(False, "print more", may_change=lambda config: True)


BASE = Config(updates=4, hidden=(8,), batch_size=8, reward="raw", schedule="constant")


class Sharpened(ActorObjective):
    """The place that reads the new settings: an objective with arguments of their names."""

    has_entropy = True

    def __init__(self, sharpness: float = Config.sharpness, rounding: str = Config.rounding):
        super().__init__(sharpness=sharpness)
        self.rounding = rounding

    def forward(self, networks, batch, advantage):
        log_prob = networks.log_prob(batch)
        weight = self.sharpness if self.rounding == "up" else 5.0
        return -weight * log_prob, {"log_prob": log_prob.detach()}


@pytest.fixture
def sharpened(monkeypatch):
    monkeypatch.setattr(build, "ACTOR_OBJECTIVES", {"log_prob": Sharpened})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sharpness": 0.0}, r"must lie in \(0, 10\]: exponent .*; 1 leaves them\. IQLLoss itself"),
        ({"sharpness": "1"}, "sharpness is '1'; expected a number"),
        ({"rounding": "away"}, "rounding is 'away'; choose one of 'up', 'down'"),
        ({"width": 0}, "width is 0; it must be >= 1"),
        ({"verbose": 1}, "verbose is 1; expected True or False"),
    ],
)
def test_the_config_checks_it(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)
    assert Config(sharpness=2).to_dict()["sharpness"] == 2.0


def test_it_is_an_option_with_help(capsys):
    words = ["--sharpness", "2", "--rounding", "down", "--width", "3", "--verbose"]
    config = parse(Own, words, presets={"base": BASE})[1]
    assert config == replace(BASE, sharpness=2.0, rounding="down", width=3, verbose=True)
    with pytest.raises(SystemExit, match="0"):
        parse(Own, ["--help"], presets={"base": BASE})
    text = " ".join(capsys.readouterr().out.split())
    assert "exponent of the weights; 1 leaves them (in (0, 10]) (default: 1.0)" in text
    assert "--rounding {up,down}" in text


@pytest.mark.usefixtures("sharpened")
def test_losses_and_runs_of_a_population_have_it_or_must_agree():
    dataset = load_dataset(small_columns())
    agent = make_agent(replace(BASE, sharpness=3.0, rounding="down"), dataset)
    objective = agent.loss.actor_objective
    assert (objective.sharpness, objective.rounding) == (3.0, "down")
    population = IQLPopulation([replace(BASE, sharpness=value) for value in (1.0, 2.5)], dataset)
    assert population.loss.actor_objective.sharpness.tolist() == [1.0, 2.5]
    message = r"width is 3 in configs\[1\] and 2 in configs\[0\]; .* may differ in .*sharpness"
    for change, words in (
        ({"width": 3}, message),
        ({"rounding": "down"}, r"rounding is down in configs\[1\] and up in configs"),
    ):
        with pytest.raises(ValueError, match=words):
            IQLPopulation([BASE, replace(BASE, **change)], dataset)


def parts_of(*settings):
    """A step and the rows that it is trained on."""
    torch.manual_seed(0)
    objectives = {"value_objective": Sparse(1.0), "actor_objective": Sharpened(*settings)}
    loss = IQLLoss(*make_networks(), **objectives).make_value_estimator(gamma=0.9)
    return make_step(loss), DeviceSampler(make_batch(8), 4, seed=0)


@pytest.mark.usefixtures("uncompiled")
def test_a_captured_step_notices_changes():
    loss = IQLLoss(*make_networks(), actor_objective=Sharpened())
    step, data = make_step(loss, lr=0.0), make_batch(8)
    data["mask"] = torch.arange(8) < 4
    plain, rows = (DeviceSampler(data, 16, seed=0) for _ in range(2))
    call, seen = captured(step, rows, updates=1), set()
    for owner, name, value in (
        (loss, "loss_mask_key", loss.loss_mask_key),
        (loss.actor_objective, "sharpness", 2.0),
        (loss.actor_objective, "rounding", "down"),
        (loss, "loss_mask_key", "mask"),
    ):
        setattr(owner, name, value)
        expected = step(plain.sample())["loss_actor"]
        torch.testing.assert_close(call()["loss_actor"].float(), expected)
        seen.add(float(expected))
    assert len(seen) == 4


def compare(config, saved=BASE):
    saved, own = (
        {"agent": {"config": c if isinstance(c, dict) else c.to_dict(), "task": {}}}
        for c in (saved, config)
    )
    check_same_run(saved, own, config=Config)


def test_resume_compares_it_and_a_config_from_before_it_existed_has_its_default():
    for config in (BASE, replace(BASE, verbose=True), replace(BASE, updates=9, compile=True)):
        compare(config)
    for name, value in {"sharpness": 2.0, "rounding": "down", "width": 3, "seed": 1}.items():
        with pytest.raises(CheckpointError, match=f"{name} was .* and is {value!r}"):
            compare(replace(BASE, **{name: value}))
    cosine = replace(BASE, schedule="cosine")
    with pytest.raises(CheckpointError, match="updates was 4 and is 9"):
        compare(replace(cosine, updates=9), cosine)
    old = {
        name: value for name, value in BASE.to_dict().items() if name in config_settings(IQLConfig)
    }
    compare(BASE, old)
    with pytest.raises(CheckpointError, match=r"sharpness was 1\.0 and is 2\.0"):
        compare(replace(BASE, sharpness=2.0), old)


def test_resume_compares_it_where_the_loss_was_made_by_hand():
    unchanged, changed = (
        OfflineTrainer(step=step, replay_buffer=rows, total_updates=1, progress_bar=False)
        for step, rows in (parts_of(), parts_of(2.0))
    )
    saved = unchanged.state_dict()
    assert (saved["settings"]["sharpness"], saved["settings"]["rounding"]) == (1.0, "up")
    with pytest.raises(CheckpointError, match=r"sharpness was 1\.0 and is 2\.0"):
        changed.load_state_dict(saved)
    del saved["settings"]["sharpness"]  # a checkpoint from before the setting existed
    unchanged.load_state_dict(saved)


def test_equal_names_of_two_objectives_are_told_apart():
    """``alpha`` of the value objective and that of the policy's weights."""
    losses = [
        IQLLoss(*make_networks(), value_objective=Sparse(alpha), actor_objective=objective)
        for alpha in (1.0, 2.0)
        for objective in (AdvantageWeighted(weight="sparse", alpha=a) for a in (1.0, 2.0))
    ]
    assert len({str(loss.description) for loss in losses}) == 4


# -- the description and the code that reads a setting ---------------------------------------------


def test_arguments_of_the_loss_and_of_objectives_have_the_defaults_of_the_settings():
    described, found = config_settings(IQLConfig), set()
    for kind in (IQLLoss, *VALUE_OBJECTIVES.values(), *ACTOR_OBJECTIVES.values()):
        for name, argument in inspect.signature(kind.__init__).parameters.items():
            if name in described and name != "actor_objective":  # "auto" in the config
                assert argument.default == described[name].default, (kind, name)
                found.add(name)
    named = {"expectile", "temperature", "max_weight", "loss_function", "alpha", "pessimism"}
    assert named | {"bc_weight", "condition_dropout", "value_objective"} <= found


def test_every_choice_has_code_that_carries_it_out():
    described = config_settings(IQLConfig)
    assert set(described["loss_function"].choices) == set(F.REGRESSION_LOSSES)
    for name in described["policy"].choices:
        assert name == "auto" or callable(getattr(policies, name))
    assert set(described["activation"].choices) == set(networks.ACTIVATIONS)
    assert set(described["actor_objective"].choices) == {"auto", *ACTOR_OBJECTIVES}
    for choice in described["value_objective"].choices:
        loss = IQLLoss(*make_networks(), value_objective=choice)
        assert loss(make_batch())["loss_value"].isfinite()


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5), (1, -0.1)),
        ("(0, 1]", (1, 0.5), (0, 1.1)),
        ("(0, inf)", (1e300,), (0, float("inf"), float("nan"))),
        ("(0, inf]", (float("inf"),), (0, float("nan"))),
    ],
)
def test_intervals(interval, inside, outside):
    described = Setting(name="x", kind=float, help="", interval=interval)
    for value in inside:
        assert described.plain(value) == value
        described.check_in_loss(torch.tensor(value, dtype=torch.float64))
    for value in outside:
        with pytest.raises(ValueError, match="x is "):
            described.plain(value)


def test_a_loss_accepts_more_than_a_config_and_tensors_of_one_number():
    loss = IQLLoss(*make_networks(), expectile=torch.tensor(0.2), max_weight=float("inf"))
    assert float(loss.expectile) == pytest.approx(0.2)
