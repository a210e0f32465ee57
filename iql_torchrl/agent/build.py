"""From a config and a dataset to the parts of a run; nothing here that twenty lines could not do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchrl.modules import ProbabilisticActor

from iql_torchrl import policies
from iql_torchrl.agent import hub
from iql_torchrl.agent.export import export_policy
from iql_torchrl.agent.make_encoder import Encoders, check_images
from iql_torchrl.agent.make_networks import make_networks
from iql_torchrl.agent.make_update import make_loss, make_optimizer, make_step
from iql_torchrl.agent.task import Task
from iql_torchrl.config import IQLConfig, check_usable
from iql_torchrl.data import DatasetSummary
from iql_torchrl.evaluation.act import act, private_random_numbers
from iql_torchrl.files import CheckpointError, component_names, newest, read_components
from iql_torchrl.losses import ImplicitQLoss, LossCritics
from iql_torchrl.networks import with_history
from iql_torchrl.update.compiled import compiled
from iql_torchrl.update.step import IQLStep

__all__ = ["Agent", "build_agent", "make_agent"]


@dataclass(frozen=True)
class Agent:
    """What a run consists of: each part is an ordinary torch or TorchRL object.

    ``policy`` acts, for ``evaluate`` and for TorchRL environments: the actor itself; with
    ``actor_ema`` in the config a copy with the average of its weights (``loss.averaged_actor``);
    with ``num_samples`` the best of that one's actions (``policies.best_of``), by the critics as they
    are at every call. ``act`` is for NumPy; ``step(batch)`` makes one update.

    Where observations are more than vectors or one category, ``loss.encoder_network`` turns them
    into ``"features"``, which actor, critics and V read; ``policy`` begins with it. ``encoders``: the
    leaves whose encoders the user gave.
    """

    config: IQLConfig
    task: Task
    actor: ProbabilisticActor | policies.FlowPolicy
    loss: ImplicitQLoss
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    step: IQLStep
    policy: TensorDictModuleBase
    encoders: tuple[str, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether ``policy`` takes the best of several actions by the critics."""
        return any(isinstance(module, policies.BestOf) for module in self.policy.modules())

    def act(
        self,
        observation: Any,
        *,
        deterministic: bool = True,
        action_mask: Any = None,
        seed: int | None = None,
    ) -> Any:
        """An action for ``env.step`` from an observation as ``env`` gives it; or a batch of both.

        A policy with a history takes the last observations of the episode, ``(T, ...)``.
        Where the data had action masks, ``action_mask`` ``(n,)`` is expected. Samples are drawn from
        ``seed``, or from torch's global generator. See :func:`iql_torchrl.evaluation.act.act`.
        """
        return act(
            self.policy,
            observation,
            self.task.observation_space,
            self.task.action_space,
            dtype=self.task.dtype,
            deterministic=deterministic,
            action_mask=action_mask,
            seed=seed,
        )

    def export(self, path: str | Path) -> Path:
        """Write the policy as a program for torch or ONNX: :func:`agent.export.export_policy`."""
        return export_policy(self.policy, self.task, path)

    def description(self) -> dict[str, Any]:
        """All that rebuilds the agent before its weights, as plain data.

        ``config`` and ``task``; ``encoders``, names of leaves, where the user gave modules for them.
        """
        own = {"encoders": list(self.encoders)} if self.encoders else {}
        return {"config": self.config.to_dict(), "task": self.task.state_dict(), **own}

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers of every network, targets too; not the optimizer's state."""
        return self.loss.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weights of another agent's ``state_dict``.

        Raises ``ValueError`` naming an entry that is missing, unknown, or of another shape.
        """
        _check_state(state, self.state_dict())
        self.loss.load_state_dict(state)

    @staticmethod
    def load(
        path: str | Path,
        device: torch.device | str | None = None,
        *,
        encoders: Encoders | None = None,
    ) -> Agent:
        """The agent of a checkpoint, with its weights and a fresh optimizer; needs no data.

        ``path``: a ``.torchrl`` file, or a run's folder: its ``best.torchrl`` if there is one,
        else the newest of its ``checkpoints``. ``device``: by default the config's, or the CPU
        where this machine lacks it. ``encoders``: modules of the kind given to ``make_agent``, whose
        weights are loaded. To go on training, resume with the trainer instead.

        Raises ``CheckpointError`` with one sentence: nothing to load, a damaged file, parts that
        were made by hand, or fields that only another version knows.
        """
        path = Path(path)
        if path.is_dir():
            best = path / "best.torchrl"
            path = best if best.exists() else newest(path / "checkpoints")
        weights = read_components(path, ["loss_module"])["loss_module"]
        if "agent" not in component_names(path):
            raise CheckpointError(
                f"{path}: was trained from parts made by hand, so it does not say how to rebuild "
                "them; rebuild them as the training script did and load through the trainer."
            )
        description = read_components(path, ["agent"])["agent"]
        given = dict(encoders or {})
        if missing := [name for name in description.get("encoders", ()) if name not in given]:
            raise CheckpointError(
                f"{path}: was trained with an encoder of yours for {missing[0]!r}, which the file does "
                f"not contain; pass encoders={{{missing[0]!r}: module}}."
            )
        try:
            # settings that an older file lacks have their defaults
            saved = IQLConfig().to_dict() | description["config"]
            config = IQLConfig.from_dict(saved)
            config = replace(config, device=_usable(device, config.device))
            agent = build_agent(config, Task.from_state_dict(description["task"]), given)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        try:
            agent.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:  # TensorDict's own message is pages long
            raise CheckpointError(f"{path}: its weights do not fit its description.") from error
        return agent

    push_to_hub = hub.push_to_hub
    from_hub = classmethod(hub.from_hub)


def make_agent(
    config: IQLConfig, dataset: DatasetSummary, *, encoders: Encoders | None = None
) -> Agent:
    """Networks, loss, optimizer and step for ``dataset``'s observations and actions.

    Vectors of numbers are standardised and one category is one-hot, in each network. All other
    observations (a Dict with other leaves than vectors, images, MultiDiscrete, shaped and scalar
    Boxes) are encoded once for all networks, each leaf by itself:

    - Box: flattened and standardised; MultiBinary: 0 and 1; Discrete, MultiDiscrete: one-hot;
    - images (Box ``(H, W, C)`` or ``(C, H, W)``, at least 8 x 8, of uint8 or of floats in [0, 1]):
      ``networks.ImageEncoder``, trained as ``config.encoder_gradient`` says.

    With ``history`` in the config the networks read the last observations of the episode, and batches
    are those of ``dataset.windows(history)`` (``stack=True`` for ``history_encoder="stack"``), which
    ``OfflineTrainer`` makes itself: each observation is encoded as above, and an LSTM or a causal
    transformer, trained as the encoder is, reads the sequence.

    ``encoders`` replaces these by leaf: ``{"camera": module}``, ``"arm.speed"`` for a nested leaf,
    ``"observation"`` where there is no Dict. A module turns a batch of the leaf as it is stored,
    ``(B, *shape)``, into features ``(B, F)``, is trained with the others, and is not copied.

    Draws the initial weights from ``config.seed`` without touching the caller's random state.

    Raises ``ValueError`` when an encoder names no leaf or gives no vector, float images lie outside
    [0, 1], the actions are neither Discrete nor a Box of floats ``(A,)`` with finite bounds, the policy
    does not fit the actions, or this machine lacks the config's device; ``TypeError`` on arguments of
    another kind.
    """
    if not isinstance(config, IQLConfig):
        raise TypeError(
            f"config is {type(config).__name__}; expected an IQLConfig, such as IQLConfig(seed=1) or "
            "PRESETS['quick']."
        )
    if not isinstance(dataset, DatasetSummary):
        raise TypeError(
            f"dataset is {type(dataset).__name__}; expected what load_dataset(...) returns."
        )
    encoders = encoders or {}
    check_images(dataset, encoders)
    return build_agent(config, Task.of(dataset), encoders)


def build_agent(config: IQLConfig, task: Task, encoders: Encoders | None = None) -> Agent:
    """:func:`make_agent` where the dataset is known by its description alone."""
    check_usable(config.device)
    # where weights are drawn: torch's default device, and the config's for copies of critics
    with private_random_numbers(config.seed, torch.get_default_device(), config.device):
        networks = make_networks(config, task, encoders or {})
        loss = make_loss(config, task, networks)
    optimizer, scheduler = make_optimizer(config, loss)
    step = make_step(config, loss, optimizer, scheduler)
    policy = loss.averaged_actor if config.actor_ema else networks.actor
    if config.num_samples > 1:
        policy = policies.best_of(policy, LossCritics(loss), config.num_samples)
    if networks.encoder is not None:
        policy = policies.encoded(networks.encoder, policy)
    if config.history > 1:
        stack = config.history_encoder == "stack"
        policy = with_history(policy, config.history, stack=stack)
    update = compiled(step) if config.compile else step
    names = tuple(encoders or ())
    return Agent(config, task, networks.actor, loss, optimizer, scheduler, update, policy, names)


def _check_state(state: Any, own: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the entries are ``own``'s: TorchRL prints whole TensorDicts."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state is {type(state).__name__}; expected what state_dict() returned.")
    faults = [f"it lacks {key}" for key in own if key not in state]
    faults += [f"it has {key}, which is unknown here" for key in state if key not in own]
    shapes = {
        key: (tuple(value.shape), tuple(state[key].shape))
        for key, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor)
    }
    faults += [f"{k} has shape {b}, here {a}" for k, (a, b) in shapes.items() if a != b]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ValueError(
            f"the state is not of an agent like this one: {faults[0]}{more}. Build the agent from "
            "the config and the data that the state was trained with."
        )


def _usable(device: torch.device | str | None, configured: str) -> str:
    if device is not None:
        return str(torch.device(device))
    try:
        torch.empty(0, device=configured)
    except (RuntimeError, AssertionError):  # torch built without it, or no such device
        return "cpu"
    return configured
