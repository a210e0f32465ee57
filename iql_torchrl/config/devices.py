"""Torch devices on which a run can train: by name, and on this machine."""

from __future__ import annotations

import torch

DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")  # where torch's fused Adam runs
LAUNCHING = ("cuda",)


def check_device(device: str) -> None:
    """Raise ``ValueError`` unless ``device`` names a torch device of a type in ``DEVICES``."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in DEVICES:
        raise ValueError(
            f"device is {device!r}; give a torch device of type {', '.join(DEVICES)}, "
            "such as 'cuda' or 'cuda:1'."
        )


def check_usable(device: str) -> None:
    """Raise ``ValueError`` with torch's reason unless this machine can use ``device``."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device is {device!r}, which this machine cannot use: {reason}"
        ) from error


def launches_kernels(device: torch.device) -> bool:
    """Whether every operation is a kernel that is launched: a program should have few of them there."""
    return device.type in LAUNCHING
