"""TorchRL's hooks on our trainer, and our loss and step in TorchRL's trainers."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from conftest import make_batch
from small_trainers import Numbers, make_step, make_trainer, same_weights
from tensordict import TensorDict
from torch import optim
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.trainers import (
    DefaultOptimizationStepper,
    EarlyStopping,
    LogScalar,
    LogValidationReward,
    LRSchedulerHook,
    ReplayBufferTrainer,
    SelectKeys,
    TargetNetUpdaterHook,
    Trainer,
)
from torchrl.trainers.algorithms import IQLTrainer


def targets(loss):
    return [p.detach().clone() for p in loss.target_qvalue_network_params.values(True, True)]


def test_log_scalar():
    logger = Numbers()
    trainer = make_trainer(logger=logger)
    LogScalar(("next", "reward"), "reward").register(trainer)
    trainer.train()
    assert [step for _, step in logger.of("reward")] == [0, 5, 10, 15]
    assert all(math.isfinite(value) for value, _ in logger.of("reward_std"))


def test_log_scalar_sees_the_batch_that_is_trained_on_and_draws_none_of_its_own():
    plain, hooked, seen = make_step(), make_step(), []
    for step in (plain, hooked):
        trainer = make_trainer(step, 6, log_interval=2)
        if step is hooked:
            trainer.register_op("pre_steps_log", lambda batch: seen.append(batch.clone()))
        trainer.train()
    assert same_weights(plain, hooked)
    buffer = make_trainer().replay_buffer
    drawn = [buffer.sample()["observation"] for _ in range(6)]
    for batch, number in zip(seen, (0, 2, 4), strict=True):
        assert torch.equal(batch["observation"], drawn[number])


@pytest.mark.parametrize(
    ("interval", "own", "halvings"),
    [("batch", False, 4), ("optim", False, 20), ("optim", True, 20)],
)
def test_lr_scheduler_hook_moves_a_rate_once(interval, own, halvings):
    """Also where the hook has the step's ``own`` scheduler."""
    step = make_step()
    scheduler = optim.lr_scheduler.StepLR(step.optimizer, step_size=1, gamma=0.5)
    step.lr_schedulers = (scheduler,) if own else ()
    trainer = make_trainer(step)
    LRSchedulerHook(scheduler, interval=interval).register(trainer)
    trainer.train()
    rate = step.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3 * 0.5**halvings)


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"monitor": "return_mean"}, 20),
        # the first value at 5 is the best; 10 updates later it is over
        ({"monitor": "loss_qvalue", "mode": "min", "min_delta": 1e6}, 15),
    ],
)
def test_early_stopping_on_an_evaluation_and_on_a_loss(options, updates):
    scores = iter([1.0, 2.0, 2.0, 2.0, 2.0, 3.0])
    trainer = make_trainer(
        total=50, eval_interval=10, evaluation=lambda: {"return_mean": next(scores)}
    )
    EarlyStopping(patience=10, wait_for=0, **options).register(trainer)
    trainer.train()
    assert trainer.updates == updates
    assert "did not improve" in trainer._stop_reason


def test_log_validation_reward():
    logger, step = Numbers(), make_step(3, 1)
    environment = TransformedEnv(GymEnv("Pendulum-v1"))
    trainer = make_trainer(step, 4, obs=3, act=1, log_interval=1, logger=logger)
    LogValidationReward(
        record_interval=2,
        record_frames=5,
        policy_exploration=step.loss.actor_network,
        environment=environment,
    ).register(trainer)
    trainer.train()
    result = logger.of("r_evaluation")
    assert [step for _, step in result] == [1, 3]
    assert all(-20 < value < 0 for value, _ in result)


def test_target_hook_of_a_step_that_leaves_the_targets_alone():
    step = make_step(target=False)
    loss = step.loss
    before = targets(loss)
    trainer = make_trainer(step, total=3)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, targets(loss), strict=True))
    trainer.total_frames = 4
    trainer.register_op("post_optim", TargetNetUpdaterHook(step.spare_updater))
    trainer.train()
    live = list(loss.qvalue_network_params.values(True, True))
    for old, now, new in zip(before, live, targets(loss), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * now.detach())


@pytest.mark.parametrize("stage", ["post_optim", "register"])
def test_target_hook_beside_a_step_that_moves_the_targets_moves_them_once(stage):
    step, alone = make_step(), make_step()
    make_trainer(alone, 3).train()
    trainer, hook = make_trainer(step, 3), TargetNetUpdaterHook(step.spare_updater)
    if stage == "register":
        hook.register(trainer, "target")
    else:
        trainer.register_op("post_optim", hook)
    trainer.train()
    for a, b in zip(targets(step.loss), targets(alone.loss), strict=True):
        assert torch.equal(a, b)


def test_hooks_that_change_the_batch_change_every_batch():
    step = make_step()
    rewards = []

    def loud(batch):
        return batch.clone().set(("next", "reward"), torch.full((16, 1), 7.0))

    trainer = make_trainer(step, total=7)
    trainer.register_op("process_optim_batch", loud)
    with pytest.warns(FutureWarning, match="post_loss"):
        trainer.register_op("post_loss", lambda batch: rewards.append(batch["next", "reward"]))
    trainer.train()
    assert len(rewards) == 7
    assert all((r == 7).all() for r in rewards)


