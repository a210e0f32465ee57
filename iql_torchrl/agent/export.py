"""Export of a policy to one file, for torch or ONNX, that includes standardisation and bounds."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from iql_torchrl.agent.task import Task
from iql_torchrl.data.codec import field_of_space, leaf_spaces
from iql_torchrl.data.schema import MASK, Key
from iql_torchrl.descriptions import bounds_in_words, describe_space, one_line
from iql_torchrl.evaluation.acting import as_in_evaluation, check_policy
from iql_torchrl.evaluation.policy_input import integer_limits, needs_mask, reads_names_at_top_level
from iql_torchrl.files import atomic_write, first_line, make_folder
from iql_torchrl.networks import HISTORY_MASK, chunk_of, history_of, repeat_first, stack_frames
from iql_torchrl.private_apis import assert_dtype, assert_later

HISTORY: Key = (HISTORY_MASK,)
UNCOMPARED = (torch.uint16, torch.uint32, torch.uint64)  # torch compares none of these
OUTPUT = "action"  # name of a program's output
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# by the suffix of a program: what its description says of checks, and an example of use
USE = {
    ".pt2": "action = torch.export.load(path).module()(*inputs): tensors in the order above; other "
    "shapes, dtypes or values raise RuntimeError; validate_inputs = False on the module leaves out the "
    "comparison of shapes",
    ".onnx": "(action,) = onnxruntime.InferenceSession(path).run(None, inputs): NumPy arrays by name; "
    "other shapes or dtypes raise an error, values are not checked: wrong ones give wrong actions",
}
PACKAGES = ("iql_torchrl", "torch", "torchrl", "tensordict", *ONNX_PACKAGES)


@dataclass(frozen=True)
class ProgramInput:
    """One tensor of a program: ``leaf`` of the data, which the policy reads at ``key``."""

    leaf: Key
    key: NestedKey
    space: spaces.Space[Any]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        name = ".".join(self.leaf[1:] or self.leaf)
        return ".".join(self.leaf) if name == OUTPUT else name

    def rule(self) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The condition on its values, in words and as a function of them."""
        limits = integer_limits(self.space)
        if self.leaf == MASK:
            return "at least one True in every row", lambda mask: mask.any(-1)
        if self.leaf == HISTORY:
            return (
                "in every row False at padding, which comes before the first step of an episode and "
                "is ignored, and then True at the real steps; the current step is the last one",
                lambda mask: (mask[:, 1:] >= mask[:, :-1]).all(-1) & mask[:, -1],
            )
        if limits is None:
            return "finite numbers", Tensor.isfinite
        # a limit of all dimensions is a number, so that a program needs no tensor for it
        low, high = (
            int(np.min(x)) if np.unique(x).size == 1 else torch.as_tensor(x) for x in limits
        )
        words = f"integers in {bounds_in_words(*limits)}"
        wide = torch.int64 if self.dtype in UNCOMPARED else self.dtype
        return words, lambda values: (values.to(wide) >= low) & (values.to(wide) <= high)

    def described(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        form = {"shape": ["B", *self.shape], "dtype": dtype, "values": self.rule()[0]}
        return {"name": self.name, "key": list(self.leaf), **form}

    def examples(self, size: int, task: Task) -> Tensor:
        """``size`` plausible values: near the dataset's statistics, or near zero, inside bounds."""
        generator, shape = np.random.default_rng(size), (size, *self.shape)
        limits = integer_limits(self.space)
        if limits is None:
            values = generator.normal(size=shape)
            logged = task.statistics.get(self.leaf[0] if len(self.leaf) == 1 else self.leaf)
            if logged is not None:
                values = logged.mean.numpy() + logged.std.numpy() * values
            assert isinstance(self.space, spaces.Box)
            values = values.clip(self.space.low, self.space.high)
        else:
            values = generator.integers(*limits, shape, self.space.dtype, endpoint=True)
        if self.leaf in (MASK, HISTORY):
            values.sort(1)
            values[:, -1] = True
        return torch.from_numpy(values).to(self.dtype)


def program_inputs(policy: TensorDictModuleBase, task: Task) -> list[ProgramInput]:
    """The program's inputs in their order: leaves of the observation or windows, then the masks."""
    check_policy(policy)
    history, actions = history_of(policy), task.action_space
    steps = () if history is None else (history.length,)
    flat = reads_names_at_top_level(policy.in_keys, task.observation_space)
    masked = needs_mask(policy, task.observation_space)
    inputs = []
    for key in policy.in_keys:
        path = (key,) if isinstance(key, str) else tuple(key)
        path = ("observation", *path) if flat else path
        for leaf, space in leaf_spaces(task.observation_space).items():
            if leaf[: len(path)] == path:  # a key may name a whole Dict
                shape, dtype = field_of_space(space, task.dtype, leaf)
                read_at = leaf[1:] if flat else leaf
                inputs.append(ProgramInput(leaf, read_at, space, (*steps, *shape), dtype))
    if history is not None:
        bits = spaces.MultiBinary(history.length)
        inputs.append(ProgramInput(HISTORY, HISTORY, bits, steps, torch.bool))
    if masked:
        if not isinstance(actions, spaces.Discrete):
            raise ValueError(
                f"action_mask needs Discrete actions, found {describe_space(actions)}."
            )
        size = int(actions.n)
        inputs.append(ProgramInput(MASK, MASK, spaces.MultiBinary(size), (size,), torch.bool))
    return inputs


def described_policy(policy: TensorDictModuleBase, task: Task) -> dict[str, Any]:
    """Inputs and output of the policy's programs, for JSON; null means unbounded."""
    space, chunk = task.action_space, chunk_of(policy)
    steps = () if chunk is None else (chunk.length,)
    if isinstance(space, spaces.Discrete):
        form: dict[str, Any] = {"shape": ["B"], "dtype": "int64"}
        form |= {"kind": "discrete", "n": int(space.n), "start": int(space.start)}
    elif isinstance(space, spaces.Box):
        low, high = (bound.astype(object) for bound in (space.low, space.high))
        low[~np.isfinite(space.low)] = high[~np.isfinite(space.high)] = None
        form = {"shape": ["B", *steps, *space.shape], "dtype": str(space.dtype)}
        form |= {"kind": "box", "low": low.tolist(), "high": high.tolist()}
        if chunk is not None:
            form |= {"steps": chunk.length, "execute": chunk.executed}
    else:
        raise ValueError(
            f"the actions are {describe_space(space)}; an export needs Box or Discrete."
        )
    return {
        "task": task.name,
        "inputs": [each.described() for each in program_inputs(policy, task)],
        "output": {"name": OUTPUT, **form},
        "device": "cpu",
    }


class PolicyProgram(nn.Module):
    """The policy as a function of tensors; tracing removes the TensorDict."""

    def __init__(self, policy: nn.Module, task: Task, inputs: list[ProgramInput]) -> None:
        super().__init__()
        self.inputs, self.space = inputs, task.action_space
        self.stack = (history := history_of(policy)) is not None and history.stack
        self.chunk = chunk_of(policy)
        self.policy = copy.deepcopy(policy).cpu().requires_grad_(False)

    def forward(self, *tensors: Tensor) -> Tensor:
        batch = TensorDict({}, batch_size=tensors[0].shape[:1])
        given = {each.leaf: values for each, values in zip(self.inputs, tensors, strict=True)}
        real = given.get(HISTORY)
        # the mask of a window is checked before it is used
        for each in sorted(self.inputs, key=lambda each: each.leaf != HISTORY):
            values, observed = given[each.leaf], each.leaf not in (MASK, HISTORY)
            if observed and real is not None:
                values = repeat_first(values, real)
            words, holds = each.rule()
            assert_dtype(values, each.dtype)
            assert_later(holds(values).all(), f"{each.name} must hold {words}.")
            if observed and np.any(start := getattr(each.space, "start", 0)):
                values = values - torch.as_tensor(start)
            if observed and self.stack:
                values = stack_frames(values, values.ndim - 2)
            batch[each.key] = values
        return self.accepted(self.policy(batch).get("action"))

    def accepted(self, action: Tensor) -> Tensor:
        """The policy's action in the form that the environment takes."""
        space = self.space
        steps: tuple[int, ...] = ()
        if self.chunk is not None and isinstance(space, spaces.Box):
            action, steps = self.chunk.steps(action, space.shape), (self.chunk.length,)
        rows = tuple(action.shape[1:])
        if isinstance(space, spaces.Box) and rows == (*steps, *space.shape):
            low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
            exact = torch.promote_types(action.dtype, low.dtype)
            return action.to(exact).clamp(low.to(exact), high.to(exact)).to(low.dtype)
        if isinstance(space, spaces.Discrete):
            start = int(space.start)
            if rows == (space.n,) and space.n > 1:
                return (action.long() if action.dtype == torch.bool else action).argmax(-1) + start
            if rows in ((), (1,)) and not action.is_floating_point():
                return action.reshape(-1).long() + start
        raise ValueError(
            f"policy output 'action' is {action.dtype} with rows of shape {rows}, for "
            f"{describe_space(space)}; expected rows of the shape of a Box, or for Discrete actions "
            "integer indices (B,) or (B, 1), or one-hot rows."
        )


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
    counted from the space's start; of a policy with chunks the actions of the next h steps,
    ``(B, h, *shape)``. ``<stem>.json`` (``<stem>.onnx.json``) in the same folder describes
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
    larger bound, in batches of 1, 2 and 7.

    ``policy`` may be any TensorDict module that writes ``action``; it and the caller's random
    generators do not change. Returns ``path``.

    Raises:
        TypeError: ``policy`` is not a TensorDict module.
        ValueError: ``path`` ends in neither ``.pt2`` nor ``.onnx`` or cannot be written, the policy
            writes no ``action`` or reads what the task does not have, or its actions do not fit the
            task's or are not finite.
        RuntimeError: the policy cannot be traced or translated, or acts differently once it is.
        ImportError: ``path`` ends in ``.onnx`` and the packages of the extra ``onnx`` are missing.
        OSError: a file cannot be written, as on a full disk; the message names it, and files of an
            earlier export do not change.
    """
    path, kind = Path(path), type(policy).__name__
    if path.suffix not in USE:
        raise ValueError(
            f"path is {str(path)!r}; the name of an exported program ends in .pt2 (torch) or .onnx."
        )
    make_folder("path", path, above=True)
    if path.is_dir():
        raise ValueError(f"path is {path}, which is a folder; choose the name of a file.")
    description = described_policy(policy, task)
    inputs = program_inputs(policy, task)
    traced_from, *batches = [[each.examples(n, task) for each in inputs] for n in (3, 1, 2, 7)]
    with as_in_evaluation(policy, torch.device("cpu")):
        module = PolicyProgram(policy, task, inputs)
        actions = [module(*batch) for batch in batches]
        if not all(bool(action.isfinite().all()) for action in actions):
            raise ValueError(
                f"this {kind} gives an action that is not finite for a plausible observation; look "
                "for NaN in its parameters."
            )
        program = _traced(module, traced_from, kind)
        file = io.BytesIO()  # torch's own writer ends the process when the disk is full
        if path.suffix == ".onnx":
            run, content = _translated(program, [each.name for each in inputs], kind)
            file.write(content)
            tolerance, form = 1e-5, "translated to ONNX"
        else:
            run, tolerance, form = program.module(), 1e-6, "traced"
            torch.export.save(program, file)
        size = _size_of(task.action_space)
        _compare(run, batches, actions, tolerance, size, f"this {kind}, once {form},")
    description |= {"use": USE[path.suffix], "versions": versions()}
    note = json.dumps(description, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_bytes(file.getvalue())
        beside = path.with_suffix(".json" if path.suffix == ".pt2" else ".onnx.json")
        with atomic_write(beside) as temporary_note:
            temporary_note.write_text(note)
    return path


def _compare(
    program: Callable[..., Tensor],
    batches: Sequence[Sequence[Tensor]],
    actions: Sequence[Tensor],
    tolerance: float,
    size: Tensor,
    what: str,
) -> None:
    for batch, action in zip(batches, actions, strict=True):
        error = (program(*batch).double() - action.double()).abs()
        if not bool((error <= tolerance * torch.maximum(action.double().abs(), size)).all()):
            raise RuntimeError(
                f"{what} acts differently, by {error.max():.3g} in a batch of {len(action)}: it draws "
                "random numbers, keeps a state, or branches on values. Make its deterministic action "
                "a function of its inputs alone."
            )


def _size_of(space: spaces.Space[Any]) -> Tensor:
    """The larger bound of each dimension of the actions; 1 where it is 0 or not finite."""
    if not isinstance(space, spaces.Box):
        return torch.ones(())
    largest = np.maximum(np.abs(space.low), np.abs(space.high)).astype(np.float64)
    return torch.from_numpy(np.where(np.isfinite(largest) & (largest > 0), largest, 1.0))


def _traced(module: nn.Module, examples: Sequence[Tensor], kind: str) -> ExportedProgram:
    shapes = (tuple({0: Dim("batch", min=1)} for _ in examples),)
    try:
        program = torch.export.export(module, tuple(examples), dynamic_shapes=shapes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own classes
            program = program.run_decompositions({})  # the same operations, fewer nested graphs
    except Exception as error:  # an error of any kind comes from the policy's code
        raise RuntimeError(
            f"this {kind} cannot be traced by torch.export ({first_line(error)}); its forward must be "
            "tensor operations that depend neither on values nor on the batch's size. Without that, "
            "keep the checkpoint and act with this package installed."
        ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    # Without examples a loaded program compares shapes with readable messages; with them, torch
    # generates a function that ends in an IndexError where the batch dimension is missing.
    program.example_inputs = None
    return program


def _translated(
    program: ExportedProgram, inputs: Sequence[str], kind: str
) -> tuple[Callable[..., Tensor], bytes]:
    """The program in ONNX, without checks of values: run by onnxruntime, and a file's content."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports what of torchvision is not installed
    try:
        for package in ONNX_PACKAGES:
            import_module(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=[OUTPUT],
            )
        model = translated.model
        _rename_values(model.graph, inputs)
        for part in (model.graph, *model.functions.values()):
            for node in part.all_nodes():
                node.metadata_props.clear()  # where torch and onnxscript made it: half of the file
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape[0] = "batch"
        translated.initialize_inference_session()
        return lambda *batch: translated(*batch)[0], translated.model_proto.SerializeToString()
    except ImportError as error:
        raise ImportError(
            f"an ONNX program needs {', '.join(ONNX_PACKAGES)}, and one cannot be imported ({error}); "
            'install them with pip install "iql_torchrl[onnx]", or write a .pt2 file.'
        ) from error
    except Exception as error:  # its kinds differ between versions of torch and onnxscript
        raise RuntimeError(
            f"this {kind} cannot be translated to ONNX and run by onnxruntime ({first_cause(error)}); "
            "write a .pt2 file, which torch runs, or train it on float32 data."
        ) from error
    finally:
        logger.setLevel(level)


def _rename_values(graph: Any, inputs: Sequence[str]) -> None:
    """Give other names to values of an ONNX graph that are named as one of its inputs.

    torch names the result of an operation after it, such as "cat" or "linear".
    """
    values = [value for node in graph.all_nodes() for value in node.outputs]
    taken = {*inputs, *(value.name for value in values)}
    for value in values:
        if value.name in inputs:
            while value.name in taken:
                value.name += "_"
            taken.add(value.name)


def versions() -> dict[str, str]:
    """The versions of those packages that are installed."""
    return {each.name: each.version for each in metadata.distributions() if each.name in PACKAGES}


def first_cause(error: BaseException) -> str:
    """Kind and message of the first cause of ``error``, in one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {one_line(error)}"
    return text if len(text) <= 300 else f"{text[:300]} ..."
