"""Learn a policy from a fixed log with IQL, beside the log itself and behaviour cloning.

Without arguments: makes a small Pendulum log once, trains behaviour cloning and IQL on it, plays
both in the real environment and writes tables and a picture to runs/.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from iql_torchrl import (
    PRESETS,
    Evaluation,
    IQLConfig,
    OfflineDataset,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.config import CHOICES, field_help
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset

DEFAULT_DATASET = "pendulum/mixed-v0"
EVALUATION_SEED = 10_000  # episodes start alike for every method and every training seed


def main(arguments: list[str] | None = None) -> int:
    options, config = parse(arguments)
    try:
        from matplotlib import pyplot  # noqa: F401  (asked for before the work, not after it)

        source = options.dataset
        if source in BUILTIN:
            source = ensure_dataset(source)
        dataset = load_dataset(source, reward=config.reward)
        dataset.make_env().close()
        make_agent(config, dataset)  # what cannot be built is said before a folder is made
        folder = new_folder(options.output, options.name or default_name(options.dataset, config))
    except ModuleNotFoundError as error:
        print(
            f'error: {error}; install it with pip install "iql_torchrl[examples]".', file=sys.stderr
        )
        return 2
    except (ImportError, ValueError, OSError, RuntimeError, AssertionError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2

    write_text(
        folder / "config.json", json.dumps({"dataset": options.dataset, **asdict(config)}, indent=2)
    )
    print(
        f"{options.dataset}: {len(dataset):,} transitions, {len(dataset.episode_returns)} episodes, "
        f"mean return {dataset.episode_returns.mean():.1f}. Writing to {folder}/"
    )
    started = time.monotonic()
    history: list[dict[str, object]] = []
    results, states = {}, {}
    for method, settings in (
        ("behaviour cloning", replace(config, temperature=0.0)),
        ("IQL", config),
    ):
        results[method], states[method] = train(method, settings, dataset, options, history, folder)
    save(folder / "checkpoint.pt", {"config": asdict(config), **states})
    draw(folder / "learning_curve.png", options.dataset, dataset, history)
    print_table(dataset, results)
    print(f"{time.monotonic() - started:.0f} s. Picture: {folder / 'learning_curve.png'}")
    return 0


def train(
    method: str,
    config: IQLConfig,
    dataset: OfflineDataset,
    options: argparse.Namespace,
    history: list[dict[str, object]],
    folder: Path,
) -> tuple[Evaluation, dict[str, object]]:
    """Train one method, measuring it on the way; returns its last evaluation and its state."""
    agent = make_agent(config, dataset)
    buffer = dataset.replay_buffer(config.batch_size, device=config.device, seed=config.seed)
    every = options.eval_every or max(1, config.updates // 10)
    bar = tqdm(total=config.updates, desc=method, unit="update", disable=None)
    for update in range(1, config.updates + 1):
        metrics = agent.step(buffer.sample())
        bar.update()
        last = update == config.updates
        if not last and update % every:
            continue
        episodes = options.final_episodes if last else options.episodes
        evaluation = play(agent.policy, dataset, episodes)
        curve = first(evaluation, options.episodes)
        row = {"method": method, "update": update, **curve.summary()}
        row |= {key: metrics[key].item() for key in sorted(metrics.keys())}
        history.append(row)
        write_csv(folder / "metrics.csv", history)
        bar.set_postfix_str(f"return {row['return_mean']:.1f}")
        if bar.disable:
            print(f"{method}: update {update:,}, return {row['return_mean']:.1f}", flush=True)
    bar.close()
    state = {
        "loss": agent.loss.state_dict(),
        "optimizer": agent.optimizer.state_dict(),
        "scheduler": agent.scheduler.state_dict(),
    }
    return evaluation, state


def first(evaluation: Evaluation, episodes: int) -> Evaluation:
    """The same episodes at every point of the curve, though the last evaluation plays more."""
    return Evaluation(evaluation.returns[:episodes], evaluation.lengths[:episodes])


def play(policy: torch.nn.Module, dataset: OfflineDataset, episodes: int) -> Evaluation:
    return evaluate(
        policy,
        dataset.make_env,
        episodes=episodes,
        num_envs=8,
        seed=EVALUATION_SEED,
        reference_scores=dataset.reference_scores,
    )


def print_table(dataset: OfflineDataset, results: dict[str, Evaluation]) -> None:
    log = dataset.episode_returns
    rows = [("the log", log.mean(), log.std(ddof=1) / len(log) ** 0.5, len(log))]
    for method, result in results.items():
        summary = result.summary()
        rows.append(
            (method, summary["return_mean"], summary["return_standard_error"], len(result.returns))
        )
    scored = dataset.reference_scores is not None
    print(
        f"\n{'':18} {'mean return':>12} {'std. error':>11} {'episodes':>9}"
        + scored * "  score 0..100"
    )
    for name, mean, error, episodes in rows:
        score = f"  {float(dataset.normalised_score(mean)):12.1f}" if scored else ""
        print(f"{name:18} {mean:12.1f} {error:11.1f} {episodes:9d}{score}")
    print()


def draw(path: Path, title: str, dataset: OfflineDataset, history: list[dict[str, object]]) -> None:
    """Mean return against updates, one line per method with its standard error, and the log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    log = dataset.episode_returns.mean()
    axes.axhline(log, color="0.4", linestyle="--", label=f"the log ({log:.0f})")
    for method in dict.fromkeys(row["method"] for row in history):
        rows = [row for row in history if row["method"] == method]
        updates = [row["update"] for row in rows]
        mean = [row["return_mean"] for row in rows]
        error = [row["return_standard_error"] for row in rows]
        (line,) = axes.plot(
            updates, mean, marker="o", markersize=3, label=f"{method} ({mean[-1]:.0f})"
        )
        axes.fill_between(
            updates,
            [m - e for m, e in zip(mean, error, strict=True)],
            [m + e for m, e in zip(mean, error, strict=True)],
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    axes.set(xlabel="gradient updates", ylabel="mean return per episode", title=title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def save(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_name(f".{path.name}")
    torch.save(state, temporary)
    os.replace(temporary, path)


def default_name(dataset: str, config: IQLConfig) -> str:
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', dataset).strip('-')}-seed{config.seed}"


def new_folder(root: Path, name: str) -> Path:
    """``root/name``, or ``root/name-2`` and so on: earlier runs are kept."""
    if Path(name).name != name:
        raise ValueError(f"--name is {name!r}; give one folder name, and its parent as --output.")
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise OSError(f"{root / name} and 9,998 numbered folders beside it exist; remove some.")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, IQLConfig]:
    """Every field of IQLConfig is an option; what is not given comes from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add(
        "--dataset",
        default=DEFAULT_DATASET,
        metavar="ID",
        help=f"a Minari id or a file; made on demand: {', '.join(BUILTIN)} ({DEFAULT_DATASET})",
    )
    add(
        "--preset",
        default="quick",
        choices=list(PRESETS),
        help="settings to start from: quick, or the official code's for D4RL's tasks (default quick)",
    )
    add(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where runs are written (runs)",
    )
    add("--name", help="folder of this run below --output (default: from dataset and seed)")
    add(
        "--eval-every",
        type=positive,
        metavar="N",
        help="updates between evaluations (default updates / 10)",
    )
    add(
        "--episodes",
        type=positive,
        default=16,
        metavar="N",
        help="episodes of each evaluation (16)",
    )
    add(
        "--final-episodes",
        type=positive,
        default=100,
        metavar="N",
        help="episodes of the last one (100)",
    )
    settings = parser.add_argument_group("settings, in place of the preset's")
    texts = field_help()
    for field in fields(IQLConfig):
        add_setting(settings, field.name, texts[field.name])
    options = parser.parse_args(arguments)
    given = {
        f.name: getattr(options, f.name) for f in fields(IQLConfig) if hasattr(options, f.name)
    }
    try:
        return options, replace(PRESETS[options.preset], **given)
    except ValueError as error:
        parser.error(str(error))


def add_setting(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    value = getattr(PRESETS["quick"], name)
    text += f" (quick: {value})"
    kwargs: dict[str, object] = {"default": argparse.SUPPRESS, "help": text, "dest": name}
    if isinstance(value, bool):
        kwargs["action"] = argparse.BooleanOptionalAction
    elif isinstance(value, tuple):
        kwargs |= {"nargs": "+", "type": int, "metavar": "N", "action": AsTuple}
    elif name == "max_grad_norm":
        kwargs |= {"type": lambda s: None if s == "none" else float(s), "metavar": "X"}
    elif name in CHOICES:
        kwargs["choices"] = CHOICES[name]
    else:
        kwargs |= {"type": type(value), "metavar": {int: "N", float: "X"}.get(type(value), "S")}
    group.add_argument(f"--{name.replace('_', '-')}", **kwargs)


class AsTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
