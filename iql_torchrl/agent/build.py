"""``make_agent``: networks, loss, optimizer and step from a config and a dataset."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchrl import logger as torchrl_logger
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SoftUpdate

from iql_torchrl import functional as F
from iql_torchrl import policies
from iql_torchrl.agent import hub
from iql_torchrl.agent.export import described_policy, export_policy, versions
from iql_torchrl.agent.networks import Encoders, check_images, make_networks
from iql_torchrl.agent.task import Task
from iql_torchrl.config import IQLConfig, check_usable
from iql_torchrl.data import DatasetSummary, DatasetWarning, RewardMap
from iql_torchrl.evaluation.acting import act, private_random_numbers
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.files import CheckpointError, components, newest, read_components
from iql_torchrl.losses import (
    ACTOR_OBJECTIVES,
    VALUE_OBJECTIVES,
    ActorObjective,
    DiscreteIQLLoss,
    IQLLoss,
    LossCritics,
    SharedEncoder,
    ValueObjective,
)
from iql_torchrl.losses.objective import make_objective
from iql_torchrl.networks import with_chunk, with_history
from iql_torchrl.update.compiled import compiled
from iql_torchrl.update.step import IQLStep

# by policy, the loss that regresses it on the logged actions, where that is not log_prob
REGRESSIONS = {"deterministic": "mse", "flow": "flow"}
# by network, the field of IQLConfig
LEARNING_RATES = {
    "actor": "actor_lr",
    "qvalue": "critic_lr",
    "value": "value_lr",
    "encoder": "encoder_lr",
}


@dataclass(frozen=True)
class Agent:
    """The parts of a run, each an ordinary torch or TorchRL object.

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
    loss: IQLLoss
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    step: IQLStep
    policy: TensorDictModuleBase
    encoders: tuple[str, ...] = ()

    def act(
        self,
        observation: Any,
        *,
        deterministic: bool = True,
        action_mask: Any = None,
        seed: int | None = None,
    ) -> Any:
        """An action for ``env.step`` from an observation as ``env`` gives it; or a batch of both.

        A policy with a history takes the last observations of the episode, ``(T, ...)``; one with
        chunks of h actions gives the actions of the next h steps, ``(h, *shape)``.
        Where the data had action masks, ``action_mask`` ``(n,)`` is expected. Samples are drawn from
        ``seed``, or from torch's global generator. See :func:`iql_torchrl.evaluation.acting.act`.
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
        if not isinstance(state, Mapping):
            raise ValueError(
                f"state is {type(state).__name__}; expected what state_dict() returned."
            )
        own = self.state_dict()
        for name in {**own, **state}:
            given, here = _form(state, name), _form(own, name)
            if given != here:  # TensorDict's own message is pages long
                raise ValueError(
                    f"the state is not of an agent like this one: {name} is {given}, here {here}. "
                    "Build the agent from the config and the data that the state was trained with."
                )
        self.loss.load_state_dict(state)

    @staticmethod
    def load(
        path: str | Path,
        device: torch.device | str | None = None,
        *,
        encoders: Encoders | None = None,
    ) -> Agent:
        """The agent of a checkpoint: its weights and hyperparameters, a fresh optimizer; no data.

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
        if "agent" not in (present := components(path)):
            raise CheckpointError(
                f"{path}: was trained from parts made by hand, so it does not say how to rebuild "
                "them; rebuild them as the training script did and load through the trainer."
            )
        parts = ("agent", "loss_module", "step")
        states = read_components(path, [name for name in parts if name in present])
        description = states["agent"]
        given = dict(encoders or {})
        if missing := [name for name in description.get("encoders", ()) if name not in given]:
            raise CheckpointError(
                f"{path}: was trained with an encoder of yours for {missing[0]!r}, which the file does "
                f"not contain; pass encoders={{{missing[0]!r}: module}}."
            )
        try:
            # settings that an older file lacks have their defaults
            config = IQLConfig.from_dict(IQLConfig().to_dict() | description["config"])
            if device is None:
                with suppress(ValueError):  # this machine may lack it
                    check_usable(config.device)
                    device = config.device
            config = replace(config, device=str(torch.device(device or "cpu")))
            agent = build_agent(config, Task.from_state_dict(description["task"]), given)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        try:
            agent.load_state_dict(states["loss_module"])
            agent.loss.load_hyperparameters(states.get("step", {}).get("hyperparameters", {}))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: its weights do not fit its description.") from error
        return agent

    def push_to_hub(
        self,
        repo: str,
        *,
        evaluation: Evaluation | Mapping[str, float] | None = None,
        dataset: DatasetSummary | None = None,
        folder: str | Path | None = None,
        private: bool = True,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        license: str | None = None,
        tags: Sequence[str] = (),
    ) -> str:
        """Upload the agent to the Hugging Face Hub (extra ``hub``), for :meth:`from_hub`.

        One commit has all files, and replaces those of an earlier one: ``agent.torchrl`` (settings,
        task and weights of all networks, as plain data that is loaded without running code; no
        optimizer), ``policy.pt2`` and ``policy.json`` (see :meth:`export`), and a model card
        ``README.md``. Of the data they contain: its name, the bounds, mean and deviation of its
        observations, and 64-bit digests of at most 2048 of its episodes.

        Args:
            repo: ``"user/name"``; made if it does not exist.
            evaluation: scores for the card: what ``evaluate`` returns, or numbers by name.
            dataset: what the agent was made for; its size and mean return are added to the card.
            folder: where the files are written and kept, in place of those of an earlier upload; a
                temporary folder by default.
            private: whether a repository that is made here is private; others stay as they are.
            revision: a branch to upload to, made if needed; ``main`` by default.
            token: with the permission to write; by default ``HF_TOKEN`` or the login of this machine.
            license: identifier for the card, such as ``"mit"``.
            tags: for the card, in addition to those of offline reinforcement learning.

        Returns the commit's hash: ``from_hub(repo, revision=hash)`` loads exactly these files.

        Raises:
            ImportError: huggingface_hub is not installed.
            HubError: no token, the Hub refuses or cannot be reached.
            ValueError: ``repo`` is not such a name, ``dataset`` has other episodes than the agent's, or
                ``folder`` has other files of these names.
            RuntimeError, OSError: as :meth:`export`.
        """
        sections = {
            "Policy": described_policy(self.policy, self.task),
            "Data": hub.data_of(self.task, dataset),
            "Settings": self.config.to_dict(),
            "Versions": versions(),
        }
        if evaluation is not None:
            sections["Scores"] = hub.scores_of(evaluation)
        card = hub.model_card(repo, sections, license, tags)
        states = {"agent": self.description(), "loss_module": self.state_dict()}
        states["step"] = {"hyperparameters": dict(self.loss.hyperparameters)}
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary if folder is None else folder)
            hub.write_files(place, states, self.export, card)
            return hub.upload(
                place, repo, revision, private=private, token=token, message=commit_message
            )

    @classmethod
    def from_hub(
        cls,
        repo: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        token: str | None = None,
        encoders: Encoders | None = None,
    ) -> Agent:
        """The agent that :meth:`push_to_hub` uploaded, with its weights and a fresh optimizer.

        ``repo``: ``"user/name"``, or a folder with such files, which takes precedence. ``revision``: a
        branch, a tag or a commit's hash. ``device`` and ``encoders``: as in :meth:`load`. ``token``:
        for private repositories; by default ``HF_TOKEN`` or the login of this machine. Without a
        connection the copy in the Hub's cache is used, if there is one.

        A damaged checkpoint is recognised by the checksums in it, and loading executes none of its
        contents. A commit's hash as ``revision`` fixes the contents.

        Raises:
            ImportError: huggingface_hub is not installed.
            HubError: no such repository or revision, or the Hub cannot be reached and the cache has no
                copy.
            CheckpointError: the checkpoint is missing, damaged, or of another version.
            ValueError: ``repo`` is neither a folder nor such a name, or a ``revision`` of a folder.
        """
        folder = Path(repo)
        if not folder.is_dir():
            folder = hub.download(str(repo), revision, token)
        elif revision is not None:
            raise ValueError(
                f"revision is {revision!r} and {str(repo)!r} is a folder, which has none; leave it "
                "out, or start Python elsewhere to mean the repository of that name."
            )
        return cls.load(folder / hub.AGENT, device, encoders=encoders)


