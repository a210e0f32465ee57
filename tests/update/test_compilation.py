"""``compiled``: the plain step's parameters and states, without compiling again."""

from __future__ import annotations

import copy

import pytest
import torch
from changes import CHANGES
from conftest import ACT, OBS, make_batch, make_networks
from small_losses import assert_same_metrics, assert_same_optimizers, assert_same_state
from tensordict.nn import NormalParamExtractor, TensorDictModule
from test_step import make_loss, make_step
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torchrl import logger
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import HardUpdate, SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, compiled
from iql_torchrl.config import arithmetic
from iql_torchrl.losses import AdvantageWeighted
from iql_torchrl.private_apis import untiled_loops_only
from iql_torchrl.update import compiled as compiled_module
from iql_torchrl.update.compiled import (
    JOINED,
    UNSPLIT,
    CompiledStep,
    counted,
    program_options,
    worth_checking,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def soft(loss):
    return SoftUpdate(loss, tau=0.1)


def hard(loss):
    return HardUpdate(loss, value_network_update_interval=3)


def adam(params):
    return optim.Adam(params, lr=1e-3)


def two_steps(make_optimizer=adam, make_updater=soft, schedule=False, **options):
    """Plain steps of the same weights."""
    torch._dynamo.reset()
    loss, steps = make_loss().double(), []
    for each in (loss, copy.deepcopy(loss)):
        optimizer, updater = make_optimizer(each.parameters()), make_updater(each)
        scheduler = LambdaLR(optimizer, lambda n: 0.9**n) if schedule else None
        steps.append(IQLStep(each, optimizer, updater, lr_scheduler=scheduler, **options))
    return steps


def plain_and_traced(*backend):
    plain, other = two_steps()
    return plain, traced(other, *backend)


def train(plain, fast, updates):
    for number in range(updates):
        torch.manual_seed(number)
        batch = make_batch(dtype=torch.float64)
        # the optimizer's state is made in the first update: from the second on, nothing is new
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            metrics = plain(batch.clone()), fast(batch.clone())
    return metrics


CASES = {
    "one graph": {"schedule": True, "max_grad_norm": 0.5},
    "hard target": {
        "make_optimizer": lambda p: optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        "make_updater": hard,
        "order": "simultaneous",
    },
}


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ("one graph", "aot_eager"),
        pytest.param("hard target", "aot_eager", marks=pytest.mark.slow),
        pytest.param("one graph", "inductor", marks=pytest.mark.slow),
        pytest.param("hard target", "inductor", marks=pytest.mark.slow),
    ],
)
def test_equals_the_plain_step_but_for_rounding(case, backend):
    plain, other = two_steps(**CASES[case])
    fast = compiled(other, **({} if backend == "inductor" else {"backend": backend}))
    a, b = train(plain, fast, 12)
    assert_same_state(plain.loss, fast.loss, **CLOSE)
    assert_same_metrics(b, a, rtol=1e-9, atol=1e-11)
    assert_same_optimizers(plain.optimizer, fast.optimizer, rtol=1e-9, atol=1e-12)
    if case == "one graph":  # loaded state is used, and a plain step goes on from a compiled one's
        fast.load_state_dict(copy.deepcopy(plain.state_dict()))
        fast.loss.load_state_dict(plain.loss.state_dict())
        train(plain, fast, 3)
        assert_same_state(plain.loss, fast.loss, **CLOSE)


def test_the_default_estimator_is_made_before_the_update_is_traced(monkeypatch):
    torch._dynamo.reset()
    fast = traced(make_step())

    def too_late(self):
        raise AssertionError("made inside of the update, where torch 2.11 cannot trace it")

    monkeypatch.setattr(IQLLoss, "_default_value_estimator", too_late)
    metrics = fast(make_batch())
    assert metrics["loss_qvalue"].isfinite()


OTHER_OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=1e-3, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=1e-3, amsgrad=True),
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_any_other_optimizer_runs_eagerly_and_one_log_line_says_so(name, caplog):
    loss = make_loss()
    step = IQLStep(loss, OTHER_OPTIMIZERS[name](loss.parameters()), soft(loss))
    with caplog.at_level("WARNING", logger="torchrl"):
        logger.addHandler(caplog.handler)
        try:
            fast = compiled(step)
        finally:
            logger.removeHandler(caplog.handler)
    assert fast is step
    (line,) = caplog.messages
    assert line.startswith(f"{name} is not compiled: updates run eagerly.")


def test_settings_of_a_compiled_step_are_the_plain_steps():
    step = make_step()
    fast = compiled(step)
    assert fast.plain is step
    assert compiled(fast).plain is step
    for name, value in (
        ("order", "simultaneous"),
        ("max_grad_norm", 0.5),
        ("independent_ranks", True),
        ("target_updater", None),
    ):
        setattr(fast, name, value)
        assert getattr(step, name) == value == getattr(fast, name)
    assert fast.loss is step.loss
    assert fast.state_dict().keys() == step.state_dict().keys()
    assert set(vars(fast)) == {"_plain", "_update", "_program"}  # no copy of the step's
    with pytest.raises(TypeError, match="a copied IQLStep would train nothing"):
        copy.deepcopy(fast)


