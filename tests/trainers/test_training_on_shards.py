"""The trainer on a log in shards: resuming between replacements, refusals, and equal ranks."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shard_logs import SPACES, arrays, written
from small_agents import config

from iql_torchrl import OfflineTrainer, captured, compiled, load_dataset, make_agent
from iql_torchrl.data import ShardedDataset, load_shards
from iql_torchrl.files import CheckpointError
from iql_torchrl.trainers.checkpoints import DataState, check_same_data

LENGTHS = [7, 3, 12, 5, 5, 9, 2, 8, 6, 11]
SETTINGS = {"loaded": 2, "replace_every": 3}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> ShardedDataset:
    return written(tmp_path_factory.mktemp("log"), LENGTHS, 5)


def trainer(
    log: ShardedDataset, total: int, folder: Path | None = None, form=lambda step: step, **settings
) -> OfflineTrainer:
    agent = make_agent(config(), log)
    return OfflineTrainer(
        agent=agent, step=form(agent.step), dataset=log, total_updates=total, folder=folder,
        replay_buffer=log.replay_buffer(16, seed=0, **(SETTINGS | settings)), progress_bar=False,
    )  # fmt: skip


def weights(run: OfflineTrainer) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in run.loss_module.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("stop", [4, 6, 17])
def test_a_loaded_run_has_the_bits_of_one_without_interruption(log, stop):
    """Stopped in the middle between two replacements, where one is due, and in a later pass."""
    alone, stopped = trainer(log, 24), trainer(log, stop)
    alone.train()
    stopped.train()
    again = trainer(load_shards(log.files.location), 24)
    again.load_state_dict(deepcopy(stopped.state_dict()))
    assert again.updates == stop
    again.train()
    assert same(weights(alone), weights(again))
    assert alone.replay_buffer.loaded_shards() == again.replay_buffer.loaded_shards()


def test_the_trainer_makes_the_replay_of_its_agent(log, tmp_path):
    agent = make_agent(config(seed=3), log)
    run = OfflineTrainer(agent=agent, dataset=log, folder=tmp_path / "run", progress_bar=False)
    assert run.replay_buffer.loaded == 4
    expected = log.replay_buffer(16, seed=3).sample()
    assert bool((run.replay_buffer.sample() == expected).all())
    run.train()
    assert (tmp_path / "run" / "curves.png").is_file()  # with the mean return of the log


def test_all_shards_give_the_batches_and_updates_of_the_log_in_memory(log):
    """The same rows in the same order, so the same weights, by hand from the whole table."""
    run = trainer(log, 5, loaded=5)
    places = torch.cat([_rows(log, number) for number in run.replay_buffer.loaded_shards()])
    run.train()
    step = make_agent(config(), log).step
    table = load_dataset(arrays(LENGTHS), **SPACES).transitions.exclude("collector")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step(table[places[torch.randint(68, (16,), generator=generator)]])
    assert same(weights(run), list(step.loss.state_dict().values()))


def _rows(log: ShardedDataset, number: int) -> torch.Tensor:
    start = sum(shard.rows for shard in log.shards[:number])
    return torch.arange(start, start + log.shards[number].rows)


@pytest.mark.slow
def test_a_compiled_step_trains_from_shards(log):
    run, eager = trainer(log, 8, form=compiled), trainer(log, 8)
    run.train()
    eager.train()
    for one, other in zip(weights(run), weights(eager), strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_read_shards_says_so(log):
    agent = make_agent(config(), log)
    with pytest.raises(TypeError, match=r"replay is a ShardedReplay, .* Use compiled\(step\)"):
        captured(agent.step, log.replay_buffer(16))
    history = make_agent(config(history=2), log)
    with pytest.raises(ValueError, match=r"history=2 and log.npz is in shards, from which windows"):
        OfflineTrainer(agent=history, dataset=log, progress_bar=False)


def refused(run: OfflineTrainer) -> str:
    with pytest.raises((CheckpointError, ValueError)) as caught:
        run.resume()
    return str(caught.value)


def test_a_checkpoint_of_other_shards_rewards_or_settings_is_refused(log, tmp_path):
    folder = tmp_path / "run"
    trainer(log, 4, folder).train()
    other = written(tmp_path, LENGTHS, 5, seed=1)
    words = refused(trainer(other, 8, folder))
    assert "another run: shard-00000 of the dataset was" in words
    assert "Resume with the dataset (log.npz), " in words
    mapped = load_shards(log.files.location, reward=(2.0, 0.0))
    assert "the reward map (reward= of load_dataset) was" in refused(trainer(mapped, 8, folder))
    assert "loaded = 2, and this one has 3" in refused(trainer(log, 8, folder, loaded=3))
    run = trainer(log, 8, folder, replace_every=9)
    assert "replace_every = 3, and this one has 9" in refused(run)
    run = trainer(log, 8, folder)
    run.replay_buffer = load_dataset(arrays(LENGTHS), **SPACES).device_sampler(16, seed=0)
    assert "the kind of replay buffer was 'of shards' and is 'growing'" in refused(run)


class Recording:
    """Two ranks; what this one gives to compare with the other one's, by the error about it."""

    size = 2

    def __init__(self) -> None:
        self.values: dict[str, object] = {}

    def check_same(self, value, message: str) -> None:
        self.values[message] = value


def test_ranks_must_have_the_same_shards_and_the_same_rotation(log, tmp_path):
    def given(dataset, **options):
        ranks, buffer = Recording(), dataset.replay_buffer(8, **({"seed": 0} | SETTINGS | options))
        check_same_data(ranks, DataState(buffer, None), buffer)
        return ranks.values

    def refusals(dataset=log, **options):
        mine, other = given(log), given(dataset, **options)
        return [message for message in mine if mine[message] != other[message]]

    assert refusals() == []
    for options in ({"seed": 1}, {"loaded": 3}, {"replace_every": 4}):
        (message,) = refusals(**options)
        assert "replay buffers would draw different rows" in message
    for other in (written(tmp_path, LENGTHS, 5, seed=1), replace(log, shards=log.shards[:4])):
        assert "the ranks have different data: their datasets' digests" in refusals(other)[0]