def make_agent(
    config: IQLConfig, dataset: DatasetSummary, *, encoders: Encoders | None = None
) -> Agent:
    """Networks, loss, optimizer and step for ``dataset``'s observations and actions.

    Vectors of numbers are standardised and one category is one-hot, in each network. All other
    observations (a Dict with other leaves than vectors, images, MultiDiscrete, shaped and scalar
    Boxes) are encoded once for all networks, each leaf by itself:

    - Box: flattened and standardised; MultiBinary: 0 and 1; Discrete, MultiDiscrete: one-hot;
    - images (Box ``(H, W, C)`` or ``(C, H, W)``, at least 8 x 8, of uint8 or of floats in [0, 1]) and
      stacks of them (``(k, H, W, C)``): ``networks.ImageEncoder``, trained as
      ``config.encoder_gradient`` says.

    With ``history`` in the config the networks read the last observations of the episode, and batches
    are those of ``dataset.windows(history)`` (``stack=True`` for ``history_encoder="stack"``), which
    ``OfflineTrainer`` makes itself: each observation is encoded as above, and an LSTM or a causal
    transformer, trained as the encoder is, reads the sequence.

    With ``action_chunk`` h in the config the critics value, and the policy writes as ``action``
    ``(B, h * A)``, the actions of h steps; batches are those of ``dataset.chunks(h)``.
    ``evaluate`` executes ``replan_every`` of them before it asks for the next.

    ``encoders`` replaces these by leaf: ``{"camera": module}``, ``"arm.speed"`` for a nested leaf,
    ``"observation"`` without a Dict. A module turns a batch of the leaf as it is stored,
    ``(B, *shape)``, into features ``(B, F)``, is trained with the others, and is not copied.

    Draws the initial weights from ``config.seed`` without touching the caller's random state. Warns
    with ``DatasetWarning`` where the config's discount is 1 and the dataset has truncated episodes, and
    logs a warning where the dataset's rewards are not scaled as ``config.reward`` says.

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
    task = Task.of(dataset)
    check_images(dataset, encoders or {})
    warn_of_data(config, dataset, config.discount)
    return build_agent(config, task, encoders)


def warn_of_data(config: IQLConfig, dataset: DatasetSummary, discount: float) -> None:
    """Warn of rewards whose scaling is not ``config.reward``, and of undiscounted truncations.

    The latter have values without a bound: ``discount`` is 1 and an episode is truncated.
    """
    asked, mapped = config.reward, dataset.reward_map
    if asked is not None and (asked == "raw") is not (mapped == RewardMap()):
        torchrl_logger.warning(
            f"config.reward is {asked!r} and the rewards of {dataset.name} have the map "
            f"{(mapped.scale, mapped.shift)} (1, 0 is raw). Training uses them as they are; if that "
            f"is not wanted, load_dataset(..., reward={asked!r})."
        )
    if discount == 1 and dataset.range_of(("next", "truncated"))[1]:
        warnings.warn(
            f"discount is 1 and {dataset.name} has truncated episodes, past which undiscounted values "
            "are bootstrapped without a bound. Choose a discount below 1; or, where those episodes "
            "really end there, load them as terminated.",
            DatasetWarning,
            stacklevel=3,
        )


def build_agent(config: IQLConfig, task: Task, encoders: Encoders | None = None) -> Agent:
    """:func:`make_agent` where the dataset is known by its description alone."""
    check_usable(config.device)
    discrete = isinstance(task.action_space, spaces.Discrete)
    kind: type[IQLLoss] = DiscreteIQLLoss if discrete else IQLLoss
    value_objective, actor_objective = make_objectives(config)
    # where weights are drawn: torch's default device, and the config's for copies of critics
    with private_random_numbers(config.seed, torch.get_default_device(), config.device):
        actor, critic, value, encoder = make_networks(config, task, encoders or {})
        shared = None
        if encoder is not None:
            shared = SharedEncoder(encoder, config.encoder_gradient, config.random_shift)
        loss = kind(
            actor,
            critic,
            value,
            num_qvalue_nets=config.num_critics,
            loss_function=config.loss_function,
            value_objective=value_objective,
            actor_objective=actor_objective,
            encoder_network=shared,
            diagnostics=True,
        )
        loss.average_actor(config.actor_ema)
    loss.make_value_estimator(gamma=config.discount)
    optimizer, scheduler = _make_optimizer(config, loss)
    step = make_step(config, loss, optimizer, scheduler)
    policy: Any = loss.averaged_actor if config.actor_ema else actor
    if config.num_samples > 1:
        policy = policies.best_of(policy, LossCritics(loss), config.num_samples)
    if encoder is not None:
        policy = policies.encoded(encoder, policy)
    if config.history > 1:
        policy = with_history(policy, config.history, stack=config.history_encoder == "stack")
    if config.action_chunk > 1:
        policy = with_chunk(policy, config.action_chunk, config.replan_every)
    update = compiled(step) if config.compile else step
    names = tuple(encoders or ())
    return Agent(config, task, actor, loss, optimizer, scheduler, update, policy, names)


def make_objectives(config: IQLConfig) -> tuple[ValueObjective, ActorObjective]:
    """The objectives that ``config`` names, with its hyperparameters."""
    settings = config.to_dict()
    value: ValueObjective = make_objective(VALUE_OBJECTIVES[config.value_objective], settings)
    weight = config.advantage_weight
    settings["weight"] = value.advantage_weight if weight == "auto" else weight
    name: str = config.actor_objective
    if name == "auto":
        name = REGRESSIONS.get(config.policy, "log_prob")
    actor: ActorObjective = make_objective(ACTOR_OBJECTIVES[name], settings)
    return value, actor


def _make_optimizer(config: IQLConfig, loss: IQLLoss) -> tuple[torch.optim.Optimizer, LambdaLR]:
    groups = []
    for network, field in LEARNING_RATES.items():
        named = loss.named_parameters()
        params = [p for name, p in named if name.startswith(f"{network}_network")]
        if params:
            groups.append({"params": params, "lr": getattr(config, field)})
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(groups, weight_decay=config.weight_decay, fused=True)
    return optimizer, LambdaLR(optimizer, rate_factors(config, len(groups)))


def make_step(
    config: IQLConfig,
    loss: IQLLoss,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
) -> IQLStep:
    """One eager update of ``loss`` as ``config`` says."""
    return IQLStep(
        loss,
        optimizer,
        SoftUpdate(loss, tau=config.polyak),
        order=config.order,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler=scheduler,
        precision=config.precision,
    )


def rate_factors(config: IQLConfig, groups: int = 3) -> list[Callable[[int], float]]:
    """Factors of the learning rates of policy, critics, V and the encoder, if any."""
    falling = {"constant": 0, "cosine_actor": 1, "cosine": groups}[config.schedule]
    intervals = config.schedule_steps or config.updates
    factor = partial(F.cosine_factor, updates=config.updates)
    return [partial(factor, intervals=intervals if n < falling else 0) for n in range(groups)]


def ends_before(config: IQLConfig, updates: int) -> str | None:
    """A sentence where the schedule of ``config`` ends before ``updates``; else None."""
    if config.schedule == "constant" or updates <= config.updates:
        return None
    return (
        f"schedule is {config.schedule!r} over updates={config.updates} of the config, and the run "
        f"makes {updates} updates: the scheduled learning rates are 0 after update {config.updates}. "
        f"Give the config updates={updates}, or schedule='constant'."
    )


def _form(state: Mapping[str, Any], name: str) -> str:
    """Presence and shape of an entry, which must agree before another agent's weights are loaded."""
    value = state.get(name)
    shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"
    return shape if name in state else "missing"
