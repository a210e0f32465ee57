"""What identifies a sweep in its folder."""

from __future__ import annotations

from typing import Any

from iql_torchrl.sweep.task import read_json, write_json

__all__ = ["claim"]


def claim(sweep: Any) -> None:
    """Write what identifies a ``Sweep`` to its folder, or compare it with what the folder has.

    Raises ``ValueError`` naming what differs from the sweep that the folder belongs to.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path, own = sweep.folder / "sweep.json", _identity(sweep)
    if not path.exists():
        write_json(path, own)
        return
    saved = read_json(path)
    for name, value in own.items():
        if saved.get(name) != value:
            now = "" if name == "configs" else f" (it was {saved.get(name)!r}, now {value!r})"
            raise ValueError(
                f"{sweep.folder} has another sweep: {name} differs{now}; choose another folder, or "
                "delete this one."
            )


def _identity(sweep: Any) -> dict[str, Any]:
    common = sweep.common
    numbers = (
        "held_out", "episodes", "evaluation_seed", "fit_updates", "discount", "save_every",
    )  # fmt: skip
    return {
        "configs": {name: config.to_dict() for name, config in sweep.configs.items()},
        "source": repr(sweep.source),
        "members_per_task": sweep.members_per_task,
        "load": {name: repr(value) for name, value in sweep.load.items()},
        "env": None if sweep.env is None else getattr(sweep.env, "__qualname__", str(sweep.env)),
        "reward": None if common.reward is None else repr(common.reward),
        "score": getattr(common.score, "__qualname__", "environment" * sweep.plays),
        **{name: getattr(common, name) for name in numbers},
    }
