"""TorchRL's hooks on our trainer, and our loss and step in TorchRL's trainers."""

import math
import warnings

import pytest
import torch
from small_trainers import Numbers, make_step, make_trainer, same_weights
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


def test_log_scalar_sees_the_batch_that_is_trained_on_and_draws_none_of_its_own():
    plain, hooked, logger, seen = make_step(), make_step(), Numbers(), []
    make_trainer(plain).train()
    trainer = make_trainer(hooked, logger=logger)
    LogScalar(("next", "reward"), "reward").register(trainer)
    trainer.register_op("pre_steps_log", lambda batch: seen.append(batch.clone()))
    trainer.train()
    assert same_weights(plain, hooked)
    assert [step for _, step in logger.of("reward")] == [0, 5, 10, 15]
    assert all(math.isfinite(value) for value, _ in logger.of("reward_std"))
    buffer = make_trainer().replay_buffer
    drawn = [buffer.sample()["observation"] for _ in range(20)]
    for batch, expected in zip(seen, drawn[::5], strict=True):
        assert torch.equal(batch["observation"], expected)


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
    online = list(loss.qvalue_network_params.values(True, True))
    for old, now, new in zip(before, online, targets(loss), strict=True):
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
    assert all(map(torch.equal, targets(step.loss), targets(alone.loss)))


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
    evaluation = {"eval_interval": 10, "evaluation": lambda: {"return_mean": next(scores)}}
    trainer = make_trainer(total=50, **evaluation)
    EarlyStopping(patience=10, wait_for=0, **options).register(trainer)
    trainer.train()
    assert trainer.updates == updates
    assert "did not improve" in trainer._stop_reason


def test_log_validation_reward():
    logger, step = Numbers(), make_step(3, 1)
    trainer = make_trainer(step, 4, obs=3, act=1, log_interval=1, logger=logger)
    environment = TransformedEnv(GymEnv("Pendulum-v1"))
    options = {"policy_exploration": step.loss.actor_network, "environment": environment}
    LogValidationReward(record_interval=2, record_frames=5, **options).register(trainer)
    trainer.train()
    result = logger.of("r_evaluation")
    assert [step for _, step in result] == [1, 3]
    assert all(-20 < value < 0 for value, _ in result)


def test_hooks_that_change_the_batch_change_every_batch():
    rewards, trainer = [], make_trainer(total=7)
    loud = torch.full((16, 1), 7.0)
    trainer.register_op(
        "process_optim_batch", lambda batch: batch.clone().set(("next", "reward"), loud)
    )
    with pytest.warns(FutureWarning, match="post_loss"):
        trainer.register_op("post_loss", lambda batch: rewards.append(batch["next", "reward"]))
    trainer.train()
    assert len(rewards) == 7
    assert all((r == 7).all() for r in rewards)


def test_select_keys_and_registered_modules_are_saved(tmp_path):
    def make():
        trainer, linear = make_trainer(save_trainer_file=tmp_path / "a"), torch.nn.Linear(2, 2)
        SelectKeys(["observation", "action", "next"]).register(trainer)
        trainer.register_module("mine", linear)
        return trainer, linear

    (trainer, linear), (other, loaded) = make(), make()
    linear.weight.data.fill_(3.0)
    trainer.train()
    other.load_from_file(tmp_path / "a")
    assert (loaded.weight == 3.0).all()
    assert other.updates == 20


@pytest.mark.parametrize("format", ["directory", "archive"])
def test_torchrl_checkpoint_and_rotation(tmp_path, format):
    best, scores, step = ("return_mean", "max"), iter([0.0, 5.0, 1.0, 2.0, 3.0]), make_step()
    rotation = CheckpointRotation(tmp_path / "rotated", keep_last=2, keep_best=best)
    options = {"checkpoint": Checkpoint(format=format), "checkpoint_rotation": rotation}
    evaluation = {"eval_interval": 5, "evaluation": lambda: {"return_mean": next(scores)}}
    make_trainer(step, **evaluation, **options).train()
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


def torchrls_trainer(step, stepper):
    """TorchRL's ``Trainer`` with our step or TorchRL's own stepper, or its ``IQLTrainer``."""
    collector = Collector(
        GymEnv("Pendulum-v1", categorical_action_encoding=False), step.loss.actor_network,
        frames_per_batch=64, total_frames=256, auto_register_policy_transforms=False,
    )  # fmt: skip
    options = {"total_frames": 256, "frame_skip": 1, "optim_steps_per_batch": 4}
    options |= {"collector": collector, "loss_module": step.loss, "progress_bar": False}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=16)
    if stepper == "IQLTrainer":
        options |= {"replay_buffer": buffer, "log_rewards": False, "optimizer": step.optimizer}
        return IQLTrainer(target_net_updater=step.spare_updater, **options)
    if stepper == "ours":
        trainer = Trainer(optimization_stepper=step, **options)
    else:
        options["optimization_stepper"] = DefaultOptimizationStepper()
        trainer = Trainer(optimizer=step.optimizer, **options)
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
