"""Many runs as one: seeds and settings trained together over stacked parameters."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchrl import logger as torchrl_logger

from iql_torchrl.agent.build import (
    LEARNING_RATES,
    Agent,
    build_agent,
    ends_before,
    make_step,
    rate_factors,
    warn_of_data,
)
from iql_torchrl.agent.task import Task
from iql_torchrl.config import IQLConfig, check_choice, config_settings
from iql_torchrl.data import DeviceSampler, OfflineDataset, RelabelledDataset
from iql_torchrl.data.replay import MemberSampler
from iql_torchrl.distributed import Ranks
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.evaluation.rollout import evaluate
from iql_torchrl.files import CheckpointError, read_components, write_components
from iql_torchrl.trainers.checkpoints import check_same_data, check_same_run, data_state
from iql_torchrl.trainers.events import whole_updates
from iql_torchrl.update.adam import StackedAdam
from iql_torchrl.update.captured import captured
from iql_torchrl.update.lifted import Lift, stack_losses, write_member

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
        dataset: the data; ``configs[0].reward`` is for ``load_dataset``, as in ``make_agent``.
        batches: ``"shared"``: every run gets the same batch (a fair comparison of settings, and the
            fastest); ``"own"``: each run gets its own, ``(P, B)``.
        ranks: the processes that divide the runs among them; build the population on each with the
            same arguments. A rank trains its consecutive part of the runs, with the batches and
            random tensors that these have in one process, and exchanges nothing meanwhile.

    ``configs`` are those of this rank's runs, which ``member``, ``evaluate`` and events count from 0;
    ``all_configs`` are all. ``ranks.gather(population.evaluate(...))`` and :meth:`joined` give rank 0
    everything. A run's weights equal those of one process up to the rounding of matrix products for
    other numbers of runs. Random tensors of updates come from the sampler's generator, except those of
    dropout, which torch's default generator draws: with ``dropout`` a loaded population continues with
    other ones.

    Attributes: ``loss`` (of all runs, with parameters ``(P, ...)``), ``optimizer``, ``scheduler``,
    ``step`` (an ``IQLStep``; for ``compiled`` and ``captured`` too), ``sampler``, ``updates``.

    Raises ``ValueError`` on configs that differ elsewhere, network widths included, on unknown
    ``batches``, on fewer configs than ranks or ranks with other configs or data, and as
    ``update.lifted.stack_losses`` does.
    """

    def __init__(
        self,
        configs: Sequence[IQLConfig],
        dataset: OfflineDataset | RelabelledDataset,
        *,
        batches: str = "shared",
        ranks: Ranks | None = None,
    ) -> None:
        check_choice("batches", batches, ("shared", "own"))
        _check_configs(configs)
        _check_rows(configs[0], dataset, batches)
        self.ranks = Ranks() if ranks is None else ranks
        self.all_configs, self.batches = tuple(configs), batches
        self._dataset = dataset
        self._agree_with_other_ranks()
        self.runs = self.ranks.part(len(configs))
        self.configs = self.all_configs[self.runs.start : self.runs.stop]
        self.task = Task.of(dataset)
        warn_of_data(configs[0], dataset, max(config.discount for config in configs))
        first = self.all_configs[0]
        self.loss = stack_losses([self._agent(number).loss for number in range(len(self))])
        self.loss.to(first.device)
        self.optimizer = self._make_optimizer()
        self.scheduler = LambdaLR(
            self.optimizer, rate_factors(first, len(self.optimizer.param_groups))
        )
        self.step = make_step(first, self.loss, self.optimizer, self.scheduler)
        self.step.independent_ranks = self.ranks.size > 1
        where: Any = {"device": first.device, "seed": first.seed}
        if batches == "own":
            where |= {"members": len(configs), "part": self.runs}
            self.sampler: DeviceSampler = MemberSampler(
                dataset.transitions, first.batch_size, **where
            )
        else:
            chunk = first.action_chunk
            rows = dataset if chunk == 1 else dataset.chunks(chunk)
            self.sampler = rows.device_sampler(first.batch_size, **where)
        part: Any = {"first": self.runs.start, "count": len(configs)}
        # as captured updates, which draw from it too: then it does not matter how many are captured
        self.step.lift = Lift(self.loss, len(self), generator=self.sampler.generator, **part)
        self.updates = 0
        self._captured: Any = None

    def __len__(self) -> int:
        return len(self.configs)

    def _agree_with_other_ranks(self) -> None:
        ranks, count = self.ranks, len(self.all_configs)
        if count < ranks.size:
            raise ValueError(
                f"there are {count} configs and {ranks.size} ranks; start as many processes as there "
                "are configs, or fewer."
            )
        ranks.check_same(
            [config.to_dict() for config in self.all_configs],
            "the ranks have different configs; give each rank the whole list, in the same order.",
        )
        if ranks.size > 1:
            check_same_data(ranks, self._data, None)
            ranks.share_random_state()

    @cached_property
    def _data(self) -> dict[str, Any]:
        return data_state(None, self._dataset)

    def _agent(self, number: int) -> Agent:
        return build_agent(replace(self.configs[number], compile=False), self.task)

    def _make_optimizer(self) -> StackedAdam:
        first, named = self.configs[0], list(self.loss.named_parameters())
        groups = []
        for network, field in LEARNING_RATES.items():
            params = [p for name, p in named if name.startswith(f"{network}_network")]
            rates = torch.tensor([getattr(c, field) for c in self.configs], dtype=torch.float64)
            groups += [{"params": params, "rates": rates}] if params else []
        adamw = first.optimizer == "adamw"
        return StackedAdam(groups, weight_decay=first.weight_decay, decoupled=adamw)

    def train(self, updates: int | None = None, *, every: int = 1000) -> Iterator[PopulationEvent]:
        """Make ``updates`` more (by default up to ``configs[0].updates``), yielding at intervals.

        ``for event in population.train(every=1000): ...`` may evaluate, log or save at each event.
        Updates are made when the next event is requested, so a call without a loop trains nothing and
        warns; :meth:`train_now` needs no loop. With ``compile`` in the configs, updates
        are :func:`~iql_torchrl.captured`, at most 32 a call; a rest of ``every`` is made eagerly.

        Raises ``ValueError`` on ``every < 1`` and on numbers that are not whole.
        """
        every = whole_updates("every", every)
        end = self.configs[0].updates
        if updates is not None:
            end = self.updates + whole_updates("updates", updates, least=0)
        if self.ranks.is_main and (after := ends_before(self.configs[0], end)):
            torchrl_logger.warning(after)
        read: list[bool] = []
        events = self._events(end, every, read)
        weakref.finalize(events, _warn_unread, read)
        return events

    def train_now(self, updates: int | None = None) -> PopulationEvent | None:
        """Make the updates of :meth:`train` at once; the last event, None without updates."""
        last = None
        for event in self.train(updates):
            last = event
        return last

    def _events(self, end: int, every: int, read: list[bool]) -> Iterator[PopulationEvent]:
        read.append(True)
        while self.updates < end:
            updates = min(every, end - self.updates)
            if (
                self._captured is not None
                and every < self._captured.updates <= (end - self.updates) / 4
            ):
                self._captured = None  # no interval would fill a call
            metrics = self._advance(updates)
            yield PopulationEvent(self.updates, metrics)

    def _advance(self, updates: int) -> TensorDictBase:
        """Means over ``updates`` updates; those that do not fill a captured call are made eagerly."""
        total: Any = 0
        left = updates
        if self.configs[0].compile:
            per_call = _updates_per_call(updates)
            if self._captured is None or 4 * self._captured.updates < per_call:
                self._captured = captured(self.step, self.sampler, updates=per_call)
            per_call = self._captured.updates
            while left >= per_call:
                total = self._captured() * per_call + total
                self.updates, left = self.updates + per_call, left - per_call
        for _ in range(left):
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
        write_member(self.loss, number, agent.loss)
        return agent

    def evaluate(
        self, make_env: Callable[[], Any], *, episodes: int, seed: int, **options: Any
    ) -> list[Evaluation]:
        """:func:`iql_torchrl.evaluate` of every run, with the same seeds."""
        return [
            evaluate(self.member(i).policy, make_env, episodes=episodes, seed=seed, **options)
            for i in range(len(self))
        ]

    def joined(self) -> IQLPopulation | None:
        """On rank 0 the population of all ranks' runs, in the order of ``all_configs``; else None.

        Every rank must call it. It has the weights, optimizer and sampler of all runs, so that
        ``member``, ``rank_policies`` and further training work as with a population of one process,
        and a sampler with a copy of the rows. With one rank it is this population.
        """
        if self.ranks.size == 1:
            return self
        own = {"loss_module": self.loss.state_dict(), "step": self.step.state_dict()}
        parts = self.ranks.gather(_mapped(lambda x: x.cpu() if isinstance(x, Tensor) else x, own))
        if parts is None:
            return None
        whole = IQLPopulation(self.all_configs, self._dataset, batches=self.batches)
        whole.step.independent_ranks = True
        whole._take(parts)
        whole.sampler.load_state_dict(self.sampler.state_dict())
        whole.updates, whole._data = self.updates, self._data
        return whole

    def _take(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Take this population's runs from the states of consecutive parts of one that has them all.

        What runs share has the same shape in the state of any number of runs. Older files have one
        discount for all, and ``(P, 1, ...)`` outside of perceptrons.
        """

        def of_these(*values: Any) -> Any:
            if not isinstance(values[0], Tensor) or values[0].ndim == 0:
                return values[0]
            return torch.cat(values)[self.runs.start : self.runs.stop]

        def as_held(value: Tensor, own: Tensor) -> Tensor:
            return value.expand_as(own) if value.ndim == 0 else value.reshape(own.shape)

        loss = self.loss.state_dict()
        for name, own in loss.items():
            values = [part["loss_module"][name] for part in parts]
            if isinstance(values[0], Tensor):
                same = values[0].shape == own.shape
                loss[name] = as_held(values[0] if same else of_these(*values), own)
        self.loss.load_state_dict(loss)
        step = _mapped(of_these, *(part["step"] for part in parts))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, state in step["optimizer"]["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = as_held(state[name], parameters[number])
        self.step.load_state_dict(step)

    def save(self, path: str | Path) -> Path:
        """Write configs, weights, optimizer, schedule and sampler to one file, or nothing on error.

        Only digests of the dataset are written; the first save takes about 1 s per gigabyte. Every rank
        must call it; rank 0 writes all runs. The file can be loaded on any number of ranks.
        """
        whole = self.joined()
        return self.ranks.from_main(lambda: write_components(path, (whole or self)._states()))

    def _states(self) -> dict[str, dict[str, Any]]:
        return {
            "population": {
                "configs": [config.to_dict() for config in self.configs],
                "batches": self.batches,
                "updates": self.updates,
            },
            "data": self._data,
            "loss_module": self.loss.state_dict(),
            "step": self.step.state_dict(),
            "sampler": self.sampler.state_dict(),
        }

    @classmethod
    def load(
        cls,
        path: str | Path,
        dataset: OfflineDataset | RelabelledDataset,
        *,
        device: torch.device | str | None = None,
        ranks: Ranks | None = None,
    ) -> IQLPopulation:
        """The population of a file, which continues training from there; ``ranks`` as for a new one.

        ``device``: by default the one it was trained on. On another type of device the sampler
        starts again from the seed, because each type has its own generator.

        Raises ``CheckpointError`` when the file cannot be read, the data differ, or the version or
        device is not available here.
        """
        ranks = Ranks() if ranks is None else ranks
        names = ["population", "data", "loss_module", "step", "sampler"]
        states = ranks.from_main(lambda: read_components(path, names))
        record = states["population"]
        try:
            data = data_state(None, dataset)
            check_same_run({"data": states["data"]}, {"data": data})
            saved = [IQLConfig.from_dict(IQLConfig().to_dict() | c) for c in record["configs"]]
            configs = [
                replace(c, device=c.device if device is None else str(device)) for c in saved
            ]
            population = cls(configs, dataset, batches=record["batches"], ranks=ranks)
            population._take([states])
            if population.sampler.device.type == torch.device(saved[0].device).type:
                population.sampler.load_state_dict(states["sampler"])
        except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        population.updates, population._data = record["updates"], data
        return population


def _warn_unread(read: list[bool]) -> None:
    """Called where the events of a training are gone."""
    if not read:
        warnings.warn(
            "population.train(...) was called without a loop over its events, so nothing was "
            "trained; write for event in population.train(...): ..., or population.train_now(...).",
            UserWarning,
            stacklevel=3,
        )


def _check_configs(configs: Sequence[IQLConfig]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``configs`` are those of one population."""
    if not isinstance(configs, Sequence):
        raise TypeError(
            f"configs is {type(configs).__name__}; expected a sequence of IQLConfigs, one per run."
        )
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
        described = config_settings(type(config))
        for name, setting in described.items():
            first, other = getattr(configs[0], name), getattr(config, name)
            if not setting.per_run and first != other:
                may_differ = [name for name, each in described.items() if each.per_run]
                raise ValueError(
                    f"{name} is {other} in configs[{number}] and {first} in configs[0]; runs of a "
                    f"population may differ in {', '.join(may_differ)}. Train one population for "
                    "each."
                )


def _check_rows(config: IQLConfig, dataset: Any, batches: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` where a population cannot read its batches."""
    if not isinstance(dataset, OfflineDataset | RelabelledDataset):
        raise TypeError(
            f"dataset is {type(dataset).__name__}; expected what load_dataset(...) returns. "
            "A population needs all rows in one table, so shards are not possible."
        )
    if config.history > 1:
        raise ValueError(
            f"history is {config.history}; the runs of a population read single observations. "
            "Train runs with a history one by one."
        )
    chunk, relabelled = config.action_chunk, isinstance(dataset, RelabelledDataset)
    if batches == "own" and (relabelled or chunk > 1):
        what = "the dataset has goals" if relabelled else f"action_chunk is {chunk}"
        raise ValueError(
            f"batches is 'own' and {what}; goals and chunks are drawn for batches that all runs "
            "share. Choose batches='shared'."
        )


def _updates_per_call(updates: int) -> int:
    """The largest divisor of ``updates`` up to the limit; the limit itself where that is small."""
    most = min(updates, MOST_UPDATES_PER_CALL)
    divisor = next(k for k in range(most, 0, -1) if updates % k == 0)
    return divisor if 4 * divisor > MOST_UPDATES_PER_CALL else most


def _mapped(function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` of the leaves at the same place of nested dicts, lists and tuples."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: _mapped(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_mapped(function, *leaves) for leaves in zip(*trees, strict=True))
    return function(*trees)