def traced(step, backend=lambda graph, _: graph.forward):
    """``compiled``, guards and all, but for Inductor: what was traced is run as it is."""
    options = {"guard_filter_fn": worth_checking}
    return CompiledStep(step, {"fullgraph": True, "backend": backend, "options": options})


SHARPNESS = 1.0


def sharp(advantage):
    return (SHARPNESS * advantage).exp().clamp(max=100.0)


def twice_as_sharp(advantage):
    return (2 * advantage).exp().clamp(max=100.0)


CHOSEN = sharp


def chosen(advantage):
    return CHOSEN(advantage)


@pytest.mark.parametrize("function", [sharp, chosen])
def test_a_changed_global_of_a_users_function_is_noticed(function, monkeypatch):
    """A number, and another function; without guards the first value would stay in the program."""
    torch._dynamo.reset()
    objective, advantage = AdvantageWeighted(weight=function), torch.randn(32)
    options = {"guard_filter_fn": worth_checking}
    fast = torch.compile(objective.weight_of, backend="eager", fullgraph=True, options=options)
    for change in ({}, {"SHARPNESS": 3.0} if function is sharp else {"CHOSEN": twice_as_sharp}):
        for name, value in change.items():
            monkeypatch.setitem(globals(), name, value)
        torch.testing.assert_close(fast(advantage), objective.weight_of(advantage))


def test_guards_are_filtered_beside_the_users_options(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda program, **options: given.append(options))
    step = make_step()
    own, right = {"max_autotune": True}, {"_post_fusion_custom_pass": untiled_loops_only()}
    options = [{}, {"options": own}, {"mode": "default"}, {"backend": "eager"}]
    for each in (*options, {"mode": None}, {"backend": "inductor"}):
        compiled(step, **each)
    plain, with_options, with_mode, with_backend, *others = given
    for each in others:
        assert "mode" not in each
        assert each["options"].keys() >= {*right, "guard_filter_fn"}
    for each in (plain, with_options):
        assert each["options"].pop("guard_filter_fn").__wrapped__ is worth_checking
    assert plain["options"] == {"triton.cudagraphs": False, "cpp_wrapper": True, **right}
    assert with_options["options"] == {**right, **own}
    assert own == {"max_autotune": True}  # of which torch.compile takes entries out
    assert with_mode["options"].pop("guard_filter_fn").__wrapped__ is worth_checking
    assert with_mode == {
        "fullgraph": True,
        "options": right,
    }  # torch refuses both, mode and options
    assert with_backend == {"fullgraph": True, "backend": "eager"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "reduce-overhead"}, "mode is 'reduce-overhead', with which torch.compile rec"),
        ({"mode": "max-autotune"}, "mode is 'max-autotune'"),
        ({"options": {"triton.cudagraphs": True}}, "'triton.cudagraphs' is True"),
    ],
)
def test_cuda_graphs_of_torch_compile_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        compiled(make_step(), **options)
    assert "captured(step, replay, updates=K)" in str(caught.value)


SOME_CHANGES = ("temperature", "objective", "frozen")


