"""Every setting of a run, described once, in one frozen dataclass; named configs with their sources."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from iql_torchrl.config.arithmetic import check_device
from iql_torchrl.config.settings import config_settings, setting

# What advantage_weight="auto" is, by value_objective; with any other it is "exponential".
OWN_WEIGHTS = {"sparse": "positive", "exponential": "positive"}


# Settings of IQLConfig, by the names that they have elsewhere.
NAMES_ELSEWHERE = {
    "gamma": "discount",
    "beta": "temperature",
    "weight_temp": "temperature",
    "iql_tau": "expectile",
    "tau": "expectile (of the value loss) or polyak (of the target critics)",
    "exp_adv_max": "max_weight",
    "eps": "polyak",
    "lr": "actor_lr, critic_lr and value_lr",
    "learning_rate": "actor_lr, critic_lr and value_lr",
    "hidden_sizes": "hidden",
    "hidden_dims": "hidden",
    "hidden_dim": "hidden",
    "n_critics": "num_critics",
    "num_qvalue_nets": "num_critics",
    "max_steps": "updates",
    "n_steps": "updates",
    "normalize": "standardise",
    "clip_grad_norm": "max_grad_norm",
}


@dataclass(frozen=True, kw_only=True)
class IQLConfig:
    """Settings of one IQL run; the defaults are the paper's for locomotion.

    Impossible values and combinations raise ``ValueError`` with the value in the message. Numbers
    become plain ``int`` and ``float``; a bool is not accepted as a number, nor ``1e4`` as an
    ``int``. A config may name a ``device`` that this machine lacks, so that it can be read on
    another machine.

    To add a setting, add a field here with :func:`~iql_torchrl.config.setting` and read it where it
    takes effect: for a hyperparameter in the constructor of an objective, as an argument of that name.
    """

    seed: int = setting(
        0, "of the initial weights and the batches", interval="[0, 2147483647]", per_run=True
    )
    updates: int = setting(
        1_000_000,
        "number of gradient updates",
        interval="[1, inf)",
        may_change=lambda config: (
            config["schedule"] == "constant"
        ),  # else it decides the learning rates
    )
    batch_size: int = setting(256, "transitions per update", interval="[1, inf)")
    discount: float = setting(
        0.99,
        "discount factor gamma per environment step; 1 where every episode terminates",
        interval="[0, 1]",
        per_run=True,
    )
    expectile: float = setting(
        0.7,
        "expectile tau of the value loss: 0.5 gives the value of the behaviour policy, 0.7 to 0.9 that "
        "of its better actions; below 0.5 V follows the worse logged actions and the policy learns "
        "to avoid the good ones",
        interval="[0.5, 1]",
        loss_interval="(0, 1]",
        per_run=True,
    )
    temperature: float = setting(
        3.0,
        "inverse temperature beta of the policy's weights, per unit of advantage; 0 is behaviour "
        "cloning, and a negative one would prefer the worst logged actions",
        interval="[0, inf)",
        per_run=True,
    )
    max_weight: float = setting(
        100.0,
        "largest weight of a sample in the policy loss; the paper's is 100",
        interval="(0, 3e+38]",  # the largest numbers of float32
        loss_interval="(0, inf]",
        per_run=True,
    )
    bc_weight: float = setting(
        0.3,
        "weight of the cloning error in actor_objective ddpg_bc; 0 only maximises the critics' values, "
        "OGBench's alpha, 0.003 to 3, is twice this",
        interval="[0, 3e+38]",
        per_run=True,
    )
    polyak: float = setting(
        0.005, "step of the target critics to the critics; 1 copies them", interval="(0, 1]"
    )
    reward: Literal["raw", "return_range", "minus_one"] | None = setting(
        None,
        "reward scaling of load_dataset; return_range: 1000 / range of episode returns; none: that of "
        "the dataset, which a script loads with raw rewards",
        may_change=lambda config: True,  # the scaling itself is compared
    )
    standardise: bool = setting(True, "standardise observations, with the dataset's statistics")
    policy: Literal[
        "auto", "gaussian", "tanh_normal", "deterministic", "mixture", "flow", "categorical"
    ] = setting("auto", "auto chooses by the action space; gaussian is the paper's")
    actor_objective: Literal["auto", "log_prob", "mse", "ddpg_bc", "flow", "conditioned_flow"] = (
        setting(
            "auto",
            "loss of the policy: log_prob, mse or flow (weighted regression), ddpg_bc (maximises Q, "
            "with cloning), or conditioned_flow (a flow with one more input: whether the advantage is "
            "positive); auto is the weighted regression that fits the policy",
        )
    )
    actor_ema: float = setting(
        0.0,
        "decay per update of the moving average of the policy's weights, with which it acts; 0.999 "
        "averages over about 1,000 updates; 0: it acts with the weights themselves",
        interval="[0, 1)",
    )
    flow_steps: int = setting(
        10, "Euler steps from noise to an action of a flow policy", interval="[1, inf)"
    )
    condition_dropout: float = setting(
        0.1,
        "probability that conditioned_flow does not tell the flow about a sample's advantage; such "
        "samples teach it the behaviour policy, which guidance extrapolates from",
        interval="(0, 1)",
        per_run=True,
    )
    guidance: float = setting(
        1.0,
        "weight of the conditional velocity when a conditioned_flow acts: 0 imitates the dataset, 1 "
        "its actions of positive advantage, more extrapolates; policy.guidance changes it later",
        interval="[0, 1000]",
    )
    hidden: tuple[int, ...] = setting(
        (256, 256), "widths of the hidden layers of every network", interval="[1, inf)"
    )
    activation: Literal["relu", "tanh", "gelu", "mish"] = setting(
        "relu", "activation of every network; gelu is approximated by tanh"
    )
    initialisation: Literal["orthogonal", "torch"] = setting(
        "orthogonal",
        "initial weights of every network: orthogonal with gain sqrt(2) and biases of 0 (the "
        "official code) or torch (as torch.nn.Linear draws them)",
        per_run=True,
    )
    layer_norm: bool = setting(False, "layer normalisation in the critics and in V")
    norm_after_activation: bool = setting(False, "layer normalisation follows the activation")
    residual: Literal["none", "policy", "all"] = setting(
        "none",
        "which networks have residual blocks, one for each of the hidden widths, which must be equal; "
        "blocks have layer normalisation, and in the policy dropout",
    )
    dropout: float = setting(0.0, "dropout probability in the policy", interval="[0, 1)")
    image_encoder: Literal["small", "residual"] = setting(
        "small", "small (three convolutions) or residual (Espeholt et al. 2018)"
    )
    image_features: int = setting(64, "numbers that each image becomes", interval="[1, inf)")
    history: int = setting(
        1, "observations that the networks read, the current one included", interval="[1, inf)"
    )
    history_encoder: Literal["lstm", "transformer", "stack"] = setting(
        "lstm",
        "what reads several observations; stack joins them to one vector, or images on their channels",
    )
    history_features: int = setting(64, "width of the lstm or transformer", interval="[1, inf)")
    action_chunk: int = setting(
        1,
        "actions of consecutive steps that the critics value and the policy proposes at once",
        interval="[1, inf)",
    )
    replan_every: int | None = setting(
        None,
        "actions of a chunk that the policy executes before it proposes the next one; none: all",
        interval="[1, inf)",
        may_change=lambda config: True,
    )
    encoder_gradient: Literal["critics", "all"] = setting(
        "critics", "whose losses train the encoder that the networks share"
    )
    random_shift: int = setting(
        0,
        "move the images of a batch at random by up to that many pixels; DrQ has 4 for 84 x 84",
        interval="[0, 64]",
    )
    num_samples: int = setting(
        1,
        "actions that the policy draws when it acts, of which the critics choose the best; 1: it "
        "acts without the critics",
        interval="[1, inf)",
    )
    num_critics: int = setting(2, "number of critics; see pessimism", interval="[1, inf)")
    pessimism: float | None = setting(
        None,
        "rho in mean - rho std over the critics, the target of V; 0 is the mean; none: their minimum",
        interval="[0, inf)",
    )
    value_objective: Literal[
        "expectile", "quantile", "sarsa_expectile", "sparse", "exponential", "gumbel"
    ] = setting(
        "expectile",
        "loss of V; sparse (SQL), exponential (EQL) and gumbel (XQL) read alpha, the others expectile",
    )
    alpha: float = setting(
        1.0,
        "of value_objective sparse, exponential and gumbel, in units of the values: a large one gives "
        "the value of the behaviour policy, one near 0 the largest value of a logged action, errors "
        "included; the authors' are 0.5 to 10",
        interval="(0, inf)",
        per_run=True,
    )
    advantage_weight: Literal["auto", "exponential", "positive", "sparse"] = setting(
        "auto",
        "weight of a sample of advantage A in the policy's loss: exponential (exp(temperature A)), "
        "positive (max(A, 0)) or sparse (max(1 + A / (2 alpha), 0)); auto is positive for "
        "value_objective sparse and exponential, else exponential",
    )
    loss_function: Literal["l2", "l1", "smooth_l1"] = setting(
        "l2", "distance of the critics to their targets"
    )
    optimizer: Literal["adam", "adamw"] = setting("adam", "of all networks")
    weight_decay: float = setting(0.0, "decoupled weight decay of adamw", interval="[0, inf)")
    actor_lr: float = setting(
        3e-4, "learning rate of the policy", interval="(0, inf)", per_run=True
    )
    critic_lr: float = setting(
        3e-4, "learning rate of the critics", interval="(0, inf)", per_run=True
    )
    value_lr: float = setting(3e-4, "learning rate of V", interval="(0, inf)", per_run=True)
    encoder_lr: float = setting(
        1e-4, "learning rate of a shared encoder; 1e-4 is that of DrQ-v2", interval="(0, inf)"
    )
    schedule: Literal["constant", "cosine_actor", "cosine"] = setting(
        "cosine_actor",
        "of the learning rates: constant, cosine_actor (the policy's falls to 0 over the run: the "
        "official code) or cosine (all fall)",
    )
    schedule_steps: int | None = setting(
        None, "falling rates change in that many steps; none: at every update", interval="[1, inf)"
    )
    max_grad_norm: float | None = setting(
        None, "clip the gradient of each network to this L2 norm; none: never", interval="(0, inf)"
    )
    order: Literal["sequential", "simultaneous"] = setting(
        "sequential",
        "sequential (V, then policy and critics with the new V: the official code) or simultaneous",
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "of the networks' products: float32 (the dtype they have) or bfloat16 (autocast)"
    )
    compile: bool = setting(
        False,
        "torch.compile: a minute's start, then faster updates",
        may_change=lambda config: True,
    )
    device: str = setting(
        "cpu", "torch device: cpu, cuda, cuda:1, mps, ...", may_change=lambda config: True
    )

    def __new__(cls, *_: Any, **settings: Any) -> IQLConfig:
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                meant = NAMES_ELSEWHERE.get(name.lower(), close[0] if close else None)
                advice = (
                    f"did you mean {meant}?" if meant else f"the settings are {', '.join(names)}."
                )
                raise TypeError(f"{cls.__name__} has no setting {name!r}; {advice}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, described in config_settings(type(self)).items():
            object.__setattr__(self, name, described.plain(getattr(self, name)))
        for contradiction in (*self._contradictions(), *self._contradictions_of_policy()):
            raise ValueError(contradiction)
        check_device(self.device)

    def _contradictions(self) -> Iterator[str]:
        """Settings of networks, optimizer and weights that do not fit together, each in a sentence."""
        if self.weight_decay and self.optimizer != "adamw":
            yield f"weight_decay is {self.weight_decay} and needs optimizer='adamw'."
        if self.schedule_steps is not None and self.schedule == "constant":
            yield (
                f"schedule_steps is {self.schedule_steps} and schedule is 'constant', which never "
                "changes a rate; choose schedule='cosine' or 'cosine_actor', or schedule_steps=None."
            )
        if self.norm_after_activation and not self.layer_norm:
            yield "norm_after_activation is True and needs layer_norm=True."
        if self.residual != "none" and len(set(self.hidden)) != 1:
            yield (
                f"residual is {self.residual!r} and hidden is {self.hidden}; residual blocks need "
                "equal widths, one for each block, such as (256, 256, 256)."
            )
        if self.residual == "all" and self.layer_norm:
            yield (
                "residual is 'all' and layer_norm is True; residual blocks always have layer "
                "normalisation. Choose layer_norm=False."
            )
        weight: str = self.advantage_weight
        if weight == "auto":
            weight = OWN_WEIGHTS.get(self.value_objective, "exponential")
        if self.temperature == 0 and weight != "exponential":
            yield (
                f"temperature is 0, which is behaviour cloning, and the weights are {weight!r}, "
                "which do not read it; choose advantage_weight='exponential'."
            )

    def _contradictions_of_policy(self) -> Iterator[str]:
        """Settings of the policy that do not fit together, each in a sentence."""
        policy, objective = self.policy, self.actor_objective
        flow = objective in ("flow", "conditioned_flow")
        if (policy == "flow") is not flow and objective != "auto":
            yield (
                f"actor_objective is {objective!r} and policy is {policy!r}; a flow is trained with "
                "'flow' or 'conditioned_flow', and no other policy is. Choose actor_objective='auto'."
            )
        if self.guidance != 1 and objective != "conditioned_flow":
            yield (
                f"guidance is {self.guidance} and actor_objective is {objective!r}; it needs "
                "policy='flow', actor_objective='conditioned_flow'."
            )
        if policy == "deterministic" and objective == "log_prob":
            yield (
                "actor_objective is 'log_prob' and policy is 'deterministic', which has no density; "
                "choose 'mse' or 'ddpg_bc'."
            )
        if self.replan_every is not None and self.replan_every > self.action_chunk:
            yield (
                f"replan_every is {self.replan_every} and action_chunk is {self.action_chunk}; a "
                "policy executes at most the actions of a chunk. Choose replan_every=None for all."
            )
        if self.num_samples > 1 and policy in ("deterministic", "categorical"):
            yield (
                f"num_samples is {self.num_samples} and policy is {policy!r}; the best of several "
                "actions needs a policy that draws continuous actions, such as 'flow'."
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain JSON value (tuples as lists); :meth:`from_dict` reads it back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IQLConfig:
        """The config that :meth:`to_dict` wrote.

        Raises ``ValueError`` naming unknown and missing keys, or as the constructor does.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"settings are {values!r}; expected a dict of IQLConfig's fields.")
        names = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in names)
        missing = [name for name in names if name not in values]
        if unknown or missing:
            raise ValueError(
                f"settings have other keys than IQLConfig (unknown: {', '.join(unknown) or 'none'}; "
                f"missing: {', '.join(missing) or 'none'}). Remove what is unknown and give what is "
                "missing: another version may have written them."
            )
        hidden = values["hidden"]  # JSON has no tuples
        return cls(**{**values, "hidden": tuple(hidden) if isinstance(hidden, list) else hidden})


