"""Export of a policy to one file that torch alone runs, with standardisation and bounds inside."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.export import Dim, ExportedProgram

from iql_torchrl.agent.export_checks import MASK_VALUES, assert_values, values_in_words
from iql_torchrl.agent.task import Task, counted_from_zero
from iql_torchrl.data.schema import MASK, Key, field_of_space, leaf_spaces
from iql_torchrl.descriptions import describe_space
from iql_torchrl.evaluation.act import as_in_evaluation, needs_mask
from iql_torchrl.evaluation.gym_interface import check_policy, reads_names_at_top_level
from iql_torchrl.files import whole_file
from iql_torchrl.host import validates_distributions

__all__ = ["export_policy"]

SUFFIX = ".pt2"
TOLERANCE = 1e-6
TRACED_BATCH = 3
CHECKED_BATCHES = (1, 2, 7)
PACKAGES = ("iql_torchrl", "torch", "torchrl", "tensordict")


@dataclass(frozen=True)
class _Input:
    """One tensor of the program: ``leaf`` of the data, which the policy reads at ``key``."""

    leaf: Key
    key: NestedKey
    space: spaces.Space[Any]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return ".".join(self.leaf[1:] or self.leaf)


def export_policy(policy: TensorDictModuleBase, task: Task, path: str | Path) -> Path:
    """Write the deterministic ``policy`` as a ``torch.export`` program, and a note beside it.

    The program's positional inputs are the observation's leaves that the policy reads, in the order
    of its ``in_keys``, then ``action_mask`` ``(B, n)`` bool where it reads one: values as the
    environment gives them, B >= 1 of each; Boxes of floats in ``task.dtype``, other Boxes in their
    own dtype, categories as int64. Its output is the action as the environment takes it: clipped to
    the bounds, ``(B, *shape)`` in the space's dtype, or int64 ``(B,)`` counted from the space's
    start. ``<stem>.json`` beside it says this in numbers, with a usage example.

    ``torch.export.load(path).module()`` runs it on the CPU, where neither this package nor TorchRL
    nor tensordict need be installed. It raises ``RuntimeError`` on an input of another shape (an
    observation without the batch dimension too) or dtype, on floats that are not finite, on whole
    numbers out of their space, and on a mask that allows no action in a row. Shapes are compared by
    torch's loader: ``program.validate_inputs = False`` on what ``module()`` returns leaves that out
    and saves about a third of the time of a single action. torch's AOTInductor needs example
    inputs, which the file does not contain: set ``torch.export.load(path).example_inputs`` yourself.
    ``policy`` may be any TensorDict module that writes
    ``action``; it and the caller's random numbers are left as they were. Returns ``path``.

    Raises:
        TypeError: ``policy`` is no TensorDict module.
        ValueError: ``path`` does not end in ``.pt2``, the policy writes no ``action`` or reads what
            the task does not give, or its actions do not fit the task's or are not finite.
        RuntimeError: the policy cannot be traced, or acts differently once traced.
        OSError: a file cannot be written, as on a full disk; it is named, and files of an earlier
            export stay as they were.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"path is {str(path)!r}; the name of an exported program ends in .pt2.")
    inputs = _inputs(policy, task)
    with as_in_evaluation(policy, torch.device("cpu")):
        module = _Program(policy, task, inputs)
        example = module(*_examples(inputs, task, 1))
        if not bool(example.isfinite().all()):
            raise ValueError(
                f"this {type(policy).__name__} gives an action that is not finite for a plausible "
                "observation; look for NaN in its parameters."
            )
        program = _trace(module, _examples(inputs, task, TRACED_BATCH), type(policy).__name__)
        for size in CHECKED_BATCHES:
            _compare(program, module, _examples(inputs, task, size), type(policy).__name__)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = json.dumps(_note(path, task, inputs, example), indent=2, allow_nan=False) + "\n"
    content = io.BytesIO()  # torch's own writer ends the process where a disk is full
    torch.export.save(program, content)
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())
        with whole_file(path.with_suffix(".json")) as beside:
            beside.write_text(note)
    return path


class _Program(nn.Module):
    """The policy as a function of tensors; tracing removes the TensorDict."""

    low: Tensor
    high: Tensor

    def __init__(self, policy: nn.Module, task: Task, inputs: list[_Input]) -> None:
        super().__init__()
        self.inputs, self.space = inputs, task.action_space
        self.policy = copy.deepcopy(policy).cpu().requires_grad_(False)
        if isinstance(self.space, spaces.Box):
            self.register_buffer("low", torch.from_numpy(self.space.low.copy()))
            self.register_buffer("high", torch.from_numpy(self.space.high.copy()))
        elif not isinstance(self.space, spaces.Discrete):
            raise ValueError(
                f"the actions are {describe_space(self.space)}; an export needs Box or Discrete."
            )

    def forward(self, *tensors: Tensor) -> Tensor:
        batch = TensorDict({}, batch_size=tensors[0].shape[:1])
        for each, values in zip(self.inputs, tensors, strict=True):
            assert_values(each.name, values, None if each.leaf == MASK else each.space, each.dtype)
            start = getattr(each.space, "start", 0)
            batch[each.key] = values - torch.as_tensor(start) if np.any(start) else values
        action = self.policy(batch).get("action")
        choose = self.index if isinstance(self.space, spaces.Discrete) else self.clipped
        return choose(action, tuple(action.shape[1:]))

    def index(self, action: Tensor, shape: tuple[int, ...]) -> Tensor:
        assert isinstance(self.space, spaces.Discrete)
        count = int(self.space.n)
        if shape == (count,) and count > 1:
            action = (action.long() if action.dtype == torch.bool else action).argmax(-1)
        elif shape not in ((), (1,)) or action.is_floating_point():
            raise ValueError(
                f"policy output 'action' must be integer indices (B,) or (B, 1), or (B, {count}) "
                f"one-hot, for {self.space}; found {action.dtype} with rows of shape {shape}."
            )
        return action.reshape(-1).long() + int(self.space.start)

    def clipped(self, action: Tensor, shape: tuple[int, ...]) -> Tensor:
        if shape != self.space.shape:
            raise ValueError(
                f"policy output 'action' must have rows of shape {self.space.shape} for "
                f"{describe_space(self.space)}, found {shape}."
            )
        exact = torch.promote_types(action.dtype, self.low.dtype)
        action = action.to(exact).clamp(self.low.to(exact), self.high.to(exact))
        return action.to(self.low.dtype)


