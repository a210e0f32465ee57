"""One learner of bench_scores.py in a process of its own; it needs numpy, torch and its own library.

    python benchmarks/score_methods.py METHOD TASK.json

``TASK.json``: ``rows`` (an npz file), ``seed``, ``updates`` (of the whole run, for schedules),
``chunk`` (updates of one command, at least), ``low`` and ``high`` (bounds of continuous actions) or
``actions`` (their number), ``states`` (number of states where observations are categories), and
``options`` (settings of the method). The process reads one JSON object a line and answers with one:

    {"learn": 500}                      {"seconds": ..., "cpu_seconds": ...}: 500 further updates
    {"act": [[...], ...], "mask": ...}  {"actions": [...]}: deterministic actions of a batch
    {"about": true}                     {"settings": {...}, "versions": {...}}

Each function below builds the networks, the optimizers and the loop as the authors of that library
do; the docstring names the file that it follows. No row is changed for a method, except as its
docstring says.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch


@dataclass
class Learner:
    """``learn(n)`` makes n updates; ``act(observations, masks)`` gives the actions of a batch."""

    learn: Callable[[int], None]
    act: Callable[[Any, Any], Any]
    settings: dict[str, Any]
    packages: tuple[str, ...] = field(default=("torch",))


@dataclass
class Task:
    """What a learner gets; ``rows`` are numpy arrays, one row a step."""

    rows: dict[str, Any]
    seed: int
    updates: int
    chunk: int
    options: dict[str, Any]
    low: list[float] | None = None
    high: list[float] | None = None
    actions: int | None = None
    states: int | None = None

    def inputs(self, observations: Any) -> torch.Tensor:
        """Float observations ``(B, S)``; categories as one-hot rows."""
        if self.states is None:
            return torch.as_tensor(np.asarray(observations, np.float32))
        return torch.eye(self.states)[torch.as_tensor(np.asarray(observations, np.int64))]

    def transitions(self) -> Any:
        """The rows in TorchRL's layout."""
        from tensordict import TensorDict

        rows, count = self.rows, len(self.rows["reward"])
        ends = {name: torch.as_tensor(rows[name])[:, None] for name in ("terminated", "truncated")}
        following = {
            "observation": self.inputs(rows["next_observation"]),
            "reward": torch.as_tensor(rows["reward"])[:, None],
            **ends,
            "done": ends["terminated"] | ends["truncated"],
        }
        batch = {
            "observation": self.inputs(rows["observation"]),
            "action": torch.as_tensor(rows["action"]),
            "next": following,
        }
        return TensorDict(batch, [count])


