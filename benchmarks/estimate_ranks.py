"""Estimate, not a measurement: which widths and batches 2, 8 and 64 GPUs would make faster.

    python benchmarks/estimate_ranks.py

Reads benchmarks/results/ranks.json, which bench_ranks.py writes and which was measured without a GPU.

At each width the measured time of one process is fitted by ``fixed + each * batch``. What does not
depend on the batch at the smallest width is taken for the host's work: Python and calls, which a GPU
needs too. The rest is the device's work, divided by ``speed``: a GPU's published rate in float32, times
the share of it that is assumed to be reached, over the rate of a product of 1024 x 1024 matrices on the
measured processor. With n GPUs

    exchange = sums * latency(n) + bytes * 2 (n - 1) / n / bandwidth(n)
    device   = (fixed - host) / speed + each * batch / n / speed + exchange
    time     = max(host, device)

because a GPU works while the host prepares its next calls. A second table leaves the host out
(``time = device``), as if all calls were in one CUDA graph, which ``captured`` does not offer for
several GPUs so far.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "ranks.json"

# H100 SXM, float32 without tensor cores: NVIDIA's data sheet, nvidia.com/en-us/data-center/h100.
RATE, REACHED = 67e12, 0.5


@dataclass(frozen=True)
class Link:
    """A group of GPUs: seconds of the smallest all-reduce, and bytes a second of "bus bandwidth".

    An all-reduce of S bytes takes ``S * 2 (n - 1) / n / bandwidth`` besides the latency
    (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    """

    gpus: int
    latency: float
    bandwidth: float


LINKS = (
    # one machine of H100: 370 GB/s of the 450 GB/s of NVLink (NVIDIA/nccl-tests issue 212, by an
    # author of NCCL); small sums took 6 us with 2 of them (NVIDIA/nccl issue 1259), and 10 us with 8
    # A100 (issue 583)
    Link(2, 6e-6, 370e9),
    Link(8, 10e-6, 370e9),
    # eight machines, one link of 400 Gb/s a GPU: its line rate; 25 us is NCCL's own prediction for two
    # machines (NVIDIA/nccl issue 1453), so eight machines take longer
    Link(64, 25e-6, 50e9),
)


def estimate(
    rows: Sequence[Mapping[str, float]],
    processor: float,
    links: Sequence[Link] = LINKS,
    *,
    with_host: bool = True,
) -> list[dict[str, float]]:
    """Milliseconds of one GPU, and the factor by which each link's GPUs are faster, for each row.

    ``rows``: ``width``, ``batch``, ``alone ms``, ``sums`` and ``numbers`` (float32) of an update; at
    least two batches for each width. ``processor``: operations a second of the measured processor.
    ``with_host``: whether an update takes at least as long as the work of the host.
    """
    speed = RATE * REACHED / processor
    fits = {width: _fit([r for r in rows if r["width"] == width]) for width in _widths(rows)}
    host = fits[min(fits)][0]
    lines = []
    for row in rows:
        fixed, each = fits[row["width"]]
        own = max(0.0, fixed - host) / speed

        def time(gpus: int, exchange: float, own=own, work=each * row["batch"] / speed) -> float:
            return max(host if with_host else 0.0, own + work / gpus + exchange)

        alone = time(1, 0.0)
        line = {"width": row["width"], "batch": row["batch"], "one GPU ms": 1e3 * alone}
        for link in links:
            sent = 4 * row["numbers"] * 2 * (link.gpus - 1) / link.gpus
            exchange = row["sums"] * link.latency + sent / link.bandwidth
            line[f"{link.gpus} GPUs"] = alone / time(link.gpus, exchange)
        more = {"device needs batch": (host - own) * speed / each} if with_host else {}
        lines.append(line | more)
    return lines


def estimates(rows: Sequence[Mapping[str, float]], processor: float) -> str:
    """Both tables, with their headings."""
    return "\n\n".join(
        (
            "An estimate for GPUs, which were not measured:",
            table(estimate(rows, processor)),
            "The same without the work of the host:",
            table(estimate(rows, processor, with_host=False)),
        )
    )


def _widths(rows: Sequence[Mapping[str, float]]) -> list[float]:
    return sorted({row["width"] for row in rows})


def _fit(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """``fixed`` and ``each`` in seconds, not negative, of least relative squares."""
    times = np.array([row["alone ms"] for row in rows]) / 1e3
    batches = np.array([row["batch"] for row in rows], dtype=float)
    if len(set(batches)) < 2:
        raise ValueError(
            f"width {rows[0]['width']} was measured at {len(rows)} batch; the estimate needs two or "
            "more: bench_ranks.py --batches 256 1024 4096."
        )
    columns = np.stack([1 / times, batches / times], 1)
    fixed, each = np.linalg.lstsq(columns, np.ones(len(rows)), rcond=None)[0]
    return max(0.0, float(fixed)), max(1e-12, float(each))


def table(rows: Sequence[Mapping[str, float]]) -> str:
    """The rows as a table of Markdown, three digits a number, whole numbers in full."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    lines += ["| " + " | ".join(_digits(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


def main() -> None:
    record = json.loads(RESULT.read_text())
    print(estimates(record["rows"], record["processor"]))


if __name__ == "__main__":
    main()