@pytest.mark.parametrize(
    "names",
    [SOME_CHANGES, pytest.param(tuple(CHANGES), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_change_is_seen_despite_the_fewer_guards(names):
    """One change after another, each done to both steps."""
    plain, fast = plain_and_traced()
    with torch._dynamo.config.patch(recompile_limit=64):
        for name in (None, *names):
            for step in (plain, fast) if name else ():
                CHANGES[name](step)
            for _ in range(2):
                batch = make_batch(dtype=torch.float64)
                batch["next", "other"] = 3 * batch["next", "reward"]
                plain(batch.clone())
                fast(batch.clone())
            assert_same_state(plain.loss, fast.loss, **CLOSE, after=name)


@pytest.mark.slow
def test_batches_of_other_shapes_and_with_a_mask():
    plain, fast = plain_and_traced()
    shapes = ((32,), (48,), (40,), (4, 6), (32,), (32,))
    batches = [make_batch(*shape, dtype=torch.float64) for shape in shapes]
    batches[-2]["collector", "mask"] = torch.rand(32) < 0.5
    batches[-1]["priority_weight"] = torch.rand(32, dtype=torch.float64)
    for batch in batches:
        plain(batch.clone())
        fast(batch)
    assert_same_state(plain.loss, fast.loss, **CLOSE)


@pytest.mark.parametrize(
    "name", ["actor_network", pytest.param("value_network", marks=pytest.mark.slow)]
)
def test_modes_are_followed(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    loss = IQLLoss(*make_networks(dropout=0.5))
    fast = traced(IQLStep(loss, optim.Adam(loss.parameters(), lr=0.0), None))
    for other in {"actor_network", "qvalue_network", "value_network"} - {name}:
        getattr(loss, other).eval()
    batch = make_batch()
    key = f"loss_{name.split('_')[0]}"

    def losses():
        return {float(fast(batch.clone())[key]) for _ in range(3)}

    assert len(losses()) == 3
    getattr(loss, name).eval()
    assert len(losses()) == 1
    getattr(loss, name).train()
    assert len(losses()) == 3


def squared(actor, batch):
    action = actor(batch.select("observation"))["action"]
    return (action - batch["action"]).square().sum(-1)


def log_normal():
    """A policy whose mean ``exp(m + s**2 / 2)`` is not its mode ``exp(m - s**2)``."""
    layers = nn.Sequential(nn.Linear(OBS, 2 * ACT), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(layers, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=LogNormal,
    )


class LogNormal(torch.distributions.Independent):
    def __init__(self, loc, scale):
        super().__init__(torch.distributions.LogNormal(loc, scale), 1)


def test_another_mode_of_the_policys_actions_is_followed():
    torch._dynamo.reset()
    actor = log_normal()
    loss = IQLLoss(actor, *make_networks()[1:], actor_objective=squared, temperature=0.0)
    fast = traced(IQLStep(loss, optim.Adam(loss.parameters(), lr=0.0), None))
    batch = make_batch()
    dist = actor.get_dist(batch.clone())
    for mode, action in (
        (ExplorationType.MODE, dist.base_dist.mode),
        (ExplorationType.MEAN, dist.mean),
        (ExplorationType.MODE, dist.base_dist.mode),
    ):
        loss.deterministic_sampling_mode = mode
        expected = (action - batch["action"]).square().sum(-1).mean()
        torch.testing.assert_close(fast(batch.clone())["loss_actor"], expected.detach())


def test_an_annealed_temperature_is_followed_by_one_program():
    programs = []
    plain, fast = plain_and_traced(lambda graph, _: programs.append(graph) or graph.forward)
    for number in range(100):
        torch.manual_seed(number)
        batch = make_batch(8, dtype=torch.float64)
        for step in (plain, fast):
            step.loss.temperature = 10 * 0.9**number
        expected = plain(batch.clone())["loss_actor"]
        torch.testing.assert_close(fast(batch)["loss_actor"], expected, rtol=1e-9, atol=1e-11)
    assert len(programs) == 1
    assert_same_state(plain.loss, fast.loss, **CLOSE)


def test_the_tenth_compilation_is_logged(monkeypatch):
    said = []
    monkeypatch.setattr(compiled_module.torchrl_logger, "warning", said.append)
    keep = counted(lambda guards: [True for _ in guards])
    for _ in range(9):
        assert keep(["guard"]) == [True]
    assert said == []
    keep([])
    assert "compiled for the 10th time" in said[0]
    assert "TORCH_LOGS=recompiles" in said[0]


# -- programs for devices on which every kernel is launched --------------------------------------------


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_the_update_for_a_gpu_equals_the_plain_one(order, monkeypatch):
    """Traced on the CPU as for a GPU: norms of joined gradients."""
    monkeypatch.setattr(arithmetic, "LAUNCHING", ("cpu",))
    plain, other = two_steps(lambda p: optim.AdamW(p, lr=1e-2), order=order, max_grad_norm=0.1)
    fast = compiled(other, backend=lambda graph, _: graph.forward)
    for number in range(3):
        torch.manual_seed(number)
        batch = make_batch(dtype=torch.float64)
        plain(batch.clone())
        fast(batch)
    assert_same_state(plain.loss, other.loss, **CLOSE)


def test_options_by_device():
    small, large = [torch.zeros(UNSPLIT)], [torch.zeros(UNSPLIT + 1)]
    assert program_options(torch.device("cpu"), large) == {
        "triton.cudagraphs": False,
        "cpp_wrapper": True,
        "_post_fusion_custom_pass": untiled_loops_only(),
    }
    for_cuda = program_options(torch.device("cuda"), large)
    assert for_cuda["combo_kernels"]
    assert for_cuda["combo_kernels_pointwise_only"]
    assert "cpp_wrapper" not in for_cuda
    assert "split_reductions" not in for_cuda
    assert program_options(torch.device("cuda", 1), small) == {
        **for_cuda,
        "split_reductions": False,
    }
    assert program_options(torch.device("meta"), small) == {"triton.cudagraphs": False}


def test_a_torch_without_the_pass_for_right_numbers_is_said_in_the_log(monkeypatch):
    said = []
    monkeypatch.setattr(compiled_module.torchrl_logger, "warning", said.append)
    compiled_module._log_once.cache_clear()
    monkeypatch.setattr(compiled_module, "inductor_settings", set)
    assert program_options(torch.device("cpu"), [torch.ones(1)]) == {}
    assert program_options(torch.device("cpu"), [torch.ones(1)]) == {}
    assert len(said) == 1
    assert "lacks the Inductor pass" in said[0]
    assert "185702" in said[0]


def test_an_option_that_this_torch_lacks_is_left_out(monkeypatch):
    monkeypatch.setitem(JOINED, "an_option_of_another_version", 1)
    assert "an_option_of_another_version" not in program_options(
        torch.device("cuda"), [torch.ones(1)]
    )
