"""Learn from a dataset, then continue in the environment: the fine-tuning of the IQL paper.

First come updates on the dataset alone. Then a sampled action in the environment and an update on the
dataset and the new steps alternate (arXiv:2110.06169, section 5.3). The loss, the optimizer's state and
the target critics continue: only the data changes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from iql_torchrl import PRESETS, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.report import draw, write_csv

import torch
from torchrl import logger
from torchrl.collectors import Collector
from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv
from torchrl.envs.utils import ExplorationType

LEAST = {"offline_updates": 0, "online_steps": 1, "eval_every": 1, "episodes": 1}


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id, file, or one of the built-in datasets (python -m iql_torchrl.data)"""
    limit: int | None = None
    """learn from the first transitions of the dataset, so many"""
    offline_updates: int = 2_000
    """updates on the dataset alone"""
    online_steps: int = 8_000
    """steps in the environment, each with an update"""
    eval_every: int = 250
    """updates between evaluations"""
    episodes: int = 16
    """episodes of each evaluation"""
    output: Path = Path("runs/finetune")
    """folder of the results"""


def check(config):
    """Refuse settings with which a step in the environment is not a row of the batches."""
    if config.action_chunk > 1 or config.history > 1:
        raise ValueError(
            f"action_chunk is {config.action_chunk} and history is {config.history}: online collection "
            "with action chunks or histories is not available, because their batches are windows of "
            "the dataset's rows. Use 1 for both here, or learn offline alone with iql_offline.py."
        )


def as_logged(frames, dataset):
    """Collected steps ``(n,)`` as rows of the dataset: its keys and reward scaling, new episodes."""
    stored = dataset.transitions
    for key in stored.keys(True, True):
        new, logged = (
            "missing" if x is None else f"{x.dtype} of shape {tuple(x.shape[1:])}"
            for x in (frames.get(key, None), stored[key])
        )
        if new != logged:
            raise ValueError(
                f"{key!r} is {new} in the environment and {logged} in the data: wrap the environment "
                "(env= of load_dataset) so that both agree, or leave that column out of the dataset."
            )
    rows = frames.select(*stored.keys(True, True))
    rows["next", "reward"] = dataset.reward_map(rows["next", "reward"])
    rows["collector", "traj_ids"] += len(dataset.episode_lengths)
    return rows


def act_online(agent, dataset, steps):
    """Steps ``(1,)`` in the environment with sampled actions, as transitions of the dataset."""
    env = GymWrapper(dataset.make_env(), categorical_action_encoding=True)
    # Not collector.set_seed: it resets the environment after the collector has its observation.
    env.set_seed(agent.config.seed)
    collector = Collector(
        TransformedEnv(env, DoubleToFloat()),
        agent.policy,  # the very module that is trained, so there are no weights to send
        frames_per_batch=1,
        total_frames=steps,
        policy_device=agent.config.device,
        env_device="cpu",
        storing_device="cpu",
        exploration_type=ExplorationType.RANDOM,
        auto_register_policy_transforms=False,
        pre_collect_hook=agent.policy.eval,  # no dropout in what acts
        post_collect_hook=lambda _: agent.policy.train(),
    )
    try:
        for frames in collector:
            yield as_logged(frames, dataset)
    finally:
        collector.shutdown()


def run(dataset, config, options, buffer):
    """Both phases, with batches of ``buffer``; yields a row for each evaluation."""
    torch.manual_seed(config.seed)  # sampled actions and dropout
    agent = make_agent(config, dataset)
    steps, before, every = options.online_steps, options.offline_updates, options.eval_every

    def point(update):
        played = evaluate(agent.policy, dataset.make_env, episodes=options.episodes, seed=10_000)
        phase = "offline" if update <= before else "online"
        print(f"update {update:7,} ({phase}): {played.returns.mean():8.1f}", flush=True)
        return {"update": update, **played.summary()}

    for update in range(before):
        if update and update % every == 0:
            yield point(update)
        agent.step(buffer.sample().to(config.device))
    yield point(before)
    for done, new in enumerate(act_online(agent, dataset, steps), 1):
        buffer.extend(new)
        agent.step(buffer.sample().to(config.device))
        if done % every == 0 or done == steps:
            yield point(before + done)


@cli.errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    # The policy's rate falls to 0 in the official code offline, and is constant in fine-tuning.
    constant = {"schedule": "constant", "schedule_steps": None}
    presets = {name: replace(preset, **constant) for name, preset in PRESETS.items()}
    how = {"without": ("updates",), "least": LEAST, "description": __doc__.split("\n\n")[0]}
    options, config = cli.parse(Options, arguments, presets=presets, **how)
    check(config)
    logger.setLevel("WARNING")  # TorchRL announces every storage that it makes
    source = ensure_source(options.dataset)
    dataset = load_dataset(source, reward=config.reward, limit=options.limit)
    dataset.print_notes()
    room = {"capacity": len(dataset) + options.online_steps, "device": config.device}
    buffer = dataset.replay_buffer(config.batch_size, seed=config.seed, **room)
    history = []
    options.output.mkdir(parents=True, exist_ok=True)
    for row in run(dataset, config, options, buffer):
        history.append(row)
        write_csv(options.output / "metrics.csv", history)
    level = float(dataset.episode_returns.mean())
    title = f"In the environment from update {options.offline_updates:,} on"
    draw(options.output / "finetune.png", history, title=title, reference=("the dataset", level))
    print(f"The dataset: {level:.1f}. Written to {options.output}/")


if __name__ == "__main__":
    main()
