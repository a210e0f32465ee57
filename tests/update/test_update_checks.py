"""Updates that would train nothing, or train each rank apart, are refused in every form."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_batch
from small_populations import BASE, dataset
from tensordict import TensorDict
from test_step import make_loss, snapshot
from torch import distributed, optim
from torch.nn.parallel import DistributedDataParallel
from torchrl.objectives import IQLLoss as TorchRLLoss
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLPopulation, IQLStep, captured, compiled
from iql_torchrl.data import DeviceSampler

MODES = {"torch.no_grad()": torch.no_grad, "torch.inference_mode()": torch.inference_mode}


def make_step(**options) -> IQLStep:
    loss = make_loss()
    return IQLStep(loss, optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.1), **options)


def plain(step):
    batch = make_batch()
    return lambda: step(batch)


def through_compiled(step):
    fast, batch = compiled(step, backend="eager"), make_batch()
    return lambda: fast(batch)


def through_captured(step):
    return captured(step, DeviceSampler(make_batch(50), 8, seed=0), updates=2)


def through_captured_without_adam(step):
    loss = step.loss
    other = IQLStep(loss, optim.SGD(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.1))
    return captured(other, DeviceSampler(make_batch(50), 8, seed=0), updates=2)


FORMS = [plain, through_compiled, through_captured, through_captured_without_adam]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_no_form_of_the_step_runs_without_gradients(form, mode):
    step = make_step()
    update, before = form(step), snapshot(step.loss)
    with MODES[mode](), pytest.raises(RuntimeError) as caught:
        update()
    assert f"under {mode}," in str(caught.value)
    assert "train nothing" in str(caught.value)
    after = snapshot(step.loss)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not step.optimizer.state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compile", [False, True])
def test_nor_does_a_population(mode, compile):
    config = replace(BASE, compile=compile)
    population = IQLPopulation([config, config], dataset(dtype=torch.float32))
    with MODES[mode](), pytest.raises(RuntimeError, match="train nothing"):
        next(population.train(2, every=2))
    assert population.updates == 0


def test_gradients_enabled_inside_inference_mode_are_refused_too():
    """There ``torch.is_grad_enabled()`` is true, and yet no tensor requires a gradient."""
    step = make_step()
    with (
        torch.inference_mode(),
        torch.enable_grad(),
        pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"),
    ):
        step(make_batch())


def test_gradients_enabled_inside_no_grad_train():
    step, alone, batch = make_step(), make_step(), make_batch()
    alone.loss.load_state_dict(step.loss.state_dict())
    with torch.no_grad(), torch.enable_grad():
        step(batch.clone())
    alone(batch.clone())
    mine, theirs = snapshot(step.loss), snapshot(alone.loss)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_step_with_everything_frozen_still_runs():
    step = make_step()
    for parameter in step.loss.parameters():
        parameter.requires_grad_(False)
    assert float(step(make_batch())["loss_value"]) > 0


@pytest.fixture
def group(tmp_path):
    """A real process group of one rank."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def ranks(group, monkeypatch):
    """Makes the group claim to have so many ranks."""
    return lambda count: monkeypatch.setattr(distributed, "get_world_size", lambda: count)


@pytest.mark.parametrize("form", FORMS)
def test_several_ranks_are_refused_by_every_form(form, ranks):
    update = form(make_step())
    ranks(2)
    with pytest.raises(RuntimeError, match=r"2 ranks.*does not reduce gradients") as caught:
        update()
    assert "data_parallel(step, Ranks.from_environment())" in str(caught.value)
    assert "independent_ranks=True" in str(caught.value)


def test_several_ranks_are_refused_by_a_population(ranks):
    config = BASE
    population = IQLPopulation([config, config], dataset(dtype=torch.float32))
    ranks(4)
    with pytest.raises(RuntimeError, match="4 ranks"):
        next(population.train(2, every=2))


@pytest.mark.usefixtures("uncompiled")
def test_a_group_of_one_rank_and_independent_ranks_are_allowed(ranks):
    step = make_step()
    ranks(1)
    step(make_batch())
    ranks(2)
    step = make_step(independent_ranks=True)
    before = snapshot(step.loss)
    for update in (plain(step), through_captured(step)):
        update()
        after = snapshot(step.loss)
        assert any(not torch.equal(before[name], after[name]) for name in before)
        before = after


RANK = """
import sys, torch
from torch import distributed, optim
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = [sys.argv[3], sys.argv[3] + '/..']
from conftest import make_batch
from test_step import make_loss
from torchrl.objectives import SoftUpdate
from iql_torchrl import IQLStep

loss = make_loss()
step = IQLStep(loss, optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.1))
size = int(sys.argv[4])
distributed.init_process_group(
    "gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=size
)
try:
    step(make_batch())
except RuntimeError as error:
    print("refused:", error)
try:
    IQLStep(DistributedDataParallel(loss), optim.Adam(loss.parameters()), None)
except TypeError as error:
    print("wrapped:", error)
distributed.barrier()
distributed.destroy_process_group()
step(make_batch())
print("trained alone")
"""


def start_ranks(tmp_path, count):
    folder = str(Path(__file__).parent)
    place = [str(tmp_path / "rendezvous")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *place, str(rank), folder, str(count)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="rendezvous by a file")
def test_two_real_ranks_are_refused_until_the_group_is_gone(tmp_path):
    for output in start_ranks(tmp_path, 2):
        assert "refused: the torch.distributed process group has 2 ranks" in output
        assert "wrapped: loss is a DistributedDataParallel around IQLLoss" in output
        assert output.strip().endswith("trained alone")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="rendezvous by a file")
def test_a_real_group_of_one_rank_trains(tmp_path):
    (output,) = start_ranks(tmp_path, 1)
    assert "refused" not in output
    assert "trained alone" in output


def test_losses_of_another_kind_are_refused_with_what_to_pass(group):
    loss = make_loss()
    wrapped = DistributedDataParallel(loss)
    with pytest.raises(TypeError, match=r"DistributedDataParallel around IQLLoss") as caught:
        IQLStep(wrapped, optim.Adam(loss.parameters()), None)
    assert ".module" in str(caught.value)
    IQLStep(wrapped.module, optim.Adam(loss.parameters()), None)(make_batch())
    actor, value = loss.actor_network, loss.value_network
    theirs = TorchRLLoss(actor, loss.qvalue_network, value)
    with pytest.raises(TypeError, match=r"torchrl\.objectives\.iql\.IQLLoss; pass an IQLLoss"):
        IQLStep(theirs, optim.Adam(theirs.parameters()), None)


def test_the_batch_of_inference_mode_is_not_accepted_in_silence():
    with torch.inference_mode():
        batch: TensorDict = make_batch()
    with pytest.raises(RuntimeError, match="Inference tensors"):
        make_step()(batch)
