"""The units of work of a sweep: each continues the folder it is given, or starts it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iql_torchrl.agent.build import Agent, make_agent
from iql_torchrl.config import IQLConfig
from iql_torchrl.data import DatasetWarning, OfflineDataset, load_dataset
from iql_torchrl.evaluation.rollout import evaluate
from iql_torchrl.files import SUFFIX, first_line, folder_lock, read_json, write_json
from iql_torchrl.population.runs import IQLPopulation
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_policies
from iql_torchrl.selection.candidates import resolve_candidate
from iql_torchrl.trainers.trainer import OfflineTrainer

Row = dict[str, Any]
Score = Callable[[Agent, OfflineDataset], Mapping[str, float]]
POPULATION = f"population{SUFFIX}"
FAILED = "its evaluation failed"
EVENTS = 20  # how often progress is written between two checkpoints


class Parts(NamedTuple):
    """Which episodes are for what; None: no such part.

    ``train``: runs learn from them. ``held_out``: the ranking reads them. ``reserved``: the sweep
    does not read them.
    """

    train: OfflineDataset
    held_out: OfflineDataset | None
    reserved: OfflineDataset | None


@dataclass(frozen=True)
class Log:
    """The built table of a sweep's log in the folder ``data``; see ``Sweep`` for the rest."""

    data: Path
    options: Mapping[str, Any]
    reward: Any
    held_out: float | None
    reserved: float | None

    def parts(self, config: IQLConfig) -> Parts:
        """The episodes of the log, with the reward map of a config. Raises as ``split``."""
        reward = config.reward if self.reward is None else self.reward
        with warnings.catch_warnings():  # the sweep has shown them once
            warnings.simplefilter("ignore", DatasetWarning)
            log = load_dataset(self.data, reward=reward, **self.options)
        reserved = held_out = None
        if self.reserved is not None:
            log, reserved = log.split(1 - self.reserved, seed=1)
        if self.held_out is not None:
            log, held_out = log.split(1 - self.held_out, seed=0)
        return Parts(log, held_out, reserved)


def played(agent: Agent, dataset: OfflineDataset, *, episodes: int, seed: int) -> Row:
    """The mean return in the environment of ``dataset``, and its interval."""
    summary = evaluate(agent.policy, dataset.make_env, episodes=episodes, seed=seed).summary()
    ends = {"score": "mean", "score_low": "low", "score_high": "high"}
    return {key: summary[f"return_{end}"] for key, end in ends.items()}


