"""``Sweep``: many configs trained, evaluated and ranked by workers; the folder is the state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from iql_torchrl.config import IQLConfig
from iql_torchrl.data import OfflineDataset, load_dataset
from iql_torchrl.data.saved import is_saved, is_sharded
from iql_torchrl.sweep.identity import check_folder, claim
from iql_torchrl.sweep.local_processes import perform_locally
from iql_torchrl.sweep.plan import make_plan, named
from iql_torchrl.sweep.rank_task import RankTask
from iql_torchrl.sweep.ray_tasks import perform_on_ray
from iql_torchrl.sweep.result import SweepResult, joined, write_table
from iql_torchrl.sweep.slurm_jobs import perform_on_slurm
from iql_torchrl.sweep.task import Common, Parts, Score, Task, first_line, read_json, write_json
from iql_torchrl.sweep.worker import Job

__all__ = ["Sweep"]

ENGINES = ("local", "ray", "slurm")
Perform = Callable[[Sequence[Job], Callable[[], None]], dict[str, str]]


class Sweep:
    """Many runs on one log, trained, evaluated and ranked, with one table of results.

    The work is divided into tasks: at most ``members_per_task`` configs that can be one
    :class:`~iql_torchrl.IQLPopulation`. Configs that populations refuse (a history, encoders of
    images, residual networks) are trained one by one by ``OfflineTrainer``. A task continues its
    folder or starts it, so that a worker may be stopped at any time. On a CPU the table has the same
    bits however often that happened, and with any number of workers and any engine. It depends on
    ``members_per_task``, because the members of a population share their batches.

    Args:
        configs: name to ``IQLConfig``, or a list of them, named by the settings in which they
            differ. ``name #seed`` says that runs of equal ``name`` differ in the seed only.
        source: a name or path that ``load_dataset`` reads, or a list of them. A table is built in
            ``folder/data`` once, unless ``source`` is the folder of a built table; workers open
            it without the source.
        folder: of everything that is written. It must be the same path for all workers.
        members_per_task: the largest number of runs that are trained together.
        env: as in ``load_dataset``; None: the one that the data record.
        reward: as in ``load_dataset``; None: ``config.reward`` of each run.
        load: further options of ``load_dataset``.
        score: ``"environment"``: mean return of ``episodes`` episodes and its 95 % interval; where
            no environment can be made, a note says why there are no scores. A function
            ``(agent, dataset) -> {"score": ...}`` (and ``score_low``, ``score_high``) in its place;
            it is sent to the workers. None: no scores.
        episodes, evaluation_seed: of the evaluation; all runs have the same initial states.
        score_words: what the score is, for the picture.
        log_score: name and score of the policy that made the log; None: the log's mean return.
        held_out: share of the episodes that no run learns from, in (0, 1): from them
            ``rank_members`` estimates the value of each run. None: no ranking.
        reserved: share of the episodes that the sweep does not read at all, in (0, 1), taken before
            ``held_out``. Where the results of one sweep decide which configs the next one has, its
            estimates are too high for the best; an estimate from :meth:`parts`' ``reserved`` is
            not. None: none.
        fit_updates: updates of ``fitted_q_evaluation``. discount: of the estimates; None: that of
            the first config.
        save_every: updates between two checkpoints of a task.

    Raises:
        TypeError, ValueError: configs that are none, equal or of another type, a number out of
            range, a source in memory.
    """

    def __init__(
        self,
        configs: Mapping[str, IQLConfig] | Sequence[IQLConfig],
        source: str | Path | Sequence[str | Path],
        folder: str | Path,
        *,
        members_per_task: int = 8,
        env: Any = None,
        reward: Any = None,
        load: Mapping[str, Any] | None = None,
        score: Score | str | None = "environment",
        episodes: int = 20,
        evaluation_seed: int = 10_000,
        score_words: str = "mean return, 95 % interval",
        log_score: tuple[str, float] | None = None,
        held_out: float | None = None,
        reserved: float | None = None,
        fit_updates: int = 10_000,
        discount: float | None = None,
        save_every: int = 5_000,
    ) -> None:
        self.configs = named(configs)
        self.source, self.folder = source, Path(folder).absolute()
        self.members_per_task, self.env, self.load = members_per_task, env, dict(load or {})
        self.log_score, self.score_words = log_score, score_words
        self.plays = score == "environment"
        if isinstance(score, str) and not self.plays:
            raise ValueError(f"score is {score!r}; expected 'environment', a function or None.")
        self._scored = score is not None
        numbers = {"members_per_task": members_per_task, "episodes": episodes}
        for name, value in (
            numbers | {"fit_updates": fit_updates, "save_every": save_every}
        ).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1.")
        for name, share in (("held_out", held_out), ("reserved", reserved)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} is {share!r}; it must lie in (0, 1), or be None.")
        for each in source if isinstance(source, list | tuple) else [source]:
            if not isinstance(each, str | Path):
                raise TypeError(
                    f"source is a {type(each).__name__}; a sweep reads a name or a path, which the "
                    "workers can open: write the data with load_dataset(..., memmap=FOLDER), and "
                    "give FOLDER."
                )
            if is_sharded(each):
                raise ValueError(
                    f"source is {each}, a folder of shards, and a sweep needs all rows in one table; "
                    "give the log itself, or a part of it written with load_dataset(..., limit=)."
                )
        own_table = isinstance(source, str | Path) and is_saved(source)
        self.common = Common(
            data=Path(source).absolute() if own_table else self.folder / "data",  # type: ignore[arg-type]
            opening={k: v for k, v in self.load.items() if k in ("dtype", "reference_scores")},
            env=env,
            reward=reward,
            held_out=held_out,
            reserved=reserved,
            score=score if callable(score) else None,
            episodes=episodes,
            evaluation_seed=evaluation_seed,
            fit_updates=fit_updates,
            discount=discount,
            save_every=save_every,
        )

    def run(
        self,
        engine: str = "local",
        *,
        workers: int = 2,
        threads: int = 1,
        attempts: int = 2,
        address: str | None = None,
        ray: Mapping[str, Any] | None = None,
        slurm: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> SweepResult:
        """Do what the folder does not have yet, and write ``members.csv`` and ``sweep.png``.

        A run that failed is named in ``failures`` and in the table, and is tried again by the next
        call; the others finish.

        Args:
            engine: ``"local"``: processes on this machine. ``"ray"``: tasks on the cluster at
                ``address``, or on this machine. ``"slurm"``: one job for each task.
            workers: how many tasks are performed at once; on a Ray cluster and by Slurm, as many as
                there are free processors.
            threads: of torch in each worker. The bits of the results may depend on it.
            attempts: how often a member is evaluated, at most, where its evaluation raises.
            address: of a Ray cluster, ``HOST:PORT`` or ``auto``; None: Ray is started here.
            ray: options of a Ray task, such as ``{"num_gpus": 0.5}``.
            slurm: options of ``submitit.AutoExecutor.update_parameters``, and ``cluster``.
            progress: one bar for all tasks; None shows it on terminals only.

        Raises:
            ValueError: another engine, a number below 1, or a folder with another sweep.
            ImportError: ray or submitit is not installed. ConnectionError: no cluster at
            ``address``. ``DatasetError`` as ``load_dataset``.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; choose one of {', '.join(ENGINES)}.")
        counts = {"workers": workers, "threads": threads, "attempts": attempts}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1.")
        perform: Perform = {
            "local": partial(perform_locally, workers=workers, threads=threads),
            "ray": partial(
                perform_on_ray, workers=workers, threads=threads, address=address, options=ray
            ),
            "slurm": partial(
                perform_on_slurm,
                threads=threads,
                folder=self.folder / "slurm",
                options=slurm or {},
            ),
        }[engine]
        check_folder(self)
        plan = self._plan()
        tasks = self._tasks(plan, attempts)
        for task in tasks:
            task.forget_failed_evaluations()
        failed = self._perform(tasks, perform, progress, "training")
        failures = dict(plan["failed"])
        failures |= {name: failed[t.name] for t in tasks if t.name in failed for name in t.configs}
        done, notes = [task for task in tasks if task.finished], list(plan["notes"])
        ranking = None
        if self.common.held_out is not None and done:
            last = RankTask(self.folder / "ranking", done, self.common)
            sentences = self._perform([last], perform, progress, "ranking").values()
            notes += [f"There is no ranking: {sentence}" for sentence in sentences]
            if last.finished:
                ranking, skipped = last.result()
                notes += [f"{name} is not ranked: {why}" for name, why in skipped.items()]
        rows = {row["member"]: row | {"task": t.name} for t in done for row in t.rows()}
        failures |= {name: row["error"] for name, row in rows.items() if "error" in row}
        level = plan["log_score"]
        return self._written(rows, ranking, failures, notes, level, done)

    def parts(self) -> Parts:
        """The episodes of each part, as the first config reads them; after :meth:`run`."""
        return self.common.parts(next(iter(self.configs.values())))

    def _perform(
        self, jobs: Sequence[Job], perform: Perform, progress: bool | None, words: str
    ) -> dict[str, str]:
        waiting = [job for job in jobs if not job.finished]
        if not waiting:
            return {}
        with tqdm(
            total=sum(job.total for job in jobs) or None,
            initial=sum(job.done for job in jobs),
            desc=words,
            unit="update",
            unit_scale=True,
            disable=None if progress is None else not progress,
        ) as bar:

            def watch() -> None:
                finished = sum(job.finished for job in jobs)
                bar.set_postfix_str(f"{finished} of {len(jobs)} tasks", refresh=False)
                bar.update(sum(job.done for job in jobs) - bar.n)

            failed = perform(waiting, watch)
            watch()
        for name, sentence in failed.items():
            print(f"{name} failed: {sentence}", file=sys.stderr)
        return failed

    def _plan(self) -> dict[str, Any]:
        """Groups of names, notes and the log's score.

        Made again where a config could not be built, or no environment could be made.
        """
        path = self.folder / "plan.json"
        saved: dict[str, Any] = read_json(path, {})
        if saved and not saved["notes"]:
            return saved
        log = self._log(self.common.data if saved else self.source)
        log.print_notes()
        plan = make_plan(self.configs, log, self.members_per_task)
        notes, scored = [], self._scored
        if self.plays:
            try:
                log.make_env().close()
            except Exception as error:
                notes.append(f"There are no scores: {first_line(error)}")
                scored = False
        mean = ("the log", float(log.episode_returns.mean()))
        new = {
            "groups": [[list(names), stacked] for names, stacked in plan.groups],
            "failed": dict(plan.failed),
            "notes": notes,
            "log_score": list(self.log_score or mean) if scored else None,
        }
        for name, sentence in plan.failed.items():
            print(f"{name} {sentence}", file=sys.stderr)
        if plan.groups:  # a sweep of which nothing can be trained leaves the folder to others
            claim(self)
        if not plan.failed:
            write_json(path, new)
        return new

    def _log(self, source: Any) -> OfflineDataset:
        """The log of ``source``, which is built in ``common.data`` unless it is a built table."""
        if is_saved(source):
            reward = self.common.reward or next(iter(self.configs.values())).reward
            options = self.load if source == self.source else self.common.opening
            return load_dataset(source, env=self.env, reward=reward, **options)
        return load_dataset(source, env=self.env, memmap=self.common.data, **self.load)

    def _tasks(self, plan: Mapping[str, Any], attempts: int) -> list[Task]:
        place = {name: number for number, name in enumerate(self.configs)}
        return [
            Task(
                self.folder / "tasks" / f"from-{place[names[0]]:05d}",
                {name: self.configs[name] for name in names},
                stacked,
                plan["log_score"] is not None,
                self.common,
                attempts,
            )
            for names, stacked in plan["groups"]
        ]

    def _written(
        self,
        rows: Mapping[str, Any],
        ranking: Any,
        failures: Mapping[str, str],
        notes: Sequence[str],
        log_score: Sequence[Any] | None,
        done: Sequence[Task],
    ) -> SweepResult:
        whole = joined(self.configs, rows, ranking, failures)
        write_table(self.folder / "members.csv", whole)
        level = None if log_score is None else (str(log_score[0]), float(log_score[1]))
        result = SweepResult(
            whole, ranking, level, dict(failures), tuple(notes), self.folder, tuple(done)
        )
        result.draw(title=self.folder.name, words=self.score_words)
        return result
