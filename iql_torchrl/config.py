"""Every knob of a run in one frozen dataclass, and named presets with their sources."""

from __future__ import annotations

import ast
import inspect
import numbers
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch

__all__ = ["PRESETS", "IQLConfig", "field_help"]

CHOICES = {
    "policy": ("auto", "gaussian", "tanh_normal", "deterministic", "mixture", "categorical"),
    "value_objective": ("expectile", "quantile", "sarsa_expectile"),
    "loss_function": ("l2", "l1", "smooth_l1"),
    "optimizer": ("adam", "adamw"),
    "schedule": ("constant", "cosine_actor", "cosine"),
    "order": ("sequential", "simultaneous"),
    "precision": ("float32", "bfloat16"),
    "reward": ("raw", "return_range", "minus_one"),
}
DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")  # where torch's fused Adam runs


@dataclass(frozen=True, kw_only=True)
class IQLConfig:
    """Settings of one IQL run; the defaults are the paper's for locomotion.

    Impossible values and combinations raise ``ValueError`` with the value in the message. Numbers
    become plain ``int`` and ``float``; a bool is no number, and ``1e4`` is no ``int``. Whether this
    machine has ``device`` is not asked, so a config can be read elsewhere.
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
    """ceiling of a sample's weight in the policy loss, > 0 and finite"""
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
    schedule_steps: int | None = None
    """the falling rates change in this many equal steps over the run, >= 1; none: at every update"""
    max_grad_norm: float | None = None
    """clip each network's gradient to this L2 norm, > 0; none for never"""
    order: str = "sequential"
    """sequential (V, then policy and critics with the new V: the official code) or simultaneous"""
    precision: str = "float32"
    """of the networks' products: float32 (the dtype they have) or bfloat16 (autocast)"""
    compile: bool = False
    """run the losses under torch.compile: a start-up of about a minute, then faster updates"""
    device: str = "cpu"
    """torch device of networks and data: cpu, cuda, cuda:1, mps, ..."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _plain(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if 0 < self.expectile < 0.5:
            raise ValueError(
                f"expectile is {self.expectile}: below 0.5 V follows the worse actions of the log "
                "and the policy learns to avoid the good ones. Use 0.7 to 0.9; IQLLoss itself "
                "takes any value in (0, 1]."
            )
        for name, interval in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not _inside(value, interval):
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
        if self.schedule_steps is not None and self.schedule == "constant":
            raise ValueError(
                f"schedule_steps is {self.schedule_steps} and schedule is 'constant', which never "
                "changes a rate; choose schedule='cosine' or 'cosine_actor', or schedule_steps=None."
            )
        _check_device(self.device)

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
            raise ValueError(f"settings are {values!r}; wanted a dict of IQLConfig's fields.")
        names = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in names)
        missing = [name for name in names if name not in values]
        faults = [
            f"{kind}: {', '.join(keys)}"
            for kind, keys in (("unknown", unknown), ("missing", missing))
            if keys
        ]
        if faults:
            raise ValueError(
                f"settings have other keys than IQLConfig ({'; '.join(faults)}). Remove what is "
                "unknown and give what is missing: another version may have written them."
            )
        given = dict(values)
        if isinstance(given["hidden"], list):  # JSON has no tuples
            given["hidden"] = tuple(given["hidden"])
        return cls(**given)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _only(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return check


def _widths(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise TypeError
    return tuple(_whole(width) for width in value)


_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (_whole, "a whole number, written without a point"),
    "float": (_number, "a number"),
    "bool": (_only(bool), "True or False"),
    "str": (_only(str), "a string"),
    "tuple[int, ...]": (_widths, "a tuple of whole numbers"),
}


def _plain(name: str, kind: str, value: Any) -> Any:
    """``value`` as the plain Python value that a field annotated ``kind`` holds."""
    optional = kind.endswith(" | None")
    if value is None and optional:
        return None
    convert, wanted = _KINDS[kind.removesuffix(" | None")]
    try:
        return convert(value)
    except (TypeError, OverflowError):
        or_none = ", or None" if optional else ""
        raise ValueError(f"{name} is {value!r}; wanted {wanted}{or_none}.") from None


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(", "))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below  # false for nan


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in DEVICES:
        raise ValueError(
            f"device is {device!r}; give a torch device of type {', '.join(DEVICES)}, "
            "such as 'cuda' or 'cuda:1'."
        )


_RANGES = {
    "seed": "[0, 2147483647]",
    "updates": "[1, inf)",
    "batch_size": "[1, inf)",
    "discount": "[0, 1)",
    "expectile": "[0.5, 1]",
    "temperature": "[0, inf)",
    "max_weight": "(0, 3e+38]",  # float32 holds no more
    "polyak": "(0, 1]",
    "dropout": "[0, 1)",
    "num_critics": "[1, inf)",
    "weight_decay": "[0, inf)",
    "actor_lr": "(0, inf)",
    "critic_lr": "(0, inf)",
    "value_lr": "(0, inf)",
    "schedule_steps": "[1, inf)",
    "max_grad_norm": "(0, inf)",
}

#: ``quick`` learns small tasks in about a minute on two cores. ``adamw_cosine`` is nobody's
#: published setting: AdamW without decay, and all rates on one cosine of a hundred steps (torch's
#: ``CosineAnnealingLR`` with ``T_max=100``, stepped a hundred times over the run).
#:
#: The others are the official code's for D4RL's tasks, read in
#: https://github.com/ikostrikov/implicit_q_learning at commit 09d7002: ``configs/mujoco_config.py``
#: (locomotion), ``configs/antmaze_config.py``, ``configs/kitchen_config.py`` (kitchen and, by its
#: README, Adroit); ``train_offline.py`` (batch size, updates, and the reward maps it applies to
#: locomotion and AntMaze); ``learner.py`` (Adam, cosine for the policy alone, order of the update);
#: ``actor.py`` (ceiling 100). It standardises nothing. Its default seed is 42.
PRESETS = MappingProxyType(
    {
        "quick": IQLConfig(
            updates=10_000, hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3
        ),
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
