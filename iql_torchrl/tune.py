"""Trials of Ray Tune: a config, or a population of seeds, that continues from its last checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from iql_torchrl.agent.build import Agent, make_agent
from iql_torchrl.config import IQLConfig, check_whole
from iql_torchrl.data import OfflineDataset
from iql_torchrl.files import SUFFIX, components, read_components, write_components
from iql_torchrl.population import IQLPopulation
from iql_torchrl.trainers.trainer import OfflineTrainer

Score = Callable[[Agent, OfflineDataset], Mapping[str, float]]
FILE = f"trial{SUFFIX}"


def trainable(
    load: Callable[[], OfflineDataset],
    config: IQLConfig,
    *,
    seeds: int = 1,
    score: Score | None = None,
    report_every: int | None = None,
) -> Callable[[Mapping[str, Any]], None]:
    """A trainable for ``ray.tune.Tuner``, whose ``param_space`` has settings of the config by name.

    A trial reports ``updates``, the mean losses since its last report and the numbers of ``score``,
    each time with a checkpoint. A trial that is repeated, restored or paused continues from there; on
    a CPU with the bits of a trial without interruption. Schedulers need ``time_attr="updates"``. Where
    ``seeds`` is 1, population-based training may change learning rates and settings of the loss.

    Args:
        load: makes the dataset in the process of each trial: ``partial(load_dataset, PATH, ...)`` with
            an absolute path that every machine reaches, best of a dataset on disk.
        config: the settings that ``param_space`` does not have.
        seeds: how many seeds, counted from ``config.seed``, are trained together as one
            :class:`~iql_torchrl.IQLPopulation`. Reported numbers are then means over them, and
            ``<name>_std`` is the standard deviation of a score.
        score: called at each report with the agent and its dataset.
        report_every: updates between two reports; by default a tenth of ``config.updates``.

    Raises ``ValueError`` for a number below 1, and ``ImportError`` without ray. A trial raises
    ``ValueError`` for an unknown setting, and where a population would continue with other settings.
    """
    try:
        from ray import tune
    except ImportError as error:
        raise ImportError('tune needs ray; pip install "iql_torchrl[tune]" installs it.') from error
    every = max(1, config.updates // 10) if report_every is None else report_every
    check_whole(seeds=seeds, report_every=every)

    def trial(settings: Mapping[str, Any]) -> None:
        given = type(config).from_dict(config.to_dict() | dict(settings))
        this = _Trial(tune, given, load(), seeds, score, every)
        checkpoint = tune.get_checkpoint()
        saved = None if checkpoint is None else Path(checkpoint.to_directory(), FILE)
        (this.train if seeds == 1 else this.train_seeds)(saved)

    return trial


def agents_of(checkpoint: Any, dataset: OfflineDataset, device: str | None = None) -> list[Agent]:
    """The agents of a trial's checkpoint (``result.checkpoint``), one for each seed."""
    with checkpoint.as_directory() as folder:
        path = Path(folder, FILE)
        if "population" not in components(path):
            return [Agent.load(path, device)]
        population = IQLPopulation.load(path, dataset, device=device)
        return [population.member(number) for number in range(len(population))]


@dataclass(frozen=True)
class _Trial:
    tune: Any
    config: IQLConfig
    dataset: OfflineDataset
    seeds: int
    score: Score | None
    every: int

    def train(self, saved: Path | None) -> None:
        agent = make_agent(self.config, self.dataset)
        options: Any = {"log_interval": self.every, "seed": self.config.seed, "progress_bar": False}
        trainer = OfflineTrainer(agent=agent, dataset=self.dataset, **options)

        def event() -> None:
            save = partial(write_components, states=trainer.state_dict())
            self.report(trainer.updates, trainer.progress.rows[-1], [agent], save)

        trainer.register_op("post_steps", event)
        if saved is not None:
            trainer.load_state_dict(_with_settings(read_components(saved), trainer.state_dict()))
        trainer.train()

    def train_seeds(self, saved: Path | None) -> None:
        end, first = self.config.updates, self.config.seed
        configs = tuple(replace(self.config, seed=first + number) for number in range(self.seeds))
        data = self.dataset
        population = IQLPopulation.load(saved, data) if saved else IQLPopulation(configs, data)
        if population.configs != configs:
            raise ValueError(
                f"the checkpoint has {population.configs[0]}, and the trial {configs[0]}; settings "
                "may change during a trial only with seeds=1."
            )
        while population.updates < end:
            # the generator from which a loss may draw is not in the checkpoint
            torch.manual_seed(first * 1_000_003 + population.updates)
            updates = min(self.every, end - population.updates)
            for event in population.train(updates, every=updates):
                losses = {str(name): values.mean().item() for name, values in event.metrics.items()}
                agents = [population.member(number) for number in range(self.seeds)]
                self.report(event.updates, losses, agents, population.save)

    def report(
        self, updates: int, means: Mapping[str, float], agents: list[Agent], save: Any
    ) -> None:
        numbers = {name: value for name, value in means.items() if name.startswith("loss_")}
        scores = [self.score(agent, self.dataset) for agent in agents] if self.score else []
        for name in scores[0] if scores else ():
            values = [each[name] for each in scores]
            numbers[name] = fmean(values)
            numbers |= {f"{name}_std": stdev(values)} if len(values) > 1 else {}
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder, FILE))
            checkpoint = self.tune.Checkpoint.from_directory(folder)
            self.tune.report({"updates": updates, **numbers}, checkpoint=checkpoint)


def _with_settings(saved: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The ``saved`` state of a trainer with the settings in its ``own`` state: Tune may change them."""
    step, now = saved["step"], own["step"]
    for group, new in zip(*(s["optimizer"]["param_groups"] for s in (step, now)), strict=True):
        rate = group["lr"] * new["initial_lr"] / group["initial_lr"]  # at its place of the schedule
        group |= new | {"lr": rate, "params": group["params"]}
    step["hyperparameters"] = now["hyperparameters"]
    for schedule, new in zip(step["lr_schedulers"], now["lr_schedulers"], strict=True):
        schedule["base_lrs"] = new["base_lrs"]
    weights = {n: v for n, v in saved["loss_module"].items() if "_network" in n}
    loss, agent = own["loss_module"] | weights, saved["agent"] | {"config": own["agent"]["config"]}
    return saved | {"agent": agent, "settings": own["settings"], "loss_module": loss}