def _inputs(policy: TensorDictModuleBase, task: Task) -> list[_Input]:
    check_policy(policy)
    flat = reads_names_at_top_level(policy.in_keys, task.observation_space)
    masked = needs_mask(policy, task.observation_space)
    leaves = leaf_spaces(task.observation_space)
    inputs = []
    for key in policy.in_keys:
        path = (key,) if isinstance(key, str) else tuple(key)
        if masked and path == MASK:
            continue
        path = ("observation", *path) if flat else path
        for leaf, space in leaves.items():
            if leaf[: len(path)] == path:  # a key may name a whole Dict
                field = field_of_space(counted_from_zero(space), task.dtype, leaf)
                inputs.append(_Input(leaf, leaf[1:] if flat else leaf, space, *field))
    if not inputs:
        raise ValueError(f"the policy reads {list(policy.in_keys)}: nothing of the observation.")
    if masked:
        if not isinstance(task.action_space, spaces.Discrete):
            raise ValueError(
                f"action_mask needs Discrete actions, found {describe_space(task.action_space)}."
            )
        size = int(task.action_space.n)
        inputs.append(_Input(MASK, MASK, spaces.MultiBinary(size), (size,), torch.bool))
    return inputs


def _examples(inputs: list[_Input], task: Task, size: int) -> tuple[Tensor, ...]:
    """``size`` plausible observations: near the log's statistics, or near zero, inside bounds."""
    generator = torch.Generator().manual_seed(size)
    statistics = {(k,) if isinstance(k, str) else k: s for k, s in task.statistics.items()}
    examples = []
    for each in inputs:
        shape, space = (size, *each.shape), each.space
        if each.leaf == MASK:
            values = torch.rand(shape, generator=generator) < 0.5
            values[torch.arange(size), torch.randint(shape[1], (size,), generator=generator)] = True
        elif each.dtype.is_floating_point:
            values = torch.randn(shape, generator=generator, dtype=each.dtype)
            if (known := statistics.get(each.leaf)) is not None:
                values = known.mean + known.std * values
            low, high = (torch.as_tensor(getattr(space, b)).to(values) for b in ("low", "high"))
            values = values.clamp(low, high).to(each.dtype)
        else:
            space = copy.deepcopy(space)  # sampling must not change the task's own random state
            space.seed(size)
            rows = np.stack([np.asarray(space.sample()) for _ in range(size)])
            values = torch.as_tensor(rows).to(each.dtype)
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
    program: ExportedProgram, module: nn.Module, examples: tuple[Tensor, ...], name: str
) -> None:
    traced, expected = program.module()(*examples).double(), module(*examples).double()
    excess = (traced - expected).abs() - TOLERANCE * expected.abs().clamp(min=1.0)
    if not bool((excess <= 0).all()):
        raise RuntimeError(
            f"this {name} acts differently once traced, by {(traced - expected).abs().max():.3g} in "
            f"a batch of {len(examples[0])}: it draws random numbers, keeps a state, or branches on "
            "values. Make its deterministic action a function of its inputs alone."
        )


def _note(path: Path, task: Task, inputs: list[_Input], example: Tensor) -> dict[str, Any]:
    """The description of inputs and output beside the program, in JSON; null: unbounded."""
    space = task.action_space
    if isinstance(space, spaces.Discrete):
        action: dict[str, Any] = {"kind": "discrete", "n": int(space.n), "start": int(space.start)}
    else:
        assert isinstance(space, spaces.Box)
        low, high = (b.astype(object) for b in (space.low, space.high))
        low[~np.isfinite(space.low)] = high[~np.isfinite(space.high)] = None
        action = {"kind": "box", "low": low.tolist(), "high": high.tolist()}
    arguments = []
    for each in inputs:
        size = ", ".join(map(str, (1, *each.shape)))
        make = "ones" if each.dtype == torch.bool else "zeros"
        arguments.append(f"torch.{make}({size}, dtype={each.dtype})")
    return {
        "task": task.name,
        "inputs": [
            {
                "name": i.name,
                "key": list(i.leaf),
                **_form(i.shape, i.dtype),
                "values": MASK_VALUES if i.leaf == MASK else values_in_words(i.space),
            }
            for i in inputs
        ],
        "output": {"name": "action", **_form(tuple(example.shape[1:]), example.dtype), **action},
        "device": "cpu",
        "checks": "an input of another shape, dtype or values raises RuntimeError; "
        "policy.validate_inputs = False leaves out the comparison of shapes",
        "usage": [
            "import torch",
            f"policy = torch.export.load({path.name!r}).module()",
            f"action = policy({', '.join(arguments)})",
        ],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": ["B", *shape], "dtype": str(dtype).removeprefix("torch.")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
