"""Learn a policy from a fixed log with IQL, beside the log itself and behaviour cloning.

Without arguments: makes a small Pendulum log once, trains behaviour cloning and IQL on it, plays
both in the real environment and writes tables, pictures, checkpoints and the policy to runs/.
"""

import inspect
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torchrl.record.loggers import MLFlowLogger, get_logger

from iql_torchrl import (
    PRESETS,
    Evaluation,
    IQLConfig,
    OfflineDataset,
    OfflineTrainer,
    cli,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.checkpoint import CheckpointError
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.report import compare
from iql_torchrl.trainers.run_folder import new_folder, saved_arguments

EXPECTED = (ImportError, ValueError, OSError, RuntimeError, AssertionError)
EVALUATION_SEED = 10_000  # episodes start alike for every method and every training seed


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id, file, or one of the built-in datasets (python -m iql_torchrl.data)"""
    env: str | None = None
    """Gymnasium id to play in, for files that record none"""
    output: Path = Path("runs")
    """where runs are written"""
    name: str | None = None
    """folder of this run below --output; by default from dataset and seed"""
    eval_every: int | None = None
    """updates between evaluations; by default a tenth of all"""
    episodes: int = 16
    """episodes of each evaluation"""
    final_episodes: int = 100
    """episodes of the last evaluation"""
    logger: Literal["csv", "tensorboard", "wandb", "mlflow", "trackio"] | None = None
    """logger of TorchRL that also receives the metrics"""
    resume: Path | None = None
    """folder of a run that was stopped, to continue it"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options, config, folder = parse(arguments)
    try:
        source = ensure_dataset(options.dataset) if options.dataset in BUILTIN else options.dataset
        dataset = load_dataset(source, env=options.env, reward=config.reward)
        dataset.print_notes()
        # what cannot be built or played is said before a folder is made
        policy = make_agent(config, dataset).policy
        evaluate(policy, dataset.make_env, episodes=1, seed=0, max_steps=1)
        if options.logger == "wandb":
            check_wandb()
        if options.resume is None:
            name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{options.dataset}-seed{config.seed}").strip(
                "-"
            )
            folder = new_folder(options.output, options.name or name, arguments)
    except EXPECTED as error:
        return fail(error)
    print(
        f"{options.dataset}: {len(dataset):,} transitions, {len(dataset.episode_returns)} episodes, "
        f"mean return {dataset.episode_returns.mean():.1f}. Writing to {folder}/"
    )
    started, results = time.monotonic(), {}
    methods = {"behaviour cloning": replace(config, temperature=0.0), "IQL": config}
    try:
        for method, chosen in methods.items():
            results[method] = train(method, chosen, dataset, options, folder)
    except KeyboardInterrupt:
        print(f"Stopped. Go on with: {resume_command(folder)}", file=sys.stderr)
        return 130
    except (CheckpointError, LoggerError, OSError, ValueError) as error:
        return fail(error)
    print_table(dataset, results)
    picture, log = folder / "learning_curve.png", dataset.episode_returns.mean()
    runs = {method: run_folder(folder, method) for method in methods}
    compare(picture, runs, reference=(f"the log ({log:.0f})", log))
    print(f"{time.monotonic() - started:.0f} s. Picture: {picture}")
    return 0


def train(
    method: str,
    config: IQLConfig,
    dataset: OfflineDataset,
    options: Options,
    folder: Path,
) -> Evaluation:
    """Train one method, or go on with it; returns the last policy's evaluation."""
    run = run_folder(folder, method)
    agent = make_agent(config, dataset)
    play = partial(
        evaluate,
        agent.policy,
        dataset.make_env,
        seed=EVALUATION_SEED,
        reference_scores=dataset.reference_scores,
    )
    with logger_of(options.logger, run) as logger:
        trainer = OfflineTrainer(
            agent=agent,
            dataset=dataset,
            evaluation=partial(play, episodes=options.episodes),
            eval_interval=options.eval_every,
            logger=logger,
            folder=run,
            seed=config.seed,
            resume_command=resume_command(folder),
        )
        if list(run.glob("checkpoints/*")):
            trainer.resume()
        print(f"{method}: updates {trainer.updates:,} to {config.updates:,}", flush=True)
        trainer.train()
    agent.export(run / "policy.pt2")
    return play(episodes=options.final_episodes)


