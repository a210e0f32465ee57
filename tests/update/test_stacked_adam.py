"""StackedAdam: torch's Adam and AdamW on each slice, rates of their own, states and schedules."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR

from iql_torchrl.update.adam import JoinedCounts, StackedAdam, along

RATES = torch.tensor([1e-3, 0.1, 3e-2], dtype=torch.float64)
SHAPES = ((4, 2), (5,), (), (2, 1, 3))
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, *shape, dtype=dtype)) for shape in SHAPES]


def gradients(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    sizes = (10.0 ** (number % 5 - 2), 1.0, 1e-8, 0.0)
    return [
        size * torch.randn(3, *shape, dtype=torch.float64, generator=generator)
        for size, shape in zip(sizes, SHAPES, strict=True)
    ]


def give(held, found, skip=()) -> None:
    for number, (parameter, gradient) in enumerate(zip(held, found, strict=True)):
        parameter.grad = None if number in skip else gradient.to(parameter.dtype).clone()


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9), "eps": 1e-3}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
def test_each_slice_is_an_optimizer_of_its_own(kind, decay, options):
    stacked = parameters()
    optimizer = StackedAdam(
        stacked, rates=RATES, weight_decay=decay, decoupled=kind is optim.AdamW, **options
    )
    alone = [[nn.Parameter(p[i].detach().clone()) for p in stacked] for i in range(3)]
    others = [
        kind(held, lr=float(rate), weight_decay=decay, **options)
        for held, rate in zip(alone, RATES, strict=True)
    ]
    schedules = [LambdaLR(o, lambda n: 0.9**n) for o in (optimizer, *others)]
    for number in range(30):
        skip = (1,) if number % 3 == 0 else ()  # no gradient: neither counted nor decayed
        found = gradients(number)
        give(stacked, found, skip)
        for i, held in enumerate(alone):
            give(held, [g[i] for g in found], skip)
        for each in (optimizer, *others, *schedules):
            each.step()
    for number, parameter in enumerate(stacked):
        for i in range(3):
            torch.testing.assert_close(parameter[i], alone[i][number], **EXACT)
            state, expected = optimizer.state[parameter], others[i].state[alone[i][number]]
            assert state["step"] == expected["step"]
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state[name][i], expected[name], **EXACT)


def test_the_first_step_by_hand():
    """Adam's first step is ``rate * g / (|g| + eps)``; AdamW first takes ``rate * decay`` away."""
    parameter = nn.Parameter(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    rates = torch.tensor([0.1, 0.5])
    optimizer = StackedAdam([parameter], rates=rates, weight_decay=0.2, decoupled=True, eps=1.0)
    parameter.grad = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    optimizer.step()
    expected = [[1 * (1 - 0.02) - 0.1 * 3 / 4], [2 * (1 - 0.1) + 0.5 * 1 / 2]]
    torch.testing.assert_close(
        parameter.detach(), torch.tensor(expected).double(), rtol=1e-7, atol=0
    )


def test_a_state_goes_on_with_the_same_bits():
    first, second = parameters(), parameters()
    optimizers = [StackedAdam(p, rates=RATES, weight_decay=0.1) for p in (first, second)]
    schedules = [LambdaLR(o, lambda n: 0.9**n) for o in optimizers]
    for number in range(5):
        give(first, gradients(number))
        optimizers[0].step()
        schedules[0].step()
    file = io.BytesIO()
    torch.save([optimizers[0].state_dict(), schedules[0].state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for each, state in zip((optimizers[1], schedules[1]), saved, strict=True):
        each.load_state_dict(state)
    for mine, theirs in zip(second, first, strict=True):
        mine.data.copy_(theirs.data)
    for number in range(5, 10):
        for held, optimizer, schedule in zip((first, second), optimizers, schedules, strict=True):
            give(held, gradients(number))
            optimizer.step()
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert optimizers[1].param_groups[0]["lr"] == optimizers[0].param_groups[0]["lr"] < 1
    other = StackedAdam([nn.Parameter(torch.zeros(2, *shape)) for shape in SHAPES], rates=RATES[:2])
    with pytest.raises(ValueError, match=r"has shape \(2, 4, 2\) and there are 3 rates"):
        other.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))


@pytest.mark.gpu
def test_a_state_on_the_host_is_moved_to_the_parameters():
    held = [p.detach().cuda().requires_grad_() for p in parameters()]
    optimizer = StackedAdam(held, rates=RATES)
    give(held, [g.cuda() for g in gradients(0)])
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, map_location="cpu"))
    optimizer.step()
    assert optimizer.param_groups[0]["rates"].device.type == "cuda"


