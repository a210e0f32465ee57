"""``captured``: K updates per call, sampling included, without Python work between them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler
from torchrl.objectives import HardUpdate

from iql_torchrl.config import Arithmetic, check_whole, number_dtype
from iql_torchrl.data.replay import DeviceSampler
from iql_torchrl.data.shards import ShardedReplay
from iql_torchrl.data.spaces import check_categories
from iql_torchrl.data.windows import WindowStorage
from iql_torchrl.losses import LOSSES
from iql_torchrl.private_apis import (
    compile_program,
    generator_of,
    mark_stepped,
    stored_rows,
    tracing_gradients,
    version_of,
)
from iql_torchrl.update.adam import Moments
from iql_torchrl.update.checks import check_traceable
from iql_torchrl.update.compiled import (
    CHANGES_MORE,
    GraphUpdate,
    fits_a_graph,
    learning_rates,
    log_eager,
    options_of,
    program_options,
    worth_checking,
)
from iql_torchrl.update.step import IQLStep, Step

Program = tuple[Callable[..., object], Sequence[Any]]  # with its arguments


def captured(
    step: Step, replay: DeviceSampler | ReplayBuffer, *, updates: int = 32
) -> CapturedStep:
    """A function without arguments: ``updates`` updates, each of a batch that it samples itself.

    ``replay`` is a :class:`~iql_torchrl.data.DeviceSampler`, or a TorchRL buffer with uniform
    sampling and no transform, whose rows are then copied to the parameters' device, and again when
    the buffer has been written to (by this process: call ``recapture()`` where another writes).
    Random tensors that the loss reads (``random_inputs``) are drawn after the row numbers, from the
    same generator, unless the rows have such keys.
    Returns the means of the step's metrics over the updates, as tensors on the device: reading them
    is the only wait.

    With Adam or AdamW an update is one compiled program. On CUDA the updates of a call are one CUDA
    graph, which is replayed; the first call runs them without a graph. Elsewhere the program is
    called ``updates`` times without checks between. A loaded state, a moved parameter, other settings
    of the loss or the optimizer, other modes or rows make another program before the next update;
    learning rates are tensors, so schedules do not. Not watched: code and attributes of your own
    modules; call ``recapture()`` after changing those.

    With any other optimizer a call makes ``updates`` eager updates, on every device, and a log line
    says so; these draw a loss's random tensors from torch's default generator.

    Raises ``ValueError`` on ``updates < 1``; a buffer that samples otherwise; rows on another
    device; categories that the networks' ``OneHot`` does not know; a schedule that changes more than
    learning rates; on CUDA, states of the optimizer on the CPU, and targets that would move in the
    middle of a call. ``TypeError`` on a step or a replay of another kind. A call raises
    ``RuntimeError`` where the step's own call does (``torch.no_grad()``, several ranks).
    """
    return CapturedStep(step, replay, updates)


class CapturedStep:
    """What :func:`captured` returns: ``updates``, ``step`` (the plain one), ``replay``, a call."""

    def __init__(self, step: Step, replay: DeviceSampler | ReplayBuffer, updates: int) -> None:
        if not isinstance(step, Step):
            raise TypeError(f"step is {type(step).__name__}; expected an IQLStep.")
        if isinstance(updates, bool) or not isinstance(updates, int):
            raise TypeError(f"updates is {updates!r}; expected an integer >= 1.")
        check_whole(updates=updates)
        self.step, self.replay, self.updates = step.plain, replay, updates
        self._device = self.step.device
        _check_replay(replay, self._device)
        self._in_graph = fits_a_graph(self.step.optimizer)
        self._graph: CudaGraph | None = None
        if self._in_graph:
            check_traceable(self.step.loss)
        else:
            log_eager(self.step)
        if self._in_graph and CudaGraph.supports(self._device):
            _check_cuda(self.step, updates)
            self._graph = CudaGraph(self._device)
        self._generator: torch.Generator | None = None  # of a buffer's copied rows
        self._update = GraphUpdate(self.step)
        self.recapture()

    def recapture(self) -> None:
        """Capture again at the next call, from a buffer's rows as they are then."""
        self._copy: tuple[object, DeviceSampler] | None = None
        self._made_for: tuple[Any, ...] | None = None  # what a program and its tensors are for

    def __call__(self) -> TensorDictBase:
        self.step.check_trains()
        rows = self._rows()
        if not self._in_graph:
            metrics = torch.stack([self.step(rows.sample()) for _ in range(self.updates)])
            return metrics.mean(0)
        self._train(rows)
        mark_stepped(self.step.optimizer)
        means = dict(zip(self._names, (self._sums / self.updates).unbind(), strict=True))
        return TensorDict(means, batch_size=self._sums.shape[1:])

    def state_dict(self) -> dict[str, Any]:
        """The step's state, and the state of sampling from a buffer's rows."""
        generator = None if self._generator is None else self._generator.get_state()
        return self.step.state_dict() | {"generator": generator}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of this class or of a plain step."""
        self.step.load_state_dict(state_dict)
        generator = state_dict.get("generator")
        self._copy = self._generator = None
        if generator is not None:
            self._generator = torch.Generator(self._device)
            self._generator.set_state(generator.cpu())

    # -- the program of one update -------------------------------------------------------------------

    def _program(self, rows: DeviceSampler) -> Program:
        """The program for the step as it is now, and its arguments.

        The guards of ``torch.compile`` are checked here, once for all updates of a call: where
        something differs from what a program was made for, another one is made.
        """
        with self.step.modes(), tracing_gradients():
            self._prepare(rows)
            self._traced(rows, self._update.moments())
        function, arguments = self._kept
        self._kept.clear()
        return function, arguments

    def _prepare(self, rows: DeviceSampler) -> None:
        """Make what a program reads and writes besides the step's own tensors, where it changed."""
        loss, where = self.step.loss, self._device
        _ = loss.in_keys  # kept by the loss from now on: a guard would notice that later
        if self._made_for is None or self._made_for[:2] != (rows, rows.batch_size):
            shape = rows.index_shape(rows.batch_size)
            self._index = torch.zeros(shape, dtype=torch.int64, device=where)
            self._shape = rows.gather(self._index).batch_size
        names, inputs = (
            [*LOSSES, *loss.scalar_names],
            self.step.evaluated.random_inputs(self._shape),
        )
        groups = len(self.step.optimizer.param_groups)
        made_for = (rows, rows.batch_size, names, inputs, groups)
        if made_for == self._made_for:
            return
        check_categories(rows.column, self._update.limits)
        self._made_for, self._names = made_for, names
        runs = () if self.step.lift is None else (self.step.lift.members,)
        self._sums = torch.zeros((len(names), *runs), dtype=number_dtype(where), device=where)
        # learning rates of the coming updates, and of the one after them
        self._rates = torch.zeros(
            (self.updates + 1, groups), dtype=number_dtype(where), device=where
        )
        drawn = {name: draw for name, draw in inputs.items() if rows.column((name,)) is None}
        like = next(loss.parameters())
        # by name, the draw and the tensor that the program reads
        self._draws = {name: (draw, draw.empty(like)) for name, draw in drawn.items()}
        self._traced = self._new_program()

    def _new_program(self) -> Callable[..., None]:
        """:meth:`_one_update` under ``torch.compile``; a call executes nothing of it.

        It puts the program, and the arguments with which it makes the update, into ``self._kept``.
        Dynamo keeps its backends alive, so this one refers to no tensors.
        """
        options = program_options(self._device, self.step.loss.parameters())
        kept: list[Any] = []
        self._kept = kept

        def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., tuple[()]]:
            function = compile_program(graph, inputs, options)

            def keep(*arguments: Any) -> tuple[()]:
                kept[:] = function, arguments
                return ()

            return keep

        guards: Any = {"guard_filter_fn": worth_checking}
        return torch.compile(
            self._one_update, fullgraph=True, dynamic=False, backend=backend, options=guards
        )

    def _one_update(self, rows: DeviceSampler, moments: Moments) -> None:
        draws = {name: out for name, (_, out) in self._draws.items()}
        batch = self.step.evaluated.prepare_batch(rows.gather(self._index), draws)
        losses, summary = self._update.run(
            batch, moments, self.step.loss.deterministic_sampling_mode
        )
        metrics = losses | summary
        self._sums.add_(torch.stack([metrics[name].to(self._sums.dtype) for name in self._names]))

    # -- the updates of a call ---------------------------------------------------------------------

    def _train(self, rows: DeviceSampler) -> None:
        """All updates of a call. Nothing advances where a capture or a check before it raises."""
        updater, graph, program = self.step.target_updater, self._graph, self._program(rows)
        work = functools.partial(self._run, rows, program)
        if graph is not None:
            _check_alignment(updater, self.updates)
            graph.record(work, rows.generator, self._fixed(rows, program))
        rates = upcoming_lrs(self.step, self.updates)
        if rates is not None:
            self._rates.copy_(rates, non_blocking=True)
        if graph is None:
            work()
            return
        graph.run(work)
        if isinstance(updater, HardUpdate):
            for _ in range(self.updates):
                updater.step()

    def _run(self, rows: DeviceSampler, program: Program) -> None:
        function, arguments = program
        updater, scheduled = self.step.target_updater, bool(self.step.lr_schedulers)
        in_python = not self.step.followed.targets and self._graph is None
        self._sums.zero_()
        for number in range(self.updates):
            rows.draw(self._index)
            for draw, out in self._draws.values():
                draw.fill(out, rows.generator)
            if scheduled:
                self._update.rates.copy_(self._rates[number])
            function(*arguments)
            if in_python and updater is not None:
                updater.step()
        if scheduled:
            self._update.rates.copy_(self._rates[self.updates])

    def _fixed(self, rows: DeviceSampler, program: Program) -> tuple[Any, ...]:
        """What a CUDA graph of :meth:`_run` has fixed, tensors as addresses."""
        function, arguments = program
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return (
            function,
            [t.data_ptr() if isinstance(t, Tensor) else t for t in arguments],
            (rows, rows.rows, rows.generator, bool(self.step.lr_schedulers)),
            # torch's settings that decide which kernels are launched
            (Arithmetic.current(), cudnn.deterministic, cudnn.benchmark),
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        )

    # -- rows of a buffer ----------------------------------------------------------------------------

    def _rows(self) -> DeviceSampler:
        """The sampler itself, or one over the buffer's rows as they are now."""
        replay = self.replay
        if isinstance(replay, DeviceSampler):
            return replay
        state = (len(replay), getattr(replay, "write_count", None), _versions(replay))
        if self._copy is None or self._copy[0] != state:
            if self._generator is None:
                self._generator = torch.Generator(self._device).manual_seed(_seed_from(replay))
            size: Any = replay.batch_size
            rows: DeviceSampler
            if isinstance(replay.storage, WindowStorage):  # whose frames are held once
                rows = replay.storage.windows.device_sampler(size, self._device, seed=0)
            else:
                rows = DeviceSampler(replay[:].exclude("index"), size, device=self._device, seed=0)
            rows.generator = self._generator
            self._copy = (state, rows)
        return self._copy[1]


