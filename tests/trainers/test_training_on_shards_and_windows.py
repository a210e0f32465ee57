"""The trainer on a dataset in shards, and on windows: resuming, refusals, equal ranks, digests."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small_agents import config
from small_logs import LENGTHS, SPACES, in_shards, numbered
from small_trainers import same_weights
from test_sequences import ENCODERS, Last, step_of
from test_sequences import dataset as sequences

from iql_torchrl import OfflineDataset, OfflineTrainer, captured, compiled, load_dataset, make_agent
from iql_torchrl.agent import Agent
from iql_torchrl.data import ShardedDataset, load_shards
from iql_torchrl.data.windows import WindowStorage
from iql_torchrl.files import CheckpointError
from iql_torchrl.networks import Chunk, with_history
from iql_torchrl.trainers.checkpoints import check_same_data, data_state

SETTINGS = {"loaded": 2, "replace_every": 3}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> ShardedDataset:
    return in_shards(tmp_path_factory.mktemp("log"), LENGTHS, 5)


def trainer(
    log: ShardedDataset, total: int, folder: Path | None = None, form=lambda step: step, **settings
) -> OfflineTrainer:
    agent = make_agent(config(), log)
    return OfflineTrainer(
        agent=agent, step=form(agent.step), dataset=log, total_updates=total, folder=folder,
        replay_buffer=log.replay_buffer(16, seed=0, **(SETTINGS | settings)), progress_bar=False,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [4, 6, 17])
def test_a_loaded_run_has_the_bits_of_one_without_interruption(log, stop):
    """Stopped in the middle between two replacements, where one is due, and in a later pass."""
    alone, stopped = trainer(log, 24), trainer(log, stop)
    alone.train()
    stopped.train()
    again = trainer(load_shards(log.saved.location.name), 24)
    again.load_state_dict(deepcopy(stopped.state_dict()))
    assert again.updates == stop
    again.train()
    assert same_weights(alone.step, again.step)
    assert alone.replay_buffer.loaded_shards() == again.replay_buffer.loaded_shards()


def test_the_trainer_makes_the_replay_of_its_agent(log, tmp_path):
    agent = make_agent(config(seed=3), log)
    run = OfflineTrainer(agent=agent, dataset=log, folder=tmp_path / "run", progress_bar=False)
    assert run.replay_buffer.loaded == 4
    expected = log.replay_buffer(16, seed=3).sample()
    assert bool((run.replay_buffer.sample() == expected).all())
    run.train()
    assert (tmp_path / "run" / "curves.png").is_file()  # with the mean return of the dataset


def test_all_shards_give_the_batches_and_updates_of_the_log_in_memory(log):
    """The same rows in the same order, so the same weights, by hand from the whole table."""
    run = trainer(log, 5, loaded=5)
    rows = torch.arange(68).split([shard.rows for shard in log.shards])
    places = torch.cat([rows[number] for number in run.replay_buffer.loaded_shards()])
    run.train()
    step = make_agent(config(), log).step
    table = load_dataset(numbered(LENGTHS), **SPACES).transitions.exclude("collector")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step(table[places[torch.randint(68, (16,), generator=generator)]])
    assert same_weights(run.step, step)


@pytest.mark.slow
def test_a_compiled_step_trains_from_shards(log):
    run, eager = trainer(log, 8, form=compiled), trainer(log, 8)
    run.train()
    eager.train()
    torch.testing.assert_close(run.loss_module.state_dict(), eager.loss_module.state_dict())


def test_what_cannot_read_shards_says_so(log):
    agent = make_agent(config(), log)
    with pytest.raises(TypeError, match=r"replay is a ShardedReplay, .* Use compiled\(step\)"):
        captured(agent.step, log.replay_buffer(16))
    for name in ("history", "action_chunk"):
        agent = make_agent(config(**{name: 2}), log)
        with pytest.raises(ValueError, match=f"{name}=2 and log.npz is in shards, from which wind"):
            OfflineTrainer(agent=agent, dataset=log, progress_bar=False)


def test_a_checkpoint_of_other_shards_rewards_or_settings_is_refused(log, tmp_path):
    folder, other = tmp_path / "run", in_shards(tmp_path, LENGTHS, 5, seed=1)
    trainer(log, 4, folder).train()
    in_memory = trainer(log, 8, folder)
    in_memory.replay_buffer = load_dataset(numbered(LENGTHS), **SPACES).device_sampler(16, seed=0)
    mapped = load_shards(log.saved.location.name, reward=(2.0, 0.0))
    for run, words in (
        (trainer(other, 8, folder), "another run: shard-00000 of the dataset was"),
        (trainer(other, 8, folder), r"Resume with the dataset \(log.npz\), "),
        (trainer(mapped, 8, folder), r"the reward scaling \(reward= of load_dataset\) was"),
        (trainer(log, 8, folder, loaded=3), "loaded = 2, and this one has 3"),
        (trainer(log, 8, folder, replace_every=9), "replace_every = 3, and this one has 9"),
        (in_memory, "the kind of replay buffer was 'of shards' and is 'growing'"),
    ):
        with pytest.raises((CheckpointError, ValueError), match=words):
            run.resume()


def test_ranks_must_have_the_same_shards_and_the_same_rotation(log, tmp_path):
    def given(dataset=log, **options):
        """What a rank gives to compare with the other ranks', by the error about it."""
        ranks, values = Mock(size=2), {}
        ranks.check_same = lambda value, message: values.update({message: value})
        buffer = dataset.replay_buffer(8, **({"seed": 0} | SETTINGS | options))
        check_same_data(ranks, data_state(buffer, None), buffer)
        return values

    def refusals(**options):
        mine, other = given(), given(**options)
        return [message for message in mine if mine[message] != other[message]]

    assert refusals() == []
    for options in ({"seed": 1}, {"loaded": 3}, {"replace_every": 4}):
        (message,) = refusals(**options)
        assert "replay buffers would draw different rows" in message
    fewer = replace(log, saved=replace(log.saved, shards=log.shards[:4]))
    for other in (in_shards(tmp_path, LENGTHS, 5, seed=1), fewer):
        assert (
            "the ranks have different data: their datasets' digests" in refusals(dataset=other)[0]
        )


