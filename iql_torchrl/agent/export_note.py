"""The JSON file beside an exported program: its inputs, its output and an example of use."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from iql_torchrl.agent.export_checks import HISTORY_VALUES, MASK_VALUES, values_in_words
from iql_torchrl.agent.exported_program import HISTORY, ProgramInput
from iql_torchrl.agent.onnx_export import ONNX_PACKAGES, ONNX_SUFFIX
from iql_torchrl.agent.task import Task
from iql_torchrl.data.schema import MASK

__all__ = ["export_note", "versions"]

PACKAGES = ("iql_torchrl", "torch", "torchrl", "tensordict")


def export_note(
    path: Path, task: Task, inputs: list[ProgramInput], example: Tensor
) -> dict[str, Any]:
    """The description of inputs and output, for JSON; null means unbounded."""
    space = task.action_space
    if isinstance(space, spaces.Discrete):
        action: dict[str, Any] = {"kind": "discrete", "n": int(space.n), "start": int(space.start)}
    else:
        assert isinstance(space, spaces.Box)
        low, high = (b.astype(object) for b in (space.low, space.high))
        low[~np.isfinite(space.low)] = high[~np.isfinite(space.high)] = None
        action = {"kind": "box", "low": low.tolist(), "high": high.tolist()}
    return {
        "task": task.name,
        "inputs": [
            {
                "name": i.name,
                "key": list(i.leaf),
                **_form(i.shape, i.dtype),
                "values": _values(i),
            }
            for i in inputs
        ],
        "output": {"name": "action", **_form(tuple(example.shape[1:]), example.dtype), **action},
        **_history(inputs),
        "device": "cpu",
        **(_onnx_use if path.suffix == ONNX_SUFFIX else _torch_use)(path.name, inputs),
    }


def _torch_use(name: str, inputs: list[ProgramInput]) -> dict[str, Any]:
    arguments = [f"torch.{_make(i)}({(1, *i.shape)}, dtype={i.dtype})" for i in inputs]
    return {
        "checks": "an input of another shape, dtype or values raises RuntimeError; "
        "policy.validate_inputs = False leaves out the comparison of shapes",
        "usage": [
            "import torch",
            f"policy = torch.export.load({name!r}).module()",
            f"action = policy({', '.join(arguments)})",
        ],
        "versions": versions(PACKAGES),
    }


def _values(each: ProgramInput) -> str:
    masks = {MASK: MASK_VALUES, HISTORY: HISTORY_VALUES}
    return masks.get(each.leaf) or values_in_words(each.space)


def _history(inputs: list[ProgramInput]) -> dict[str, Any]:
    """How to fill the windows of a policy with a history; nothing for others."""
    lengths = [each.shape[0] for each in inputs if each.leaf == HISTORY]
    if not lengths:
        return {}
    return {
        "history": {
            "length": lengths[0],
            "order": "dimension 1 of each observation is time: the current step is last",
            "padding": "before the first step of an episode; its values are ignored",
        }
    }


def _onnx_use(name: str, inputs: list[ProgramInput]) -> dict[str, Any]:
    arguments = [
        f"{i.name!r}: np.{_make(i)}({(1, *i.shape)}, dtype={_dtype(i.dtype)!r})" for i in inputs
    ]
    return {
        "checks": "an input of another shape or dtype raises an error of onnxruntime; values are not "
        "checked, and wrong ones give wrong actions",
        "usage": [
            "import numpy as np",
            "import onnxruntime",
            f"policy = onnxruntime.InferenceSession({name!r})",
            f"(action,) = policy.run(None, {{{', '.join(arguments)}}})",
        ],
        "versions": versions((*PACKAGES, *ONNX_PACKAGES)),
    }


def _make(each: ProgramInput) -> str:
    return "ones" if each.dtype == torch.bool else "zeros"


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": ["B", *shape], "dtype": _dtype(dtype)}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The installed version of each package."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