class CudaGraph:
    """Work that is the same at every call, on the CUDA device ``device``.

    The first :meth:`run` does the work as it is, because libraries set themselves up in their first
    call, which no capture allows. :meth:`record` then records the work, and later runs replay it.

    First run and capture use one stream that belongs to this object alone, also when the work is
    recorded again. On a stream that several graphs share, as torch's default capture stream, the
    destruction of one graph clears the cuBLAS workspaces that the others still use
    (pytorch/pytorch issue 193402), and every new stream takes another workspace.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fixed: object = None
        self._warm = False

    @staticmethod
    def supports(device: torch.device) -> bool:
        return device.type == "cuda"

    def record(self, work: Callable[[], object], generator: torch.Generator, fixed: object) -> None:
        """Record ``work``, which draws from ``generator``; nothing of it is executed.

        Does nothing before the first run, or where the work is recorded. Where ``fixed``, by which
        works are told apart, is another than before, the graph is freed and the next run does the work
        as it is. A failure leaves the generator, the current device and the current stream as they
        were.
        """
        if fixed != self._fixed:
            if self._graph is not None:
                self._graph.reset()
            self._graph, self._warm, self._fixed = None, False, fixed
        if self._graph is not None or not self._warm:
            return
        before = generator.clone_state()
        try:
            # The end of a failed capture raises before it resets the stream, so that is done here.
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                graph = torch.cuda.CUDAGraph()
                graph.register_generator_state(generator)
                with torch.cuda.graph(graph, stream=self._stream):
                    work()
        except BaseException:
            # the state that was registered may still be marked as being captured
            generator.graphsafe_set_state(before)
            raise
        self._graph = graph

    def run(self, work: Callable[[], object]) -> None:
        """Replay the graph; without a graph, do ``work`` as it is."""
        with torch.cuda.device(self._device):
            if self._graph is not None:
                self._graph.replay()
                return
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)
            self._warm = True


def _versions(replay: ReplayBuffer) -> tuple[int, ...]:
    """How often each of a buffer's tensors was written to in place, by this process."""
    rows = stored_rows(replay)
    if not isinstance(rows, TensorDictBase):
        return ()
    leaves = rows.values(include_nested=True, leaves_only=True)
    return tuple(version_of(leaf) for leaf in leaves if not leaf.is_inference())


