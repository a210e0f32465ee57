"""Export of a policy to one file, for torch or ONNX, that includes standardisation and bounds."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.export import Dim, ExportedProgram

from iql_torchrl.agent.export_note import export_note
from iql_torchrl.agent.exported_program import (
    HISTORY,
    PolicyProgram,
    ProgramInput,
    program_inputs,
)
from iql_torchrl.agent.onnx_export import (
    ONNX_SUFFIX,
    ONNX_TOLERANCE,
    check_onnx_packages,
    onnx_function,
    to_onnx,
)
from iql_torchrl.agent.task import Task
from iql_torchrl.data.schema import MASK
from iql_torchrl.evaluation.act import as_in_evaluation
from iql_torchrl.files import whole_file
from iql_torchrl.private_apis import validates_distributions

__all__ = ["description_path", "export_policy"]

TORCH_SUFFIX = ".pt2"
TOLERANCE = 1e-6
TRACED_BATCH = 3
CHECKED_BATCHES = (1, 2, 7)


def export_policy(policy: TensorDictModuleBase, task: Task, path: str | Path) -> Path:
    """Write the deterministic ``policy`` as a program, and a description of it.

    A ``path`` that ends in ``.pt2`` becomes a ``torch.export`` program, ``.onnx`` an ONNX program.

    The program's positional inputs are the observation's leaves that the policy reads, in the order
    of its ``in_keys``, then ``action_mask`` ``(B, n)`` bool where it reads one: values as the
    environment gives them, B >= 1 of each; Boxes of floats in ``task.dtype``, other Boxes in their
    own dtype, categories as int64. For a policy with a history each leaf is a window ``(B, T, *shape)``
    of the last T observations of the episode, oldest first, and ``history_mask`` ``(B, T)`` bool
    follows the leaves: False at padding, whose values are ignored. The output is the action that the
    environment accepts: clipped to the bounds, ``(B, *shape)`` in the space's dtype, or int64 ``(B,)``
    counted from the space's start. ``<stem>.json`` (``<stem>.onnx.json``) in the same folder describes
    inputs and output, with an example of use.

    ``torch.export.load(path).module()`` runs it on the CPU; this package, TorchRL and tensordict
    need not be installed. It raises ``RuntimeError`` on an input of another shape (also on an
    observation without the batch dimension) or dtype, on floats that are not finite, on whole
    numbers outside their space, and on a mask that allows no action in a row. torch's loader
    compares the shapes: ``validate_inputs = False`` on the module switches that off and saves about
    a third of the time of a single action. torch's AOTInductor needs example inputs, which the file
    does not contain: set ``torch.export.load(path).example_inputs`` yourself.

    An ONNX program (extra ``onnx``) has the same inputs, by name, and the same output; onnxruntime
    runs it without torch. ONNX has no assertions: onnxruntime compares dtypes and all dimensions but
    the first, and nothing compares values, so check them before the call (the description says
    which). Before the file is written its actions are compared with the policy's, to 1e-5 times the
    greater of 1 and the action, in batches of 1, 2 and 7.

    ``policy`` may be any TensorDict module that writes ``action``; it and the caller's random
    generators do not change. Returns ``path``.

    Raises:
        TypeError: ``policy`` is not a TensorDict module.
        ValueError: ``path`` ends in neither ``.pt2`` nor ``.onnx``, the policy writes no ``action``
            or reads what the task does not have, or its actions do not fit the task's or are not
            finite.
        RuntimeError: the policy cannot be traced or translated, or acts differently once it is.
        ImportError: ``path`` ends in ``.onnx`` and the packages of the extra ``onnx`` are missing.
        OSError: a file cannot be written, as on a full disk; the message names it, and files of an
            earlier export do not change.
    """
    path = Path(path)
    if path.suffix not in (TORCH_SUFFIX, ONNX_SUFFIX):
        raise ValueError(
            f"path is {str(path)!r}; the name of an exported program ends in .pt2 (torch) or .onnx."
        )
    if path.suffix == ONNX_SUFFIX:
        check_onnx_packages()
    inputs = program_inputs(policy, task)
    with as_in_evaluation(policy, torch.device("cpu")):
        module = PolicyProgram(policy, task, inputs)
        example = module(*_examples(inputs, task, 1))
        if not bool(example.isfinite().all()):
            raise ValueError(
                f"this {type(policy).__name__} gives an action that is not finite for a plausible "
                "observation; look for NaN in its parameters."
            )
        content = _checked_content(path.suffix, module, task, type(policy).__name__)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = json.dumps(export_note(path, task, inputs, example), indent=2, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
        with whole_file(description_path(path)) as description:
            description.write_text(note)
    return path


def description_path(path: Path) -> Path:
    """Where the description of the program ``path`` is: two programs of one stem have one each."""
    return path.with_suffix(".json" if path.suffix == TORCH_SUFFIX else f"{path.suffix}.json")


def _checked_content(suffix: str, module: PolicyProgram, task: Task, name: str) -> bytes:
    """The program's file in the format ``suffix``, which acts as ``module`` does."""
    examples = [_examples(module.inputs, task, size) for size in CHECKED_BATCHES]
    program = _trace(module, _examples(module.inputs, task, TRACED_BATCH), name)
    traced = program.module()
    for batch in examples:
        _compare(traced, module, batch, name, TOLERANCE)
    if suffix == ONNX_SUFFIX:
        translated = to_onnx(program, [each.name for each in module.inputs], name)
        run = onnx_function(translated, name)
        for batch in examples:
            _compare(run, module, batch, name, ONNX_TOLERANCE)
        return translated
    content = io.BytesIO()  # torch's own writer ends the process when the disk is full
    torch.export.save(program, content)
    return content.getvalue()