def test_select_keys_and_registered_modules_are_saved(tmp_path):
    step = make_step()
    keys = ["observation", "action", "next"]
    trainer = make_trainer(step, save_trainer_file=tmp_path / "run.torchrl")
    SelectKeys([*keys]).register(trainer)
    linear = torch.nn.Linear(2, 2)
    trainer.register_module("mine", linear)
    trainer.train()
    other = make_trainer(make_step(), save_trainer_file=tmp_path / "run.torchrl")
    SelectKeys([*keys]).register(other)
    other.register_module("mine", torch.nn.Linear(2, 2))
    other.load_from_file(tmp_path / "run.torchrl")
    assert torch.equal(other._modules["mine"].weight, linear.weight)
    assert other.updates == 20


@pytest.mark.parametrize("format", ["directory", "archive"])
def test_torchrl_checkpoint_and_rotation(tmp_path, format):
    rotation = CheckpointRotation(
        tmp_path / "rotated", keep_last=2, keep_best=("return_mean", "max")
    )
    scores = iter([0.0, 5.0, 1.0, 2.0, 3.0])
    step = make_step()
    trainer = make_trainer(
        step,
        eval_interval=5,
        evaluation=lambda: {"return_mean": next(scores)},
        checkpoint=Checkpoint(format=format),
        checkpoint_rotation=rotation,
    )
    trainer.train()
    names = [path.stem for path in rotation.checkpoints()]
    assert names == [f"checkpoint-{n:012d}" for n in (5, 15, 20)]
    assert rotation.best().stem == "checkpoint-000000000005"
    other = make_trainer(make_step(), checkpoint=Checkpoint(format=format))
    other.load_from_file(rotation.latest())
    assert same_weights(step, other)


def test_register_op_refuses_stages_that_the_step_owns():
    trainer = make_trainer()
    for stage in ("process_loss", "optimizer"):
        with pytest.raises(ValueError, match=f"'{stage}' changes losses or gradients"):
            trainer.register_op(stage, lambda *_: None)


def online(step):
    """The common arguments of TorchRL's trainers, and a buffer."""
    environment = GymEnv("Pendulum-v1", categorical_action_encoding=False)
    collector = Collector(
        environment, step.loss.actor_network, frames_per_batch=64, total_frames=256,
        auto_register_policy_transforms=False,
    )  # fmt: skip
    options = {"total_frames": 256, "frame_skip": 1, "optim_steps_per_batch": 4}
    options |= {"collector": collector, "loss_module": step.loss, "progress_bar": False}
    return options, TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=16)


def torchrls_trainer(step, stepper):
    """TorchRL's ``Trainer`` with our step or TorchRL's own stepper, or its ``IQLTrainer``."""
    options, buffer = online(step)
    if stepper == "IQLTrainer":
        options |= {"replay_buffer": buffer, "log_rewards": False}
        return IQLTrainer(
            optimizer=step.optimizer, target_net_updater=step.spare_updater, **options
        )
    if stepper == "ours":
        trainer = Trainer(optimization_stepper=step, **options)
    else:
        stepper = DefaultOptimizationStepper()
        trainer = Trainer(optimizer=step.optimizer, optimization_stepper=stepper, **options)
        trainer.register_op("post_optim", TargetNetUpdaterHook(step.spare_updater))
    ReplayBufferTrainer(buffer, batch_size=16).register(trainer)
    return trainer


@pytest.mark.parametrize("stepper", ["ours", "TorchRL's", "IQLTrainer"])
def test_our_step_and_loss_in_torchrls_trainers(stepper):
    step = make_step(3, 1)
    before, old_targets = [p.detach().clone() for p in step.loss.parameters()], targets(step.loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchRL's own: experimental, retiring stages
        trainer = torchrls_trainer(step, stepper)
        trainer.train()
    assert trainer._optim_count == 16
    assert step.optimizer.state[next(step.loss.parameters())]["step"] == 16
    for old, new in ((before, list(step.loss.parameters())), (old_targets, targets(step.loss))):
        assert any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        assert torch.as_tensor(trainer._log_dict[name][-1]).isfinite()


def test_stepper_state_is_a_part_of_torchrls_checkpoint():
    step = make_step(3, 1)
    step(make_batch(obs=3, act=1))
    state = copy.deepcopy(step.state_dict())
    other = make_step(3, 1)
    _ = other.loss.value_estimator  # made when first needed, and a part of the state
    other.loss.load_state_dict(step.loss.state_dict())
    other.load_state_dict(state)
    torch.manual_seed(4)
    batch = make_batch(obs=3, act=1)
    a, b = step(batch.clone()), other(batch.clone())
    assert isinstance(a, TensorDict)
    assert same_weights(step, other)
    assert all(torch.equal(a[k], b[k]) for k in a.keys())  # noqa: SIM118
