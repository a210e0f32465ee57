"""A setting is described once: a new one reaches every check, option and comparison by itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from conftest import make_batch, make_networks
from small_agents import log
from torchrl.objectives import SoftUpdate

from iql_torchrl import (
    IQLConfig,
    IQLLoss,
    IQLPopulation,
    IQLStep,
    OfflineTrainer,
    captured,
    load_dataset,
    make_agent,
    networks,
    policies,
)
from iql_torchrl import functional as F
from iql_torchrl.config import Knob, knob, knobs, loss_knobs
from iql_torchrl.config.cli import parse
from iql_torchrl.data import DeviceSampler
from iql_torchrl.files import CheckpointError
from iql_torchrl.losses import ImplicitQLoss
from iql_torchrl.losses.loss import ACTOR_OBJECTIVES
from iql_torchrl.networks.perceptrons import INITIALISATIONS
from iql_torchrl.trainers.checkpoints import check_same_run


@dataclass(frozen=True, kw_only=True)
class Config(IQLConfig):
    """IQLConfig with four more settings: one of each kind of use."""

    sharpness: float = knob(
        1.0,
        "exponent of the weights; 1 leaves them",
        interval="(0, 10]",
        loss_interval="(0, 20]",
        per_run=True,
        in_loss=True,
    )
    rounding: Literal["up", "down"] = knob("up", "how weights are rounded", in_loss=True)
    width: int = knob(2, "of the extra head", interval="[1, inf)")
    verbose: bool = knob(False, "print more", may_change=lambda config: True)


BASE = Config(updates=4, hidden=(8,), batch_size=8, reward="raw", schedule="constant")


@pytest.fixture
def new_knobs(monkeypatch):
    """The place that reads the new settings: here a loss that only keeps them."""
    made = ImplicitQLoss.__init__

    def init(self, *args, sharpness=Config.sharpness, rounding=Config.rounding, **kwargs):
        made(self, *args, **kwargs)
        self.sharpness, self.rounding = sharpness, rounding

    monkeypatch.setattr(ImplicitQLoss, "__init__", init)
    monkeypatch.setattr(ImplicitQLoss, "knobs", loss_knobs(Config))


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
    @dataclass
    class Own:
        """None of its own."""

    words = ["--sharpness", "2", "--rounding", "down", "--width", "3", "--verbose"]
    config = parse(Own, words, presets={"base": BASE})[1]
    assert config == replace(BASE, sharpness=2.0, rounding="down", width=3, verbose=True)
    with pytest.raises(SystemExit, match="0"):
        parse(Own, ["--help"], presets={"base": BASE})
    text = " ".join(capsys.readouterr().out.split())
    assert "exponent of the weights; 1 leaves them (in (0, 10]) (default: 1.0)" in text
    assert "--rounding {up,down}" in text


@pytest.mark.usefixtures("new_knobs")
def test_losses_and_runs_of_a_population_have_it_or_must_agree():
    dataset = load_dataset(log())
    agent = make_agent(replace(BASE, sharpness=3.0, rounding="down"), dataset)
    assert (agent.loss.sharpness, agent.loss.rounding) == (3.0, "down")
    population = IQLPopulation([replace(BASE, sharpness=value) for value in (1.0, 2.5)], dataset)
    assert population.loss.sharpness.tolist() == [[1.0], [2.5]]
    assert population.loss.rounding == "up"
    message = r"width is 3 in configs\[1\] and 2 in configs\[0\]; .* may differ in .*sharpness"
    for change, words in (
        ({"width": 3}, message),
        ({"rounding": "down"}, r"rounding is down in configs\[1\] and up in configs"),
    ):
        with pytest.raises(ValueError, match=words):
            IQLPopulation([BASE, replace(BASE, **change)], dataset)


def parts_of(**options):
    """A step and the rows that it is trained on."""
    torch.manual_seed(0)
    loss = IQLLoss(*make_networks(), **options)
    loss.make_value_estimator(gamma=0.9)
    step = IQLStep(loss, torch.optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.1))
    return step, DeviceSampler(make_batch(8), 4, seed=0)


@pytest.mark.usefixtures("new_knobs", "uncompiled")
@pytest.mark.parametrize(
    ("name", "value"), [("sharpness", 2.0), ("rounding", "down"), ("loss_mask_key", "mask")]
)
def test_a_captured_step_notices_a_change(name, value, monkeypatch):
    def weight_of(loss, advantage, batch):
        return torch.full_like(advantage, loss.sharpness if loss.rounding == "up" else 5.0)

    monkeypatch.setattr(ImplicitQLoss, "weight_of", weight_of)
    loss = IQLLoss(*make_networks())
    step = IQLStep(loss, torch.optim.Adam(loss.parameters(), lr=0.0), SoftUpdate(loss, tau=0.1))
    data = make_batch(8)
    data["mask"] = torch.arange(8) < 4
    plain, rows = (DeviceSampler(data, 16, seed=0) for _ in range(2))
    call = captured(step, rows, updates=1)
    for change in (lambda: None, lambda: setattr(loss, name, value)):
        change()
        expected = step(plain.sample())["loss_actor"]
        torch.testing.assert_close(call()["loss_actor"].float(), expected)


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
    old = {name: value for name, value in BASE.to_dict().items() if name in knobs(IQLConfig)}
    compare(BASE, old)
    with pytest.raises(CheckpointError, match=r"sharpness was 1\.0 and is 2\.0"):
        compare(replace(BASE, sharpness=2.0), old)


@pytest.mark.usefixtures("new_knobs")
def test_resume_compares_it_where_the_loss_was_made_by_hand():
    unchanged, changed = (
        OfflineTrainer(step=step, replay_buffer=rows, total_updates=1, progress_bar=False)
        for step, rows in (parts_of(), parts_of(sharpness=2.0))
    )
    saved = unchanged.state_dict()
    assert (saved["settings"]["sharpness"], saved["settings"]["rounding"]) == (1.0, "up")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"sharpness was 1\.0 and is 2\.0"):
            changed.load_state_dict(saved)
        saved["settings"].pop("sharpness", None)  # a checkpoint from before the setting existed
    unchanged.load_state_dict(saved)


# -- the description and the code that reads a setting ---------------------------------------------


def test_every_knob_of_the_loss_is_an_argument_with_the_same_default_and_an_attribute():
    parameters = inspect.signature(IQLLoss.__init__).parameters
    loss = IQLLoss(*make_networks())
    for name, described in IQLLoss.knobs.items():
        assert parameters[name].default == described.default == getattr(loss, name), name
    assert {"expectile", "temperature", "max_weight", "loss_function"} < set(IQLLoss.knobs)


def test_every_choice_has_code_that_carries_it_out():
    described = knobs(IQLConfig)
    assert set(described["loss_function"].choices) == set(F.REGRESSION_LOSSES)
    for name in described["policy"].choices:
        assert name == "auto" or callable(getattr(policies, name))
    assert set(described["activation"].choices) == set(networks.ACTIVATIONS)
    assert set(described["initialisation"].choices) == set(INITIALISATIONS)
    assert set(described["actor_objective"].choices) == {"auto", *ACTOR_OBJECTIVES}
    for choice in described["value_objective"].choices:
        loss = IQLLoss(*make_networks(), value_objective=choice)
        SoftUpdate(loss, tau=0.1)
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
    described = Knob(name="x", kind=float, help="", interval=interval)
    for value in inside:
        assert described.plain(value) == value
        described.check_in_loss(torch.tensor(value, dtype=torch.float64))
    for value in outside:
        with pytest.raises(ValueError, match="x is "):
            described.plain(value)


def test_a_loss_accepts_more_than_a_config_and_tensors_of_one_number():
    loss = IQLLoss(*make_networks(), expectile=torch.tensor(0.2), max_weight=float("inf"))
    assert loss.expectile == 0.2
    for value in (True, "3", torch.ones(2), None):
        with pytest.raises(TypeError, match=r"temperature is .*; expected a number"):
            IQLLoss(*make_networks(), temperature=value)