class _Named(dict[str, IQLConfig]):
    """Presets by name; an unknown name is a ``KeyError`` that lists them."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"there is no preset {name!r}; the presets are {', '.join(self)}.")


SMALL_TASKS: dict[str, Any] = {
    "reward": "return_range",
    "hidden": (64, 64),
    "actor_lr": 1e-3,
    "critic_lr": 1e-3,
    "value_lr": 1e-3,
}

# The official code of IQL standardises nothing and draws orthogonal weights.
OFFICIAL: dict[str, Any] = {
    "reward": "return_range", "standardise": False, "initialisation": "orthogonal",
}  # fmt: skip

# Settings that FQL's paper and code share among their methods.
FQL: dict[str, Any] = {
    "expectile": 0.9,
    "reward": "raw",
    "standardise": False,
    "initialisation": "orthogonal",
    "hidden": (512, 512, 512, 512),
    "activation": "gelu",
    "layer_norm": True,
    "norm_after_activation": True,
    "schedule": "constant",
    "order": "simultaneous",
}

#: ``quick`` learns small tasks in about a minute on two cores. ``small`` is for a few thousand noisy
#: transitions: few updates, because more of them fit the noise (``benchmarks/bench_small.py``).
#: ``adamw_cosine`` is not from a publication: AdamW without decay, and all learning rates on one
#: cosine of a hundred steps (torch's ``CosineAnnealingLR`` with ``T_max=100``, stepped a hundred
#: times over the run).
#:
#: The others are the official code's for D4RL's tasks, read in
#: https://github.com/ikostrikov/implicit_q_learning at commit 09d7002: ``configs/mujoco_config.py``
#: (locomotion), ``configs/antmaze_config.py``, ``configs/kitchen_config.py`` (kitchen and, by its
#: README, Adroit); ``train_offline.py`` (batch size, updates, and the reward scaling of
#: locomotion and AntMaze); ``learner.py`` (Adam, cosine for the policy alone, order of the update);
#: ``actor.py`` (weights clipped at 100); ``common.py`` (orthogonal weights). It standardises nothing.
#: Its default seed is 42.
#:
#: ``ogbench`` and ``ifql`` are IQL and IFQL for the single-task data of OGBench, with states as
#: observations: Park, Li, Levine 2025, "Flow Q-Learning" (arXiv:2502.02538), appendix E, and
#: https://github.com/seohongpark/fql at commit 719d044: ``agents/iql.py``, ``agents/ifql.py`` (Adam
#: with 3e-4, batches of 256, four layers of 512 with GELU, layer normalisation after the activation
#: in the critics and in V, polyak 0.005, expectile 0.9, one gradient of all losses; 10 Euler steps,
#: 32 candidates), ``main.py`` (1,000,000 updates). The temperature of IQL, 10, is its default; the
#: paper tunes it for each task, and takes a discount of 0.995 for some. Not taken over: its initial
#: weights (uniform, by the mean of fan-in and fan-out), its constant standard deviation, and the online
#: critics in the weights of IQL.
PRESETS = MappingProxyType(
    _Named(
        {
            "quick": IQLConfig(updates=10_000, **SMALL_TASKS),
            "small": IQLConfig(updates=2_000, schedule="constant", **SMALL_TASKS),
            "adamw_cosine": IQLConfig(
                discount=0.97,
                temperature=2.0,
                reward="raw",
                optimizer="adamw",
                actor_lr=1e-4,
                critic_lr=1e-3,
                value_lr=1e-3,
                schedule="cosine",
                schedule_steps=100,
            ),
            "locomotion": IQLConfig(**OFFICIAL),
            "antmaze": IQLConfig(
                expectile=0.9, temperature=10.0, **OFFICIAL | {"reward": "minus_one"}
            ),
            "kitchen": IQLConfig(temperature=0.5, dropout=0.1, **OFFICIAL | {"reward": "raw"}),
            "adroit": IQLConfig(temperature=0.5, dropout=0.1, **OFFICIAL | {"reward": "raw"}),
            "ogbench": IQLConfig(temperature=10.0, **FQL),
            "ifql": IQLConfig(temperature=0.0, policy="flow", flow_steps=10, num_samples=32, **FQL),
        }
    )
)