def _examples(inputs: list[ProgramInput], task: Task, size: int) -> tuple[Tensor, ...]:
    """``size`` plausible observations: near the log's statistics, or near zero, inside bounds."""
    generator = torch.Generator().manual_seed(size)
    statistics = {(k,) if isinstance(k, str) else k: s for k, s in task.statistics.items()}
    examples = []
    for each in inputs:
        shape, space = (size, *each.shape), each.space
        if each.leaf == MASK:
            values = torch.rand(shape, generator=generator) < 0.5
            values[torch.arange(size), torch.randint(shape[1], (size,), generator=generator)] = True
        elif each.leaf == HISTORY:
            real = torch.randint(1, shape[1] + 1, (size, 1), generator=generator)
            values = torch.arange(shape[1]) >= shape[1] - real
        elif each.dtype.is_floating_point:
            values = torch.randn(shape, generator=generator, dtype=each.dtype)
            if (logged := statistics.get(each.leaf)) is not None:
                values = logged.mean + logged.std * values
            low, high = (torch.as_tensor(getattr(space, b)).to(values) for b in ("low", "high"))
            values = values.clamp(low, high).to(each.dtype)
        else:
            space = copy.deepcopy(space)  # sampling must not change the task's own random state
            space.seed(size)
            count = math.prod(shape) // math.prod(space.shape or ())
            rows = np.stack([np.asarray(space.sample()) for _ in range(count)])
            values = torch.as_tensor(rows).to(each.dtype).reshape(shape)
        examples.append(values)
    return tuple(examples)


def _trace(module: nn.Module, examples: tuple[Tensor, ...], name: str) -> ExportedProgram:
    batch = Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in examples),)
    try:
        with _unvalidated_distributions():
            program = torch.export.export(module, examples, dynamic_shapes=shapes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own classes
            program = program.run_decompositions({})  # the same operations, fewer nested graphs
    except Exception as error:  # an error of any kind comes from the policy's code
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeError(
            f"this {name} cannot be traced by torch.export ({reason}); its forward must be tensor "
            "operations that depend neither on values nor on the batch's size. Without that, keep "
            "the checkpoint and act with this package installed."
        ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    # Without examples a loaded program compares shapes with readable messages; with them, torch
    # generates a function that ends in an IndexError where the batch dimension is missing.
    program.example_inputs = None
    return program


@contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """A context without torch's argument checks, which branch on values and cannot be traced."""
    before = validates_distributions()
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _compare(
    program: Callable[..., Tensor],
    module: nn.Module,
    examples: tuple[Tensor, ...],
    name: str,
    tolerance: float,
) -> None:
    traced, expected = program(*examples).double(), module(*examples).double()
    excess = (traced - expected).abs() - tolerance * expected.abs().clamp(min=1.0)
    if not bool((excess <= 0).all()):
        once = "traced" if tolerance == TOLERANCE else "translated to ONNX"
        raise RuntimeError(
            f"this {name} acts differently once {once}, by {(traced - expected).abs().max():.3g} in "
            f"a batch of {len(examples[0])}: it draws random numbers, keeps a state, or branches on "
            "values. Make its deterministic action a function of its inputs alone."
        )