@dataclass(frozen=True)
class Task:
    """Configs that are trained as one population, or one config that populations refuse.

    The folder has the newest checkpoint, ``losses.json``, ``progress.json`` (updates, while it
    trains), ``scores.json`` (of the members evaluated so far) and, at the end, ``rows.json``, or
    ``rows_without_scores.json``. Every file is replaced as a whole. ``score``: None where members
    are not evaluated. ``attempts``: how often a member is evaluated, at most, where that raises.
    """

    folder: Path
    configs: Mapping[str, IQLConfig]
    stacked: bool
    log: Log
    score: Score | None
    save_every: int
    attempts: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def first(self) -> IQLConfig:
        return next(iter(self.configs.values()))

    @property
    def finished(self) -> bool:
        return self._result.exists()

    @property
    def _result(self) -> Path:
        return self.folder / ("rows_without_scores.json" if self.score is None else "rows.json")

    @property
    def total(self) -> int:
        """Updates of all members together."""
        return len(self.configs) * self.first.updates

    @property
    def done(self) -> int:
        """Of ``total``, as far as the files show."""
        made = 0 if self.finished else int(read_json(self.folder / "progress.json", 0))
        return self.total if self.finished else len(self.configs) * made

    def rows(self) -> list[Row]:
        """One row for each member: losses, scores, or ``error``. Needs ``finished``."""
        rows: list[Row] = read_json(self._result)
        return rows

    def forget_failed_evaluations(self) -> None:
        """Evaluate members again whose evaluation failed in an earlier call."""
        if self.finished and any(FAILED in str(row.get("error")) for row in self.rows()):
            self._result.unlink()

    def perform(self) -> None:
        """Do what is not done yet. Another process that has the task waits, then finds it done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder):
            if not self.finished:
                own = self.log.parts(self.first).train
                agents = self._trained(own) if self.stacked else [self._trained_alone(own)]
                write_json(self._result, self._evaluated(agents, own))

    def _trained(self, dataset: OfflineDataset) -> list[Agent]:
        saved, every = self.folder / POPULATION, self.save_every
        if saved.exists():
            population = IQLPopulation.load(saved, dataset)
        else:
            population = IQLPopulation(list(self.configs.values()), dataset)
        while population.updates < self.first.updates:
            # the generator from which a loss may draw is not in the checkpoint
            torch.manual_seed(self.first.seed * 1_000_003 + population.updates)
            rest = self.first.updates - population.updates
            coming = min(every - population.updates % every, rest)
            for event in population.train(coming, every=max(1, coming // EVENTS)):
                write_json(self.folder / "progress.json", event.updates)
            losses = {str(name): values.tolist() for name, values in event.metrics.items()}
            self._write_losses(losses)  # before the state that is after them
            population.save(saved)
        return [population.member(number) for number in range(len(population))]

    def _trained_alone(self, dataset: OfflineDataset) -> Agent:
        config, folder = self.first, self.folder / "run"
        agent = make_agent(config, dataset)
        trainer = OfflineTrainer(
            agent=agent,
            dataset=dataset,
            folder=folder,
            keep_last=2,
            log_interval=max(1, config.updates // 100),
            save_trainer_interval=self.save_every,
            progress_bar=False,
            seed=config.seed,
        )
        progress = self.folder / "progress.json"
        trainer.register_op("post_steps", lambda: write_json(progress, trainer.updates))
        if any((folder / "checkpoints").glob(f"*{SUFFIX}")):
            trainer.resume()
        if trainer.updates < config.updates:
            trainer.train()
        self._write_losses({name: [value] for name, value in trainer.progress.rows[-1].items()})
        return agent

    def _write_losses(self, metrics: Mapping[str, list[float]]) -> None:
        losses = {name: values for name, values in metrics.items() if name.startswith("loss_")}
        write_json(self.folder / "losses.json", losses)

    def _evaluated(self, agents: Sequence[Agent], dataset: OfflineDataset) -> list[Row]:
        losses, path = read_json(self.folder / "losses.json"), self.folder / "scores.json"
        scores: dict[str, Row] = read_json(path, {})
        rows = []
        for number, (name, agent) in enumerate(zip(self.configs, agents, strict=True)):
            row: Row = {"member": name} | {loss: values[number] for loss, values in losses.items()}
            if bad := [loss for loss in losses if not abs(row[loss]) < float("inf")]:
                row["error"] = f"{bad[0]} is not finite"
            elif name in scores:
                row |= scores[name]
            elif self.score is not None:
                score = self._scored(self.score, agent, dataset)
                if "error" not in score:
                    scores[name] = score
                    write_json(path, scores)
                row |= score
            rows.append(row)
        return rows

    def _scored(self, score: Score, agent: Agent, dataset: OfflineDataset) -> Row:
        """``score`` and its bounds, or the ``error`` of this member: the others are evaluated."""
        for attempt in range(self.attempts):
            try:
                given = {name: float(value) for name, value in score(agent, dataset).items()}
                if "score" in given:
                    bounds = dict.fromkeys(("score", "score_low", "score_high"), given["score"])
                    return bounds | given
                raise ValueError(
                    f"score returned {sorted(given)}; expected a mapping with 'score', and with "
                    "'score_low' and 'score_high' where they are known."
                )
            except Exception as error:
                reason = first_line(error)
                print(
                    f"evaluation {attempt + 1} of {self.attempts} failed: {reason}", file=sys.stderr
                )
        return {"error": f"{FAILED}: {reason}"}

    def agents(self, device: str | None = None) -> Iterator[tuple[str, Agent]]:
        """The trained agents by name, from the checkpoints."""
        if not self.stacked:
            yield next(iter(self.configs)), Agent.load(self.folder / "run", device)
            return
        dataset = self.log.parts(self.first).train
        population = IQLPopulation.load(self.folder / POPULATION, dataset, device=device)
        for number, name in enumerate(self.configs):
            yield name, population.member(number)


def rank(folder: Path, tasks: Sequence[Task], *, fit_updates: int, discount: float | None) -> None:
    """Write ``ranking.json`` of the members of finished tasks, from the held-out episodes.

    All members are estimated together, because the bounds of the gains hold for all of them at
    once. Estimates are fitted on half of the held-out episodes and corrected by the other half.
    Members that cannot be ranked (with a history, for example) are named in ``skipped.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        if read_ranking(folder, tasks) is not None:
            return
        first, names = tasks[0].first, members_of(tasks)
        held_out = tasks[0].log.parts(first).held_out
        assert held_out is not None
        members, skipped = {}, {}
        for name, agent in (pair for task in tasks for pair in task.agents()):
            if name in names:
                try:
                    resolve_candidate(name, agent)
                    members[name] = agent
                except ValueError as error:
                    skipped[name] = first_line(error)
        write_json(folder / "skipped.json", skipped)
        fit, test = held_out.split(0.5, seed=0)
        discount = first.discount if discount is None else discount
        if members:
            fitted = fitted_q_evaluation(members, fit, test, discount=discount, updates=fit_updates)
            ranking = rank_policies(members, fit, test, discount=discount, fitted_q=fitted)
            ranking.to_json(folder / "ranking.json")
        else:
            write_json(folder / "ranking.json", None)
        write_json(folder / "ranked.json", names)


def members_of(tasks: Sequence[Task]) -> list[str]:
    """Names of the members that did not fail."""
    return [row["member"] for task in tasks for row in task.rows() if "error" not in row]


def read_ranking(
    folder: Path, tasks: Sequence[Task]
) -> tuple[Ranking | None, dict[str, str]] | None:
    """What :func:`rank` wrote for these members: the ranking, and why members have none.

    None where it did not.
    """
    path = folder / "ranking.json"
    if read_json(folder / "ranked.json", []) != members_of(tasks) or not path.exists():
        return None
    ranking = None if read_json(path) is None else Ranking.from_json(path)
    return ranking, read_json(folder / "skipped.json", {})