# -- windows

NAMES = {"actor": Last, "critic": Last, "value": ENCODERS["lstm"]}


def windows():
    torch.manual_seed(0)
    return sequences().windows(3)


@pytest.mark.parametrize("kind", ["device_sampler", "replay_buffer"])
def test_a_run_continues_with_the_same_windows(kind, tmp_path):
    def trainer(total, folder):
        return OfflineTrainer(
            step=step_of(NAMES), replay_buffer=getattr(windows(), kind)(8, seed=0),
            total_updates=total, folder=folder, progress_bar=False,
        )  # fmt: skip

    alone = trainer(8, tmp_path / "alone")
    alone.train()
    trainer(4, tmp_path / "twice").train()
    again = trainer(8, tmp_path / "twice").resume()
    assert again.updates == 4
    again.train()
    assert same_weights(alone.step, again.step)


def test_digests_are_of_the_frames_and_not_of_windows(monkeypatch):
    monkeypatch.setattr(WindowStorage, "get", None)
    buffer = windows().replay_buffer(8)
    digests = data_state(buffer, None)["fingerprint"]
    assert digests["frames.observation"].startswith("float64 (12, 3) ")
    assert digests["own.observation"].startswith("float64 (3, 3) ")
    assert data_state(windows().replay_buffer(4), None)["fingerprint"] == digests
    buffer.storage.windows.final["observation",][0, 0] += 1
    changed = data_state(buffer, None)["fingerprint"]
    assert {key for key in digests if changed[key] != digests[key]} == {"own.observation"}


def test_captured_updates_of_a_buffer_hold_the_frames(monkeypatch):
    step, alone = step_of(NAMES), step_of(NAMES)
    for each in (step, alone):
        each.optimizer = torch.optim.SGD(each.loss.parameters(), lr=0.1)  # updates are eager
    buffer = windows().replay_buffer(8, seed=3)
    monkeypatch.setattr(WindowStorage, "get", None)
    captured(step, buffer, updates=2)()
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    sampler = windows().device_sampler(8, seed=seed)
    for _ in range(2):
        alone(sampler.sample())
    assert same_weights(step, alone)


def test_the_trainer_makes_the_windows_of_the_agents_policy(monkeypatch):
    def trained(history):
        torch.manual_seed(0)
        dataset = sequences()
        agent = make_agent(config(updates=4, batch_size=8, seed=1), dataset)
        if history:
            with_history(agent.policy, 1, stack=True)  # as plain rows, each frame once
            monkeypatch.setattr(OfflineDataset, "replay_buffer", None)
        trainer = OfflineTrainer(agent=agent, dataset=dataset, progress_bar=False)
        trainer.train()
        return trainer

    plain, other = trained(history=False), trained(history=True)
    assert not isinstance(plain.replay_buffer.storage, WindowStorage)
    assert isinstance(other.replay_buffer.storage, WindowStorage)
    assert all(map(torch.equal, plain.loss_module.parameters(), other.loss_module.parameters()))


# -- chunks


@pytest.mark.usefixtures("no_pictures")
def test_a_run_on_chunks_continues_bit_for_bit(tmp_path):
    more = {"history": 2, "history_encoder": "stack", "num_samples": 3}

    def run(updates, folder=None):
        torch.manual_seed(0)
        dataset = sequences()
        agent = make_agent(config(updates=6, batch_size=8, action_chunk=3, **more), dataset)
        return OfflineTrainer(
            agent=agent, dataset=dataset, folder=folder, total_updates=updates, progress_bar=False
        )  # fmt: skip

    whole, half = run(6), run(3, tmp_path / "run")
    whole.train()
    half.train()
    resumed = run(6, tmp_path / "run").resume()
    resumed.train()
    assert whole.replay_buffer.storage.windows.size == 3
    assert all(map(torch.equal, whole.loss_module.parameters(), resumed.loss_module.parameters()))
    loaded = Agent.load(tmp_path / "run")
    assert loaded.policy.chunk == Chunk(3)
    observation = np.zeros((2, 3), np.float32)
    assert loaded.act(observation).shape == (3, *sequences().action_space.shape)


def test_digests_of_chunks_are_of_the_rows():
    dataset = sequences()
    buffer = dataset.chunks(3).replay_buffer(8)
    digests = data_state(buffer, None)["fingerprint"]
    assert data_state(dataset.chunks(3).replay_buffer(4), None)["fingerprint"] == digests
    buffer.storage.windows.chunks["actions",][0, 0] += 1
    assert data_state(buffer, None)["fingerprint"] != digests
