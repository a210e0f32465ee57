"""Windows in trainers and captured updates: resuming, digests, and frames that are not copied."""

from __future__ import annotations

import pytest
import torch
from test_sequences import ENCODERS, Last, log, step_of

from iql_torchrl import IQLConfig, OfflineDataset, OfflineTrainer, captured, make_agent
from iql_torchrl.data.windows import WindowStorage
from iql_torchrl.networks import with_history
from iql_torchrl.trainers.checkpoints import DataState

NAMES = {"actor": Last, "critic": Last, "value": ENCODERS["lstm"]}


def windows():
    torch.manual_seed(0)
    return log().windows(3)


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
    pairs = zip(alone.step.loss.parameters(), again.step.loss.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_digests_are_of_the_frames_and_not_of_windows(monkeypatch):
    monkeypatch.setattr(WindowStorage, "get", None)
    buffer = windows().replay_buffer(8)
    digests = DataState(buffer, None).state_dict()["fingerprint"]
    assert digests["frames.observation"].startswith("float64 (12, 3) ")
    assert digests["own.observation"].startswith("float64 (3, 3) ")
    assert DataState(windows().replay_buffer(4), None).state_dict()["fingerprint"] == digests
    buffer.storage.windows.frame_table.own["observation",][0, 0] += 1
    changed = DataState(buffer, None).state_dict()["fingerprint"]
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
    pairs = zip(step.loss.parameters(), alone.loss.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_trainer_makes_the_windows_of_the_agents_policy(monkeypatch):
    def trained(history):
        torch.manual_seed(0)
        dataset = log()
        agent = make_agent(IQLConfig(updates=4, hidden=(8,), batch_size=8, seed=1), dataset)
        if history:
            with_history(agent.policy, 1, stack=True)  # as plain rows, each frame once
            monkeypatch.setattr(OfflineDataset, "replay_buffer", None)
        trainer = OfflineTrainer(agent=agent, dataset=dataset, progress_bar=False)
        trainer.train()
        return trainer, list(agent.loss.parameters())

    plain, expected = trained(history=False)
    trainer, found = trained(history=True)
    assert not isinstance(plain.replay_buffer.storage, WindowStorage)
    assert isinstance(trainer.replay_buffer.storage, WindowStorage)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
