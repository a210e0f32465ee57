"""``compiled``: the whole update as one graph under ``torch.compile``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torchrl import logger as torchrl_logger
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl.config import launches_kernels, number_dtype
from iql_torchrl.data.spaces import category_limits, check_categories
from iql_torchrl.losses.batch import Batch
from iql_torchrl.private_apis import (
    inductor_settings,
    mark_stepped,
    mode_options,
    recompilation_reason,
    tracing_gradients,
    untiled_loops_only,
)
from iql_torchrl.update.adam import (
    Moments,
    StackedAdam,
    adam_step,
    count_steps,
    start,
)
from iql_torchrl.update.checks import check_traceable
from iql_torchrl.update.step import IQLStep, LossesAndSummary, Step

MANY_COMPILATIONS = 10
GRAPH_MODES = ("reduce-overhead", "max-autotune")
CUDA_GRAPHS = "triton.cudagraphs"  # off even where it was switched on globally
# On a GPU the launches take the time of an update of small networks. Independent kernels are then
# joined into one, without timing which ones; and a reduction of at most UNSPLIT numbers is one kernel
# and not two.
JOINED = {
    "combo_kernels": True,
    "combo_kernels_autotune": 0,
    "combo_kernels_pointwise_only": True,
    "combo_kernel_max_num_nodes": 32,  # torch 2.13; earlier versions have no limit of their own
    # torch 2.13 joins fewer kernels where that keeps 5 % more memory at once; here that is little
    "combo_kernel_peak_memory_pct_threshold": 1.0,
}
UNSPLIT = 2**17
OF_NETWORKS = ("CONSTANT_MATCH", "EQUALS_MATCH", "ID_MATCH", "TENSOR_MATCH")
NOISE = ("EMPTY_NN_MODULE_HOOKS_DICT", "HASATTR", "NOT_PRESENT_IN_GENERIC_DICT")
INNER = ("type(", "dict(", "list(")
#: What a schedule must not do.
CHANGES_MORE = (
    "a schedule changes more than learning rates, which a compiled or captured update has fixed; "
    "pass cycle_momentum=False to OneCycleLR or CyclicLR, or use the plain step."
)
# Globals of libraries, as Dynamo names them: MODULE.NAME is G['__import_MODULE'].NAME. Those of
# iql_torchrl.config say which kernels are generated.
OF_LIBRARIES = re.compile(
    r"G\['(__import_(torch|tensordict|torchrl|iql_torchrl(?!_dot_config)|numpy|contextlib|dataclasses)"
    r"(_dot_|')|__builtins_dict__|_\d+_c\d+)"
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
    by the next. :func:`captured` records CUDA graphs. Also on a schedule of momentum, for which every
    update would compile again. Raises ``TypeError`` on ``torch.nn.LSTM``,
    ``GRU`` and ``RNN``, which cannot be traced.
    """
    if not isinstance(step, Step):
        raise TypeError(f"step is {type(step).__name__}; expected an IQLStep, such as agent.step.")
    plain = step.plain
    if not fits_a_graph(plain.optimizer):
        log_eager(plain)
        return plain
    check_traceable(plain.loss)
    if any(getattr(scheduler, "cycle_momentum", False) for scheduler in plain.lr_schedulers):
        raise ValueError(CHANGES_MORE)
    return CompiledStep(plain, _compile_options(plain, torch_compile_kwargs))


