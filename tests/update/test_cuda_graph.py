"""CUDA graphs without a GPU: ``captured`` on a fake of torch.cuda that checks the order of calls."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from changes import CHANGES, set_all
from fake_cuda import FakeCuda
from small_losses import assert_same_leaves
from test_capture import (  # noqa: F401 (fixtures)
    Pair,
    buffer_of,
    by_group,
    groups,
    hard,
    make_loss,
    table,
    untraced,
    with_other_reward,
)
from torch import optim
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLStep, captured
from iql_torchrl.data import DeviceSampler
from iql_torchrl.update.captured import CapturedStep, CudaGraph

WARM_UP = ["own waits", "current waits"]
CAPTURE = ["register", "begin", "end"]
SECOND = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def fused(params):
    return optim.Adam(params, lr=1e-3, fused=True)


def pair_of(**options) -> Pair:
    return Pair(**{"optimizer": fused, "schedule": by_group, **options})


# -- the graph alone ---------------------------------------------------------------------------------


class Work:
    """``total += draw``, with a draw of its own each time."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.total = torch.zeros(3)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        self.cuda.note("work")
        self.total += torch.rand(3, generator=self.generator)


def test_work_runs_once_as_it_is_then_is_recorded_then_replayed(cuda):
    graph, work = CudaGraph(SECOND), Work(cuda)
    draws = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    graph.record(work, work.generator, "same")
    assert cuda.names() == []
    graph.run(work)
    assert cuda.names() == ["own waits", "work", "current waits"]
    graph.record(work, work.generator, "same")
    assert torch.equal(work.total, draws[0])  # a capture executes nothing
    graph.record(work, work.generator, "same")
    for _ in range(3):
        graph.run(work)
    assert cuda.names(3) == ["register", "begin", "work", "end", "replay", "replay", "replay"]
    torch.testing.assert_close(work.total, draws.sum(0))
    assert {event.device for event in cuda.events} == {SECOND}
    work_streams = {event.stream for event in cuda.events if event.what in ("work", "begin", "end")}
    assert len(work_streams) == 1
    assert work_streams.pop().device == SECOND
    assert {e.stream for e in cuda.events if e.what == "replay"} == {cuda.default_stream}
    assert (cuda.device, cuda.stream) == (torch.device("cuda", 0), cuda.default_stream)


def test_the_stream_stays_when_other_work_is_recorded(cuda):
    graph, work = CudaGraph(SECOND), Work(cuda)
    for fixed in ("one", "other"):
        for _ in range(3):
            graph.record(work, work.generator, fixed)
            graph.run(work)
    names = ["own waits", "work", "current waits", "register", "begin", "work", "end"]
    assert cuda.names() == [*names, "replay", "replay", "reset", *names, "replay", "replay"]
    assert len({event.stream for event in cuda.events if event.what == "begin"}) == 1
    assert len(cuda.streams) == 2  # the default one, and this graph's


@pytest.mark.parametrize("where", ["inside", "end"])
def test_a_failed_capture_leaves_everything_and_may_be_tried_again(cuda, where):
    graph, work = CudaGraph(SECOND), Work(cuda)
    graph.record(work, work.generator, "same")
    graph.run(work)
    total, state = work.total.clone(), work.generator.get_state()

    def wrong() -> None:
        work()
        if where == "inside":
            work.total.sum().item()

    if where == "end":
        cuda.end_fails = RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError, match=r"capture|capturing"):
        graph.record(wrong, work.generator, "same")
    assert torch.equal(work.total, total)
    assert torch.equal(work.generator.get_state(), state)
    assert not cuda.captured_by
    assert (cuda.device, cuda.stream) == (torch.device("cuda", 0), cuda.default_stream)
    graph.record(work, work.generator, "same")
    graph.run(work)
    assert cuda.names()[-4:] == ["begin", "work", "end", "replay"]
    draws = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(work.total, draws.sum(0))


