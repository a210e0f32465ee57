"""Many runs as one: seeds and knobs trained together over stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch.optim.lr_scheduler import LambdaLR

from iql_torchrl.agent.build import Agent, build_agent
from iql_torchrl.agent.make_update import LEARNING_RATES, make_step, rate_factors
from iql_torchrl.agent.task import Task
from iql_torchrl.checkpoint import CheckpointError, read_components, write_components
from iql_torchrl.config import IQLConfig, knobs
from iql_torchrl.data import DeviceSampler, OfflineDataset
from iql_torchrl.data.replay import MemberSampler
from iql_torchrl.evaluation.rollout import Evaluation, evaluate
from iql_torchrl.population.loss import PopulationLoss
from iql_torchrl.trainers.identity import DataState
from iql_torchrl.update.adam import StackedAdam
from iql_torchrl.update.captured import captured

__all__ = ["IQLPopulation", "PopulationEvent"]

MOST_UPDATES_PER_CALL = 32


@dataclass(frozen=True)
class PopulationEvent:
    """``updates`` made so far, and means ``(P,)`` of the metrics since the last event."""

    updates: int
    metrics: TensorDictBase


class IQLPopulation:
    """P runs trained as one: every matrix product of an update is one product for all runs.

    Each run equals the same run trained alone on the same batches, except for rounding.

    Args:
        configs: one per run. They may differ in the settings that are described as ``per_run`` in
            ``IQLConfig`` (seed, expectile, temperature, learning rates, ...); nothing else.
        dataset: the log; ``configs[0].reward`` is for ``load_dataset``, as in ``make_agent``.
        batches: ``"shared"``: every run gets the same batch (a fair comparison of knobs, and the
            fastest); ``"own"``: each run gets its own, ``(P, B)``.

    Attributes: ``loss`` (:class:`PopulationLoss`), ``optimizer``, ``scheduler``, ``step`` (an
    ``IQLStep``; for ``compiled`` and ``captured`` too), ``sampler``, ``updates``.

    Raises ``ValueError`` on configs that differ elsewhere, network widths included, on unknown
    ``batches``, and as :class:`PopulationLoss` does.
    """

    def __init__(
        self, configs: Sequence[IQLConfig], dataset: OfflineDataset, *, batches: str = "shared"
    ) -> None:
        if batches not in ("shared", "own"):
            raise ValueError(f"batches is {batches!r}; choose 'shared' or 'own'.")
        _check_configs(configs)
        if not isinstance(dataset, OfflineDataset):
            raise TypeError(
                f"dataset is {type(dataset).__name__}; expected what load_dataset(...) returns."
            )
        if configs[0].history > 1:
            raise ValueError(
                f"history is {configs[0].history}; the runs of a population read single observations. "
                "Train runs with a history one by one."
            )
        self.configs, self.batches = tuple(configs), batches
        self.task = Task.of(dataset)
        self._data = DataState(None, dataset)
        first = self.configs[0]
        self.loss = PopulationLoss([self._agent(number).loss for number in range(len(configs))])
        self.loss.to(first.device)
        self.optimizer = self._make_optimizer()
        self.scheduler = LambdaLR(self.optimizer, rate_factors(first))
        self.step = make_step(first, self.loss, self.optimizer, self.scheduler)
        where: Any = {"device": first.device, "seed": first.seed}
        self.sampler = (
            DeviceSampler(dataset.transitions, first.batch_size, **where)
            if batches == "shared"
            else MemberSampler(
                dataset.transitions, first.batch_size, members=len(self.configs), **where
            )
        )
        self.updates = 0
        self._captured: Any = None

    def __len__(self) -> int:
        return len(self.configs)

    def _agent(self, number: int) -> Agent:
        return build_agent(replace(self.configs[number], compile=False), self.task)

    def _make_optimizer(self) -> StackedAdam:
        first = self.configs[0]
        named = list(self.loss.named_parameters())
        groups = []
        for network, field in LEARNING_RATES.items():
            params = [p for name, p in named if name.startswith(f"{network}_network")]
            if not params:
                continue
            rates = torch.tensor([getattr(c, field) for c in self.configs], dtype=torch.float64)
            groups.append({"params": params, "rates": rates})
        adamw = first.optimizer == "adamw"
        return StackedAdam(groups, weight_decay=first.weight_decay, decoupled=adamw)

    def train(self, updates: int | None = None, *, every: int = 1000) -> Iterator[PopulationEvent]:
        """Make ``updates`` more (by default up to ``configs[0].updates``), yielding at intervals.

        ``for event in population.train(every=1000): ...`` may evaluate, log or save at each event.
        Updates are made when the next event is requested. With ``compile`` in the configs, updates
        are :func:`~iql_torchrl.captured`; the number per call divides ``every`` and is at most 32.

        Raises ``ValueError`` on ``every < 1`` and on numbers that are not whole.
        """
        if int(every) != every or every < 1:
            raise ValueError(f"every is {every}; expected at least one update, a whole number.")
        if updates is not None and (int(updates) != updates or updates < 0):
            raise ValueError(f"updates is {updates}; expected a whole number, at least 0.")
        end = self.configs[0].updates if updates is None else self.updates + updates
        while self.updates < end:
            coming = min(every, end - self.updates)
            metrics = self._advance(coming)
            yield PopulationEvent(self.updates, metrics)

    def _advance(self, updates: int) -> TensorDictBase:
        """Means over ``updates`` updates; those that do not fill a captured call are made eagerly."""
        calls = 0
        if self.configs[0].compile:
            if self._captured is None:
                self._captured = captured(
                    self.step, self.sampler, updates=_updates_per_call(updates)
                )
            calls = updates // self._captured.updates
        total: Any = 0
        for _ in range(calls):
            total = self._captured() * self._captured.updates + total
            self.updates += self._captured.updates
        for _ in range(updates - calls * self._captured.updates if calls else updates):
            total = self.step(self.sampler.sample()) + total
            self.updates += 1
        means: TensorDictBase = (total / updates).cpu()
        return means

    def member(self, number: int) -> Agent:
        """Run ``number`` as an ordinary agent, with its weights and a fresh optimizer.

        Raises ``IndexError`` when there is no such run.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no run {number}: the runs are 0 to {len(self) - 1}.")
        agent = self._agent(number)
        self.loss.write_member(number, agent.loss)
        return agent

    def evaluate(
        self, make_env: Callable[[], Any], *, episodes: int, seed: int, **options: Any
    ) -> list[Evaluation]:
        """:func:`iql_torchrl.evaluate` of every run, with the same seeds."""
        return [
            evaluate(self.member(i).policy, make_env, episodes=episodes, seed=seed, **options)
            for i in range(len(self))
        ]

    def save(self, path: str | Path) -> Path:
        """Write configs, weights, optimizer, schedule and sampler to one file, or nothing on error.

        Only digests of the dataset are written; the first save takes about 1 s per gigabyte.
        """
        states = {
            "population": {
                "configs": [config.to_dict() for config in self.configs],
                "batches": self.batches,
                "updates": self.updates,
            },
            "data": self._data.state_dict(),
            "loss_module": self.loss.state_dict(),
            "step": self.step.state_dict(),
            "sampler": self.sampler.state_dict(),
        }
        return write_components(path, states)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dataset: OfflineDataset,
        *,
        device: torch.device | str | None = None,
    ) -> IQLPopulation:
        """The population of a file, which continues training from there.

        ``device``: by default the one it was trained on. On another type of device the sampler
        starts again from the seed, because each type has its own generator.

        Raises ``CheckpointError`` when the file cannot be read, the data differ, or the version or
        device is not available here.
        """
        states = read_components(path, ["population", "data", "loss_module", "step", "sampler"])
        record = states["population"]
        try:
            data = DataState(None, dataset)
            data.check(states["data"])
            saved = [IQLConfig.from_dict(IQLConfig().to_dict() | c) for c in record["configs"]]
            configs = [
                replace(c, device=c.device if device is None else str(device)) for c in saved
            ]
            population = cls(configs, dataset, batches=record["batches"])
            population.loss.load_state_dict(states["loss_module"])
            population.step.load_state_dict(states["step"])
            if population.sampler.device.type == torch.device(saved[0].device).type:
                population.sampler.load_state_dict(states["sampler"])
        except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        population.updates, population._data = record["updates"], data
        return population