def fits_a_graph(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's update is :func:`iql_torchrl.update.adam.adam_step`."""
    unusual = ("amsgrad", "maximize", "differentiable")
    plain = type(optimizer) in (Adam, AdamW, StackedAdam)
    return plain and not any(g.get(name) for g in optimizer.param_groups for name in unusual)


def log_eager(step: IQLStep) -> None:
    """Log that the step's optimizer is not compiled."""
    torchrl_logger.warning(
        f"{type(step.optimizer).__name__} is not compiled: updates run eagerly. Adam and AdamW, "
        "without amsgrad, maximize and differentiable, are compiled."
    )


class CompiledStep(Step):
    """The update of the step ``plain`` as one graph.

    Its state is the plain step's, and so are its settings, in both directions.
    """

    def __init__(self, plain: IQLStep, options: dict[str, Any]) -> None:
        update = GraphUpdate(plain)
        program = torch.compile(update.run, **options)
        self.__dict__.update(_plain=plain, _update=update, _program=program)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("_plain"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.plain, name, value)

    @property
    def plain(self) -> IQLStep:
        plain: IQLStep = self._plain
        return plain

    def learn(self, batch: TensorDictBase) -> LossesAndSummary:
        plain, moments = self.plain, self._update.moments()
        with plain.modes(), tracing_gradients():
            read = plain.evaluated.prepare_batch(batch)
            if plain.device.type == "cpu":  # elsewhere it would wait for the device
                check_categories(lambda key: read.data.get(key, None), self._update.limits)
            mode = plain.loss.deterministic_sampling_mode
            result: LossesAndSummary = self._program(read, moments, mode)
            mark_stepped(plain.optimizer)
            return result

    def state_dict(self) -> dict[str, Any]:
        return self.plain.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.plain.load_state_dict(state_dict)


class GraphUpdate:
    """The update of ``step`` as a function of tensors, of which graphs are made."""

    def __init__(self, step: IQLStep) -> None:
        self.step = step
        self.limits = category_limits(step.loss)
        self.groups: list[dict[str, Any]] = []  # Dynamo would guard all of the optimizer's own
        self.rates = torch.zeros(0)
        self._written: list[Any] = []  # numbers in the learning rates, None for a tensor's

    def run(self, batch: Batch, moments: Moments, mode: ExplorationType | None) -> LossesAndSummary:
        """Losses, gradients, clipping, Adam and Polyak step; new values are written in place.

        ``mode`` is that of :meth:`IQLStep.modes`, where a compiled program notices another one.
        Losses and summary have no gradient, which may not leave a graph.
        """
        step = self.step
        parameters, group_of, _ = step.trained
        added = [0] * len(parameters)

        def descend(loss: Tensor) -> None:
            if loss.requires_grad and parameters:
                own = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
                gradients = step.summed_and_clipped(list(own))
                with torch.no_grad():
                    values = [parameter.data for parameter in parameters]
                    adam_step(values, gradients, moments, self.groups, group_of, added)

        with set_exploration_type(mode):
            result = step.update(batch, descend)
            count_steps(moments.steps, added)
            step.move_targets()
        return result

    def moments(self) -> Moments:
        """The optimizer's state, created if missing, and its learning rates as tensors."""
        step, optimizer = self.step, self.step.optimizer
        self.groups = [options_of(group) for group in optimizer.param_groups]
        parameters, group_of, _ = step.list_trained()
        states = [optimizer.state[p] for p in parameters]
        for parameter, state, number in zip(parameters, states, group_of, strict=True):
            if not state:
                group = optimizer.param_groups[number]
                on_device = group.get("fused") or group.get("capturable")
                start(state, parameter, parameter.device if on_device else torch.device("cpu"))
        return Moments.of(states, step.counts.of(states), self._current_rates())

    def _current_rates(self) -> list[Tensor]:
        """Learning rates of the groups, views of :attr:`rates`, where changed numbers are written."""
        groups, device = self.step.optimizer.param_groups, self.step.device
        rates = [group["lr"] for group in groups]
        numbers = [None if isinstance(rate, Tensor) else rate for rate in rates]
        if len(self._written) != len(numbers):
            self.rates = torch.zeros(len(numbers), dtype=number_dtype(device), device=device)
            self._views = list(self.rates.unbind())  # separate inputs of a program: fewer kernels
        if None in numbers or numbers != self._written:
            self.rates.copy_(learning_rates(groups, device), non_blocking=True)
            self._written = numbers
        return self._views


def learning_rates(groups: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
    """Learning rates ``(groups,)``; none that is on ``device`` is read, which would wait for it."""
    rates, exact = [group["lr"] for group in groups], number_dtype(device)
    there = [isinstance(rate, Tensor) and rate.device == device for rate in rates]
    if not any(there):
        return torch.tensor([float(rate) for rate in rates], dtype=exact)
    pairs = zip(rates, there, strict=True)
    full = functools.partial(torch.full, (), dtype=exact, device=device)
    return torch.stack([rate.to(exact) if on else full(float(rate)) for rate, on in pairs])


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's group without its parameters and learning rate."""
    return {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}


# -- what torch.compile is told ------------------------------------------------------------------------


def _compile_options(plain: IQLStep, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``torch.compile``, in dicts of their own: it takes entries out of them."""
    options = {"fullgraph": True, **{k: v for k, v in given.items() if v is not None}}
    inner = options.get("options") or {}
    if options.get("mode") in GRAPH_MODES or inner.get(CUDA_GRAPHS):
        setting = f"mode is {options['mode']!r}" if "mode" in given else f"{CUDA_GRAPHS!r} is True"
        raise ValueError(
            f"{setting}, with which torch.compile records CUDA graphs of its own: they would overwrite "
            "the metrics of one update at the next. Use captured(step, replay, updates=K), which "
            "records K updates as one CUDA graph, or mode='max-autotune-no-cudagraphs'."
        )
    by_inductor = options.get("backend", "inductor") == "inductor"
    if not by_inductor and "options" not in options:
        return options
    own: dict[str, Any] = {}
    if by_inductor:
        own = correct_programs(plain.device)
        if "mode" in options and not inner:  # torch.compile accepts no options beside a mode
            inner = mode_options(options.pop("mode"))
        elif "options" not in options:
            own = program_options(plain.device, plain.loss.parameters())
    return options | {"options": {"guard_filter_fn": counted(worth_checking), **own, **inner}}


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


def worth_checking(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards to keep: thousands watch classes, hooks and module internals.

    Kept: all about the batch; tensors; numbers and flags (settings, modes); what step, loss, estimator
    and updater are; global state of torch; what functions of the user read of their own modules. Of
    networks' internals only tensors, numbers and flags.
    """
    return [
        guard.name.startswith("batch")
        or (
            not guard.name.startswith(INNER)
            and not OF_LIBRARIES.match(guard.name)
            and guard.guard_type not in NOISE
            and ("network" not in guard.name or guard.guard_type in OF_NETWORKS)
        )
        for guard in guards
    ]


def program_options(device: torch.device, parameters: Iterable[Tensor]) -> dict[str, Any]:
    """Options of Inductor for an update of these parameters, of those that this torch knows.

    On a CPU the C++ wrapper; on a GPU joined kernels.
    """
    options: dict[str, Any] = {CUDA_GRAPHS: False, **correct_programs(device)}
    if device.type == "cpu":
        options["cpp_wrapper"] = True
    elif launches_kernels(device):
        options |= JOINED
        # where a softmax's reduction is split, Inductor warns that it computes it in two passes
        options["online_softmax"] = False
        if max(parameter.numel() for parameter in parameters) <= UNSPLIT:
            options["split_reductions"] = False
    return _known(options)


def correct_programs(device: torch.device) -> dict[str, Any]:
    """Options that every program needs to compute the right numbers: on a CPU, a pass of Inductor.

    A torch without such passes is believed to have the repair (torch 2.15 has it); a log line says so,
    and ``tests/population/test_population_compiled.py`` compares such programs with eager updates.
    """
    if device.type != "cpu":
        return {}
    options = _known({"_post_fusion_custom_pass": untiled_loops_only()})
    if any(options.values()):
        return options
    _log_once(
        f"torch {torch.__version__} lacks the Inductor pass that keeps tiled loops apart; programs "
        "are right only if it has the repair of pytorch issue 185702. Compare some compiled "
        "updates with eager ones, or train eagerly."
    )
    return {}


@functools.cache
def _log_once(message: str) -> None:
    torchrl_logger.warning(message)


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    known = inductor_settings()
    return {name: value for name, value in options.items() if name in known}
