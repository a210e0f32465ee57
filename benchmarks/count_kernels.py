"""The kernels that Inductor would launch on CUDA in one update; needs neither a GPU nor Triton.

    python benchmarks/count_kernels.py
    python benchmarks/count_kernels.py --case "all diagnostics" --show code.py

A captured update is traced on the CPU. Its graph of operators is then moved to the device ``cuda``
with tensors that have a shape and no memory, and Inductor generates the program for an H100 (compute
capability 9.0) up to the source text; nothing is compiled or run. Counted are the launches in that
text: each call of a library (``extern_kernels.mm``, ...) and of a generated kernel. Drawing the row
indices, one more launch per update, is included, and a schedule's copy of the learning rates. Not
counted: launches that a library call divides itself into, such as split-K reductions of cuBLAS.
"""

from __future__ import annotations

import argparse
import re
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from bench_inputs import CATEGORY_SIZES, RATES, categories, category_parts
from iql_torchrl import DiscreteIQLLoss, IQLLoss, IQLPopulation, IQLStep, captured
from iql_torchrl.config import arithmetic
from iql_torchrl.data import DeviceSampler
from iql_torchrl.update.compiled import program_options
from step_rivals import Sizes, config_of, dataset_of, make_step, parts, step_of, transitions

import torch
from torch._guards import detect_fake_mode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
LAUNCH = re.compile(r"^ +(?:(extern_kernels)\.(\w+)\(|(\w+)\.run\()", re.MULTILINE)
#: how Inductor begins the names of its kernels
KINDS = {"poi": "element-wise", "red": "reductions", "per": "reductions", "for": "several in one"}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Generated(Exception):
    """Raised in place of compiling, with the program's text."""


def _generate(graph: Any) -> None:
    code, *_ = graph.codegen()
    raise Generated(getattr(code, "value", code))