def test_the_fake_refuses_what_a_device_refuses(cuda):
    """Otherwise the tests here could not fail."""
    work, other = Work(cuda), torch.Generator()
    graph = CudaGraph(SECOND)
    graph.record(work, other, None)
    graph.run(work)
    with pytest.raises(RuntimeError, match="generator that is not registered"):
        graph.record(work, other, None)
    stream = torch.cuda.Stream(SECOND)
    one, two = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="of another device"),
        torch.cuda.graph(one, stream=stream),
    ):
        pass
    with pytest.raises(RuntimeError, match="without a preceding"):
        one.replay()
    with torch.cuda.device(SECOND):
        for each in (one, two):
            with torch.cuda.graph(each, stream=stream):
                work.total.mul_(2)
        one.reset()
        with pytest.raises(RuntimeError, match="workspace is gone"):
            two.replay()


# -- captured steps ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_replays_equal_the_plain_step(cuda, order):
    pair = pair_of(order=order, max_grad_norm=0.1)
    calls = []
    for _ in range(4):
        start = len(cuda.events)
        pair.run(1)
        calls.append(cuda.names(start))
    assert calls == [WARM_UP, [*CAPTURE, "replay"], ["replay"], ["replay"]]
    device = pair.call.step.device
    assert {event.device for event in cuda.events} == {device}
    own = {event.stream for event in cuda.events if event.what == "begin"}
    assert cuda.default_stream not in own
    assert {stream.device for stream in own} == {device}


CASES = {
    "hard target every 10": {"updater": hard(9)},
    "no schedule": {"schedule": None},
    "rates that are tensors": {
        "optimizer": lambda p: optim.Adam(
            p, lr=torch.tensor(1e-3, dtype=torch.float64), fused=True
        ),
        "schedule": lambda o: CosineAnnealingLR(o, 40),
    },
    "one update a call": {"updates": 1},
}


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("case", CASES)
def test_more_replays_equal_the_plain_step(cuda, case):
    pair = pair_of(**CASES[case])
    for _ in range(20 // pair.call.updates):
        pair.run(1)
    assert cuda.captures() == 1


@pytest.mark.usefixtures("untraced")
def test_what_a_graph_has_fixed_makes_another_and_replays_are_right(cuda):
    pair = pair_of(data=with_other_reward(), updates=2)
    pair.run(3)
    changes = dict(CHANGES)
    del changes["a group's rate"]  # the schedule sets it
    del changes["estimator"]  # of trajectories: eagerly it reads on the host where they end
    # tensors that are written to in place, which a replay reads
    for name in ("clip", "temperature", "loaded weights"):
        pair.both(changes.pop(name))
        pair.run(1)
    assert cuda.captures() == 1
    changes["no schedule"] = lambda step: setattr(step, "lr_schedulers", ())
    for name, change in changes.items():
        start, captures = len(cuda.events), cuda.captures()
        pair.both(change)
        try:
            for _ in range(3):
                pair.run(1)
        except Exception as error:
            raise AssertionError(f"after a change of {name}") from error
        assert cuda.names(start) == ["reset", *WARM_UP, *CAPTURE, "replay", "replay"], name
        assert cuda.captures() == captures + 1, name
    captures = cuda.captures()
    for rate in (0.01, 0.02):
        pair.both(set_all("lr", rate))
        pair.run(1)
    assert cuda.captures() == captures
    pair.call.recapture()
    pair.run(2)
    assert cuda.captures() == captures + 1


MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
SURROUNDINGS = {
    "precision": (MATMUL, "fp32_precision", "tf32"),
    "reduced sums": (MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "reduced sums of half": (MATMUL, "allow_fp16_reduced_precision_reduction", False),
    "determinism": (CUDNN, "deterministic", True),
    "search": (CUDNN, "benchmark", True),
}


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_settings_of_torch_that_choose_kernels_make_another_graph(cuda, name):
    pair = pair_of()
    pair.run(3)
    owner, attribute, value = SURROUNDINGS[name]
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        pair.run(3)
        assert cuda.captures() == 2
    finally:
        setattr(owner, attribute, before)
    pair.run(3)
    assert cuda.captures() == 3


@pytest.mark.usefixtures("untraced")
def test_other_modes_and_other_rows_make_another_graph(cuda):
    loss = make_loss(dropout=0.5)
    step = IQLStep(loss, fused(groups(loss)), SoftUpdate(loss, tau=0.1))
    buffer = buffer_of(table(), capacity=150, seed=0)
    call = captured(step, buffer, updates=2)

    def write():
        buffer.extend(table(20, seed=1))

    actor = loss.actor_network
    for number, change in enumerate([lambda: None, actor.eval, actor.train, write]):
        change()
        for _ in range(3):
            call()
        assert cuda.captures() == number + 1
    assert call._rows().rows == 120


def state_of(pair: Pair):
    step = pair.call.step
    state = {"step": step.state_dict(), "loss": dict(step.loss.state_dict())}
    return copy.deepcopy(state) | {
        "generator": pair.call.replay.generator.get_state(),
        "counter": getattr(step.target_updater, "counter", None),
        "rates": [group["lr"] for group in step.optimizer.param_groups],
    }


@pytest.mark.usefixtures("cuda")
def test_a_data_parallel_step_is_refused_with_what_to_use():
    loss = make_loss()
    step = IQLStep(loss, fused(loss.parameters()), SoftUpdate(loss, tau=0.005))
    step.ranks = SimpleNamespace(rank=0, size=4)
    match = r"data parallel over 4 ranks, and sums over GPUs .* use compiled\(step\)"
    with pytest.raises(ValueError, match=match):
        captured(step, DeviceSampler(table(), 8, seed=0))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": lambda p: optim.Adam(p)}, "counts its updates on the CPU"),
        ({"updater": hard(8)}, "every 9 updates, next after 9, and a call makes 5"),
        (
            {"updater": lambda loss: type("Mine", (SoftUpdate,), {})(loss, tau=0.1)},
            "a Mine moves the targets in Python",
        ),
    ],
)
def test_what_a_cuda_graph_cannot_hold_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pair_of(**options)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("where", ["inside", "end"])
@pytest.mark.parametrize("updater", ["soft", "hard"])
def test_nothing_advances_when_a_capture_raises(cuda, where, updater, monkeypatch):
    options = {"updater": hard(9)} if updater == "hard" else {}
    pair = pair_of(**options)
    pair.run(1)
    before = state_of(pair)
    update = CapturedStep._one_update
    for _ in range(2):
        if where == "end":
            cuda.end_fails = RuntimeError("operation failed due to a previous error in capture")
        else:
            monkeypatch.setattr(CapturedStep, "_one_update", lambda *given: (update(*given), 1 / 0))
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            pair.call()
        assert_same_leaves(before, state_of(pair))
    monkeypatch.setattr(CapturedStep, "_one_update", update)
    pair.run(3)
    assert cuda.names()[-3:] == ["replay"] * 3


