"""Updates that would train nothing, or train each rank apart, are refused in every form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_losses
import torch
from conftest import ACT, OBS, make_batch, make_networks
from small_populations import BASE, dataset
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from test_capture import untraced  # noqa: F401 (fixture)
from test_step import make_loss, make_step, snapshot
from torch import distributed, nn, optim
from torch.nn.parallel import DistributedDataParallel
from torchrl.objectives import IQLLoss as TorchRLLoss
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLPopulation, IQLStep, captured, compiled
from iql_torchrl.data import DeviceSampler

MODES = {"torch.no_grad()": torch.no_grad, "torch.inference_mode()": torch.inference_mode}


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


def of_a_population(step):
    population = IQLPopulation([BASE, BASE], dataset(dtype=torch.float32))
    return lambda: next(population.train(2, every=2))


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


@pytest.mark.parametrize("form", [*FORMS, of_a_population])
def test_several_ranks_are_refused_by_every_form(form, ranks):
    update = form(make_step())
    ranks(2)
    with pytest.raises(RuntimeError, match=r"2 ranks.*does not reduce gradients") as caught:
        update()
    assert "data_parallel(step, Ranks.from_environment())" in str(caught.value)
    assert "independent_ranks=True" in str(caught.value)


@pytest.mark.usefixtures("untraced")
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


def test_a_batch_of_another_dtype_than_the_weights_is_named():
    """Such as a dataset that NumPy made, in float64."""
    step = make_step()
    words = r"got torch\.float64 and has weights of torch\.float32; cast the batch's observations"
    with pytest.raises(TypeError, match=words):
        step(make_batch(dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):  # which casts by itself
        step(make_batch().apply(lambda x: x.bfloat16() if x.is_floating_point() else x))


class LastState(nn.Module):
    """The action that an LSTM gives after one step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(OBS, ACT, batch_first=True)

    def forward(self, observation):
        return self.cell(observation.unsqueeze(-2))[0].squeeze(-2)


def test_a_recurrent_layer_of_torch_is_refused_by_name_and_trains_eagerly():
    actor = TensorDictModule(LastState(), in_keys=["observation"], out_keys=["action"])
    step = small_losses.make_step(IQLLoss(*make_networks(policy=actor), actor_objective="mse"))
    before = actor.module.cell.weight_ih_l0.clone()
    step(make_batch(8))
    assert not before.equal(actor.module.cell.weight_ih_l0)
    for form in (through_compiled, through_captured):
        with pytest.raises(TypeError, match=r"actor_network has a torch\.nn\.LSTM at") as caught:
            form(step)
        assert "'module.cell'" in str(caught.value)
        assert "networks.LSTMEncoder" in str(caught.value)