def _seed_from(replay: ReplayBuffer) -> int:
    """A seed drawn from the buffer's generator, or torch's own."""
    generator = generator_of(replay)
    where = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=where))


def _check_replay(replay: DeviceSampler | ReplayBuffer, device: torch.device) -> None:
    if isinstance(replay, ShardedReplay):
        raise TypeError(
            "replay is a ShardedReplay, whose shards are replaced while training; captured updates "
            "read rows that stay. Use compiled(step) or the step itself with OfflineTrainer, or a "
            "DeviceSampler where the dataset fits into memory."
        )
    if isinstance(replay, DeviceSampler):
        if replay.tables[0].device != device:
            raise ValueError(
                f"replay's rows are on {replay.tables[0].device} and the parameters on {device}; "
                f"build the sampler with device={str(device)!r}."
            )
        return
    if not isinstance(replay, ReplayBuffer):
        raise TypeError(
            f"replay is {type(replay).__name__}; expected a DeviceSampler or a TorchRL replay buffer."
        )
    if type(replay.sampler) is not RandomSampler:
        raise ValueError(
            f"replay samples with {type(replay.sampler).__name__}; captured updates sample "
            "uniformly on the device. Use RandomSampler, or the step or compiled(step) in a loop."
        )
    if len(replay.transform):
        raise ValueError(
            "replay has transforms, which would run in Python at every update. Apply them to "
            "the data once, or use the step or compiled(step) in a loop."
        )
    if replay.batch_size is None:
        raise ValueError("replay has no batch_size; give it one when you build it.")