@pytest.mark.usefixtures("untraced")
def test_nothing_advances_when_a_check_raises(cuda):
    pair = pair_of(updater=hard(9))
    pair.run(2)
    pair.both(lambda step: step.target_updater.step())
    before = state_of(pair)
    with pytest.raises(ValueError, match="every 10 updates, next after 9, and a call makes 5"):
        pair.call()
    assert_same_leaves(before, state_of(pair))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("tensors", [False, True])
def test_a_refused_schedule_has_not_advanced(tensors):
    rate = torch.tensor(1e-3, dtype=torch.float64) if tensors else 1e-3
    pair = Pair(
        optimizer=lambda p: optim.Adam(p, lr=rate, fused=True),
        schedule=lambda o: OneCycleLR(o, 1e-2, total_steps=100),
    )
    pair.call.step.loss.make_value_estimator(gamma=0.99)  # otherwise the first update makes it
    before = state_of(pair)
    for _ in range(2):
        with pytest.raises(ValueError, match="cycle_momentum=False"):
            pair.call()
        after = state_of(pair)
        before["step"]["optimizer"]["state"] = after["step"]["optimizer"]["state"]  # made: zeros
        assert_same_leaves(before, after)
    assert all(float(s["step"]) == 0 for s in after["step"]["optimizer"]["state"].values())
