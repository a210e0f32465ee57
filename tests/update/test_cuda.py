"""Whole agents on a CUDA device; the same bodies run on the CPU, with a fake of torch.cuda."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from fake_cuda import FakeCuda
from small_populations import configs, dataset
from test_capture import untraced  # noqa: F401 (fixture)

from iql_torchrl import IQLConfig, OfflineTrainer, captured, make_agent
from iql_torchrl.data import replay_buffer
from iql_torchrl.population import IQLPopulation

UPDATES = 4  # of a captured call


def places(second: str) -> list:
    return ["fake", pytest.param(second, marks=pytest.mark.gpu)]


@pytest.fixture(params=places("cuda"))
def device(request, monkeypatch) -> str:
    """``"cuda"``, or the CPU where ``captured`` takes its CUDA branch."""
    return usable(request, monkeypatch)


@pytest.fixture(params=places("cuda:1"))
def other_device(request, monkeypatch) -> str:
    """A device that is not the current one."""
    if request.param == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("this machine has fewer than two CUDA devices")
    return usable(request, monkeypatch)


def usable(request, monkeypatch) -> str:
    if request.param != "fake":
        return request.param
    FakeCuda(monkeypatch)
    request.getfixturevalue("untraced")
    return "cpu"


@pytest.fixture
def graph_alone(request, device):
    """Updates are captured as they are, without a compiler: for tests of graphs alone."""
    return request.getfixturevalue("untraced")


def small_config(device: str, **options) -> IQLConfig:
    base = {"updates": 50, "hidden": (16, 16), "batch_size": 16, "reward": "raw"}
    return IQLConfig(**{**base, **options}, device=device)


class Pair:
    """An agent with its plain step, and another with a captured one, from the same weights."""

    def __init__(
        self, device: str, kind: str = "continuous", updates: int = UPDATES, **options
    ) -> None:
        self.data = dataset(kind, dtype=torch.float32)
        config = small_config(device, **options)
        self.plain, self.agent = (make_agent(config, self.data) for _ in range(2))
        self.sampler, rows = (
            self.data.device_sampler(config.batch_size, device=device, seed=0) for _ in range(2)
        )
        self.call = captured(self.agent.step, rows, updates=updates)

    def run(self, calls: int, rtol: float = 1e-3, atol: float = 1e-4) -> None:
        for _ in range(calls):
            metrics = self.call()
            plain = [self.plain.step(self.sampler.sample()) for _ in range(self.call.updates)]
        for name in ("loss_actor", "loss_qvalue", "loss_value"):
            expected = torch.stack(plain).mean(0)[name]
            torch.testing.assert_close(
                metrics[name].float(), expected, rtol=10 * rtol, atol=10 * atol
            )
        assert_close(self.agent.loss, self.plain.loss, rtol, atol)


def assert_close(mine, theirs, rtol: float, atol: float) -> None:
    tensors = (
        {name: value for name, value in loss.state_dict().items() if torch.is_tensor(value)}
        for loss in (mine, theirs)
    )
    torch.testing.assert_close(*tensors, rtol=rtol, atol=atol)


def weights(agent) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in agent.loss.parameters()]


POLICIES = {
    "gaussian": ("continuous", {"policy": "gaussian"}),
    "tanh_normal": ("continuous", {"policy": "tanh_normal", "max_grad_norm": 1.0}),
    "deterministic": ("continuous", {"policy": "deterministic", "schedule": "cosine"}),
    "mixture": ("continuous", {"policy": "mixture", "order": "simultaneous"}),
    "masked actions": ("discrete", {"policy": "categorical"}),
    "categories": ("categories", {"policy": "categorical", "layer_norm": True}),
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_captured_agent_equals_the_plain_one(device, case):
    kind, options = POLICIES[case]
    pair = Pair(device, kind, **options)
    before = weights(pair.agent)
    pair.run(5)
    assert all(p.device.type == torch.device(device).type for p in pair.agent.loss.parameters())
    after = weights(pair.agent)
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_bfloat16(device):
    Pair(device, precision="bfloat16").run(4, rtol=0.02, atol=5e-3)


def test_dropout_draws_anew_in_every_replay(device):
    """With rates of zero nothing is learned, so losses of one batch differ by dropout alone."""
    tiny = dict.fromkeys(("actor_lr", "critic_lr", "value_lr"), 1e-12)
    pair = Pair(device, dropout=0.5, **tiny)
    rows = pair.call.replay
    for table in rows.tables:
        table[:] = table[:1].clone()
    losses = torch.stack([pair.call()["loss_actor"] for _ in range(12)])
    assert len(losses.unique()) == 12


@pytest.mark.parametrize("batches", ["shared", "own"])
def test_populations(device, batches):
    data = dataset(dtype=torch.float32)
    settings = [replace(config, device=device) for config in configs()]
    plain, runs = (IQLPopulation(settings, data, batches=batches) for _ in range(2))
    call = captured(runs.step, runs.sampler, updates=UPDATES)
    for _ in range(4):
        metrics = call()
        for _ in range(UPDATES):
            plain.step(plain.sampler.sample())
    assert metrics["loss_value"].shape == (len(settings),)
    assert_close(runs.loss, plain.loss, 1e-3, 1e-4)


def test_of_two_captured_steps_one_is_deleted(device, graph_alone):
    pairs = [Pair(device), Pair(device)]
    for pair in pairs:
        pair.run(3)
    del pair
    pairs.pop(0)
    graph_alone.clear()
    gc.collect()
    scratch = [torch.randn(512, 512, device=device) for _ in range(4)]
    torch.stack([a @ a for a in scratch])  # memory of the deleted graph is used by others
    pairs[0].run(3)


@pytest.mark.slow
def test_memory_is_constant_over_twenty_recaptures(device, graph_alone):
    pair = Pair(device, updates=1)
    allocated = []
    for _ in range(20):
        pair.call.recapture()
        graph_alone.clear()
        for _ in range(3):
            pair.call()
        gc.collect()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated(device))
    assert min(allocated) > 0
    assert len(set(allocated[2:])) == 1, allocated


def test_a_replay_of_an_agent_never_waits(device):
    pair = Pair(device, schedule="cosine", max_grad_norm=1.0)
    for _ in range(3):  # as it is, captured, replayed
        pair.call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pair.call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_calls_before():
    pair = Pair("cuda", schedule="cosine")
    for _ in range(3):
        pair.call()
    torch.cuda._sleep(2**31)  # cycles, about a second
    asleep = torch.cuda.Event()
    asleep.record()
    pair.call()
    pair.call()
    assert not asleep.query()


def test_a_device_that_is_not_the_current_one(other_device):
    pair = Pair(other_device)
    before = weights(pair.agent)
    pair.run(4)
    moved = zip(before, weights(pair.agent), strict=True)
    assert not any(torch.equal(one, other) for one, other in moved)
    if other_device == "cuda:1":
        assert torch.cuda.current_device() == 0
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_seeded_buffer_on_the_device(device):
    data = dataset(dtype=torch.float32)
    one, other, unlike = (
        replay_buffer(data.transitions, 16, device=device, seed=s) for s in (0, 0, 1)
    )
    first = one.sample()
    assert {value.device.type for value in first.values(True, True)} == {torch.device(device).type}
    assert torch.equal(first["observation"], other.sample()["observation"])
    assert not torch.equal(first["observation"], unlike.sample()["observation"])
    roomy = replay_buffer(data.transitions, 16, device=device, seed=0, capacity=100)
    assert torch.equal(first["observation"], roomy.sample()["observation"])
    agent = make_agent(small_config(device), data)
    for _ in range(3):
        metrics = agent.step(one.sample())
    assert all(bool(torch.isfinite(value).all()) for value in metrics.values())


def test_captured_from_a_buffer_on_the_device(device):
    data = dataset(dtype=torch.float32)
    results = []
    for _ in range(2):
        agent = make_agent(small_config(device), data)
        call = captured(agent.step, data.replay_buffer(16, device=device, seed=3), updates=UPDATES)
        for _ in range(3):
            call()
        results.append(weights(agent))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "captured"])
def test_a_trainer_on_the_device(device, form):
    data = dataset(dtype=torch.float32)
    agent = make_agent(small_config(device, updates=12), data)
    if form == "plain":
        trainer = OfflineTrainer(agent=agent, dataset=data, progress_bar=False)
    else:
        rows = data.device_sampler(16, device=device, seed=0)
        step = captured(agent.step, rows, updates=UPDATES)
        options = {"replay_buffer": rows, "total_updates": 12, "log_interval": 4}
        trainer = OfflineTrainer(step=step, progress_bar=False, **options)
    before = weights(agent)
    trainer.train()
    assert trainer.updates == 12
    moved = zip(before, weights(agent), strict=True)
    assert not any(torch.equal(one, other) for one, other in moved)


@pytest.mark.slow
def test_a_compiled_agent_equals_the_plain_one(device):
    pair = Pair(device)
    fast = make_agent(small_config(device, compile=True), pair.data)
    for _ in range(8):
        batch = pair.sampler.sample()
        pair.plain.step(batch.clone())
        fast.step(batch)
    assert_close(fast.loss, pair.plain.loss, 1e-3, 1e-4)