def ours(task: Task) -> Learner:
    """This package with ``IQLConfig(**options)``; ``temperature=0`` is behaviour cloning.

    ``form`` among the options: ``eager`` (default), ``compiled`` or ``captured``.
    """
    from iql_torchrl import IQLConfig, captured, compiled, load_dataset, make_agent

    import gymnasium
    from tensordict import TensorDict

    options = {k: tuple(v) if k == "hidden" else v for k, v in task.options.items()}
    form, reward = options.pop("form", "eager"), options.pop("reward_map", None)
    if task.actions is None:
        low, high = np.float32(task.low), np.float32(task.high)
        action_space: Any = gymnasium.spaces.Box(low, high)
    else:
        action_space = gymnasium.spaces.Discrete(task.actions)
    if task.states is None:
        shape = task.rows["observation"].shape[1:]
        observation_space: Any = gymnasium.spaces.Box(-np.inf, np.inf, shape)
    else:
        observation_space = gymnasium.spaces.Discrete(task.states)
    config = IQLConfig(seed=task.seed, updates=task.updates, **options)
    dataset = load_dataset(
        task.rows, observation_space=observation_space, action_space=action_space,
        reward=tuple(reward) if reward else config.reward, progress=False,
    )  # fmt: skip
    agent = make_agent(config, dataset)
    batches = dataset.device_sampler(config.batch_size, seed=task.seed)
    step = compiled(agent.step) if form == "compiled" else agent.step
    replay = captured(agent.step, batches, updates=25) if form == "captured" else None

    def learn(updates: int) -> None:
        for _ in range(updates if replay is None else updates // 25):
            if replay is None:
                step(batches.sample())
            else:
                replay()

    def act(observations: Any, masks: Any) -> Any:
        columns = {"observation": torch.as_tensor(np.asarray(observations, dtype(task)))}
        if masks is not None:
            columns["action_mask"] = torch.as_tensor(masks)
        return agent.policy(TensorDict(columns, [len(observations)]))["action"]

    settings = {**config.to_dict(), "form": form}
    if reward:
        settings["reward"] = reward
    return Learner(learn, act, settings, ("torch", "torchrl", "tensordict"))


def dtype(task: Task) -> Any:
    return np.float32 if task.states is None else np.int64


def torchrl_iql(task: Task) -> Learner:
    """TorchRL's loss as in pytorch/rl, sota-implementations/iql: iql_offline.py, or discrete_iql.py.

    Networks, distributions, optimizers, target updates and the order of an update are those of
    ``utils.py`` there, with the values of ``offline_config.yaml`` or ``discrete_iql.yaml``. The data
    lie in memory; the example's threads that sample in advance are left out (one thread for all).
    """
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from tensordict.nn.distributions import NormalParamExtractor
    from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.data.replay_buffers import SamplerWithoutReplacement
    from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import (
        DiscreteIQLLoss,
        HardUpdate,
        IQLLoss,
        SoftUpdate,
        group_optimizers,
    )

    o, data = task.options, task.transitions()
    form = {"num_cells": o["hidden"], "activation_class": torch.nn.ReLU}
    storage = LazyTensorStorage(len(data))
    if task.actions is None:
        low, high = torch.tensor(task.low), torch.tensor(task.high)
        spec = Bounded(low, high, low.shape)
        extractor = NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1)
        network = torch.nn.Sequential(MLP(out_features=2 * len(low), **form), extractor)
        actor: Any = ProbabilisticActor(
            module=TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"], spec=spec, distribution_class=TanhNormal,
            distribution_kwargs={"low": low, "high": high, "tanh_loc": False},
        )  # fmt: skip
        critic: Any = ValueOperator(
            MLP(out_features=1, **form),
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        )
        value: Any = ValueOperator(
            MLP(out_features=1, **form), in_keys=["observation"], out_keys=["state_value"]
        )
        sampler: Any = SamplerWithoutReplacement(drop_last=True)
        replay = TensorDictReplayBuffer(
            storage=storage, sampler=sampler, batch_size=o["batch_size"]
        )
    else:
        actor = ProbabilisticActor(
            module=TensorDictModule(
                MLP(out_features=task.actions, **form),
                in_keys=["observation"],
                out_keys=["logits"],
            ),
            in_keys=["logits"], out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
        )  # fmt: skip
        critic = TensorDictModule(
            MLP(out_features=task.actions, **form),
            in_keys=["observation"],
            out_keys=["state_action_value"],
        )
        value = TensorDictModule(
            MLP(out_features=1, **form), in_keys=["observation"], out_keys=["state_value"]
        )
        replay = TensorDictReplayBuffer(storage=storage, batch_size=o["batch_size"])
    replay.extend(data)
    with torch.no_grad():  # the first evaluation gives the lazy layers their shapes
        for network in (actor, critic, value):
            network(data[:2].clone())
    numbers = {name: o[name] for name in ("loss_function", "temperature", "expectile")}
    if task.actions is None:
        loss: Any = IQLLoss(actor, critic, value_network=value, **numbers)
        loss.make_value_estimator(gamma=o["gamma"])
        targets: Any = SoftUpdate(loss, tau=o["tau"])
    else:
        loss = DiscreteIQLLoss(
            actor, critic, value_network=value, action_space="categorical", **numbers
        )
        loss.make_value_estimator(gamma=o["gamma"])
        targets = HardUpdate(loss, value_network_update_interval=o["hard_update_interval"])
    parts = (loss.actor_network_params, loss.qvalue_network_params, loss.value_network_params)
    optimizer = group_optimizers(
        *(torch.optim.Adam(list(part.flatten_keys().values()), lr=o["lr"]) for part in parts)
    )

    def update(batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        if task.actions is None:
            losses = loss(batch)
            total = losses["loss_actor"] + losses["loss_value"] + losses["loss_qvalue"]
        else:
            names = ("actor_loss", "value_loss", "qvalue_loss")
            total = sum(getattr(loss, name)(batch)[0] for name in names)
        total.backward()
        optimizer.step()
        targets.step()

    def learn(updates: int) -> None:
        for _ in range(updates):
            update(replay.sample())

    def act(observations: Any, _: Any) -> Any:
        from torchrl.envs.utils import ExplorationType, set_exploration_type

        rows = TensorDict({"observation": task.inputs(observations)}, [len(observations)])
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            return actor(rows)["action"]

    return Learner(learn, act, dict(o), ("torch", "torchrl", "tensordict"))


def d3rlpy_iql(task: Task) -> Learner:
    """d3rlpy as in its reproductions/offline/iql.py, with the cosine over this run's updates.

    Its policy is a tanh, so actions are scaled to [-1, 1] by its own ``MinMaxActionScaler`` where the
    bounds are others. Its table has no observation after the last step of a truncated episode; that
    step is not a transition there. With ``standardise`` among the options it has its own
    ``StandardObservationScaler``.
    """
    import d3rlpy

    o, rows = task.options, task.rows
    d3rlpy.seed(task.seed)
    scaler = None
    if task.low != [-1.0] * len(task.low or []) or task.high != [1.0] * len(task.high or []):
        scaler = d3rlpy.preprocessing.MinMaxActionScaler(
            minimum=np.float32(task.low), maximum=np.float32(task.high)
        )
    dataset = d3rlpy.dataset.MDPDataset(
        rows["observation"], rows["action"], rows["reward"], rows["terminated"], rows["truncated"]
    )
    schedule = d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=task.updates)
    algorithm = d3rlpy.algos.IQLConfig(
        actor_learning_rate=o["lr"],
        critic_learning_rate=o["lr"],
        actor_optim_factory=d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=schedule),
        batch_size=o["batch_size"],
        weight_temp=o["weight_temp"],
        max_weight=o["max_weight"],
        expectile=o["expectile"],
        reward_scaler=d3rlpy.preprocessing.ReturnBasedRewardScaler(multiplier=o["multiplier"]),
        action_scaler=scaler,
        observation_scaler=d3rlpy.preprocessing.StandardObservationScaler()
        if o.get("standardise")
        else None,
    ).create(device=False)
    rounds = algorithm.fitter(
        dataset, n_steps=2**40, n_steps_per_epoch=task.chunk, show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(), save_interval=2**40,
    )  # fmt: skip

    def learn(updates: int) -> None:
        for _ in range(updates // task.chunk):
            next(rounds)

    def act(observations: Any, _: Any) -> Any:
        return algorithm.predict(np.asarray(observations, np.float32))

    settings = {**o, "action_scaler": None if scaler is None else "MinMaxActionScaler"}
    return Learner(learn, act, settings, ("torch", "d3rlpy", "gymnasium"))


def corl_trainer(task: Task) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    """CORL's ``ImplicitQLearning``, its buffer, and means, deviations and bounds of its inputs."""
    o, rows = task.options, task.rows
    corl = import_file(Path(o["file"]), ("d4rl", "gym", "pyrallis", "wandb"))
    observation = torch.as_tensor(rows["observation"])
    mean, std = (torch.as_tensor(each) for each in corl.compute_mean_std(rows["observation"], 1e-3))
    bound = torch.as_tensor(np.float32(task.high))
    columns = {
        "observations": ((observation - mean) / std).numpy(),
        "actions": (torch.as_tensor(rows["action"]) / bound).numpy(),
        "rewards": rows["reward"] * np.float32(o["reward_scale"]),
        "next_observations": ((torch.as_tensor(rows["next_observation"]) - mean) / std).numpy(),
        "terminals": rows["terminated"],
    }
    sizes = rows["observation"].shape[1], rows["action"].shape[1]
    replay = corl.ReplayBuffer(*sizes, len(observation), "cpu")
    replay.load_d4rl_dataset(columns)
    corl.set_seed(task.seed)
    critics, value = corl.TwinQ(*sizes), corl.ValueFunction(sizes[0])
    actor = (corl.DeterministicPolicy if o["iql_deterministic"] else corl.GaussianPolicy)(
        *sizes, 1.0
    )
    adams = {
        f"{name}_optimizer": torch.optim.Adam(network.parameters(), lr=o["lr"])
        for name, network in (("actor", actor), ("q", critics), ("v", value))
    }
    trainer = corl.ImplicitQLearning(
        max_action=1.0, actor=actor, q_network=critics, v_network=value, **adams,
        iql_tau=o["iql_tau"], beta=o["beta"], max_steps=task.updates, discount=o["discount"],
        tau=o["tau"], device="cpu",
    )  # fmt: skip
    return trainer, replay, (mean, std, bound)


def corl_iql(task: Task) -> Learner:
    """CORL's algorithms/offline/iql.py, a file that the user fetched, with its networks and update.

    Its imports of D4RL, gym, pyrallis and wandb are replaced by empty modules, which its update does
    not use. As in its ``train``, observations are standardised. Its policy is a tanh times the bound
    (and learns from unscaled actions), so actions are divided by their bounds here.
    """
    o = task.options
    trainer, replay, (mean, std, bound) = corl_trainer(task)

    def learn(updates: int) -> None:
        for _ in range(updates):
            trainer.train(replay.sample(o["batch_size"]))

    def act(observations: Any, _: Any) -> Any:
        state = (torch.as_tensor(np.asarray(observations, np.float32)) - mean) / std
        output = trainer.actor(state)
        return bound * (output if torch.is_tensor(output) else output.mean).clamp(-1, 1)

    settings = {name: value for name, value in o.items() if name != "file"}
    return Learner(learn, act, settings)


def import_file(path: Path, absent: tuple[str, ...]) -> ModuleType:
    """The module in ``path``, with empty ones in place of ``absent``."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    stubs = {name: mock.MagicMock() for name in absent}
    for name in absent:
        stubs[name].__spec__ = None
    with mock.patch.dict(sys.modules, {**stubs, path.stem: module}):
        spec.loader.exec_module(module)
    return module


LEARNERS: dict[str, Callable[[Task], Learner]] = {
    "ours": ours,
    "cloning": ours,
    "TorchRL": torchrl_iql,
    "d3rlpy": d3rlpy_iql,
    "CORL": corl_iql,
}


def read_task(path: Path) -> Task:
    content = json.loads(path.read_text())
    with np.load(content.pop("rows")) as rows:
        return Task(rows=dict(rows), **content)


def answer(learner: Learner, command: dict[str, Any]) -> dict[str, Any]:
    if "learn" in command:
        began, used = time.perf_counter(), time.process_time()
        learner.learn(command["learn"])
        spent = time.process_time() - used
        return {"seconds": time.perf_counter() - began, "cpu_seconds": spent}
    if "act" in command:
        with torch.no_grad():
            actions = learner.act(command["act"], command.get("mask"))
        return {"actions": np.asarray(actions).tolist()}
    versions = {name: importlib.metadata.version(name) for name in learner.packages}
    return {"settings": learner.settings, "versions": versions}


def main(method: str, path: str) -> None:
    # Libraries print to standard output; only answers may go there.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    task = read_task(Path(path))
    random.seed(task.seed)
    np.random.seed(task.seed)
    torch.manual_seed(task.seed)
    learner = LEARNERS[method](task)
    for line in sys.stdin:
        print(json.dumps(answer(learner, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
