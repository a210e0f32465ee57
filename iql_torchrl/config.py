"""Every knob of a run in one frozen dataclass, and named presets with their sources."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import dataclass, fields
from types import MappingProxyType

__all__ = ["PRESETS", "IQLConfig", "field_help"]

CHOICES = {
    "policy": ("auto", "gaussian", "tanh_normal", "deterministic", "mixture", "categorical"),
    "value_objective": ("expectile", "quantile", "sarsa_expectile"),
    "loss_function": ("l2", "l1", "smooth_l1"),
    "optimizer": ("adam", "adamw"),
    "schedule": ("constant", "cosine_actor", "cosine"),
    "order": ("sequential", "simultaneous"),
    "reward": ("raw", "return_range", "minus_one"),
}


@dataclass(frozen=True, kw_only=True)
class IQLConfig:
    """Settings of one IQL run; the defaults are the paper's for locomotion.

    Impossible values raise ``ValueError`` with the value in the message.
    """

    seed: int = 0
    """seed of initial weights and of batches, >= 0"""
    updates: int = 1_000_000
    """gradient updates, >= 1"""
    batch_size: int = 256
    """transitions per update, >= 1"""
    discount: float = 0.99
    """gamma per environment step, in [0, 1)"""
    expectile: float = 0.7
    """tau of the value loss, in [0.5, 1]: 0.5 values the log's policy, towards 1 its best actions"""
    temperature: float = 3.0
    """inverse temperature beta >= 0 of the policy's weights, per unit of advantage; 0 is behaviour
    cloning"""
    max_weight: float = 100.0
    """ceiling of a sample's weight in the policy loss, > 0"""
    polyak: float = 0.005
    """fraction of the live critics that enters their targets at each update, in (0, 1]"""
    reward: str = "return_range"
    """reward map: raw, return_range (1000 / range of episode returns) or minus_one"""
    standardise: bool = True
    """standardise observations in each network's first layer, with the log's statistics"""
    policy: str = "auto"
    """gaussian (the paper's), tanh_normal, deterministic, mixture or categorical; auto follows the
    action space"""
    hidden: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of every network"""
    layer_norm: bool = False
    """normalise layers of the critics and of V"""
    dropout: float = 0.0
    """dropout probability in the policy, in [0, 1)"""
    num_critics: int = 2
    """critics whose minimum is taken, >= 1"""
    value_objective: str = "expectile"
    """expectile, quantile or sarsa_expectile"""
    loss_function: str = "l2"
    """distance of the critics to their targets: l2, l1 or smooth_l1"""
    optimizer: str = "adam"
    """adam or adamw"""
    weight_decay: float = 0.0
    """decoupled weight decay of adamw, >= 0"""
    actor_lr: float = 3e-4
    """learning rate of the policy, > 0"""
    critic_lr: float = 3e-4
    """learning rate of the critics, > 0"""
    value_lr: float = 3e-4
    """learning rate of V, > 0"""
    schedule: str = "cosine_actor"
    """constant, cosine_actor (the policy's rate falls to 0 over the run: the official code) or
    cosine (every rate)"""
    max_grad_norm: float | None = None
    """clip each network's gradient to this L2 norm, > 0; none for never"""
    order: str = "sequential"
    """sequential (V, then policy and critics with the new V: the official code) or simultaneous"""
    compile: bool = False
    """run the losses under torch.compile: a start-up of about a minute, then faster updates"""
    device: str = "cpu"
    """torch device of networks and data: cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        if 0 < self.expectile < 0.5:
            raise ValueError(
                f"expectile is {self.expectile}: below 0.5 V follows the worse actions of the log "
                "and the policy learns to avoid the good ones. Use 0.7 to 0.9; IQLLoss itself "
                "takes any value in (0, 1]."
            )
        for name, low, high, open_low, open_high in _RANGES:
            value = getattr(self, name)
            if value is None and name == "max_grad_norm":
                continue
            too_low = value <= low if open_low else value < low
            too_high = value >= high if open_high else value > high
            if too_low or too_high or math.isnan(value):
                interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
                raise ValueError(f"{name} is {value}; it must lie in {interval}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}."
                )
        if not self.hidden or any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden is {self.hidden}; give at least one width, each >= 1.")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(f"weight_decay is {self.weight_decay} and needs optimizer='adamw'.")


_INF = math.inf
_RANGES: tuple[tuple[str, float, float, bool, bool], ...] = (
    ("seed", 0, 2**31 - 1, False, False),
    ("updates", 1, _INF, False, True),
    ("batch_size", 1, _INF, False, True),
    ("discount", 0, 1, False, True),
    ("expectile", 0.5, 1, False, False),
    ("temperature", 0, _INF, False, True),
    ("max_weight", 0, _INF, True, False),
    ("polyak", 0, 1, True, False),
    ("dropout", 0, 1, False, True),
    ("num_critics", 1, _INF, False, True),
    ("weight_decay", 0, _INF, False, True),
    ("actor_lr", 0, _INF, True, True),
    ("critic_lr", 0, _INF, True, True),
    ("value_lr", 0, _INF, True, True),
    ("max_grad_norm", 0, _INF, True, False),
)

#: ``quick`` learns small tasks in about a minute on two cores. The others are the official code's
#: settings (ikostrikov/implicit_q_learning, ``configs/`` and ``train_offline.py``) for D4RL's
#: tasks: no standardisation, and the reward maps its script applies to locomotion and AntMaze.
PRESETS = MappingProxyType(
    {
        "quick": IQLConfig(
            updates=10_000, hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3
        ),
        "locomotion": IQLConfig(standardise=False),
        "antmaze": IQLConfig(
            expectile=0.9, temperature=10.0, reward="minus_one", standardise=False
        ),
        "kitchen": IQLConfig(temperature=0.5, dropout=0.1, reward="raw", standardise=False),
        "adroit": IQLConfig(temperature=0.5, dropout=0.1, reward="raw", standardise=False),
    }
)


def field_help() -> dict[str, str]:
    """The string under each field of :class:`IQLConfig`, by name, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(IQLConfig)))
    assert isinstance(tree.body[0], ast.ClassDef)
    names = {field.name for field in fields(IQLConfig)}
    found: dict[str, str] = {}
    last = ""
    for node in tree.body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last in names:
            found[last] = " ".join(str(node.value.value).split())
            last = ""
    return found
