"""``Sweep``: many configs trained, evaluated and ranked by workers; the folder is the state."""

from __future__ import annotations

import hashlib
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from iql_torchrl.agent.build import make_agent
from iql_torchrl.config import IQLConfig, check_whole, knobs
from iql_torchrl.data import OfflineDataset, load_dataset
from iql_torchrl.data.saved import is_saved, is_sharded
from iql_torchrl.files import first_line, make_folder, read_json, write_json
from iql_torchrl.population.runs import IQLPopulation
from iql_torchrl.selection import Ranking
from iql_torchrl.sweep.engines import perform_locally, perform_on_ray, perform_on_slurm
from iql_torchrl.sweep.result import SweepResult, joined, named
from iql_torchrl.sweep.task import (
    Log,
    Parts,
    Score,
    Task,
    played,
    rank,
    read_ranking,
)

Perform = Callable[[Mapping[str, Callable[[], None]], Callable[[], None]], dict[str, str]]


@dataclass(eq=False)
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
            ``rank_policies`` estimates the value of each run. None: no ranking.
        reserved: share of the episodes that the sweep does not read at all, in (0, 1), taken before
            ``held_out``. Where the results of one sweep decide which configs the next one has, its
            estimates are too high for the best; an estimate from :meth:`parts`' ``reserved`` is
            not. None: none.
        fit_updates: updates of ``fitted_q_evaluation``.
        discount: of the estimates; None: that of the first config.
        save_every: updates between two checkpoints of a task.

    Attributes: ``runs``, the configs by name, and the arguments.

    Raises:
        TypeError, ValueError: configs that are none, equal or of another type, a number out of
            range, a source in memory.
    """

    configs: Mapping[str, IQLConfig] | Sequence[IQLConfig]
    source: str | Path | Sequence[str | Path]
    folder: str | Path
    _: KW_ONLY
    members_per_task: int = 8
    env: Any = None
    reward: Any = None
    load: Mapping[str, Any] | None = None
    score: Score | str | None = "environment"
    episodes: int = 20
    evaluation_seed: int = 10_000
    score_words: str = "mean return, 95 % interval"
    log_score: tuple[str, float] | None = None
    held_out: float | None = None
    reserved: float | None = None
    fit_updates: int = 10_000
    discount: float | None = None
    save_every: int = 5_000
    runs: dict[str, IQLConfig] = field(init=False)

    def __post_init__(self) -> None:
        self.runs, self._folder = named(self.configs), Path(self.folder).absolute()
        if isinstance(self.score, str) and self.score != "environment":
            raise ValueError(
                f"score is {self.score!r}; expected 'environment', a function or None."
            )
        counts = ("members_per_task", "episodes", "fit_updates", "save_every")
        check_whole(**{name: getattr(self, name) for name in counts})
        for name in ("held_out", "reserved"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} is {share!r}; it must lie in (0, 1), or be None.")
        for each in self.source if isinstance(self.source, list | tuple) else [self.source]:
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
        data = Path(self.source).absolute() if is_saved(self.source) else self._folder / "data"
        options = {k: v for k, v in (self.load or {}).items() if k in ("dtype", "reference_scores")}
        self._log = Log(
            data, {"env": self.env} | options, self.reward, self.held_out, self.reserved
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
            ImportError: ray or submitit is not installed.
            ConnectionError: no cluster at ``address``.
            DatasetError: as ``load_dataset``.
        """
        check_whole(workers=workers, threads=threads, attempts=attempts)
        engines: dict[str, Perform] = {
            "local": partial(perform_locally, workers=workers, threads=threads),
            "ray": partial(
                perform_on_ray, workers=workers, threads=threads, address=address, options=ray
            ),
            "slurm": partial(
                perform_on_slurm,
                threads=threads,
                folder=self._folder / "slurm",
                options=slurm or {},
            ),
        }
        if engine not in engines:
            raise ValueError(f"engine is {engine!r}; choose one of {', '.join(engines)}.")
        self._check_folder()
        plan = self._plan()
        tasks = self._tasks(plan, attempts)
        failed = self._perform(tasks, engines[engine], progress)
        failures = plan["failed"] | {
            n: failed[t.name] for t in tasks if t.name in failed for n in t.configs
        }
        done, notes, ranking = [task for task in tasks if task.finished], list(plan["notes"]), None
        if self.held_out is not None and done:
            ranking, more = self._rank(done, engines[engine])
            notes += more
        rows = {row["member"]: row | {"task": t.name} for t in done for row in t.rows()}
        failures |= {name: row["error"] for name, row in rows.items() if "error" in row}
        whole = joined(self.runs, rows, ranking, failures)
        level = None if plan["log_score"] is None else tuple(plan["log_score"])
        result = SweepResult(
            whole, ranking, level, failures, tuple(notes), self._folder, tuple(done)
        )
        result.write(words=self.score_words)
        return result

    def parts(self) -> Parts:
        """The episodes of each part, as the first config reads them; after :meth:`run`."""
        return self._log.parts(next(iter(self.runs.values())))

    def _plan(self) -> dict[str, Any]:
        """Groups of names, failures, notes and the log's score.

        Made again where a config could not be built, or no environment could be made.
        """
        path = self._folder / "plan.json"
        saved: dict[str, Any] = read_json(path, {})
        if saved and not saved["notes"]:
            return saved
        log = self._read_log(self._log.data if saved else self.source)
        log.print_notes()
        groups, failed = divided(self.runs, log, self.members_per_task)
        name, level = self.log_score or ("the log", log.episode_returns.mean())
        score = None if self.score is None else [str(name), float(level)]
        plan: dict[str, Any] = {"groups": groups, "failed": failed, "notes": [], "log_score": score}
        if self.score == "environment":
            try:
                log.make_env().close()
            except Exception as error:
                why = f"There are no scores: {first_line(error)}"
                plan |= {"notes": [why], "log_score": None}
        for name, sentence in failed.items():
            print(f"{name} {sentence}", file=sys.stderr)
        if groups:  # a sweep of which nothing can be trained leaves the folder to others
            write_json(self._folder / "sweep.json", self._identity())
        if not failed:
            write_json(path, plan)
        return plan

    def _read_log(self, source: Any) -> OfflineDataset:
        """The log of ``source``, which is built in the folder unless it is a built table."""
        options = {"env": self.env} | dict(self.load or {})
        if not is_saved(source):
            return load_dataset(source, memmap=self._log.data, **options)
        reward = self.reward or next(iter(self.runs.values())).reward
        given = options if source == self.source else self._log.options
        return load_dataset(source, reward=reward, **given)

    def _tasks(self, plan: Mapping[str, Any], attempts: int) -> list[Task]:
        score, place = None, list(self.runs)
        if plan["log_score"] is not None:
            play = partial(played, episodes=self.episodes, seed=self.evaluation_seed)
            score = self.score if callable(self.score) else play
        return [
            Task(
                folder=self._folder / "tasks" / f"from-{place.index(names[0]):05d}",
                configs={name: self.runs[name] for name in names},
                stacked=stacked,
                log=self._log,
                score=score,
                save_every=self.save_every,
                attempts=attempts,
            )
            for names, stacked in plan["groups"]
        ]

    def _perform(
        self, tasks: Sequence[Task], perform: Perform, progress: bool | None
    ) -> dict[str, str]:
        for task in tasks:
            task.forget_failed_evaluations()
        waiting = {task.name: task.perform for task in tasks if not task.finished}
        if not waiting:
            return {}
        with tqdm(
            total=sum(task.total for task in tasks),
            initial=sum(task.done for task in tasks),
            desc="training",
            unit="update",
            unit_scale=True,
            disable=None if progress is None else not progress,
        ) as bar:

            def watch() -> None:
                finished = sum(task.finished for task in tasks)
                bar.set_postfix_str(f"{finished} of {len(tasks)} tasks", refresh=False)
                bar.update(sum(task.done for task in tasks) - bar.n)

            failed = perform(waiting, watch)
            watch()
        for name, sentence in failed.items():
            print(f"{name} failed: {sentence}", file=sys.stderr)
        return failed

    def _rank(self, tasks: Sequence[Task], perform: Perform) -> tuple[Ranking | None, list[str]]:
        """The ranking of the members of finished tasks, and notes."""
        folder = self._folder / "ranking"
        call = partial(rank, folder, tasks, fit_updates=self.fit_updates, discount=self.discount)
        if (ranked := read_ranking(folder, tasks)) is None:
            failed = perform({"the ranking": call}, lambda: None)
            if failed or (ranked := read_ranking(folder, tasks)) is None:
                return None, [f"There is no ranking: {why}" for why in failed.values()]
        ranking, skipped = ranked
        return ranking, [f"{name} is not ranked: {why}" for name, why in skipped.items()]

    def _check_folder(self) -> None:
        """Raise ``ValueError`` naming what differs from the sweep that the folder belongs to."""
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"{self._folder} is a file; a sweep needs a folder.")
        make_folder("folder", self._folder)
        saved = read_json(self._folder / "sweep.json", {})
        if saved and (difference := _difference(saved, self._identity())):
            raise ValueError(
                f"{self._folder} has another sweep: {difference}; choose another folder, or delete "
                "this one."
            )

    def _identity(self) -> dict[str, Any]:
        """What identifies the sweep in its folder: its runs, its data, and what is done with them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        numbers_or_texts = {
            name: value if value is None or isinstance(value, int | float) else text_of(value)
            for name, value in values.items()
            if name not in ("folder", "runs", "score_words")
        }
        return numbers_or_texts | {
            "configs": {name: config.to_dict() for name, config in self.runs.items()},
            "load": {name: text_of(value) for name, value in (self.load or {}).items()},
            "score": text_of(self.score or ""),
        }


def text_of(value: Any) -> str:
    """The same text in each process: without addresses in memory, and for a path or its text."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {text_of(each)}' for key, each in value.items())}}}"
    if isinstance(value, partial):
        return f"{text_of(value.func)}({text_of(value.args)}, {text_of(value.keywords)})"
    if not callable(value):
        return str(value)
    name, code = getattr(value, "__qualname__", None), getattr(value, "__code__", None)
    if name is None:  # a callable object
        return f"{type(value).__qualname__}({text_of(getattr(value, '__dict__', {}))})"
    if "<lambda>" not in name or code is None:
        return str(name)
    digest = hashlib.blake2b(digest_size=8)
    digest.update(code.co_code + repr((code.co_names, code.co_varnames)).encode())
    digest.update("".join(map(text_of, code.co_consts)).encode())
    return f"{name} {digest.hexdigest()}"