def _check_cuda(step: IQLStep, updates: int) -> None:
    """Raise ``ValueError`` on an optimizer or updater that a CUDA graph cannot hold."""
    optimizer, updater = step.optimizer, step.target_updater
    if step.ranks is not None:
        raise ValueError(
            f"the step is data parallel over {step.ranks.size} ranks, and sums over GPUs inside a CUDA "
            "graph are not tested yet, so they are refused; use compiled(step), or captured with a "
            "step on one GPU without data_parallel."
        )
    options = ("capturable", "fused")
    if not all(any(group.get(name) for name in options) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__} that counts its updates on the CPU; build it "
            f"with {' or '.join(f'{name}=True' for name in options)}, or use compiled(step)."
        )
    if updater is not None and not step.followed.targets and not isinstance(updater, HardUpdate):
        raise ValueError(
            f"a {type(updater).__name__} moves the targets in Python, after every update; use "
            "SoftUpdate or HardUpdate, or compiled(step)."
        )
    _check_alignment(updater, updates)


def _check_alignment(updater: Any, updates: int) -> None:
    """Raise ``ValueError`` unless a ``HardUpdate`` copies after the last update of a call."""
    if not isinstance(updater, HardUpdate):
        return
    period = updater.value_network_update_interval + 1  # the update that copies is not counted
    coming = period - updater.counter
    if period % updates or coming % updates:
        raise ValueError(
            f"HardUpdate copies to the targets every {period} updates, next after {coming}, and a "
            f"call makes {updates}; choose updates that divide both."
        )


def upcoming_lrs(step: IQLStep, updates: int) -> Tensor | None:
    """Step every schedule ``updates`` times; the learning rates before and after each time.

    Float64 ``(updates + 1, groups)``: row 0 is for the first update, the last row for the update
    after these. On the CPU, or on the parameters' device where a learning rate is a tensor there: then
    nothing waits for the device. None where no schedule is.

    Raises ``ValueError`` where a schedule changes other settings of the optimizer; schedules and
    optimizer are then as before.
    """
    schedulers, groups = step.lr_schedulers, step.optimizer.param_groups
    if not schedulers:
        return None
    mark_stepped(step.optimizer)
    states = copy.deepcopy([scheduler.state_dict() for scheduler in schedulers])
    before = [(options_of(group), copy.deepcopy(group["lr"])) for group in groups]
    rows = [learning_rates(groups, step.device)]
    for _ in range(updates):
        for scheduler in schedulers:
            scheduler.step()
        rows.append(learning_rates(groups, step.device))
    if all(options_of(group) == old for group, (old, _) in zip(groups, before, strict=True)):
        return torch.stack(rows)
    for scheduler, state in zip(schedulers, states, strict=True):
        scheduler.load_state_dict(state)
    for group, (options, rate) in zip(groups, before, strict=True):
        group.update(options)
        if isinstance(rate, Tensor):
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate
    raise ValueError(CHANGES_MORE)