class LoggerError(RuntimeError):
    """A logger that cannot be started, in one sentence that names the option."""


@contextmanager
def logger_of(kind: str | None, run: Path) -> Iterator[Any]:
    """TorchRL's logger ``kind`` for one method's folder, closed afterwards; None without ``kind``.

    Each method has a logger of its own: W&B, MLflow and Trackio hold one active run per process.
    """
    if kind is None:
        yield None
        return
    name = f"{run.parent.name}-{run.name}"  # these three collect the runs of many folders
    try:
        if kind == "mlflow":
            database = f"sqlite:///{(run.parent / 'mlflow.db').resolve()}"
            logger: Any = MLFlowLogger(name, os.environ.get("MLFLOW_TRACKING_URI", database))
        elif kind == "trackio":
            again = {"resume": "allow" if run.exists() else "never"}
            logger = get_logger(kind, str(run.parent), name, trackio_kwargs=again)
        else:
            logger = get_logger(kind, str(run.parent), name if kind == "wandb" else run.name)
    except Exception as error:  # each kind has exceptions of its own
        raise LoggerError(f"--logger {kind} could not be started: {error}") from error
    try:
        yield logger
    finally:
        if kind == "mlflow":  # its run has no method that ends it
            import mlflow

            mlflow.end_run()
        logger.close()


def check_wandb() -> None:
    """Raises ``LoggerError`` where W&B would upload and this machine is not logged in."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    quiet = {"prompt": False} if "prompt" in inspect.signature(wandb.login).parameters else {}
    try:
        ready, reason = wandb.login(**quiet), "this machine is not logged in"
    except Exception as error:
        ready, reason = False, str(error)
    if not ready:
        raise LoggerError(
            f"--logger wandb: {reason}. Run `wandb login`, or set WANDB_MODE=offline to write to "
            "files only, or choose --logger tensorboard."
        )


def resume_command(folder: Path) -> str:
    return shlex.join([sys.executable, sys.argv[0], "--resume", str(folder)])


def fail(error: BaseException) -> int:
    print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
    return 2


def run_folder(folder: Path, method: str) -> Path:
    return folder / method.replace(" ", "-")


def print_table(dataset: OfflineDataset, results: dict[str, Evaluation]) -> None:
    log = dataset.episode_returns
    rows = [("the log", log.mean(), log.std(ddof=1) / len(log) ** 0.5, len(log))]
    for method, result in results.items():
        found = result.summary()
        rows.append(
            (method, found["return_mean"], found["return_standard_error"], len(result.returns))
        )
    scored = dataset.reference_scores is not None
    head = f"{'mean return':>12} {'std. error':>11} {'episodes':>9}" + scored * "  score 0..100"
    print(f"\n{'':18} {head}")
    for name, mean, error, episodes in rows:
        error = f"{error:.1f}" if episodes > 1 else "-"
        score = f"  {float(dataset.normalised_score(mean)):12.1f}" if scored else ""
        print(f"{name:18} {mean:12.1f} {error:>11} {episodes:9d}{score}")
    print()


def parse(arguments: list[str]) -> tuple[Options, IQLConfig, Path | None]:
    """Options, config and, with ``--resume``, the folder, whose saved command line is read again."""
    how: Any = {"presets": PRESETS, "description": __doc__.split("\n\n")[0]}
    options, config = cli.parse(Options, arguments, **how)
    for name in ("eval_every", "episodes", "final_episodes"):
        if (value := getattr(options, name)) is not None and value < 1:
            cli.refuse(f"{name} is {value}; it must be at least 1.")
    if options.logger not in (None, "csv") and find_spec(options.logger) is None:
        cli.refuse(f"--logger {options.logger}: not installed; pip install {options.logger}")
    if options.resume is None:
        return options, config, None
    if len(arguments) > 1 + ("--resume" in arguments):
        cli.refuse("--resume goes on with the settings of the run, and takes no others.")
    try:
        again = [*saved_arguments(options.resume), "--resume", str(options.resume)]
    except ValueError as error:
        cli.refuse(error)
    return *cli.parse(Options, again, **how), options.resume


if __name__ == "__main__":
    sys.exit(main())
