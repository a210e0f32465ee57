"""Learn from a log, then continue in the environment: the fine-tuning of the IQL paper.

First come updates on the log alone. Then a sampled action in the environment and an update on the
log and the new steps alternate (arXiv:2110.06169, section 5.3). The loss, the optimizer's state and
the target critics continue: only the data changes.

Without arguments: a Pendulum log, too few updates to learn the task from it, and an online phase.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iql_torchrl import PRESETS, IQLConfig, OfflineDataset, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.report import text_table, write_rows
from iql_torchrl.report.figures import Series, comparison_figure, save

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl import logger
from torchrl.collectors import Collector
from torchrl.data import OfflineToOnlineReplayBuffer, ReplayBuffer, TensorStorage
from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv
from torchrl.envs.utils import ExplorationType

EVALUATION_SEED = 10_000  # episodes start alike at every point of every run
EARLY = 0.2  # the part of the online phase in which a collapse would show
LEAST = {"offline_updates": 0, "online_steps": 1, "updates_per_step": 0, "eval_every": 1}
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


def as_logged(frames: TensorDictBase, dataset: OfflineDataset) -> TensorDict:
    """Collected steps ``(n,)`` as rows of the log: its keys, its reward map, new episode numbers.

    Raises ``ValueError`` naming the first key that is missing or of another shape or dtype.
    """
    log = dataset.transitions
    for key in log.keys(True, True):
        ours, theirs = (
            "missing" if x is None else f"{x.dtype} of shape {tuple(x.shape[1:])}"
            for x in (frames.get(key, None), log[key])
        )
        if ours != theirs:
            raise ValueError(
                f"{key!r} is {ours} in the environment and {theirs} in the log: wrap the environment "
                "(env= of load_dataset) so that both agree, or leave that column out of the log."
            )
    rows = frames.select(*log.keys(True, True))
    rows["next", "reward"] = dataset.reward_map(rows["next", "reward"])
    rows["collector", "traj_ids"] += len(dataset.episode_lengths)
    return rows


def make_buffer(dataset, config, room, log_fraction=None):
    """The log and ``room`` for online steps; ``sample()`` draws from the log alone while empty.

    Uniform over both together (the official code), or exactly ``log_fraction`` of every batch
    from the log (0.5: RLPD, arXiv:2302.02948).
    """
    if log_fraction is None:
        how = {"seed": config.seed, "device": config.device, "capacity": len(dataset) + room}
        return dataset.replay_buffer(config.batch_size, **how)
    # Not a TensorDictReplayBuffer, whose additional key "index" only one half of a batch would have.
    log = ReplayBuffer(storage=TensorStorage(dataset.transitions))
    return OfflineToOnlineReplayBuffer(
        log, online_capacity=room, offline_fraction=log_fraction, batch_size=config.batch_size
    )


def learn_online(agent, dataset, buffer, *, steps, updates_per_step=1.0):
    """Act with sampled actions and update; yields (steps, updates) so far after each step."""
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
    made = 0
    try:
        for done, frames in enumerate(collector, 1):
            buffer.extend(as_logged(frames, dataset))
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
    steps, ratio = options.online_steps, options.updates_per_step
    buffer = make_buffer(dataset, config, steps, options.log_fraction)

    def point(phase: str, updates: int, done: int) -> Row:
        how = {"episodes": options.episodes, "seed": EVALUATION_SEED}
        played = evaluate(agent.policy, dataset.make_env, **how)
        print(
            f"seed {config.seed}, {phase}, {updates:7,}: {played.returns.mean():8.1f}", flush=True
        )
        identity = {"seed": config.seed, "phase": phase, "updates": updates, "online_steps": done}
        return {**identity, **played.summary()}

    for update in range(options.offline_updates):
        if update and update % options.eval_every == 0:
            yield point("offline", update, 0)
        agent.step(buffer.sample().to(config.device))
    yield point("offline", options.offline_updates, 0)
    evaluations = 0
    for done, made in learn_online(agent, dataset, buffer, steps=steps, updates_per_step=ratio):
        if made // options.eval_every > evaluations or done == steps:
            evaluations = made // options.eval_every
            yield point("online", options.offline_updates + made, done)


def around_switch(history: list[Row]) -> Row:
    """Mean returns of one seed: at the switch, lowest in the first fifth online, at the end."""
    before = [row for row in history if row["phase"] == "offline"][-1]
    online = [row for row in history if row["phase"] == "online"]
    early = [r for r in online if r["online_steps"] <= EARLY * online[-1]["online_steps"]]
    lowest = min(row["return_mean"] for row in early or online[:1])
    end = online[-1]["return_mean"]
    return {"before": before["return_mean"], "lowest early": lowest, "end": end}


def report(path: Path, dataset: OfflineDataset, history: list[Row]) -> None:
    """Print a line for each seed, and draw the mean returns with 95 % intervals over episodes."""
    log = dataset.episode_returns.mean()
    table, lines = [["mean return", "before", "lowest early", "end"]], []
    for seed in dict.fromkeys(row["seed"] for row in history):
        rows = [row for row in history if row["seed"] == seed]
        returns = around_switch(rows)
        table.append([f"seed {seed}", *(f"{value:.1f}" for value in returns.values())])
        names = ("updates", "return_mean", "return_low", "return_high")
        columns = np.array([[row[name] for name in names] for row in rows]).T
        lines.append(Series(f"seed {seed} ({returns['end']:.0f})", *columns))
    print("\n" + text_table([*table, ["the log", f"{log:.1f}", "", ""]]))
    print(f"(before: at the switch; early: the first {EARLY:.0%} of the online steps)\n")
    note = f"dashed: the log ({log:.0f}); dotted: online from here"
    figure = comparison_figure({"return_mean": lines}, note=note)
    figure.axes[0].axhline(log, color="0.4", linestyle="--")
    switch = max(row["updates"] for row in history if row["phase"] == "offline")
    figure.axes[0].axvline(switch, color="0.4", linestyle=":")
    save(figure, path)


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
        least=LEAST,
        description=__doc__.split("\n\n")[0],
    )
    updates = options.offline_updates + int(options.online_steps * options.updates_per_step + 1e-9)
    if updates < 1:
        cli.refuse("--offline-updates and --updates-per-step are 0; nothing is learned.")
    every = options.eval_every or max(1, updates // 40)
    return replace(options, eval_every=every), replace(config, updates=updates)


@cli.errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    options, config = parse(arguments)
    logger.setLevel("WARNING")  # TorchRL announces every storage that it makes
    source = ensure_source(options.dataset)
    dataset = load_dataset(source, reward=config.reward, limit=options.limit)
    dataset.print_notes()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(asdict(options) | asdict(config), indent=2, default=str) + "\n"
    (options.output / "config.json").write_text(settings)
    history: list[Row] = []
    for seed in options.seeds:
        for row in run(dataset, replace(config, seed=seed), options):
            history.append(row)
            write_rows(options.output / "metrics.csv", history)
    report(options.output / "finetune.png", dataset, history)
    print(f"Written to {options.output}/")


if __name__ == "__main__":
    main()