@contextmanager
def imagined_gpu() -> Iterator[None]:
    """Inside, Inductor generates code for an H100 although there is none."""
    import torch._inductor.graph
    import torch._inductor.scheduler
    import torch.utils._triton
    from torch._inductor.codecache import CacheBase
    from torch._inductor.fx_passes import reinplace

    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_get_device_properties": lambda device=None: H100,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *state: None,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    inductor = torch._inductor
    with ExitStack() as stack:
        for name, replacement in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement, create=True))
        for owner, name, replacement in (
            (torch.utils._triton, "triton_hash_with_backend", lambda: ""),
            (inductor.scheduler, "has_triton", lambda *device: True),
            (inductor.graph.GraphLowering, "compile_to_module", _generate),
            # copies a tensor without memory, which a build of torch without CUDA cannot
            (reinplace, "_inplace_generalized_scatter", lambda tensor, source, views: tensor),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        settings = {"fx_graph_cache": False, "compile_threads": 1}
        stack.enter_context(inductor.config.patch(settings))
        # what Inductor notes about the system is not kept beyond this context
        stack.callback(CacheBase.get_system.cache_clear)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor recommends TF32
            yield


def on_cuda(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The graph with every tensor on ``cuda``, and its inputs without memory."""
    for node in graph.graph.nodes:
        device = node.kwargs.get("device")
        if device is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    mode = detect_fake_mode(inputs)
    with mode:
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")
            if isinstance(x, torch.Tensor)
            else x
            for x in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return graph, moved


Make = Callable[[str], Callable[..., Any]]


@contextmanager
def programs_for_cuda(make: Make) -> Iterator[None]:
    """Inside, the program of a captured step is ``make(text)``, with the text that is meant for CUDA.

    The step itself is on the CPU.
    """

    def compile_program(
        graph: Any, inputs: Sequence[Any], options: dict[str, Any]
    ) -> Callable[..., Any]:
        from torch._inductor import compile_fx

        inner = compile_fx.compile_fx_inner

        def generate(graph: Any, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
            graph, moved = on_cuda(graph, inputs)
            with imagined_gpu(), torch._inductor.config.patch(options):
                try:
                    inner(graph, moved, **settings)
                except Exception as error:
                    text = _text_of(error)
                    if text is None:
                        raise
                    return make(text)
            raise RuntimeError("Inductor generated no program")

        program: Callable[..., Any] = compile_fx.compile_fx(graph, inputs, inner_compile=generate)
        return program

    with (
        mock.patch("iql_torchrl.update.captured.compile_program", compile_program),
        # as if traced on CUDA
        mock.patch.object(arithmetic, "LAUNCHING", ("cpu", "cuda")),
        mock.patch(
            "iql_torchrl.update.captured.program_options",
            lambda device, parameters: program_options(torch.device("cuda"), parameters),
        ),
    ):
        yield


def program_of(step: IQLStep, sampler: DeviceSampler) -> str:
    """The text of the program of one captured update of ``step`` on CUDA; nothing is updated."""
    texts: list[str] = []

    def keep(text: str) -> Callable[..., Any]:
        texts.append(text)
        return lambda *arguments: ()

    with programs_for_cuda(keep):
        captured(step, sampler, updates=1)()
    (text,) = texts
    return text


def _text_of(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, Generated):
            return str(error)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None


def launches(text: str) -> Counter[str]:
    """Launches in the text of a program, by kind."""
    counts: Counter[str] = Counter()
    for library, name, generated in LAUNCH.findall(text):
        if library:
            counts["products" if name in PRODUCTS else f"library: {name}"] += 1
        else:
            kind = re.match(r"triton_([a-z]+)_fused", generated)
            counts[KINDS.get(kind[1] if kind else "", "other")] += 1
    return counts


Work = tuple[IQLStep, DeviceSampler]
SIZES = Sizes(rows=1000)


def sampler() -> DeviceSampler:
    return DeviceSampler(transitions(SIZES), SIZES.batch, seed=0)


def paper(order: str) -> Work:
    """The paper's agent, as bench_step.py builds it."""
    return make_step(SIZES, "cpu", order), sampler()


def everything() -> Work:
    """The same with all diagnostics, clipped gradients and a schedule of the learning rate."""
    loss = IQLLoss(*parts(SIZES, "cpu"), diagnostics=True)
    return step_of(loss, max_grad_norm=1.0, schedule=1000), sampler()


def discrete() -> Work:
    """Categories of ICU-Sepsis' sizes."""
    loss = DiscreteIQLLoss(*category_parts(one_hot=False), action_space="categorical")
    rows = categories(one_hot=False, device="cpu", rows=1000)
    return step_of(loss, capturable=True, **RATES), DeviceSampler(
        rows, CATEGORY_SIZES.batch, seed=0
    )


def population(members: int) -> Work:
    """Runs that differ in seed and temperature, on shared batches."""
    runs = [config_of(SIZES, "cpu", seed=i, temperature=float(i % 4)) for i in range(members)]
    together = IQLPopulation(runs, dataset_of(SIZES))
    return together.step, together.sampler


CASES: dict[str, Callable[[], Work]] = {
    "sequential": partial(paper, "sequential"),
    "simultaneous": partial(paper, "simultaneous"),
    "all diagnostics": everything,
    "discrete": discrete,
    "8 members": partial(population, 8),
}


def count(case: str) -> tuple[Counter[str], str]:
    """Launches of one update by kind, and the text of its program."""
    torch._dynamo.reset()
    step, sampler = CASES[case]()
    text = program_of(step, sampler)
    counts = launches(text) + Counter({"draw of the indices": 1})
    if step.lr_schedulers:
        counts["learning rates"] = 1
    return counts, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--show", type=Path, metavar="FILE", help="write the last program here")
    options = parser.parse_args()
    print(f"torch {torch.__version__}: launches of one captured update on CUDA")
    for case in options.case or CASES:
        counts, text = count(case)
        kinds = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
        print(f"{case:16}{counts.total():4}: {kinds}", flush=True)
        if options.show:
            options.show.write_text(text)


if __name__ == "__main__":
    main()
