"""Learn a policy from a fixed log with IQL; compare it with the log and with behaviour cloning.

Without arguments: makes a small Pendulum log once, trains behaviour cloning and IQL on it, runs
both in the environment, and writes tables, pictures, checkpoints and the policies to runs/.
Under torchrun, all its processes train each run together (torchrun --nproc-per-node 2 ...); with
--max-restarts, processes that were started again continue the run.
"""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from iql_torchrl import OfflineDataset, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import PRESETS, IQLConfig, cli
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.distributed import Ranks, data_parallel
from iql_torchrl.evaluation import Evaluation
from iql_torchrl.files import CheckpointError
from iql_torchrl.report import compare, results_table
from iql_torchrl.trainers.command_line import (
    LoggerError,
    LoggerName,
    check_logger,
    default_name,
    new_folder,
    open_logger,
    resume_command,
    resumed_arguments,
    started_folder,
)

EVALUATION_SEED = 10_000  # every method and every training seed has the same initial states


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset: str = "pendulum/mixed-v0"
    """Minari id, file, or one of the built-in datasets (python -m iql_torchrl.data)"""
    env: str | None = None
    """Gymnasium id of the environment, for files that record none"""
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
    logger: LoggerName | None = None
    """logger of TorchRL that also receives the metrics"""
    resume: Path | None = None
    """folder of a run that was stopped, to continue it"""


def main(arguments: list[str] | None = None) -> int:
    ranks = Ranks.from_environment()
    try:
        with ranks.only_main_prints():
            return run(arguments, ranks)
    finally:
        ranks.close()


def run(arguments: list[str] | None, ranks: Ranks) -> int:
    arguments, folder = resumed_arguments(sys.argv[1:] if arguments is None else arguments)
    description = __doc__.split("\n\n")[0]
    options, config = cli.parse(Options, arguments, presets=PRESETS, description=description)
    for name in ("eval_every", "episodes", "final_episodes"):
        if (value := getattr(options, name)) is not None and value < 1:
            cli.refuse(f"{name} is {value}; it must be at least 1.")
    began = time.monotonic()
    try:
        check_logger(options.logger)
        dataset = ranks.main_first(lambda: load(options, config))
        dataset.print_notes()
        # Build and run one step now: a failure here must leave no folder behind.
        policy = make_agent(config, dataset).policy
        ranks.together(lambda: evaluate(policy, dataset.make_env, episodes=1, seed=0, max_steps=1))
        if folder is None:
            name = options.name or default_name(options.dataset, config.seed)
            started = started_folder if ranks.restarts else lambda *_: None  # by this torchrun
            place = (options.output, name, arguments)
            folder = ranks.from_main(lambda: started(*place) or new_folder(*place))
    except KeyboardInterrupt:
        print("Stopped before training; nothing was saved.", file=sys.stderr)
        return 130
    except (ImportError, ValueError, OSError, RuntimeError, AssertionError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2
    mean = dataset.episode_returns.mean()
    print(f"{options.dataset}: {len(dataset):,} transitions, {len(dataset.episode_returns)} episodes, "
          f"mean return {mean:.1f}. Writing to {folder}/")  # fmt: skip
    configs = {"behaviour cloning": replace(config, temperature=0.0), "IQL": config}
    runs = {method: folder / method.replace(" ", "-") for method in configs}
    try:
        results = {m: train(m, configs[m], dataset, options, runs[m], ranks) for m in configs}
    except KeyboardInterrupt:
        print(f"Stopped. Continue with: {resume_command(folder)}", file=sys.stderr)
        return 130
    except (CheckpointError, LoggerError, OSError, ValueError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2
    picture = folder / "learning_curve.png"
    if ranks.is_main:
        compare(picture, runs, reference=(f"the log ({mean:.0f})", mean))
    print(f"\n{results_table(dataset, results)}\n")
    print(f"{time.monotonic() - began:.0f} s. Picture: {picture}")
    return 0


def load(options: Options, config: IQLConfig) -> OfflineDataset:
    source = ensure_dataset(options.dataset) if options.dataset in BUILTIN else options.dataset
    return load_dataset(source, env=options.env, reward=config.reward)


def train(
    method: str,
    config: IQLConfig,
    dataset: OfflineDataset,
    options: Options,
    run: Path,
    ranks: Ranks,
) -> Evaluation:
    """Train one method, or continue it, in the folder ``run``; returns the last evaluation."""
    agent = make_agent(config, dataset)
    score = partial(evaluate, agent.policy, dataset.make_env, seed=EVALUATION_SEED)
    score = partial(score, reference_scores=dataset.reference_scores)
    step = data_parallel(agent.step, ranks)
    with open_logger(options.logger if ranks.is_main else None, run) as logger:
        trainer = OfflineTrainer(
            agent=agent, step=step, ranks=ranks, dataset=dataset, folder=run, logger=logger,
            seed=config.seed, evaluation=partial(score, episodes=options.episodes),
            eval_interval=options.eval_every, resume_command=resume_command(run.parent),
        )  # fmt: skip
        if trainer.has_checkpoint():
            trainer.resume()
        print(f"{method}: updates {trainer.updates:,} to {config.updates:,}", flush=True)
        trainer.train()
    ranks.from_main(lambda: agent.export(run / "policy.pt2"))
    return ranks.from_main(lambda: score(episodes=options.final_episodes))


if __name__ == "__main__":
    sys.exit(main())