def _difference(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The first entry in which two nested dicts differ, and how; empty where none does."""
    for key in {**own, **saved}:
        before, now = saved.get(key), own.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            if inner := _difference(before, now):
                return f"{inner} in {key!r}"
        elif before != now:
            return f"{key} was {reprlib.repr(before)}, now {reprlib.repr(now)}"
    return ""


def divided(
    runs: Mapping[str, IQLConfig], dataset: OfflineDataset, most: int
) -> tuple[list[tuple[list[str], bool]], dict[str, str]]:
    """Names of the runs of each task, and whether they are one population; why runs cannot be built.

    At most ``most`` configs that can be one population are one task; configs that populations refuse
    (a history, encoders of images, residual networks) are one each. To find out, the first config of
    each group is built on the CPU.
    """
    alike: dict[Any, list[str]] = {}
    for name, config in runs.items():
        shared = [n for n, knob in knobs(type(config)).items() if not knob.per_run]
        alike.setdefault((type(config), *(getattr(config, n) for n in shared)), []).append(name)
    groups: list[tuple[list[str], bool]] = []
    failed: dict[str, str] = {}
    for names in alike.values():
        try:
            stacked = _stacks(runs[names[0]], dataset)
        except Exception as error:  # the other configs are trained
            failed |= {name: f"cannot be built: {first_line(error)}" for name in names}
            continue
        size = most if stacked else 1
        groups += [(names[at : at + size], stacked) for at in range(0, len(names), size)]
    return groups, failed


def _stacks(config: IQLConfig, dataset: OfflineDataset) -> bool:
    """Whether a population accepts the config; raises what prevents that it is built at all."""
    config = replace(config, device="cpu", compile=False)  # workers may have other devices
    try:
        IQLPopulation([config], dataset)
    except (ValueError, TypeError, NotImplementedError):
        make_agent(config, dataset)
        return False
    return True
