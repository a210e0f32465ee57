"""Updates from TorchRL's prioritised buffers over a dataset; needs TorchRL's C++ extension."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import small_losses
import torch
from conftest import make_networks
from small_agents import small_columns
from torchrl.data import (
    LazyTensorStorage,
    PrioritizedSampler,
    RandomSampler,
    ReplayBuffer,
    TensorDictPrioritizedReplayBuffer,
    TensorStorage,
)

from iql_torchrl import IQLLoss, IQLStep, OfflineTrainer, compiled, load_dataset
from iql_torchrl.files import CheckpointError

OBS, ACT, GAMMA, ALPHA, BETA, EPS = 3, 2, 0.9, 0.6, 0.4, 1e-8
ROWS, BATCH = 40, 16


@pytest.fixture(scope="module")
def dataset():
    """Eight episodes of five steps; every other one is truncated."""
    rows, draw = np.arange(ROWS), np.random.default_rng(0)
    observation = draw.normal(size=(ROWS, OBS)).astype(np.float32)
    ends = {"terminated": rows % 10 == 4, "truncated": rows % 10 == 9}
    return load_dataset(small_columns(ROWS, observation, **ends))


def make_sampler() -> PrioritizedSampler:
    return PrioritizedSampler(ROWS, alpha=ALPHA, beta=BETA, eps=EPS)


def prioritised(storage):
    """TorchRL's own class; it draws from NumPy's global generator unless one is given."""
    return TensorDictPrioritizedReplayBuffer(
        alpha=ALPHA, beta=BETA, eps=EPS, storage=storage, batch_size=BATCH,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def copied(dataset):
    buffer = prioritised(LazyTensorStorage(ROWS))
    buffer.extend(dataset.transitions)
    return buffer


BUFFERS = {
    "PrioritizedSampler": lambda d: d.replay_buffer(BATCH, seed=0, sampler=make_sampler()),
    "PrioritizedSampler, room for more": lambda d: d.replay_buffer(
        BATCH, seed=0, capacity=ROWS, sampler=make_sampler()
    ),
    "TensorDictPrioritizedReplayBuffer": copied,
    "TensorDictPrioritizedReplayBuffer, no copy": lambda d: prioritised(
        TensorStorage(d.transitions)
    ),
}


def make_step() -> IQLStep:
    torch.manual_seed(0)
    loss = IQLLoss(*make_networks(OBS, ACT))
    return small_losses.make_step(loss.make_value_estimator(gamma=GAMMA))


def draws(buffer, batches: int):
    """``index`` and ``priority_weight`` of many batches."""
    return torch.cat([buffer.sample().select("index", "priority_weight") for _ in range(batches)])


def squared_td_errors(critics: IQLLoss, value: IQLLoss, rows) -> torch.Tensor:
    """``(r + gamma (1 - terminated) V(s') - Q_k(s, a))^2``, ``(K, N)``."""
    with torch.no_grad(), value.value_network_params.to_module(value.value_network):
        following = value.value_network.module(rows["next", "observation"]).squeeze(-1)
    continues = 1 - rows["next", "terminated"].float().squeeze(-1)
    target = rows["next", "reward"].squeeze(-1) + GAMMA * continues * following
    errors = []
    for params in critics.qvalue_network_params.unbind(0):
        with torch.no_grad(), params.to_module(critics.qvalue_network):
            value = critics.qvalue_network.module(rows["observation"], rows["action"])
        errors.append((target - value.squeeze(-1)).square())
    return torch.stack(errors)


@pytest.mark.parametrize("name", BUFFERS)
def test_an_update_writes_the_priorities_that_the_next_draw_uses(dataset, name):
    buffer, step = BUFFERS[name](dataset), make_step()
    before = copy.deepcopy(step.loss)
    batch = buffer.sample()
    assert torch.equal(batch["priority_weight"], torch.ones(BATCH)), "no row has a priority yet"
    step(batch)
    # in sequential order the critics' targets read V after its step, the critics are those before
    errors = squared_td_errors(before, step.loss, batch).amax(0)
    torch.testing.assert_close(batch["td_error"], errors)
    buffer.update_tensordict_priority(batch)

    priority = torch.ones(ROWS)  # of rows that were not drawn
    priority[batch["index"]] = errors
    assert 5 < len(batch["index"].unique()) < BATCH, "rows may be drawn twice"
    chance = (priority + EPS) ** ALPHA
    drawn = draws(buffer, 400)
    weight = (chance / chance.min()) ** -BETA
    torch.testing.assert_close(drawn["priority_weight"], weight[drawn["index"]])
    share = torch.bincount(drawn["index"], minlength=ROWS) / len(drawn)
    torch.testing.assert_close(share, chance / chance.sum(), rtol=0.0, atol=0.02)
    assert chance.max() > 2 * chance.min(), "a uniform draw would not pass"


def test_the_losses_use_the_weights_of_the_draw(dataset):
    buffer, step = BUFFERS["PrioritizedSampler"](dataset), make_step()
    buffer.update_priority(torch.arange(ROWS), torch.linspace(0.1, 3.0, ROWS))
    batch = buffer.sample()
    weight = batch["priority_weight"]
    assert weight.max() > 1.5 * weight.min()
    before = copy.deepcopy(step.loss)
    metrics = step(batch)
    errors = squared_td_errors(before, step.loss, batch).sum(0)
    torch.testing.assert_close(metrics["loss_qvalue"], (weight * errors).sum() / weight.sum())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_draws_and_writes_as_the_eager_one(dataset, backend):
    torch._dynamo.reset()
    plain, fast = make_step(), compiled(make_step(), backend=backend)
    buffers = [BUFFERS["TensorDictPrioritizedReplayBuffer"](dataset) for _ in range(2)]
    for _ in range(10):
        batches = [buffer.sample() for buffer in buffers]
        for step, batch, buffer in zip((plain, fast), batches, buffers, strict=True):
            step(batch)
            buffer.update_tensordict_priority(batch)
        assert torch.equal(batches[0]["index"], batches[1]["index"])
        torch.testing.assert_close(batches[0]["td_error"], batches[1]["td_error"])
    assert len(batches[0]["priority_weight"].unique()) > 5


def trainer_of(dataset, folder=None, updates=10, capacity=None, sampler=None, **options):
    buffer = dataset.replay_buffer(
        BATCH, seed=0, capacity=capacity, sampler=sampler or make_sampler()
    )
    trainer = OfflineTrainer(
        step=make_step(), replay_buffer=buffer, total_updates=updates, log_interval=5,
        save_trainer_interval=5, folder=folder, **options,
    )  # fmt: skip
    return trainer, buffer


@pytest.mark.parametrize("capacity", [None, ROWS])
def test_a_trainer_updates_priorities_and_continues_with_them(dataset, tmp_path, capacity):
    straight, expected = trainer_of(dataset, capacity=capacity)
    straight.train()
    trainer_of(dataset, tmp_path / "run", 5, capacity)[0].train()
    resumed, buffer = trainer_of(dataset, tmp_path / "run", 10, capacity)
    resumed.resume().train()
    there, here = draws(expected, 50), draws(buffer, 50)
    assert torch.equal(here["index"], there["index"])
    assert torch.equal(here["priority_weight"], there["priority_weight"])
    assert len(here["priority_weight"].unique()) > 20


def test_a_checkpoint_of_other_priorities_is_refused(dataset, tmp_path):
    trainer_of(dataset, tmp_path / "run", 5)[0].train()
    uniform, _ = trainer_of(dataset, tmp_path / "run", sampler=RandomSampler())
    with pytest.raises(CheckpointError, match="priorities of the sampler was True and is False"):
        uniform.resume()
    larger = PrioritizedSampler(2 * ROWS, alpha=ALPHA, beta=BETA)
    wider, _ = trainer_of(dataset, tmp_path / "run", sampler=larger)
    with pytest.raises(ValueError, match=r"max_capacity .* is 80, and 40 in the saved state"):
        wider.resume()


def test_the_trainer_refuses_priorities_that_would_not_change(dataset):
    def trainer(buffer):
        return OfflineTrainer(
            step=step, replay_buffer=buffer, total_updates=2, log_interval=1, progress_bar=False
        )

    step = make_step()
    step.loss.set_keys(priority="p")
    with pytest.raises(ValueError, match=r"reads priorities from 'td_error'.*writes them to 'p'"):
        trainer(copied(dataset))
    plain = ReplayBuffer(storage=LazyTensorStorage(ROWS), sampler=make_sampler(), batch_size=BATCH)
    plain.extend(dataset.transitions)
    with pytest.raises(
        ValueError, match=r"ReplayBuffer with a PrioritizedSampler.*TensorDictReplay"
    ):
        trainer(plain)
    buffer = copied(dataset)
    buffer.priority_key = "p"
    trainer(buffer).train()
    assert draws(buffer, 40)["priority_weight"].unique().numel() > 2