def test_groups_have_rates_and_factors_of_their_own():
    held = parameters()
    groups = [{"params": [held[0]], "rates": RATES}, {"params": held[1:3], "rates": 2 * RATES}]
    optimizer = StackedAdam(groups)
    optimizer.add_param_group({"params": [held[3]], "rates": RATES.float(), "lr": 0.5})
    optimizer.add_param_group({"params": [], "rates": RATES})
    assert [group["rates"].dtype for group in optimizer.param_groups] == [torch.float64] * 4
    before = [p.detach().clone() for p in held]
    give(held, [torch.ones_like(p) for p in held])
    optimizer.step()
    for parameter, old, factor in zip(held, before, (1, 2, 2, 0.5), strict=True):
        expected = along(RATES * factor, parameter).expand_as(parameter)
        torch.testing.assert_close(old - parameter.detach(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (None, "rates is None; expected a tensor of positive numbers"),
        ([0.1, 0.1, 0.1], "expected a tensor"),
        (torch.tensor([0.1, 0.0, 0.1]), "positive"),
        (torch.tensor([0.1, float("nan"), 0.1]), "positive"),
        (torch.tensor(0.1), "one per run"),
        (torch.ones(2), r"has shape \(3, 4, 2\) and there are 2 rates"),
    ],
)
def test_rates_that_do_not_fit_are_refused(rates, message):
    with pytest.raises(ValueError, match=message):
        StackedAdam(parameters(), rates=rates)


def test_what_is_no_stack_is_refused():
    with pytest.raises(ValueError, match=r"has shape \(\) and there are 3 rates"):
        StackedAdam([nn.Parameter(torch.tensor(1.0))], rates=RATES)
    optimizer = StackedAdam(parameters(), rates=RATES)
    with pytest.raises(TypeError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match=r"has shape \(4,\) and there are 3 rates"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))]})


def test_counts_in_one_tensor_are_those_of_the_states():
    states = [{"step": torch.tensor(float(n))} for n in (3, 5, 8)]
    joined = JoinedCounts()
    counts = joined.of(states)
    counts.copy_(torch.tensor([4.0, 5.0, 9.0]))
    assert [state["step"].item() for state in states] == [4, 5, 9]
    assert joined.of(states) is counts
    states[1]["step"] = torch.tensor(100.0)  # a loaded state
    again = joined.of(states)
    assert again.tolist() == [4, 100, 9]
    again += 1
    assert [state["step"].item() for state in states] == [5, 101, 10]
    assert counts.tolist() == [4, 5, 9]
    assert joined.of(states[:2]).tolist() == [5, 101]


def test_an_optimizer_goes_on_by_itself_from_joined_counts():
    """torch's own Adam, plain and fused, reads and writes counts that are views of one tensor."""
    results = []
    for join in (False, True):
        for fused in (False, True):
            held = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2,), 2.0))]
            optimizer = optim.Adam(held, lr=0.1, fused=fused)
            for number in range(4):
                if join and number == 2:
                    JoinedCounts().of([optimizer.state[p] for p in held])
                for parameter in held:
                    parameter.grad = torch.full_like(parameter, number - 1.5)
                optimizer.step()
            results.append([p.detach() for p in held])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
