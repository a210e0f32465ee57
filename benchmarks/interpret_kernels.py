"""Run the program that Inductor generates for CUDA without a GPU, in Triton's interpreter.

    TRITON_INTERPRET=1 python benchmarks/interpret_kernels.py

Needs the package triton, which comes with torch's builds for CUDA; they import without a GPU. For each
case of ``CASES`` a captured step makes its updates with the program that is meant for an H100: the
interpreter executes its Triton kernels on the CPU, its library calls are torch's on the CPU. The plain
step makes the same updates, and the largest difference of a parameter is printed, in units of how far
the parameters of that tensor moved.

This shows that the kernels compute the update. It shows nothing about time, and not that a GPU's
compiler accepts them.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from count_kernels import programs_for_cuda
from iql_torchrl import IQLLoss, IQLStep, captured
from iql_torchrl.data import DeviceSampler
from step_rivals import Sizes, parts, transitions

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.objectives import SoftUpdate

SMALL = Sizes(width=16, batch=32, rows=100)
UPDATES = 3
DECORATORS = ("pointwise", "reduction", "persistent_reduction", "foreach")
SIZE = re.compile(r"^( +\w*numel) = (\d+)$", re.MULTILINE)
BLOCKS = {"XBLOCK": 64, "YBLOCK": 16, "R0_BLOCK": 32}


class Kernel:
    """A generated kernel; :meth:`run` executes it in the interpreter over its whole grid."""

    def __init__(self, function: Any, meta: dict[str, Any]) -> None:
        self._function, self._meta = function, meta

    def run(self, *arguments: Any, stream: object = None) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        names = list(self._meta["triton_meta"]["signature"])
        constants = {name: BLOCKS[name] for name in names if name in BLOCKS}
        given = [name for name in names if name not in constants]
        values = dict(zip(given, arguments, strict=True)) | constants
        grid = GridExpr.from_meta(self._meta["inductor_meta"], constants).eval_slow(values)
        self._function[grid](**values)


@contextmanager
def collected_kernels() -> Iterator[None]:
    """Inside, a decorated kernel is a :class:`Kernel` and no GPU is looked for."""
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    def decorator(**meta: Any) -> Callable[[Any], Kernel]:
        return lambda function: Kernel(function, meta)

    with ExitStack() as stack:
        for name in DECORATORS:
            stack.enter_context(mock.patch.object(triton_heuristics, name, decorator))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        stack.enter_context(mock.patch.object(triton_helpers, "libdevice", functions()))
        yield


def functions() -> types.SimpleNamespace:
    """The functions of CUDA's ``libdevice`` that the programs call, in Triton's own terms."""
    import triton.language as tl

    # looked up at each call: the interpreter replaces the functions of the module while it runs
    return types.SimpleNamespace(
        exp=lambda x: tl.exp(x),
        sqrt=lambda x: tl.sqrt(x),
        tanh=lambda x: 2 / (1 + tl.exp(-2 * x)) - 1,
    )


class Loader:
    """In the place of Inductor's ``async_compile``: kernels from their source text."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()

    def triton(self, name: str, source: str, **unused: object) -> Kernel:
        path = self._folder / f"kernel_{next(self._numbers)}.py"
        # the interpreter makes arrays of assigned numbers, and an array ends no loop
        source = SIZE.sub(r"\1: tl.constexpr = \2", source)
        path.write_text(source)  # the interpreter reads the source of a function from its file
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with collected_kernels():
            spec.loader.exec_module(module)
        kernel: Kernel = getattr(module, name)
        return kernel

    def wait(self, scope: object) -> None:
        """Nothing is compiled in the background."""


class CpuGuard:
    def __init__(self, index: int) -> None:
        """No device is chosen."""

    def __enter__(self) -> None:
        """Nothing to set."""

    def __exit__(self, *error: object) -> None:
        """Nothing to restore."""


def interpreted(folder: Path) -> Callable[[str], Callable[..., Any]]:
    """``make`` for :func:`programs_for_cuda`: programs whose kernels are interpreted."""

    def make(text: str) -> Callable[..., Any]:
        guards = torch._C._dynamo.guards
        with (
            mock.patch("torch._inductor.async_compile.AsyncCompile", partial(Loader, folder)),
            mock.patch.object(guards, "_empty_strided_cuda", guards._empty_strided_cpu),
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True),
        ):
            scope: dict[str, Any] = {"__name__": "generated"}
            exec(compile(text, "generated", "exec"), scope)

        def program(*arguments: Any) -> Any:
            with (
                mock.patch.object(torch.cuda, "_DeviceGuard", CpuGuard),
                mock.patch.object(torch.cuda, "set_device"),
            ):
                return scope["call"](list(arguments))

        return program

    return make


def make_step(**settings: Any) -> IQLStep:
    diagnostics = settings.pop("diagnostics", False)
    torch.manual_seed(0)
    loss = IQLLoss(*parts(SMALL, "cpu"), diagnostics=diagnostics)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3, fused=True)
    if settings.pop("schedule", False):
        settings["lr_scheduler"] = CosineAnnealingLR(optimizer, 10)
    return IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.1), **settings)


CASES: dict[str, dict[str, Any]] = {
    "sequential": {},
    "simultaneous": {"order": "simultaneous"},
    "everything": {"diagnostics": True, "max_grad_norm": 0.5, "schedule": True},
}


def difference(case: str) -> float:
    """Largest difference of a parameter, relative to the largest movement in its tensor."""
    torch._dynamo.reset()
    plain, fast = make_step(**CASES[case]), make_step(**CASES[case])
    rows = [DeviceSampler(transitions(SMALL), SMALL.batch, seed=0) for _ in range(2)]
    before = copy.deepcopy(plain.loss.state_dict())
    for _ in range(UPDATES):
        plain(rows[0].sample())
    with tempfile.TemporaryDirectory() as folder, programs_for_cuda(interpreted(Path(folder))):
        captured(fast, rows[1], updates=UPDATES)()
    after, own = plain.loss.state_dict(), fast.loss.state_dict()
    worst = 0.0
    for name, value in after.items():
        moved = (value - before[name]).abs().max()
        if moved > 0:
            worst = max(worst, float((own[name] - value).abs().max() / moved))
    return worst


def main() -> None:
    print(
        f"torch {torch.__version__}, triton {sys.modules['triton'].__version__}: {UPDATES} updates"
    )
    for case in CASES:
        print(f"{case:14}{difference(case):.1e} of the movement", flush=True)


if __name__ == "__main__":
    main()
