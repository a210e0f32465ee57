"""Microseconds of one matrix product by the libraries that torch has on a CPU: MKL and oneDNN.

    python benchmarks/bench_products.py
    python benchmarks/bench_products.py --size 512 --threads 1
    python benchmarks/bench_products.py --shapes 1500

``torch.mm`` of float32 is MKL's on x86; oneDNN computes it in the operation that Inductor calls in
inference.
A layer of a network, ``x @ weight.T``. The two take turns; reported is the median of the rounds.
``--shapes`` multiplies matrices of so many random shapes and layouts, and reports how the ratio of the
two depends on the shortest side and on the number of multiplications: the limits of
``iql_torchrl/networks/products.py`` are taken from there.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

ROUNDS, CALLS = 11, 100
SIDES = (17, 32, 48, 64, 65, 96, 100, 127, 128, 200, 256, 257, 300, 333, 512, 1000, 1024)
SHORTEST, LARGE = (17, 32, 64, 128), (2**18, 2**20, 2**22)
LINEAR = torch.ops.mkldnn._linear_pointwise  # the only way to oneDNN's product from Python


def microseconds(product: Callable[[], object], calls: int) -> float:
    """Mean time of a call in one block of ``calls`` calls."""
    began = time.perf_counter()
    for _ in range(calls):
        product()
    return (time.perf_counter() - began) / calls * 1e6


def by_onednn(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``first @ second``."""
    return LINEAR(first, second.mT, None, "none", [], "")


def one_size(size: int) -> None:
    first, second = torch.randn(size, size), torch.randn(size, size).mT
    products = {"MKL": lambda: first @ second, "oneDNN": lambda: by_onednn(first, second)}
    torch.testing.assert_close(products["oneDNN"](), products["MKL"](), rtol=1e-4, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(ROUNDS):
        for name, product in products.items():
            times[name].append(microseconds(product, CALLS))
    for name, values in times.items():
        print(f"{name:8}{statistics.median(values):8.1f} us")


def many_shapes(count: int) -> None:
    """Ratios of the time of oneDNN to that of MKL, over random shapes and layouts."""
    drawn, ratios = random.Random(0), []
    while len(ratios) < count:
        m, k, n = (drawn.choice(SIDES) for _ in range(3))
        if not LARGE[0] <= m * k * n <= 2**28:
            continue
        first = torch.randn(k, m).mT if drawn.random() < 0.5 else torch.randn(m, k)
        second = torch.randn(n, k).mT if drawn.random() < 0.5 else torch.randn(k, n)
        pairs = []
        for _ in range(7):
            mkl = microseconds(lambda a=first, b=second: a @ b, 1)
            pairs.append(microseconds(lambda a=first, b=second: by_onednn(a, b), 1) / mkl)
        ratios.append((min(m, k, n), m * k * n, statistics.median(pairs[1:])))
    print(
        f"{'shortest side':>14}{'products >=':>13}{'shapes':>8}{'median':>8}{'90 %':>7}{'max':>7}"
    )
    for shortest in SHORTEST:
        for large in LARGE:
            chosen = sorted(r for side, size, r in ratios if side >= shortest and size >= large)
            ninety = chosen[int(0.9 * len(chosen))]
            print(
                f"{shortest:14}{f'2**{large.bit_length() - 1}':>13}{len(chosen):8}"
                f"{statistics.median(chosen):8.2f}{ninety:7.2f}{chosen[-1]:7.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=256, help="rows and columns of both matrices")
    parser.add_argument("--shapes", type=int, default=0, help="number of random shapes instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    what = f"{options.shapes} shapes" if options.shapes else f"{options.size} cubed"
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {options.threads} threads, {what}")
    if options.shapes:
        many_shapes(options.shapes)
    else:
        one_size(options.size)


if __name__ == "__main__":
    main()
