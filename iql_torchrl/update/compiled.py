"""``compiled``: the whole update as one graph under ``torch.compile``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl import logger as torchrl_logger

from iql_torchrl.data.categories import category_limits, check_categories
from iql_torchrl.losses.batch import Batch
from iql_torchrl.private_apis import mark_stepped, recompilation_reason, tracing_gradients
from iql_torchrl.update.adam import Moments
from iql_torchrl.update.graph import GraphUpdate, fits_a_graph
from iql_torchrl.update.inductor import CUDA_GRAPHS, correct_programs, program_options
from iql_torchrl.update.step import IQLStep, Step, Terms, check_update_trains

__all__ = ["CompiledStep", "compiled", "log_eager"]

KEPT_GUARDS = (
    "AUTOGRAD_SAVED_TENSORS_HOOKS",
    "CONSTANT_MATCH",
    "DEFAULT_DEVICE",
    "DETERMINISTIC_ALGORITHMS",
    "EQUALS_MATCH",
    "FUNCTORCH_STACK_MATCH",
    "GLOBAL_STATE",
    "GRAD_MODE",
    "ID_MATCH",
    "SHAPE_ENV",
    "TENSOR_MATCH",
    "TORCH_FUNCTION_STATE",
)
MANY_COMPILATIONS = 10
GRAPH_MODES = ("reduce-overhead", "max-autotune")
NOISE = ("EMPTY_NN_MODULE_HOOKS_DICT", "HASATTR", "NOT_PRESENT_IN_GENERIC_DICT")
INNER = ("type(", "dict(", "list(")
# Globals of libraries, as Dynamo names them: MODULE.NAME is G['__import_MODULE'].NAME.
OF_LIBRARIES = re.compile(
    r"G\['(__import_(torch|tensordict|torchrl|iql_torchrl|numpy|contextlib|dataclasses)(_dot_|')"
    r"|__builtins_dict__|_\d+_c\d+)"
)


def compiled(step: Step, **torch_compile_kwargs: Any) -> Step:
    """The same update under ``torch.compile``; its settings and state are those of ``step``.

    With ``Adam`` or ``AdamW`` (without ``amsgrad``, ``maximize``, ``differentiable``) losses,
    gradients, clipping, optimizer and ``SoftUpdate`` are one graph; the optimizer's own state is
    read and written, and its learning rates are tensors, so schedules do not compile again.
    ``HardUpdate`` and schedulers run outside. Any other optimizer is not compiled: ``step`` itself is
    returned, and a log line says so.

    Keyword arguments go to ``torch.compile``: ``fullgraph=True`` unless you say otherwise, and on
    a CPU Inductor's C++ wrapper unless ``mode`` or ``options`` is given. The first call compiles,
    for tens of seconds; batches of another shape compile again. On a CPU the step raises
    ``ValueError`` on categories that the networks' ``OneHot`` does not know; elsewhere that check
    would wait for the device. On a GPU give Adam ``capturable=True`` or ``fused=True``: otherwise
    it counts its updates on the CPU, and every update copies these counts.

    Raises ``ValueError`` on a mode or option of ``torch.compile`` that records CUDA graphs by itself
    (``mode="reduce-overhead"`` and ``"max-autotune"``): what one update returned would be overwritten
    by the next. :func:`captured` records CUDA graphs.
    """
    if not isinstance(step, Step):
        raise TypeError(f"step is {type(step).__name__}; expected an IQLStep, such as agent.step.")
    plain = step.plain
    if not fits_a_graph(plain.optimizer):
        log_eager(plain)
        return plain
    return CompiledStep(plain, _compile_options(plain, torch_compile_kwargs))


def _compile_options(plain: IQLStep, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``torch.compile``, in dicts of their own: it takes entries out of them."""
    options = {"fullgraph": True, **given}
    inner = options.get("options") or {}
    if options.get("mode") in GRAPH_MODES or inner.get(CUDA_GRAPHS):
        setting = f"mode is {options['mode']!r}" if "mode" in given else f"{CUDA_GRAPHS!r} is True"
        raise ValueError(
            f"{setting}, with which torch.compile records CUDA graphs of its own: they would overwrite "
            "the metrics of one update at the next. Use captured(step, replay, updates=K), which "
            "records K updates as one CUDA graph, or mode='max-autotune-no-cudagraphs'."
        )
    if "mode" in options:  # torch.compile accepts no options beside a mode
        return options
    if "options" in given:
        inductor = options.get("backend", "inductor") == "inductor"
        own = correct_programs(plain.device) if inductor else {}
        inner = {"guard_filter_fn": counted(worth_checking), **own, **inner}
    elif "backend" not in options:
        own = program_options(plain.device, plain.loss.parameters())
        inner = {"guard_filter_fn": counted(worth_checking), **own}
    return options | ({"options": inner} if inner else {})


