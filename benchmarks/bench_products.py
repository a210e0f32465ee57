"""Microseconds of one matrix product by the libraries that torch has on a CPU: MKL and oneDNN.

    python benchmarks/bench_products.py
    python benchmarks/bench_products.py --size 512 --threads 1

``torch.mm`` of float32 is MKL's on x86; oneDNN computes it in the operation that Inductor calls in
inference.
A layer of a network, ``x @ weight.T``. The two take turns; reported is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

ROUNDS, CALLS = 11, 100


def microseconds(product: Callable[[], object]) -> float:
    """Mean time of a call in one block of calls."""
    began = time.perf_counter()
    for _ in range(CALLS):
        product()
    return (time.perf_counter() - began) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=256, help="rows and columns of both matrices")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    first, second = (torch.randn(options.size, options.size) for _ in range(2))
    weight = second.mT.contiguous()
    linear = torch.ops.mkldnn._linear_pointwise  # the only way to this product from Python
    products = {
        "MKL": lambda: first @ weight.mT,
        "oneDNN": lambda: linear(first, weight, None, "none", [], ""),
    }
    torch.testing.assert_close(products["oneDNN"](), products["MKL"](), rtol=1e-4, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(ROUNDS):
        for name, product in products.items():
            times[name].append(microseconds(product))
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{options.threads} threads, {options.size} x {options.size} x {options.size}"
    )
    for name, values in times.items():
        print(f"{name:8}{statistics.median(values):8.1f} us")


if __name__ == "__main__":
    main()
