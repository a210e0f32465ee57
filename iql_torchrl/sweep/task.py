"""The units of work of a sweep: each continues the folder it is given, or starts it."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iql_torchrl.agent.build import Agent, make_agent
from iql_torchrl.config import IQLConfig
from iql_torchrl.data import DatasetWarning, OfflineDataset, load_dataset
from iql_torchrl.data.saved import folder_lock
from iql_torchrl.evaluation.rollout import evaluate
from iql_torchrl.files import SUFFIX, whole_file
from iql_torchrl.population.runs import IQLPopulation
from iql_torchrl.trainers.trainer import OfflineTrainer

__all__ = ["Common", "Parts", "Score", "Task", "first_line", "read_json", "write_json"]

Row = dict[str, Any]
Score = Callable[[Agent, OfflineDataset], Mapping[str, float]]
POPULATION = f"population{SUFFIX}"
EVENTS = 20  # how often progress is written between two checkpoints


class Parts(NamedTuple):
    """Which episodes are for what; None: no such part.

    ``train``: runs learn from them. ``held_out``: the ranking reads them. ``reserved``: the sweep
    does not read them.
    """

    train: OfflineDataset
    held_out: OfflineDataset | None
    reserved: OfflineDataset | None


_FAILED = "its evaluation failed"


@dataclass(frozen=True, kw_only=True)
class Common:
    """What is the same for all tasks of a sweep; see ``Sweep``.

    ``data``: the folder of the built table. ``opening``: options of ``load_dataset`` to open it.
    """

    data: Path
    opening: Mapping[str, Any]
    env: Any
    reward: Any
    held_out: float | None
    reserved: float | None
    score: Score | None
    episodes: int
    evaluation_seed: int
    fit_updates: int
    discount: float | None
    save_every: int

    def parts(self, config: IQLConfig) -> Parts:
        """The episodes of the log, with the reward map of a config. Raises as ``split``."""
        with warnings.catch_warnings():  # the sweep has shown them once
            warnings.simplefilter("ignore", DatasetWarning)
            reward = config.reward if self.reward is None else self.reward
            log = load_dataset(self.data, env=self.env, reward=reward, **self.opening)
        reserved = held_out = None
        if self.reserved is not None:
            log, reserved = log.split(1 - self.reserved, seed=1)
        if self.held_out is not None:
            log, held_out = log.split(1 - self.held_out, seed=0)
        return Parts(log, held_out, reserved)

    def scores(self, agent: Agent, dataset: OfflineDataset) -> Row:
        """``score`` and its bounds; those of one number are the number."""
        if self.score is not None:
            given = {name: float(value) for name, value in self.score(agent, dataset).items()}
            if "score" not in given:
                raise ValueError(
                    f"score returned {sorted(given)}; expected a mapping with 'score', and with "
                    "'score_low' and 'score_high' where they are known."
                )
            return {f"score{end}": given["score"] for end in ("", "_low", "_high")} | given
        summary = evaluate(
            agent.policy, dataset.make_env, episodes=self.episodes, seed=self.evaluation_seed
        ).summary()
        ends = {"score": "mean", "score_low": "low", "score_high": "high"}
        return {key: summary[f"return_{end}"] for key, end in ends.items()}


@dataclass(frozen=True)
class Task:
    """Configs that are trained as one population, or one config that populations refuse.

    The folder has the newest checkpoint, ``losses.json``, ``progress.json`` (updates, while it
    trains), ``scores.json`` (of the members evaluated so far) and, at the end, ``rows.json``, or
    ``rows_without_scores.json``. Every file is replaced as a whole. ``scored``: whether the members
    are evaluated. ``attempts``: how often a member is evaluated, at most, where that raises.
    """

    folder: Path
    configs: Mapping[str, IQLConfig]
    stacked: bool
    scored: bool
    common: Common
    attempts: int = 1

    @property
    def finished(self) -> bool:
        return self._result.exists()

    @property
    def _result(self) -> Path:
        return self.folder / ("rows.json" if self.scored else "rows_without_scores.json")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def total(self) -> int:
        """Updates of all members together."""
        return len(self.configs) * self.first.updates

    @property
    def done(self) -> int:
        """Of ``total``, as far as the files show."""
        if self.finished:
            return self.total
        return len(self.configs) * int(read_json(self.folder / "progress.json", 0))

    @cached_property
    def first(self) -> IQLConfig:
        return next(iter(self.configs.values()))

    def rows(self) -> list[Row]:
        """One row for each member: losses, scores, or ``error``. Needs ``finished``."""
        rows: list[Row] = read_json(self._result)
        return rows

    def forget_failed_evaluations(self) -> None:
        """Evaluate members again whose evaluation failed in an earlier call."""
        if self.finished and any(_FAILED in str(row.get("error")) for row in self.rows()):
            self._result.unlink()

    def perform(self) -> None:
        """Do what is not done yet. Another process that has the task waits, then finds it done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder):
            if self.finished:
                return
            own = self.common.parts(self.first).train
            agents = self._trained(own) if self.stacked else [self._trained_alone(own)]
            losses = read_json(self.folder / "losses.json")
            rows = self._evaluated(agents, own, losses)
            write_json(self._result, rows)

    def _trained(self, dataset: OfflineDataset) -> list[Agent]:
        saved, every = self.folder / POPULATION, self.common.save_every
        population = (
            IQLPopulation.load(saved, dataset)
            if saved.exists()
            else IQLPopulation(list(self.configs.values()), dataset)
        )
        while population.updates < self.first.updates:
            # the generator from which a loss may draw is not in the checkpoint
            torch.manual_seed(self.first.seed * 1_000_003 + population.updates)
            rest = self.first.updates - population.updates
            coming = min(every - population.updates % every, rest)
            losses: dict[str, list[float]] = {}
            for event in population.train(coming, every=max(1, coming // EVENTS)):
                write_json(self.folder / "progress.json", event.updates)
                losses = {
                    str(name): values.tolist()
                    for name, values in event.metrics.items()
                    if str(name).startswith("loss_")
                }
            write_json(self.folder / "losses.json", losses)  # before the state that is after them
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
            save_trainer_interval=self.common.save_every,
            progress_bar=False,
            seed=config.seed,
        )
        progress = self.folder / "progress.json"
        trainer.register_op("post_steps", lambda: write_json(progress, trainer.updates))
        if any((folder / "checkpoints").glob(f"*{SUFFIX}")):
            trainer.resume()
        if trainer.updates < config.updates:
            trainer.train()
        last = trainer.progress.rows[-1]
        losses = {name: [value] for name, value in last.items() if name.startswith("loss_")}
        write_json(self.folder / "losses.json", losses)
        return agent

    def _evaluated(
        self, agents: Sequence[Agent], dataset: OfflineDataset, losses: Mapping[str, list[float]]
    ) -> list[Row]:
        path = self.folder / "scores.json"
        scores: dict[str, Row] = read_json(path, {})
        rows = []
        for number, (name, agent) in enumerate(zip(self.configs, agents, strict=True)):
            own = {loss: values[number] for loss, values in losses.items()}
            if bad := [loss for loss, value in own.items() if not abs(value) < float("inf")]:
                rows.append({"member": name, **own, "error": f"{bad[0]} is not finite"})
                continue
            if self.scored and name not in scores:
                score = self._score(agent, dataset)
                if "error" in score:
                    rows.append({"member": name, **own, **score})
                    continue
                scores[name] = score
                write_json(path, scores)
            rows.append({"member": name, **own, **scores.get(name, {})})
        return rows

    def _score(self, agent: Agent, dataset: OfflineDataset) -> Row:
        """The scores, or the ``error`` of this member: the others are evaluated."""
        for attempt in range(self.attempts):
            try:
                return self.common.scores(agent, dataset)
            except Exception as error:
                reason = first_line(error)
                print(
                    f"evaluation {attempt + 1} of {self.attempts} failed: {reason}", file=sys.stderr
                )
        return {"error": f"{_FAILED}: {reason}"}

    def agent(self, name: str, device: str | None = None) -> Agent:
        """The trained agent of that name, from the checkpoint."""
        own = self.common.parts(self.first).train
        return next(agent for other, agent in self.agents(own, device) if other == name)

    def agents(
        self, dataset: OfflineDataset, device: str | None = None
    ) -> Iterator[tuple[str, Agent]]:
        """The trained agents by name, from the checkpoints. ``dataset``: what they learnt from."""
        if not self.stacked:
            yield next(iter(self.configs)), Agent.load(self.folder / "run", device)
            return
        population = IQLPopulation.load(self.folder / POPULATION, dataset, device=device)
        for number, name in enumerate(self.configs):
            yield name, population.member(number)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")


def read_json(path: Path, default: Any = None) -> Any:
    """The content of a file that :func:`write_json` wrote; ``default`` where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if default is None:
            raise
        return default
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); delete it, and run the sweep again."
        ) from error
