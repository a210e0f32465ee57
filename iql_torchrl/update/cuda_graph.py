"""Work on a CUDA device, recorded as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["CudaGraph"]


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
        """Replay the graph; where there is none, do ``work`` as it is."""
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
