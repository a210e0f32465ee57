"""``compiled``: the plain step's parameters and states, without compiling again."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import OBS, make_batch, make_networks
from test_step import make_loss, snapshot
from torch import optim
from torch.optim.lr_scheduler import LambdaLR
from torchrl import logger
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators

from iql_torchrl import IQLLoss, IQLStep, compiled, networks
from iql_torchrl.private_apis import untiled_loops_only
from iql_torchrl.update.compiled import CompiledStep, worth_checking


def pair(dtype, make_optimizer, make_updater, schedule, backend="inductor", **options):
    """A plain and a compiled step of the same weights."""
    torch._dynamo.reset()
    loss = make_loss().to(dtype)
    steps = []
    for each in (loss, copy.deepcopy(loss)):
        optimizer = make_optimizer(each.parameters())
        scheduler = LambdaLR(optimizer, lambda n: 0.9**n) if schedule else None
        updater = make_updater(each)
        steps.append(IQLStep(each, optimizer, updater, lr_scheduler=scheduler, **options))
    traced = {} if backend == "inductor" else {"backend": backend}
    return steps[0], compiled(steps[1], **traced)


def soft(loss):
    return SoftUpdate(loss, tau=0.1)


def hard(loss):
    return HardUpdate(loss, value_network_update_interval=3)


def train(plain, fast, updates, dtype):
    for number in range(updates):
        torch.manual_seed(number)
        batch = make_batch(dtype=dtype)
        # the optimizer's state is made in the first update: from the second on, nothing is new
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            metrics = plain(batch.clone()), fast(batch.clone())
    return metrics


CASES = {
    "one graph": (lambda p: optim.Adam(p, lr=1e-3), soft, True, {"max_grad_norm": 0.5}),
    "hard target": (
        lambda p: optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        hard,
        False,
        {"order": "simultaneous"},
    ),
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
    make_optimizer, make_updater, schedule, options = CASES[case]
    plain, fast = pair(
        torch.float64, make_optimizer, make_updater, schedule, backend=backend, **options
    )
    a, b = train(plain, fast, 12, torch.float64)
    mine, theirs = snapshot(plain.loss), snapshot(fast.loss)
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-10, atol=1e-12, msg=name)
    for name in a.keys():  # noqa: SIM118
        torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=1e-11, msg=name)
    states = [step.optimizer.state_dict() for step in (plain, fast)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, one in states[0]["state"].items():
        other = states[1]["state"][number]
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-12)
    if case == "one graph":  # loaded state is used, and a plain step goes on from a compiled one's
        fast.load_state_dict(copy.deepcopy(plain.state_dict()))
        fast.loss.load_state_dict(plain.loss.state_dict())
        train(plain, fast, 3, torch.float64)
        for name, value in snapshot(plain.loss).items():
            torch.testing.assert_close(snapshot(fast.loss)[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_a_thousand_updates(order):
    """In float64: a ReLU whose input is near zero may differ between two roundings, and in float32
    that grows to 1e-2 of a parameter within 1,000 updates, on some processors."""
    plain, fast = pair(torch.float64, lambda p: optim.Adam(p, lr=1e-3), soft, False, order=order)
    train(plain, fast, 1000, torch.float64)
    mine, theirs = snapshot(plain.loss), snapshot(fast.loss)
    for name, value in mine.items():
        assert (theirs[name] - value).abs().max() <= 1e-10 * value.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_updates_in_single_precision(order):
    plain, fast = pair(torch.float32, lambda p: optim.Adam(p, lr=1e-3), soft, False, order=order)
    train(plain, fast, 10, torch.float32)
    mine, theirs = snapshot(plain.loss), snapshot(fast.loss)
    for name, value in mine.items():
        assert (theirs[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_the_default_estimator_is_made_before_the_update_is_traced(monkeypatch):
    torch._dynamo.reset()
    loss = make_loss()
    fast = traced(IQLStep(loss, optim.Adam(loss.parameters()), soft(loss)))

    def too_late(self):
        raise AssertionError("made inside of the update, where torch 2.11 cannot trace it")

    monkeypatch.setattr(IQLLoss, "_default_value_estimator", too_late)
    metrics = fast(make_batch())
    assert metrics["loss_qvalue"].isfinite()


def test_a_frozen_network_rests():
    torch._dynamo.reset()
    actor, critic, value = make_networks()
    loss = IQLLoss(actor, [critic, make_networks()[1]], value)
    loss.value_network_params.requires_grad_(False)
    before = snapshot(loss)
    trainable = [p for p in loss.parameters() if p.requires_grad]
    step = IQLStep(loss, optim.Adam(trainable), SoftUpdate(loss, tau=0.1))
    fast = compiled(step, backend="aot_eager")
    fast(make_batch())
    after = snapshot(loss)
    moved = {name.split("_")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"actor", "qvalue", "target"}


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
    loss = make_loss()
    step = IQLStep(loss, optim.Adam(loss.parameters()), soft(loss))
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
    assert fast.loss is loss
    assert fast.state_dict().keys() == step.state_dict().keys()
    assert set(vars(fast)) == {"_plain", "_update", "_program"}  # no copy of the step's
    with pytest.raises(TypeError, match="a copied IQLStep would train nothing"):
        copy.deepcopy(fast)


def traced(step):
    """``compiled``, guards and all, but for Inductor: what was traced is run as it is."""
    options = {"guard_filter_fn": worth_checking}
    return CompiledStep(
        step, {"fullgraph": True, "backend": lambda graph, _: graph.forward, "options": options}
    )


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
    loss = make_loss(advantage_weight=function)
    batch, advantage = loss.read(make_batch()), torch.randn(32)
    options = {"guard_filter_fn": worth_checking}
    fast = torch.compile(loss.weight_of, backend="eager", fullgraph=True, options=options)
    for change in ({}, {"SHARPNESS": 3.0} if function is sharp else {"CHOSEN": twice_as_sharp}):
        for name, value in change.items():
            monkeypatch.setitem(globals(), name, value)
        expected = loss.weight_of(advantage, batch)
        torch.testing.assert_close(fast(advantage, batch), expected)


def test_programs_that_share_options_are_each_filtered():
    """torch.compile takes ``guard_filter_fn`` out of the dict that it is given."""
    torch._dynamo.reset()
    filtered = []

    def counting(guards):
        filtered.append(len(guards))
        return worth_checking(guards)

    options = {"guard_filter_fn": counting}
    for number in range(2):
        loss = make_loss()
        step = IQLStep(loss, optim.Adam(loss.parameters()), soft(loss))
        backend = lambda graph, _, **__: graph.forward  # noqa: E731
        compiled(step, backend=backend, options=options)(make_batch())
        assert len(filtered) == number + 1
        assert options == {"guard_filter_fn": counting}


def test_guards_are_filtered_beside_the_users_options(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda program, **options: given.append(options))
    loss = make_loss()
    step = IQLStep(loss, optim.Adam(loss.parameters()), soft(loss))
    own, right = {"max_autotune": True}, {"_post_fusion_custom_pass": untiled_loops_only()}
    for options in ({}, {"options": own}, {"mode": "default"}, {"backend": "eager"}):
        compiled(step, **options)
    plain, with_options, with_mode, with_backend = given
    for each in (plain, with_options):
        assert each["options"].pop("guard_filter_fn").__wrapped__ is worth_checking
    assert plain["options"] == {
        "triton.cudagraphs": False,
        "cpp_wrapper": True,
        **right,
    }
    assert with_options["options"] == {**right, **own}
    assert own == {"max_autotune": True}
    assert with_mode == {"fullgraph": True, "mode": "default"}
    assert with_backend == {"fullgraph": True, "backend": "eager"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mode": "reduce-overhead"},
            "mode is 'reduce-overhead', with which torch.compile records",
        ),
        ({"mode": "max-autotune"}, "mode is 'max-autotune'"),
        ({"options": {"triton.cudagraphs": True}}, "'triton.cudagraphs' is True"),
    ],
)
def test_cuda_graphs_of_torch_compile_are_refused(options, message):
    loss = make_loss()
    step = IQLStep(loss, optim.Adam(loss.parameters()), soft(loss))
    with pytest.raises(ValueError, match=message) as caught:
        compiled(step, **options)
    assert "captured(step, replay, updates=K)" in str(caught.value)


def squared(actor, batch):
    return (actor.get_dist(batch).mean - batch["action"]).square().sum(-1)


def absolute(actor, batch):
    return (actor.get_dist(batch).mean - batch["action"]).abs().sum(-1)


def another_state(step):
    state = step.loss.state_dict()
    step.loss.load_state_dict({n: v * 1.1 if "params" in n else v for n, v in state.items()})


def to_loss(name, value):
    return lambda step: setattr(step.loss, name, value)


def to_group(**options):
    return lambda step: step.optimizer.param_groups[0].update(options)


CHANGES = {
    "temperature": to_loss("temperature", 0.5),
    "discount": lambda step: step.loss.make_value_estimator(gamma=0.5),
    "estimator": lambda step: step.loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.5),
    "a function": to_loss("actor_objective", squared),
    "another function": to_loss("actor_objective", absolute),
    "no function": to_loss("actor_objective", "log_prob"),
    "frozen": lambda step: step.loss.value_network_params.requires_grad_(False),
    "free again": lambda step: step.loss.value_network_params.requires_grad_(True),
    "keys": lambda step: step.loss.set_keys(reward="other"),
    "ceiling": to_loss("max_weight", 1.0),
    "value objective": to_loss("value_objective", "quantile"),
    "reduction": to_loss("reduction", "sum"),
    "clipping": lambda step: setattr(step, "max_grad_norm", 0.01),
    "order": lambda step: setattr(step, "order", "simultaneous"),
    "targets": lambda step: setattr(step.target_updater, "eps", 0.5),
    "betas": to_group(betas=(0.5, 0.9)),
    "decay": to_group(weight_decay=0.5),
    "rate": to_group(lr=0.1),
    "weights": another_state,
}


def plain_and_traced():
    loss = make_loss().double()
    plain, fast = (
        IQLStep(each, optim.Adam(each.parameters(), lr=1e-3), soft(each))
        for each in (loss, copy.deepcopy(loss))
    )
    return plain, traced(fast)


SOME_CHANGES = ("temperature", "another function", "frozen")


@pytest.mark.parametrize(
    "names",
    [SOME_CHANGES, pytest.param(tuple(CHANGES), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_change_is_seen_despite_the_fewer_guards(names):
    """One change after another, each done to both steps."""
    torch._dynamo.reset()
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
            for key, value in snapshot(plain.loss).items():
                torch.testing.assert_close(
                    snapshot(fast.loss)[key], value, rtol=1e-10, atol=1e-12, msg=f"{name}: {key}"
                )


@pytest.mark.slow
def test_batches_of_other_shapes_and_with_a_mask():
    torch._dynamo.reset()
    plain, fast = plain_and_traced()
    masked = make_batch(dtype=torch.float64)
    masked["collector", "mask"] = torch.rand(32) < 0.5
    weighted = make_batch(dtype=torch.float64)
    weighted["priority_weight"] = torch.rand(32, dtype=torch.float64)
    for shape in ((32,), (48,), (40,), (4, 6)):
        batch = make_batch(*shape, dtype=torch.float64)
        plain(batch.clone())
        fast(batch.clone())
    for batch in (masked, weighted):
        plain(batch.clone())
        fast(batch.clone())
    for key, value in snapshot(plain.loss).items():
        torch.testing.assert_close(snapshot(fast.loss)[key], value, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.slow
def test_many_compiled_steps_in_one_process():
    torch._dynamo.reset()
    alive = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            loss = make_loss()
            step = IQLStep(loss, optim.Adam(loss.parameters()), soft(loss))
            alive.append(compiled(step, backend="eager"))
            for _ in range(2):
                alive[-1](make_batch())


@pytest.mark.parametrize(
    "name", ["actor_network", pytest.param("value_network", marks=pytest.mark.slow)]
)
def test_modes_are_followed(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    actor, critic, value = make_networks()
    nets = {"actor_network": actor[0].module, "value_network": value.module}
    nets[name].mlp = networks.MLP(OBS, nets[name].mlp[-1].out_features, dropout=0.5)
    loss = IQLLoss(actor, critic, value)
    step = IQLStep(loss, optim.Adam(loss.parameters(), lr=0.0), None)
    fast = traced(step)
    batch = make_batch()
    key = f"loss_{name.split('_')[0]}"

    def losses():
        return {float(fast(batch.clone())[key]) for _ in range(3)}

    assert len(losses()) == 3
    getattr(loss, name).eval()
    assert len(losses()) == 1
    getattr(loss, name).train()
    assert len(losses()) == 3