def _updates_per_call(updates: int) -> int:
    """The largest divisor of ``updates`` up to the limit; the limit itself where that is small."""
    most = min(updates, MOST_UPDATES_PER_CALL)
    divisor = next(k for k in range(most, 0, -1) if updates % k == 0)
    return divisor if 4 * divisor > MOST_UPDATES_PER_CALL else most


def _check_configs(configs: Sequence[IQLConfig]) -> None:
    if isinstance(configs, IQLConfig):
        raise TypeError("configs is one IQLConfig; expected a sequence of them, one per run.")
    if not isinstance(configs, Sequence) and configs is not None:
        raise TypeError(f"configs is {type(configs).__name__}; expected a sequence of IQLConfigs.")
    if not configs:
        raise ValueError("configs is empty; a population has at least one run.")
    for number, config in enumerate(configs):
        if not isinstance(config, IQLConfig):
            raise TypeError(f"configs[{number}] is {type(config).__name__}; expected an IQLConfig.")
        if type(config) is not type(configs[0]):
            raise TypeError(
                f"configs[{number}] is {type(config).__name__} and configs[0] is "
                f"{type(configs[0]).__name__}; the configs of a population have one class."
            )
        described = knobs(type(config))
        for name, knob in described.items():
            first, other = getattr(configs[0], name), getattr(config, name)
            if not knob.per_run and first != other:
                may_differ = [name for name, each in described.items() if each.per_run]
                raise ValueError(
                    f"{name} is {other} in configs[{number}] and {first} in configs[0]; runs of a "
                    f"population may differ in {', '.join(may_differ)}. Train one population for "
                    "each."
                )
