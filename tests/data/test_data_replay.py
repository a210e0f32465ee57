"""Buffers and samplers of transitions in memory."""

import pytest
import torch
from one_device import RecordedGenerator
from small_logs import numbered
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs.transforms import MultiStepTransform

from iql_torchrl.data import DeviceSampler, load_dataset, replay_buffer
from iql_torchrl.private_apis import generator_of

LOG = numbered([10] * 20)


@pytest.fixture
def dataset():
    return load_dataset(LOG)


def test_buffer_repeats_with_its_seed(dataset):
    first, second = (dataset.replay_buffer(8, seed=3) for _ in range(2))
    torch.rand(5)
    batch = first.sample()
    assert torch.equal(batch["observation"], second.sample()["observation"])
    assert batch["next", "reward"].shape == (8, 1)
    rows = batch["observation"][:, 0].long()
    assert torch.equal(batch["action"], dataset.transitions["action"][rows])


def test_buffer_is_read_only_unless_given_room(dataset):
    before = dataset.transitions["observation"].clone()
    with pytest.raises(RuntimeError):
        dataset.replay_buffer(8).extend(dataset.transitions[:3])
    roomy = dataset.replay_buffer(8, capacity=210)
    roomy.extend(dataset.transitions[:20].clone())
    assert len(roomy) == 210
    assert torch.equal(dataset.transitions["observation"], before)
    with pytest.raises(ValueError, match="capacity"):
        dataset.replay_buffer(8, capacity=5)


def test_slices_stay_within_episodes(dataset):
    sampler = SliceSampler(slice_len=4, traj_key=("collector", "traj_ids"), strict_length=True)
    batch = dataset.replay_buffer(32, seed=0, sampler=sampler).sample().view(8, 4)
    steps = batch["observation"][..., 0]
    assert bool((steps.diff(dim=-1) == 1).all())
    ids = batch["collector", "traj_ids"]
    assert bool((ids == ids[:, :1]).all())


def test_multi_step_returns_stop_at_episode_ends(dataset):
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200),
        batch_size=64,
        transform=MultiStepTransform(n_steps=3, gamma=0.5),
    )
    buffer.extend(dataset.transitions.clone())
    rows = buffer.storage.get(slice(0, len(buffer)))
    step = rows["observation"][:, 0].long()
    raw, following = torch.as_tensor(LOG["reward"]), LOG["next_observation"][:, 0]
    for row, t in zip(rows, step.tolist(), strict=True):
        ahead = min(3, 10 - t % 10)
        expected = sum(0.5**k * float(raw[t + k]) for k in range(ahead))
        assert float(row["next", "reward"]) == pytest.approx(expected)
        assert float(row["next", "observation"][0]) == following[t + ahead - 1]


def test_device_sampler_draws_complete_rows_uniformly(dataset):
    sampler = DeviceSampler(dataset.transitions, 64, seed=0)
    batch = sampler.sample()
    assert torch.equal(
        batch["observation"], dataset.device_sampler(64, seed=0).sample()["observation"]
    )
    rows = batch["observation"][:, 0].long()
    for key in ("action", ("next", "reward"), ("next", "done"), ("next", "observation")):
        assert torch.equal(batch[key], dataset.transitions[key][rows])
    drawn = torch.bincount(sampler.indices(40_000), minlength=200)
    assert float(((drawn - 200.0) ** 2 / 200).sum()) < 300  # chi-squared, 199 degrees
    sampler.generator = torch.Generator().manual_seed(5)
    expected = DeviceSampler(dataset.transitions, 64, seed=5).indices()
    assert torch.equal(sampler.indices(), expected)


@pytest.mark.parametrize(
    ("given", "capacity"),
    [
        ("device", None),
        ("device", 210),
        # with a capacity TorchRL's writer reads a number of rows that name a device
        ("rows", None),
        ("rows that name no device", None),
        ("rows that name no device", 210),
    ],
)
def test_the_generator_is_on_the_storages_device(dataset, monkeypatch, given, capacity):
    monkeypatch.setattr(torch, "Generator", RecordedGenerator)
    rows, device = dataset.transitions, "meta" if given == "device" else None
    if given != "device":
        rows = rows.to("meta")
    if given == "rows that name no device":
        rows = rows.clone(recurse=False).clear_device_()
    buffer = replay_buffer(rows, 8, device=device, seed=3, capacity=capacity)
    generator = generator_of(buffer)
    assert generator is not None
    assert buffer.storage.device == generator.device == torch.device("meta")
    assert generator.given == 3
    sampler = DeviceSampler(rows, 8, device=device, seed=3)
    places = sampler.device, sampler.generator.device, sampler.tables[0].device
    assert set(places) == {generator.device}


@pytest.mark.parametrize("size", [0, -1, 2.5, "a", True, None])
def test_a_batch_size_that_is_no_whole_number_is_refused(dataset, size):
    for make in (dataset.replay_buffer, dataset.device_sampler):
        with pytest.raises(ValueError, match=r"batch_size is .*; expected an integer >= 1"):
            make(size)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [None, 210])
def test_a_seeded_buffer_on_a_gpu_repeats(dataset, capacity):
    for given in (dataset.transitions, dataset.transitions.to("cuda")):
        device = None if given.device is not None and given.device.type == "cuda" else "cuda"
        one, two = (
            replay_buffer(given, 8, device=device, seed=0, capacity=capacity) for _ in range(2)
        )
        batch = one.sample()
        assert batch["observation"].is_cuda
        assert torch.equal(batch["observation"], two.sample()["observation"])


@pytest.mark.gpu
def test_device_sampler_does_not_synchronise_with_the_host(dataset):
    sampler = DeviceSampler(dataset.transitions, 64, device="cuda", seed=0)
    sampler.sample()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sampler.sample()["observation"].is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
