"""Evaluation beside training: the rows, scores and best checkpoint of evaluation in between."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from small_trainers import make_step, make_trainer

from iql_torchrl import evaluate
from iql_torchrl.evaluation.background import BackgroundEvaluation
from iql_torchrl.files import read_components

SETTINGS = {"episodes": 3, "num_envs": 2, "seed": 5, "max_steps": 12}


def make_env():
    return gym.make("Pendulum-v1")


def trainer_of(folder, evaluation_of):
    step = make_step(3, 1)
    evaluation = evaluation_of(step.loss.actor_network)
    torch.manual_seed(3)
    return make_trainer(step, obs=3, act=1, eval_interval=10, evaluation=evaluation, folder=folder)


def foreground(policy):
    return lambda: evaluate(policy, make_env, **SETTINGS)


@pytest.fixture(scope="module")
def in_between(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "foreground"
    trainer_of(folder, foreground).train()
    return folder


def background(policy):
    return BackgroundEvaluation(policy, make_env, **SETTINGS)


def test_rows_and_best_are_those_of_evaluation_in_between(tmp_path, in_between):
    trainer = trainer_of(tmp_path, background)
    with trainer.evaluation:
        trainer.train()
    assert (tmp_path / "metrics.csv").read_text() == (in_between / "metrics.csv").read_text()
    actual, expected = (read_components(f / "best.torchrl") for f in (tmp_path, in_between))
    assert actual["trainer_state"]["progress"]["updates"] == trainer.progress.best_update
    assert expected["trainer_state"]["progress"]["updates"] == trainer.progress.best_update
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.slow
def test_an_evaluation_under_way_is_made_again_after_a_resume(tmp_path, in_between):
    """Stopped with an evaluation under way: its policy is in the checkpoint."""
    trainer = trainer_of(tmp_path, background)
    submitted = trainer.evaluation.submit

    def submit_and_stop(number):
        submitted(number)
        if number == 10:
            raise RuntimeError("as if killed")

    trainer.evaluation.submit = submit_and_stop
    with pytest.raises(RuntimeError, match="as if killed"), trainer.evaluation:
        trainer.train()
    again = trainer_of(tmp_path, background)
    with again.evaluation:
        assert 10 in again.resume().evaluation.pending
        again.train()
    rows = (tmp_path / "metrics.csv").read_text()
    assert rows == (in_between / "metrics.csv").read_text()
