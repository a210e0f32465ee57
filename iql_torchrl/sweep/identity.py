"""What identifies a sweep in its folder: its runs, its data, and what is done with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from iql_torchrl.sweep.task import read_json, write_json

__all__ = ["check_folder", "claim"]

FILE = "sweep.json"


def claim(sweep: Any) -> None:
    """Write what identifies a ``Sweep`` to its folder, where nothing is written yet."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / FILE
    if not path.exists():
        write_json(path, _identity(sweep))


def check_folder(sweep: Any) -> None:
    """Raise ``ValueError`` naming what differs from the sweep that the folder belongs to."""
    if not sweep.folder.exists():
        return
    if not sweep.folder.is_dir():
        raise ValueError(f"{sweep.folder} is a file; a sweep needs a folder.")
    own, saved = _identity(sweep), read_json(sweep.folder / FILE, {})
    for name, value in own.items() if saved else ():
        known = name in saved or name != "log_score"  # which older versions did not write
        if known and saved.get(name) != value:
            now = (
                _differing(saved["configs"], value)
                if name == "configs"
                else f"it was {saved.get(name)!r}, now {value!r}"
            )
            raise ValueError(
                f"{sweep.folder} has another sweep: {name} differs ({now}); choose another folder, "
                "or delete this one."
            )


def _identity(sweep: Any) -> dict[str, Any]:
    common = sweep.common
    numbers = (
        "held_out", "reserved", "episodes", "evaluation_seed", "fit_updates", "discount", "save_every",
    )  # fmt: skip
    return {
        "configs": {name: config.to_dict() for name, config in sweep.configs.items()},
        "source": _word(sweep.source),
        "members_per_task": sweep.members_per_task,
        "load": {name: _word(value) for name, value in sweep.load.items()},
        "env": None if sweep.env is None else _word(sweep.env),
        "reward": None if common.reward is None else _word(common.reward),
        "score": _word(common.score) if common.score else "environment" * sweep.plays,
        "log_score": None if sweep.log_score is None else _word(sweep.log_score),
        **{name: getattr(common, name) for name in numbers},
    }


def _word(value: Any) -> str:
    """The same text in each process: without addresses in memory, and for a path or its text."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_word, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_word(each)}' for key, each in value.items())}}}"
    if isinstance(value, partial):
        return f"{_word(value.func)}({_word(value.args)}, {_word(value.keywords)})"
    if not callable(value):
        return str(value)
    name = getattr(value, "__qualname__", None)
    if name is None:  # a callable object
        return f"{type(value).__qualname__}({_word(getattr(value, '__dict__', {}))})"
    code = getattr(value, "__code__", None)
    if "<lambda>" not in name or code is None:
        return str(name)
    digest = hashlib.blake2b(digest_size=8)
    digest.update(code.co_code + repr((code.co_names, code.co_varnames)).encode())
    digest.update("".join(map(_word, code.co_consts)).encode())
    return f"{name} {digest.hexdigest()}"


def _differing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The first run in which two sweeps differ, and how."""
    for name in {**saved, **own}:
        if name not in saved or name not in own:
            return f"{name!r} is {'new' if name in own else 'missing'}"
        for key in {**saved[name], **own[name]}:
            before, now = (each[name].get(key) for each in (saved, own))
            if before != now:
                return f"{key} of {name!r} was {before!r}, now {now!r}"
    return "the order"
