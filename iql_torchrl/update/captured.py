"""``captured``: K updates per call, sampling included, without Python work between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.objectives import HardUpdate

from iql_torchrl.data.categories import category_limits, check_rows
from iql_torchrl.data.replay import DeviceSampler
from iql_torchrl.data.windows import WindowStorage
from iql_torchrl.losses import LOSSES, ImplicitQLoss
from iql_torchrl.private_apis import (
    compile_program,
    generator_of,
    mark_stepped,
    stored_rows,
    tracing_gradients,
    version_of,
)
from iql_torchrl.update.adam import Moments
from iql_torchrl.update.checks import check_alignment, check_cuda, check_replay
from iql_torchrl.update.compiled import log_eager
from iql_torchrl.update.cuda_graph import CudaGraph
from iql_torchrl.update.graph import GraphUpdate, fits_a_graph
from iql_torchrl.update.inductor import program_options
from iql_torchrl.update.schedules import coming_rates
from iql_torchrl.update.snapshot import Snapshot, take_snapshot
from iql_torchrl.update.step import IQLStep, Step, Terms, check_update_trains

__all__ = ["CapturedStep", "captured"]


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
    called ``updates`` times without checks between. A loaded state, a moved parameter, other knobs
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
            raise TypeError(f"updates is {updates!r}; expected a whole number >= 1.")
        if updates < 1:
            raise ValueError(f"updates is {updates}; expected at least 1 a call.")
        check_replay(replay)
        self.step, self.replay, self.updates = step.plain, replay, updates
        self._device = self.step.device
        if isinstance(replay, DeviceSampler) and replay.tables[0].device != self._device:
            raise ValueError(
                f"replay's rows are on {replay.tables[0].device} and the parameters on "
                f"{self._device}; build the sampler with device={str(self._device)!r}."
            )
        self._in_graph = fits_a_graph(self.step.optimizer)
        self._graph: CudaGraph | None = None
        if not self._in_graph:
            log_eager(self.step)
        elif CudaGraph.supports(self._device):
            check_cuda(self.step, updates)
            self._graph = CudaGraph(self._device)
        self._copy: tuple[object, DeviceSampler] | None
        self._generator: torch.Generator | None = None  # of a buffer's copied rows
        self.recapture()

    @property
    def plain(self) -> IQLStep:
        """The step with the loss, the optimizer and all settings."""
        return self.step

    def recapture(self) -> None:
        """Capture again at the next call, from a buffer's rows as they are then."""
        self._copy = None
        self._forget()

    def _forget(self) -> None:
        self._snapshot: Snapshot | None = None
        self._program: Callable[[], object] | None = None
        if self._graph is not None:
            self._graph.forget()
        if self._in_graph:
            self._update = GraphUpdate(self.step)

    def __call__(self) -> TensorDictBase:
        check_update_trains(
            independent_ranks=self.step.independent_ranks,
            data_parallel=self.step.ranks is not None,
        )
        rows = self._rows()
        if not self._in_graph:
            metrics = torch.stack([self.step(rows.sample()) for _ in range(self.updates)])
            return metrics.mean(0)
        moments = self._update.moments()
        seen = take_snapshot(self.step, rows, moments)
        if self._snapshot is None or not seen.same(self._snapshot):
            self._forget()
            self._prepare(rows)
            moments = self._update.moments()
            self._record(rows, moments)
            self._snapshot = take_snapshot(self.step, rows, moments)
        self._train(lambda: self._run(rows, moments), rows.generator)
        mark_stepped(self.step.optimizer)
        means = (self._sums / self.updates).unbind()
        return TensorDict(
            dict(zip(self._names, means, strict=True)), batch_size=self._sums.shape[1:]
        )

    def state_dict(self) -> dict[str, Any]:
        """The step's state, and the state of sampling from a buffer's rows."""
        generator = None if self._generator is None else self._generator.get_state()
        return self.step.state_dict() | {"generator": generator}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Also of a plain step's state."""
        self.step.load_state_dict(state_dict)
        generator = state_dict.get("generator")
        self._copy = None
        self._generator = None
        if generator is not None:
            self._generator = torch.Generator(self._device)
            self._generator.set_state(generator.cpu())

    # -- one update ------------------------------------------------------------------------------

    def _prepare(self, rows: DeviceSampler) -> None:
        """What a capture reads and writes besides the step's own tensors."""
        check_rows(rows, category_limits(self.step.loss))
        self._names = _metric_names(self.step.loss)
        self._index = torch.zeros(rows.batch_size, dtype=torch.int64, device=self._device)
        runs = () if self.step.members is None else (self.step.members,)
        self._sums = torch.zeros(
            (len(self._names), *runs), dtype=torch.float64, device=self._device
        )
        inputs = self.step.loss.random_inputs(rows.gather(self._index).batch_size)
        like = next(self.step.loss.parameters())
        # by name, the draw and the tensor that the program reads
        self._draws = {
            name: (draw, draw.empty(like))
            for name, draw in inputs.items()
            if rows.column((name,)) is None
        }
        groups = len(self.step.optimizer.param_groups)
        self._rates = torch.zeros(  # of the coming updates, and the one after them
            (self.updates + 1, groups), dtype=torch.float64, device=self._device
        )

    def _record(self, rows: DeviceSampler, moments: Moments) -> None:
        """Compile one update and keep the program with its arguments; nothing is updated yet."""
        update, loss = self._update, self.step.loss
        draws = {name: out for name, (_, out) in self._draws.items()}
        recorder = Recorder(program_options(self._device, loss.parameters()))

        def one_update() -> None:
            batch = rows.gather(self._index)
            self._add(update(loss.read(batch, draws), moments))

        traced = torch.compile(one_update, fullgraph=True, dynamic=False, backend=recorder)
        with self.step.setting(), tracing_gradients():
            traced()
        self._program = recorder.release()

    def _add(self, terms: Terms) -> None:
        metrics = terms[0] | terms[1]
        self._sums.add_(torch.stack([metrics[name].detach().double() for name in self._names]))

    def _train(self, work: Callable[[], None], generator: torch.Generator) -> None:
        """All updates of a call. Nothing advances where a capture or a check before it raises."""
        updater, graph = self.step.target_updater, self._graph
        if graph is not None:
            check_alignment(updater, self.updates)
            graph.record(work, generator)
        rates = coming_rates(self.step, self.updates)
        if rates is not None:
            self._rates.copy_(rates, non_blocking=True)
        if graph is None:
            work()
            return
        graph.run(work)
        if isinstance(updater, HardUpdate):
            for _ in range(self.updates):
                updater.step()

    def _run(self, rows: DeviceSampler, moments: Moments) -> None:
        program = self._program
        assert program is not None
        self._sums.zero_()
        updater = self.step.target_updater
        in_python = not self.step.followed.targets and self._graph is None
        scheduled = bool(self.step.lr_schedulers)
        for number in range(self.updates):
            torch.randint(rows.rows, self._index.shape, generator=rows.generator, out=self._index)
            for draw, out in self._draws.values():
                draw.fill(out, rows.generator)
            if scheduled:
                self._set_rates(moments, self._rates[number])
            program()
            if in_python and updater is not None:
                updater.step()
        if scheduled:
            self._set_rates(moments, self._rates[self.updates])

    def _set_rates(self, moments: Moments, values: Tensor) -> None:
        for rate, value in zip(moments.rates, values.unbind(), strict=True):
            rate.copy_(value)
        self._update.forget_rates()

    # -- what may change between calls -----------------------------------------------------------

    def _rows(self) -> DeviceSampler:
        """The sampler itself, or one over the buffer's rows as they are now."""
        replay = self.replay
        if isinstance(replay, DeviceSampler):
            return replay
        state = (len(replay), getattr(replay, "write_count", None), _versions(replay))
        if self._copy is None or self._copy[0] != state:
            if self._generator is None:
                self._generator = torch.Generator(self._device).manual_seed(_seed_from(replay))
            rows = self._sampler_of(replay)
            rows.generator = self._generator
            self._copy = (state, rows)
        return self._copy[1]

    def _sampler_of(self, replay: ReplayBuffer) -> DeviceSampler:
        """A sampler over all rows of a buffer; of windows it holds the frames, once."""
        size, where = replay.batch_size, self._device
        if isinstance(replay.storage, WindowStorage):
            return replay.storage.windows.device_sampler(size, where, seed=0)
        return DeviceSampler(replay[:].exclude("index"), size, device=where, seed=0)


class Recorder:
    """A backend of ``torch.compile`` that keeps the program and its arguments, and runs nothing."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self._function: Any = compile_program(graph, inputs, self._options)
        return self._keep

    def _keep(self, *arguments: Any) -> tuple[()]:
        self._arguments = arguments
        return ()

    def release(self) -> Callable[[], object]:
        """The program as a function. Dynamo keeps its backends alive, so this one drops its data."""
        function, arguments = self._function, self._arguments
        del self._function, self._arguments
        return lambda: function(*arguments)


def _versions(replay: ReplayBuffer) -> tuple[int, ...]:
    """How often each of a buffer's tensors was written to in place, by this process."""
    rows = stored_rows(replay)
    if not isinstance(rows, TensorDictBase):
        return ()
    leaves = rows.values(include_nested=True, leaves_only=True)
    return tuple(version_of(leaf) for leaf in leaves if not leaf.is_inference())


def _metric_names(loss: ImplicitQLoss) -> list[str]:
    """Names of the step's metrics."""
    return [*LOSSES, *loss.scalar_names]


def _seed_from(replay: ReplayBuffer) -> int:
    """A seed drawn from the buffer's generator, or torch's own."""
    generator = generator_of(replay)
    where = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=where))
