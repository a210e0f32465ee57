"""Learn from a log, then go on learning in the environment: the fine-tuning of the IQL paper.

First updates on the log alone. Then, over and over, one sampled action in the environment and one
update from the log and the new steps together (arXiv:2110.06169, section 5.3). The loss, the
optimizer's state and the target critics go on as they are: only the data changes.

Without arguments: a Pendulum log, too few updates to master it, and an online phase that does.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl import logger
from torchrl.collectors import Collector
from torchrl.data import OfflineToOnlineReplayBuffer, ReplayBuffer, TensorStorage
from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv
from torchrl.envs.utils import ExplorationType
from tqdm import tqdm

from iql_torchrl import PRESETS, IQLConfig, OfflineDataset, evaluate, load_dataset, make_agent
from iql_torchrl.agent.build import Agent
from iql_torchrl.config import field_help
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.files import whole_file

EVALUATION_SEED = 10_000  # episodes start alike at every point of every run
EARLY = 0.2  # the part of the online phase in which a collapse would show
SETTINGS = ("expectile", "temperature", "discount", "batch_size", "polyak", "schedule")
LEAST = {"offline_updates": 0, "online_steps": 1, "ratio": 0, "frames_per_batch": 1}
LEAST |= {"eval_every": 1, "episodes": 1}
Row = dict[str, Any]


def as_logged(frames: TensorDictBase, dataset: OfflineDataset) -> TensorDict:
    """Collected steps ``(n,)`` as rows of the log: its keys, its reward map, new episode numbers.

    Raises ``ValueError`` naming the first key that is missing or of another shape or dtype.
    """
    log, rows = dataset.transitions, {}
    for key in log.keys(True, True):
        found = frames.get(key, None)
        if found is None:
            raise ValueError(
                f"the environment gives no {key!r}, which the log holds: wrap the environment (env= "
                "of load_dataset) so that it does, or leave that column out of the log."
            )
        if (found.shape[1:], found.dtype) != (log[key].shape[1:], log[key].dtype):
            raise ValueError(
                f"{key!r} is {found.dtype} of shape {tuple(found.shape[1:])} in the environment and "
                f"{log[key].dtype} of shape {tuple(log[key].shape[1:])} in the log: wrap the "
                "environment (env= of load_dataset) so that both agree."
            )
        rows[key] = found
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
        where = {"device": config.device, "capacity": len(dataset) + room}
        return dataset.replay_buffer(config.batch_size, seed=config.seed, **where)
    # Not a TensorDictReplayBuffer: the "index" it adds to its half would keep the halves apart.
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
    # Not collector.set_seed: that resets the environment behind the first observation's back.
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


def run(dataset: OfflineDataset, config: IQLConfig, options: argparse.Namespace) -> Iterator[Row]:
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
        about = {"seed": config.seed, "phase": phase, "updates": updates, "online_steps": steps}
        return {**about, **played.summary()}

    pretraining = options.offline_updates
    for update in range(1, pretraining + 1):
        agent.step(buffer.sample().to(config.device))
        bar.update()
        if update % options.eval_every == 0 and update < pretraining:
            yield point("offline", update, 0)
    yield point("offline", pretraining, 0)
    how = {"frames_per_batch": options.frames_per_batch, "updates_per_step": options.ratio}
    seen = 0
    for steps, made in learn_online(agent, dataset, buffer, steps=options.online_steps, **how):
        bar.update(pretraining + made - bar.n)
        if made // options.eval_every > seen or steps == options.online_steps:
            seen = made // options.eval_every
            yield point("online", pretraining + made, steps)
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
        found = around_switch([row for row in history if row["seed"] == seed])
        print(f"seed {seed:<7}" + "".join(f"{value:14.1f}" for value in found.values()))
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


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, IQLConfig]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dataset", default="pendulum/mixed-v0", help="Minari id or file (%(default)s)")
    add("--limit", type=int, metavar="N", help="learn from the first N transitions of the log")
    add("--offline-updates", type=int, default=2_000, help="on the log alone (%(default)s)")
    add("--online-steps", type=int, default=8_000, help="in the environment (%(default)s)")
    add("--updates-per-step", dest="ratio", type=float, default=1, help="online (%(default)s)")
    add("--frames-per-batch", type=int, default=1, help="steps between updates (%(default)s)")
    text = "share of each batch from the log, in (0, 1); by default log and new steps are one pool"
    add("--log-fraction", type=float, metavar="X", help=text)
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="one run each (0)")
    add("--eval-every", type=int, metavar="N", help="updates between evaluations (a 40th of all)")
    add("--episodes", type=int, default=16, help="of each evaluation (%(default)s)")
    add("--output", type=Path, default=Path("runs/finetune"), help="folder (%(default)s)")
    add("--preset", default="quick", choices=list(PRESETS), help="settings to start from (quick)")
    for name in SETTINGS:
        kwargs = {"type": type(getattr(PRESETS["quick"], name)), "default": argparse.SUPPRESS}
        add(f"--{name.replace('_', '-')}", metavar="X", help=field_help()[name], **kwargs)
    options = parser.parse_args(arguments)
    updates = options.offline_updates + int(options.online_steps * options.ratio + 1e-9)
    if options.eval_every is None:
        options.eval_every = max(1, updates // 40)
    given = {name: getattr(options, name) for name in SETTINGS if name in options}
    if options.online_steps % max(1, options.frames_per_batch):
        parser.error("--online-steps must be a multiple of --frames-per-batch")
    for name, least in LEAST.items():
        if getattr(options, name) < least:
            parser.error(f"{name} is {getattr(options, name)}; wanted at least {least}")
    try:  # the official code's policy rate falls to 0 offline, but is constant in fine-tuning
        settings = {"schedule": "constant", "updates": updates, **given}
        return options, replace(PRESETS[options.preset], **settings)
    except ValueError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    options, config = parse(arguments)
    logger.setLevel("WARNING")  # TorchRL announces every storage that it makes
    try:
        import matplotlib  # noqa: F401  (asked for before the work, not after it)

        source = ensure_dataset(options.dataset) if options.dataset in BUILTIN else options.dataset
        dataset = load_dataset(source, reward=config.reward, limit=options.limit)
        dataset.print_notes()
        options.output.mkdir(parents=True, exist_ok=True)
        about = json.dumps(vars(options) | asdict(config), indent=2, default=str) + "\n"
        with whole_file(options.output / "config.json") as temporary:
            temporary.write_text(about)
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
