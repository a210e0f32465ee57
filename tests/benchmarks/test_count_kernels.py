"""How many kernels one update is on CUDA, counted in the program that Inductor generates for it."""

from __future__ import annotations

import pytest
from count_kernels import CASES, count, launches

LIMITS = {
    "sequential": 56,
    "simultaneous": 49,
    "all diagnostics": 62,
    "discrete": 26,
    "8 members": 70,
}


def test_launches_of_a_text_counted_by_hand():
    text = """
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''
def call(args):
    extern_kernels.mm(arg0, arg1, out=buf0)
    extern_kernels.addmm(arg2, buf0, arg1, alpha=1, beta=1, out=buf1)
        triton_poi_fused_add_0.run(buf1, 256, stream=stream0)
    triton_per_fused_sum_1.run(buf1, 256, stream=stream0)
    triton_red_fused_sum_2.run(buf1, 256, stream=stream0)
    triton_for_fused_3.run(buf1, stream=stream0)
    extern_kernels.other(buf1)
    # extern_kernels.mm(in a comment)
"""
    assert launches(text) == {
        "products": 2,
        "element-wise": 1,
        "reductions": 2,
        "several in one": 1,
        "library: other": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_update_has_at_most_so_many(case):
    counts, text = count(case)
    assert "extern_kernels.mm(" in text or "extern_kernels.bmm(" in text
    assert counts["products"] > 0
    assert counts.total() <= LIMITS[case], counts