def counted(keep: Callable[[Sequence[Any]], Sequence[bool]]) -> Callable[..., Sequence[bool]]:
    """``keep``, a filter of guards, which torch calls at each compilation; many are logged."""
    compilations = 0

    @functools.wraps(keep)
    def filtered(guards: Sequence[Any]) -> Sequence[bool]:
        nonlocal compilations
        compilations += 1
        if compilations >= MANY_COMPILATIONS:
            reason = recompilation_reason()
            before = f" The time before, this was no longer so: {reason}." if reason else ""
            torchrl_logger.warning(
                f"a compiled step is compiled for the {compilations}th time, which takes far longer "
                "than its updates: something that it reads differs from call to call, such as the "
                f"batch's shape or a number of the loss.{before} TORCH_LOGS=recompiles shows each."
            )
        return keep(guards)

    return filtered


def log_eager(step: IQLStep) -> None:
    """Say in the log that the step's optimizer is not compiled."""
    torchrl_logger.warning(
        f"{type(step.optimizer).__name__} is not compiled: updates run eagerly. Adam and AdamW, "
        "without amsgrad, maximize and differentiable, are compiled."
    )


def worth_checking(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards to keep: thousands watch classes, hooks and module internals.

    Kept: all about the batch; tensors; numbers and flags (knobs, modes); what step, loss, estimator
    and updater are; global state of torch; what functions of the user read of their own modules. Of
    networks' internals only tensors, numbers and flags.
    """
    return [
        guard.name.startswith("batch")
        or (
            not guard.name.startswith(INNER)
            and not OF_LIBRARIES.match(guard.name)
            and (
                guard.guard_type in KEPT_GUARDS
                or ("network" not in guard.name and guard.guard_type not in NOISE)
            )
        )
        for guard in guards
    ]


def _of_plain(name: str) -> Any:
    """An attribute that is read from the plain step and written to it."""
    return property(
        lambda step: getattr(step.plain, name),
        lambda step, value: setattr(step.plain, name, value),
    )


class CompiledStep(Step):
    """The update of the step ``plain`` as one graph; its settings and state are the plain step's."""

    loss, optimizer = _of_plain("loss"), _of_plain("optimizer")
    target_updater, lr_schedulers = _of_plain("target_updater"), _of_plain("lr_schedulers")
    order, max_grad_norm = _of_plain("order"), _of_plain("max_grad_norm")
    precision, independent_ranks = _of_plain("precision"), _of_plain("independent_ranks")
    members, ranks = _of_plain("members"), _of_plain("ranks")

    def __init__(self, plain: IQLStep, options: dict[str, Any]) -> None:
        self._plain = plain
        self._limits = category_limits(plain.loss)
        self._update = GraphUpdate(plain)
        self._program = torch.compile(self._graph, **options)

    @property
    def plain(self) -> IQLStep:
        return self._plain

    def _graph(self, batch: Batch, moments: Moments) -> Terms:
        return self._update(batch, moments)

    def learn(self, batch: TensorDictBase) -> Terms:
        plain = self._plain
        check_update_trains(
            independent_ranks=plain.independent_ranks, data_parallel=plain.ranks is not None
        )
        self._update.follow_freezing()
        with plain.setting(), tracing_gradients():
            read = plain.loss.read(batch)
            if (
                self._limits and plain.device.type == "cpu"
            ):  # elsewhere it would wait for the device
                check_categories(read.data, self._limits)
            terms: Terms = self._program(read, self._update.moments())
            mark_stepped(plain.optimizer)
            return terms

    def state_dict(self) -> dict[str, Any]:
        return self._plain.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._plain.load_state_dict(state_dict)
