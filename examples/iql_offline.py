"""Learn a policy from a fixed dataset with IQL; compare it with the dataset and with behaviour cloning.

Without arguments: makes a small Pendulum dataset once, trains behaviour cloning and IQL on it, runs
both in the environment, and writes tables, pictures, checkpoints and the policies to runs/.
Under torchrun, all its processes train each run together (torchrun --nproc-per-node 2 ...); with
--max-restarts, processes that were started again continue the run.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from iql_torchrl import OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import PRESETS, cli
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.distributed import Ranks, data_parallel
from iql_torchrl.report import compare, results_table
from iql_torchrl.trainers.command_line import (
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
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with ranks.only_main_prints(), cli.errors_in_one_line():
            return run(arguments, ranks)
    except KeyboardInterrupt:
        print("Stopped before training; nothing was saved.", file=sys.stderr)
        return 130
    finally:
        ranks.close()


def run(arguments: list[str], ranks: Ranks) -> int:
    arguments, folder = resumed_arguments(arguments)
    least = dict.fromkeys(("eval_every", "episodes", "final_episodes"), 1)
    description = __doc__.split("\n\n")[0]
    options, config = cli.parse(
        Options, arguments, presets=PRESETS, least=least, description=description
    )
    check_logger(options.logger)
    how = {"env": options.env, "reward": config.reward}
    dataset = ranks.main_first(lambda: load_dataset(ensure_source(options.dataset), **how))
    dataset.print_notes()
    # Build and run one step now: a failure here must leave no folder behind.
    policy = make_agent(config, dataset).policy
    ranks.together(lambda: evaluate(policy, dataset.make_env, episodes=1, seed=0, max_steps=1))
    if folder is None:
        name = options.name or default_name(options.dataset, config.seed)
        where = (options.output, name, arguments)
        started = started_folder if ranks.restarts else lambda *_: None  # by this torchrun
        folder = ranks.from_main(lambda: started(*where) or new_folder(*where))
    mean = dataset.episode_returns.mean()
    print(f"{options.dataset}: {len(dataset):,} transitions, {len(dataset.episode_returns)} episodes, "
          f"mean return {mean:.1f}. Writing to {folder}/")  # fmt: skip
    results, runs = {}, {}
    for method, temperature in (("behaviour cloning", 0.0), ("IQL", config.temperature)):
        runs[method] = place = folder / method.replace(" ", "-")
        agent = make_agent(replace(config, temperature=temperature), dataset)
        score = partial(evaluate, agent.policy, dataset.make_env, seed=EVALUATION_SEED)
        score = partial(score, reference_scores=dataset.reference_scores)
        step = data_parallel(agent.step, ranks)
        try:
            with open_logger(options.logger if ranks.is_main else None, place) as logger:
                trainer = OfflineTrainer(
                    agent=agent, step=step, ranks=ranks, dataset=dataset, folder=place, logger=logger,
                    seed=config.seed, evaluation=partial(score, episodes=options.episodes),
                    eval_interval=options.eval_every, resume_command=resume_command(folder),
                )  # fmt: skip
                if trainer.has_checkpoint():
                    trainer.resume()
                print(f"{method}: updates {trainer.updates:,} to {config.updates:,}", flush=True)
                trainer.train()
            ranks.from_main(partial(agent.export, place / "policy.pt2"))
            results[method] = ranks.from_main(partial(score, episodes=options.final_episodes))
        except KeyboardInterrupt:
            print(f"Stopped. Continue with: {resume_command(folder)}", file=sys.stderr)
            return 130
    picture = folder / "learning_curve.png"
    if ranks.is_main:
        compare(picture, runs, reference=(f"the dataset ({mean:.0f})", mean))
    print(f"\n{results_table(dataset, results)}\n\nPicture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
