"""Populations compiled and captured: the same runs, and the same as each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_losses import assert_same_metrics
from small_populations import (
    CASES,
    MEMBERS,
    OBJECTIVES,
    Beside,
    assert_close,
    configs,
    dataset,
    double,
)

from iql_torchrl import IQLPopulation, captured, compiled
from iql_torchrl.data.replay import MemberSampler


@pytest.mark.parametrize(
    "compiler", ["uncompiled", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_captured_updates_equal_the_runs_alone(compiler, request):
    torch._dynamo.reset()
    if compiler == "uncompiled":
        request.getfixturevalue(compiler)
    data, settings = dataset(), configs(MEMBERS[1:3], max_grad_norm=0.5, schedule="cosine")
    beside = Beside(settings, data, "own")
    population = beside.population
    sampler = MemberSampler(data.transitions, 16, members=2, seed=settings[0].seed)
    call = captured(population.step, population.sampler, updates=4)
    for _ in range(3):
        beside.train_captured(call, sampler)
    beside.assert_equal()
    population.loss.expectile[0] = beside.agents[0].loss.expectile = 0.6
    population.loss.temperature[1] = beside.agents[1].loss.temperature = 1.5
    beside.train_captured(call, sampler)
    beside.assert_equal()
    population.step.load_state_dict(population.step.state_dict())  # new tensors
    beside.train_captured(call, sampler)
    beside.assert_equal()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", ["flow", pytest.param("conditioned flow", marks=pytest.mark.slow)])
def test_captured_updates_of_flows_draw_after_the_rows(case):
    def drawn(rows, generator):
        rows["flow_noise"] = torch.empty(3, 16, 2).double().normal_(generator=generator)
        for name in ("flow_time", "flow_drop")[: 1 if case == "flow" else 2]:
            rows[name] = torch.empty(3, 16).double().uniform_(generator=generator)
        return rows

    data, settings = dataset(), configs(**OBJECTIVES[case][1])
    beside = Beside(settings, data, "own")
    sampler = MemberSampler(data.transitions, 16, members=3, seed=settings[0].seed)
    call = captured(beside.population.step, beside.population.sampler, updates=2)
    for _ in range(2):
        beside.train_captured(call, sampler, drawn)
    beside.assert_equal()


# TorchRL's tanh, seen by Dynamo
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "threads"),
    # with one thread Inductor's own program of discrete members is wrong: untiled_loops_only
    [*((case, None) for case in CASES), ("discrete", 1)],
)
def test_compiled_updates_equal_the_runs_alone(case, threads, request):
    torch._dynamo.reset()
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads or before)
    kind, options, batches, change = CASES[case]
    with double():
        beside = Beside(configs(max_grad_norm=1.0, **options), dataset(kind), batches)
        step = compiled(beside.population.step)
        beside.assert_equal(beside.train(20, change, step))
        beside.population.step.load_state_dict(beside.population.step.state_dict())
        beside.assert_equal(beside.train(5, change, step))


@pytest.mark.slow
def test_training_of_compiled_configs_is_captured():
    torch._dynamo.reset()
    data = dataset()
    settings = configs(compile=True, schedule="cosine")
    population = IQLPopulation(settings, data)
    events = list(population.train(20, every=8))
    assert [event.updates for event in events] == [8, 16, 20]
    plain = IQLPopulation([replace(c, compile=False) for c in settings], data)
    for actual, expected in zip(events, plain.train(20, every=8), strict=True):
        metrics = expected.metrics.double()
        assert_same_metrics(actual.metrics, metrics, rtol=1e-9, atol=1e-11)
    assert_close(population.loss.state_dict(), plain.loss.state_dict(), 1e-10)
    assert not population.member(0).config.compile
