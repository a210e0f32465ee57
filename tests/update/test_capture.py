"""``captured``: K updates a call equal to the plain step's, whatever happens between calls."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from changes import CHANGES, to_loss
from conftest import OBS, make_batch, make_networks
from small_losses import Forms, assert_same_optimizers, assert_same_state, discrete_networks
from torch import optim
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.envs.transforms import RewardScaling
from torchrl.objectives import HardUpdate, SoftUpdate, group_optimizers

from iql_torchrl import (
    DiscreteIQLLoss,
    IQLLoss,
    IQLStep,
    OfflineTrainer,
    captured,
    compiled,
    networks,
)
from iql_torchrl.data import DeviceSampler, replay_buffer
from iql_torchrl.update import captured as captured_module
from iql_torchrl.update.captured import CapturedStep, upcoming_lrs

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
ACTIONS = 4
# attributes of a loss that decide what it computes
OPTIONS = (
    "actor_objective",
    "deterministic_sampling_mode",
    "loss_function",
    "loss_mask_key",
    "reduction",
    "use_prioritized_weights",
    "value_objective",
)


@pytest.fixture
def untraced(monkeypatch):
    """Programs are the update itself, run as it is; counts how often one is made.

    In place of Dynamo's guards: another program where a setting of the step differs.
    """
    made = []

    def program(self, rows):
        step = self.step
        with step.modes():
            self._prepare(rows)
        moments = self._update.moments()
        self.latest = rows, moments

        def update(*_):
            with step.modes():
                self._one_update(*self.latest)

        loss, updater = step.loss, step.target_updater
        settings = [
            *(
                {k: v for k, v in g.items() if k not in ("params", "lr", "initial_lr")}
                for g in step.optimizer.param_groups
            ),
            [getattr(loss, name) for name in OPTIONS],
            (loss.value_estimator, dict(vars(loss.tensor_keys)), step.order, step.max_grad_norm),
            [m.training for n in loss.network_names for m in getattr(loss, n).modules()],
            (getattr(updater, "eps", None), self._made_for),
        ]
        tensors = [
            self._index,
            self._sums,
            *moments.averages,
            *moments.squares,
            moments.steps,
            *loss.parameters(),
        ]
        if not made or made[-1][0] != settings:
            made.append((settings, update))
        return made[-1][1], tensors

    monkeypatch.setattr(CapturedStep, "_program", program)
    return made


def make_loss(dropout=0.0, **options) -> IQLLoss:
    torch.manual_seed(0)
    return IQLLoss(*make_networks(hidden=(8,), dropout=dropout), **options).double()


def make_discrete(preprocess=None, **options) -> DiscreteIQLLoss:
    torch.manual_seed(0)
    parts = discrete_networks(ACTIONS, mask_key="action_mask", preprocess=preprocess)
    return DiscreteIQLLoss(*parts, **options).double()


def table(rows: int = 100, seed: int = 9):
    torch.manual_seed(seed)
    return make_batch(rows, dtype=torch.float64)


def chosen():
    data = table()
    action = torch.randint(ACTIONS, (100,))
    data["action"] = action
    data["action_mask"] = (torch.rand(100, ACTIONS) < 0.5).scatter(-1, action.unsqueeze(-1), True)
    return data


def categories():
    data = chosen()
    for key in ("observation", ("next", "observation")):
        data[key] = torch.randint(OBS, (100,))
    return data


def adam(params):
    return optim.Adam(params, lr=1e-3)


def soft(loss):
    return SoftUpdate(loss, tau=0.1)


def hard(interval):
    return lambda loss: HardUpdate(loss, value_network_update_interval=interval)


def groups(loss, **options):
    names = ("actor", "qvalue", "value")
    return [{"params": list(getattr(loss, f"{n}_network_params").parameters())} for n in names]


class Pair(Forms):
    """A plain step and a captured one with the same weights, rows and seed."""

    def __init__(
        self,
        loss=None,
        optimizer=adam,
        updater=soft,
        schedule=None,
        data=None,
        updates=5,
        **options,
    ):
        def make(loss):
            made = optimizer(groups(loss))
            schedulers = None if schedule is None else schedule(made)
            return IQLStep(loss, made, updater(loss), lr_scheduler=schedulers, **options)

        loss, data = make_loss() if loss is None else loss, table() if data is None else data
        rows = partial(DeviceSampler, data, 16, seed=0)
        super().__init__(loss, rows, ["captured"], updates, make)

    def both(self, change):
        for step in self.steps:
            change(step)

    def run(self, calls: int = 2) -> None:
        """The same updates on both sides; then all must be equal, states and metrics too."""
        for _ in range(calls):
            super().run()
        self.assert_equal(**CLOSE)
        assert_same_optimizers(*(step.optimizer for step in self.steps), **CLOSE)


def by_group(optimizer):
    return LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 1.0, lambda n: 1 / (1 + n)])


CASES = {
    "sequential": {"schedule": by_group, "max_grad_norm": 0.1},
    "simultaneous": {
        "order": "simultaneous",
        "optimizer": lambda p: optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        "schedule": lambda o: (ExponentialLR(o, 0.95), by_group(o)),
    },
    "decay inside": {"optimizer": lambda p: optim.Adam(p, lr=1e-3, weight_decay=0.1)},
    "discrete, masked": {"loss": make_discrete, "data": chosen, "max_grad_norm": 1.0},
    "discrete, simultaneous": {
        "loss": lambda: make_discrete(num_qvalue_nets=1, diagnostics=True),
        "data": chosen,
        "order": "simultaneous",
    },
    "categories": {
        "loss": lambda: make_discrete(networks.OneHot(OBS)),
        "data": categories,
        "max_grad_norm": 1.0,
    },
    "hard target every 5": {"updater": hard(4)},
    "hard target every 4": {"updater": hard(3)},
    "hard target every 7": {"updater": hard(6), "order": "simultaneous"},
    "another updater": {"updater": lambda loss: type("Mine", (SoftUpdate,), {})(loss, tau=0.1)},
    "no updater": {"updater": lambda loss: None},
    "joined optimizers": {
        "optimizer": lambda p: group_optimizers(*(optim.Adam([g], lr=1e-3) for g in p))
    },
    "rates that are tensors": {
        "optimizer": lambda p: optim.Adam(p, lr=torch.tensor(1e-3, dtype=torch.float64)),
        "schedule": lambda o: CosineAnnealingLR(o, 40),
    },
    "one update a call": {"updates": 1, "schedule": by_group},
    "five critics": {"loss": lambda: make_loss(num_qvalue_nets=5, diagnostics=True)},
    "sum, sarsa": {"loss": lambda: make_loss(reduction="sum", value_objective="sarsa_expectile")},
}
TRACED = ("sequential", "simultaneous", "discrete, masked", "categories", "hard target every 4")


def pair_of(case: str) -> Pair:
    options = dict(CASES[case])
    for name, make in (("loss", make_loss), ("data", table)):
        options[name] = options.get(name, make)()
    return Pair(**options)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("case", CASES)
def test_update_schedule_and_sampling_equal_the_plain_steps(case):
    pair = pair_of(case)
    pair.run(20 // pair.call.updates)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "case", [c if c in TRACED else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_traced_it_equals_the_plain_step(case):
    pair = pair_of(case)
    pair.run(20 // pair.call.updates)


def test_equals_the_plain_step_when_compiled_by_inductor():
    Pair(loss=make_loss(diagnostics=True), schedule=by_group, max_grad_norm=0.1).run(8)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRACED[1:])
def test_more_of_it_compiled_by_inductor(case):
    pair_of(case).run(8)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_a_thousand_updates_in_single_precision(order):
    """Within rounding of where the plain step arrives: training here magnifies no difference."""
    loss = make_loss().float()
    pair = Pair(loss=loss, data=table(1000).float(), order=order, updates=50)
    for _ in range(20):
        pair.call()
    for _ in range(1000):
        pair.steps[0](pair.sampler.sample())
    mine, theirs = (step.loss.state_dict() for step in pair.steps)
    for name, value in mine.items():
        if torch.is_tensor(value):
            assert (theirs[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("kind", ["sgd", "amsgrad"])
def test_other_optimizers_make_eager_updates(kind, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)  # nothing may be compiled
    make = {
        "sgd": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9),
        "amsgrad": lambda p: optim.Adam(p, lr=1e-3, amsgrad=True),
    }[kind]
    Pair(optimizer=make, schedule=by_group).run(8)


@pytest.mark.usefixtures("untraced")
def test_of_a_compiled_step():
    pair = Pair()
    pair.call = captured(compiled(pair.steps[1]), pair.call.replay, updates=5)
    pair.run()
    assert pair.call.step.loss is pair.steps[1].loss


SOME_CHANGES = ("a loaded optimizer", "temperature", "frozen", "keys")


def with_other_reward():
    data = table()
    data["next", "other"] = 3 * data["next", "reward"]
    return data


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "names",
    [SOME_CHANGES, pytest.param(tuple(CHANGES), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_the_call_after_a_change_is_right(names):
    """One change after another, each done to both."""
    pair = Pair(data=with_other_reward())
    pair.run(1)
    for name in names:
        pair.both(CHANGES[name])
        try:
            pair.run(1)
        except Exception as error:
            raise AssertionError(f"after a change of {name}") from error


@pytest.mark.usefixtures("uncompiled")
def test_what_makes_no_other_program(monkeypatch):
    """Learning rates, states and hyperparameters are read."""
    made = []
    program = lambda graph, inputs, options: made.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(captured_module, "compile_program", program)
    pair = Pair(schedule=by_group)
    pair.run(1)
    for name in ("a group's rate", "a loaded optimizer", "moved storage"):
        pair.both(CHANGES[name])
        pair.run(1)
    for value in (0.5, 3.0, 0.5):
        pair.both(to_loss("temperature", value))
        pair.run(1)
    assert len(made) == 1
    pair.call.recapture()
    pair.run(1)
    assert len(made) == 2


@pytest.mark.usefixtures("uncompiled")
def test_masks_weights_and_several_steps_in_the_data():
    data = table()
    data["collector", "mask"] = torch.rand(100) < 0.7
    data["observation"][~data["collector", "mask"]] = torch.nan
    data["priority_weight"] = torch.rand(100, dtype=torch.float64)
    data["steps_to_next_obs"] = torch.randint(1, 4, (100, 1))
    Pair(data=data).run(4)


def buffer_of(data, capacity=None, **options):
    return replay_buffer(data, 16, capacity=capacity or len(data), **options)


def observations(call) -> set[float]:
    """First columns of the rows that its updates can draw."""
    return set(call._rows().column("observation")[:, 0].tolist())


@pytest.mark.usefixtures("untraced")
def test_a_buffer_that_is_written_to():
    data = table()
    step = Pair().steps[0]
    buffer = buffer_of(data, capacity=150)
    call = captured(step, buffer, updates=2)
    call()
    assert call._rows().rows == 100
    more = table(50, seed=1)
    buffer.extend(more)
    call()
    assert observations(call) == {
        *data["observation"][:, 0].tolist(),
        *more["observation"][:, 0].tolist(),
    }
    full = table(150, seed=2)
    buffer.extend(full)  # the cursor is where it was, and every row is another
    call()
    assert observations(call) == set(full["observation"][:, 0].tolist())


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("memmap", [False, True])
def test_a_buffer_that_is_written_to_in_place(memmap, tmp_path):
    data = table()
    storage = LazyMemmapStorage(100, scratch_dir=tmp_path) if memmap else LazyTensorStorage(100)
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=16)
    buffer.extend(data)
    call = captured(Pair().steps[0], buffer, updates=2)
    call()
    rows, program = call._rows(), call._program(call._rows())
    assert call._rows() is rows
    call()
    assert call._program(rows)[0] is program[0]  # nothing was captured again
    relabelled = buffer[:].exclude("index").clone()
    relabelled["next", "reward"] += 100
    buffer[torch.arange(100)] = relabelled
    call()
    rewards = call._rows().column(("next", "reward"))
    assert torch.equal(rewards, relabelled["next", "reward"])
    rows = call._rows()
    call.recapture()
    assert call._rows() is not rows


@pytest.mark.parametrize("where", ["observation", ("next", "observation")])
@pytest.mark.parametrize("wrong", [OBS, -1])
def test_categories_out_of_range_are_said_before_a_program_meets_them(where, wrong):
    step = IQLStep(loss := make_discrete(networks.OneHot(OBS)), adam(loss.parameters()), soft(loss))
    data = categories()
    data[where][7] = wrong
    name = where if isinstance(where, str) else ".".join(where)
    said = rf"{name} has category {wrong}; expected integers from 0 to {OBS - 1}"
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(ValueError, match=said):
        captured(step, DeviceSampler(data, 16))()
    with pytest.raises(ValueError, match=said):
        compiled(step)(data)
    after = loss.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if torch.is_tensor(v))
    with pytest.raises(RuntimeError, match=r"out of bounds|Class values must"):
        step(data)


@pytest.mark.usefixtures("untraced")
def test_a_buffers_own_seed_decides_and_its_rows_are_used():
    results = []
    for seed in (3, 3, 4):
        step = Pair().steps[0]
        call = captured(step, buffer_of(table(), seed=seed), updates=3)
        call()
        call()
        results.append(next(step.loss.parameters()).detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("kind", ["sampler", "buffer"])
def test_trains_in_a_trainer_and_goes_on_where_it_stopped(tmp_path, kind):
    def make(total, folder):
        pair = Pair(schedule=by_group)
        replay = pair.call.replay if kind == "sampler" else replay_buffer(table(), 16, seed=0)
        call = captured(pair.steps[1], replay, updates=5)
        return OfflineTrainer(
            step=call,
            replay_buffer=replay,
            total_updates=total,
            log_interval=10,
            folder=tmp_path / folder,
            progress_bar=False,
        )

    once = make(40, "once")
    once.train()
    make(20, "twice").train()
    twice = make(40, "twice").resume()
    assert twice.updates == 20
    twice.train()
    assert_same_state(once.loss_module, twice.loss_module, **CLOSE)
    assert once.progress.rows[-1]["update"] == 40
    assert once.progress.rows[-1]["loss_value"] == pytest.approx(
        twice.progress.rows[-1]["loss_value"], rel=1e-6
    )
    if kind == "sampler":
        plain = Pair(schedule=by_group)
        for _ in range(40):
            plain.steps[0](plain.sampler.sample())
        assert_same_state(once.loss_module, plain.steps[0].loss, **CLOSE)


@pytest.mark.usefixtures("uncompiled")
def test_many_in_one_process_and_nothing_is_kept_of_them():
    alive, gone = [], []
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        for _ in range(2):
            pair = Pair(updates=1)
            pair.call()
            alive.append(pair)
            call = pair.call
            gone += [weakref.ref(x) for x in (call, call.step.loss, call.replay.tables[0])]
    del pair, call
    alive.clear()
    gc.collect()
    assert not [reference() for reference in gone if reference() is not None]


def test_errors():
    step = Pair().steps[0]
    sampler = DeviceSampler(table(), 16)
    with pytest.raises(TypeError, match="step is function; expected an IQLStep"):
        captured(lambda batch: batch, sampler)
    with pytest.raises(ValueError, match="updates is 0"):
        captured(step, sampler, updates=0)
    with pytest.raises(TypeError, match="replay is TensorDict; expected a DeviceSampler"):
        captured(step, table())
    in_turn = buffer_of(table(), sampler=SamplerWithoutReplacement())
    with pytest.raises(ValueError, match="SamplerWithoutReplacement; captured updates sample unif"):
        captured(step, in_turn)
    with pytest.raises(ValueError, match="replay has transforms"):
        captured(step, buffer_of(table(), transform=RewardScaling(0.0, 2.0)))
    unsized = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    with pytest.raises(ValueError, match="no batch_size"):
        captured(step, unsized)
    sampler.tables = [part.to("meta") for part in sampler.tables]
    with pytest.raises(ValueError, match="rows are on meta and the parameters on cpu"):
        captured(step, sampler)


@pytest.mark.usefixtures("untraced")
def test_a_schedule_of_momenta_is_refused():
    pair = Pair(schedule=lambda o: OneCycleLR(o, 1e-2, total_steps=100))
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        pair.call()
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        compiled(pair.steps[0])
    Pair(schedule=lambda o: OneCycleLR(o, 1e-2, total_steps=100, cycle_momentum=False)).run()


def test_rates_of_several_updates_by_hand():
    loss = make_loss()
    groups = [{"params": list(loss.actor_network_params.parameters()), "lr": torch.tensor(0.5)}]
    groups.append({"params": [p for n, p in loss.named_parameters() if n[0] != "a"], "lr": 0.25})
    optimizer = optim.Adam(groups)
    schedule = LambdaLR(optimizer, [lambda n: 0.5**n, lambda n: 1.0])
    step = IQLStep(loss, optimizer, None, lr_scheduler=schedule)
    assert upcoming_lrs(step, 2).tolist() == [[0.5, 0.25], [0.25, 0.25], [0.125, 0.25]]


@pytest.mark.usefixtures("uncompiled")
def test_what_a_program_cannot_hold_changes_nothing():
    """A failure to trace leaves weights, schedule and sampling as they were."""
    pair = Pair(loss=make_loss(actor_objective=lambda *_: 1 / 0), schedule=by_group)
    before = copy.deepcopy(pair.steps[1].state_dict()["lr_schedulers"])
    with pytest.raises(Exception, match=r"ZeroDivisionError|division by zero"):
        pair.call()
    assert pair.steps[1].state_dict()["lr_schedulers"] == before
    assert torch.equal(pair.call.replay.indices(), pair.sampler.indices())
