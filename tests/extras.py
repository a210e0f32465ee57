"""Optional packages: a test without one is skipped with the name of the extra that installs it."""

from __future__ import annotations

from typing import Any

import pytest

EXTRAS = {
    "av": "readers",
    "datasets": "readers",
    "fsspec": "remote",
    "gymnasium_robotics": "datasets",
    "furo": "docs",
    "huggingface_hub": "hub",
    "icu_sepsis": "datasets",
    "imageio": "video",
    "ipykernel": "docs",
    "mujoco": "mujoco",
    "nbclient": "docs",
    "ogbench": "ogbench",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "optuna": "search",
    "pandas": "readers",
    "PIL": "readers",
    "pyarrow": "readers",
    "pygame": "video",
    "ray": "tune",
    "sphinx": "docs",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def needs(module: str) -> Any:
    """``module``, imported; skips the test or the file where it is not installed."""
    remedy = f"pip install 'iql_torchrl[{EXTRAS[module.split('.')[0]]}]'"
    return pytest.importorskip(module, reason=f"needs {module}: {remedy}")
