"""Learn from a log, then continue in the environment: the fine-tuning of the IQL paper.

First come updates on the log alone. Then a sampled action in the environment and an update on the
log and the new steps alternate (arXiv:2110.06169, section 5.3). The loss, the optimizer's state and
the target critics continue: only the data changes.

Without arguments: a Pendulum log, too few updates to learn the task from it, and an online phase.
"""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iql_torchrl import (
    PRESETS,
    Agent,
    IQLConfig,
    OfflineDataset,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.files import whole_file

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl import logger
from torchrl.collectors import Collector
from torchrl.data import OfflineToOnlineReplayBuffer, ReplayBuffer, TensorStorage
from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv
from torchrl.envs.utils import ExplorationType
from tqdm import tqdm

EVALUATION_SEED = 10_000  # episodes start alike at every point of every run
EARLY = 0.2  # the part of the online phase in which a collapse would show
LEAST = {"offline_updates": 0, "online_steps": 1, "updates_per_step": 0, "frames_per_batch": 1}
LEAST |= {"eval_every": 1, "episodes": 1}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id or file"""
    limit: int | None = None
    """learn from the first transitions of the log, so many"""
    offline_updates: int = 2_000
    """updates on the log alone"""
    online_steps: int = 8_000
    """steps in the environment"""
    updates_per_step: float = 1.0
    """updates per step in the environment"""
    frames_per_batch: int = 1
    """steps in the environment between updates"""
    log_fraction: float | None = None
    """part of each batch from the log, in (0, 1); by default log and new steps are one pool"""
    seeds: tuple[int, ...] = (0,)
    """one run each"""
    eval_every: int | None = None
    """updates between evaluations; by default a 40th of all"""
    episodes: int = 16
    """episodes of each evaluation"""
    output: Path = Path("runs/finetune")
    """folder of the results"""

    @property
    def updates(self) -> int:
        """Of both phases."""
        return self.offline_updates + int(self.online_steps * self.updates_per_step + 1e-9)


def as_logged(frames: TensorDictBase, dataset: OfflineDataset) -> TensorDict:
    """Collected steps ``(n,)`` as rows of the log: its keys, its reward map, new episode numbers.

    Raises ``ValueError`` naming the first key that is missing or of another shape or dtype.
    """
    log, rows = dataset.transitions, {}
    for key in log.keys(True, True):
        values = frames.get(key, None)
        if values is None:
            raise ValueError(
                f"the environment gives no {key!r}, which the log has: wrap the environment (env= "
                "of load_dataset) so that it does, or leave that column out of the log."
            )
        if (values.shape[1:], values.dtype) != (log[key].shape[1:], log[key].dtype):
            raise ValueError(
                f"{key!r} is {values.dtype} of shape {tuple(values.shape[1:])} in the environment and "
                f"{log[key].dtype} of shape {tuple(log[key].shape[1:])} in the log: wrap the "
                "environment (env= of load_dataset) so that both agree."
            )
        rows[key] = values
    rows["next", "reward"] = dataset.reward_map(rows["next", "reward"])
    episodes = ("collector", "traj_ids")
    rows[episodes] = rows[episodes] + len(dataset.episode_lengths)
    return TensorDict(rows, batch_size=frames.batch_size)


def make_buffer(
    dataset: OfflineDataset, config: IQLConfig, room: int, log_fraction: float | None
) -> ReplayBuffer | OfflineToOnlineReplayBuffer:
    """The log and ``room`` for online steps; ``sample()`` draws from the log alone while empty.

    Uniform over both together (the official code), or exactly ``log_fraction`` of every batch
    from the log (0.5: RLPD, arXiv:2302.02948).
    """
    if log_fraction is None:
        capacity = len(dataset) + room
        return dataset.replay_buffer(
            config.batch_size, seed=config.seed, device=config.device, capacity=capacity
        )
    # Not a TensorDictReplayBuffer, whose additional key "index" only one half of a batch would have.
    log = ReplayBuffer(storage=TensorStorage(dataset.transitions))
    return OfflineToOnlineReplayBuffer(
        log, online_capacity=room, offline_fraction=log_fraction, batch_size=config.batch_size
    )


def learn_online(
    agent: Agent,
    dataset: OfflineDataset,
    buffer: ReplayBuffer | OfflineToOnlineReplayBuffer,
    *,
    steps: int,
    frames_per_batch: int = 1,
    updates_per_step: float = 1.0,
) -> Iterator[tuple[int, int]]:
    """Act with sampled actions and update; yields (steps, updates) so far after each batch."""
    env = GymWrapper(dataset.make_env(), categorical_action_encoding=True)
    # Not collector.set_seed: it resets the environment after the collector has its observation.
    env.set_seed(agent.config.seed)
    collector = Collector(
        TransformedEnv(env, DoubleToFloat()),
        agent.policy,  # the very module that is trained, so there are no weights to send
        frames_per_batch=frames_per_batch,
        total_frames=steps,
        policy_device=agent.config.device,
        env_device="cpu",
        storing_device="cpu",
        exploration_type=ExplorationType.RANDOM,
        auto_register_policy_transforms=False,
        pre_collect_hook=agent.policy.eval,  # no dropout in what acts
        post_collect_hook=lambda _: agent.policy.train(),
    )
    done, made = 0, 0
    try:
        for frames in collector:
            buffer.extend(as_logged(frames, dataset))
            done += len(frames)
            while made + 1 <= done * updates_per_step + 1e-9:
                agent.step(buffer.sample().to(agent.config.device))
                made += 1
            yield done, made
    finally:
        collector.shutdown()


def run(dataset: OfflineDataset, config: IQLConfig, options: Options) -> Iterator[Row]:
    """Both phases for ``config.seed``; yields a row for each evaluation."""
    torch.manual_seed(config.seed)  # sampled actions, dropout, and batches with log_fraction
    agent = make_agent(config, dataset)
    buffer = make_buffer(dataset, config, options.online_steps, options.log_fraction)
    bar = tqdm(total=config.updates, desc=f"seed {config.seed}", unit="update", disable=None)

    def point(phase: str, updates: int, steps: int) -> Row:
        played = evaluate(
            agent.policy, dataset.make_env, episodes=options.episodes, seed=EVALUATION_SEED
        )
        bar.write(f"seed {config.seed}, {phase}, {updates:7,}: {played.returns.mean():8.1f}")
        identity = {"seed": config.seed, "phase": phase, "updates": updates, "online_steps": steps}
        return {**identity, **played.summary()}

    pretraining = options.offline_updates
    for update in range(1, pretraining + 1):
        agent.step(buffer.sample().to(config.device))
        bar.update()
        if update % options.eval_every == 0 and update < pretraining:
            yield point("offline", update, 0)
    yield point("offline", pretraining, 0)
    online = learn_online(
        agent,
        dataset,
        buffer,
        steps=options.online_steps,
        frames_per_batch=options.frames_per_batch,
        updates_per_step=options.updates_per_step,
    )
    evaluations = 0
    for steps, updates in online:
        bar.update(pretraining + updates - bar.n)
        if updates // options.eval_every > evaluations or steps == options.online_steps:
            evaluations = updates // options.eval_every
            yield point("online", pretraining + updates, steps)
    bar.close()


def around_switch(history: list[Row]) -> Row:
    """Mean returns of one seed: at the switch, lowest in the first fifth online, at the end."""
    before = [row for row in history if row["phase"] == "offline"][-1]
    online = [row for row in history if row["phase"] == "online"]
    early = [r for r in online if r["online_steps"] <= EARLY * online[-1]["online_steps"]]
    lowest = min(row["return_mean"] for row in early or online[:1])
    end = online[-1]["return_mean"]
    return {"before": before["return_mean"], "lowest early": lowest, "end": end}


def print_table(dataset: OfflineDataset, history: list[Row]) -> None:
    print(f"\n{'mean return':12}{'before':>14}{'lowest early':>14}{'end':>14}")
    for seed in dict.fromkeys(row["seed"] for row in history):
        returns = around_switch([row for row in history if row["seed"] == seed])
        print(f"seed {seed:<7}" + "".join(f"{value:14.1f}" for value in returns.values()))
    print(f"the log     {dataset.episode_returns.mean():14.1f}")
    print(f"(before: at the switch; early: the first {EARLY:.0%} of the online steps)\n")


def draw(path: Path, title: str, dataset: OfflineDataset, history: list[Row]) -> None:
    """Mean return against updates with its 95 % interval over episodes, a line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    log = dataset.episode_returns.mean()
    axes.axhline(log, color="0.4", linestyle="--", label=f"the log ({log:.0f})")
    switch = max(row["updates"] for row in history if row["phase"] == "offline")
    axes.axvline(switch, color="0.4", linestyle=":", label="online from here")
    for seed in dict.fromkeys(row["seed"] for row in history):
        rows = [row for row in history if row["seed"] == seed]
        names = ("updates", "return_mean", "return_low", "return_high")
        updates, mean, low, high = ([row[name] for row in rows] for name in names)
        label = f"seed {seed} ({mean[-1]:.0f})"
        (line,) = axes.plot(updates, mean, marker="o", markersize=3, label=label)
        axes.fill_between(updates, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="gradient updates", ylabel="mean return per episode", title=title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def write_csv(path: Path, rows: list[Row]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parse(arguments: list[str] | None) -> tuple[Options, IQLConfig]:
    """Options, and the config of all updates, by default with a constant rate of the policy.

    The official code's rate falls to 0 offline, but is constant in fine-tuning.
    """
    constant = {"schedule": "constant", "schedule_steps": None}
    options, config = cli.parse(
        Options,
        arguments,
        presets={name: replace(preset, **constant) for name, preset in PRESETS.items()},
        without=("seed", "updates"),
        description=__doc__.split("\n\n")[0],
    )
    for name, least in LEAST.items():
        if (value := getattr(options, name)) is not None and value < least:
            cli.refuse(f"{name} is {value}; it must be at least {least}.")
    if options.online_steps % options.frames_per_batch:
        cli.refuse("--online-steps must be a multiple of --frames-per-batch.")
    if options.updates < 1:
        cli.refuse("--offline-updates and --updates-per-step are 0; nothing is learned.")
    every = options.eval_every or max(1, options.updates // 40)
    return replace(options, eval_every=every), replace(config, updates=options.updates)


def main(arguments: list[str] | None = None) -> int:
    options, config = parse(arguments)
    logger.setLevel("WARNING")  # TorchRL announces every storage that it makes
    try:
        import matplotlib  # noqa: F401  (a missing package is an error before training)

        source = ensure_dataset(options.dataset) if options.dataset in BUILTIN else options.dataset
        dataset = load_dataset(source, reward=config.reward, limit=options.limit)
        dataset.print_notes()
        options.output.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(asdict(options) | asdict(config), indent=2, default=str) + "\n"
        with whole_file(options.output / "config.json") as temporary:
            temporary.write_text(settings)
        history: list[Row] = []
        for seed in options.seeds:
            for row in run(dataset, replace(config, seed=seed), options):
                history.append(row)
                write_csv(options.output / "metrics.csv", history)
    except (ImportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(options.output / "finetune.png", options.dataset, dataset, history)
    print_table(dataset, history)
    print(f"Written to {options.output}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
