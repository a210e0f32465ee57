"""Programs for devices on which every kernel is launched: what they compute, and their options."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_batch
from test_compilation import soft
from test_step import make_loss, snapshot
from torch import optim

from iql_torchrl import IQLStep, compiled
from iql_torchrl.config import devices
from iql_torchrl.private_apis import untiled_loops_only
from iql_torchrl.update import compiled as compiled_module
from iql_torchrl.update.compiled import JOINED, UNSPLIT, program_options


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_the_update_for_a_gpu_equals_the_plain_one(order, monkeypatch):
    """Traced on the CPU as for a GPU: small products as sums, norms of joined gradients."""
    monkeypatch.setattr(devices, "LAUNCHING", ("cpu",))
    torch._dynamo.reset()
    loss = make_loss().double()
    plain, other = (
        IQLStep(
            each,
            optim.AdamW(each.parameters(), lr=1e-2),
            soft(each),
            order=order,
            max_grad_norm=0.1,
        )
        for each in (loss, copy.deepcopy(loss))
    )
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    fast = compiled(other, backend=keep)
    for number in range(3):
        torch.manual_seed(number)
        batch = make_batch(dtype=torch.float64)
        plain(batch.clone())
        fast(batch)
    for name, value in snapshot(plain.loss).items():
        torch.testing.assert_close(snapshot(other.loss)[name], value, rtol=1e-10, atol=1e-12)
    # every product of these networks is small
    assert not [node for node in graphs[0].graph.nodes if "matmul" in str(node.target)]


def test_options_by_device():
    small, large = [torch.zeros(UNSPLIT)], [torch.zeros(UNSPLIT + 1)]
    assert program_options(torch.device("cpu"), large) == {
        "triton.cudagraphs": False,
        "cpp_wrapper": True,
        "_post_fusion_custom_pass": untiled_loops_only(),
    }
    for_cuda = program_options(torch.device("cuda"), large)
    assert for_cuda["combo_kernels"]
    assert for_cuda["combo_kernels_pointwise_only"]
    assert "cpp_wrapper" not in for_cuda
    assert "split_reductions" not in for_cuda
    assert program_options(torch.device("cuda", 1), small) == {
        **for_cuda,
        "split_reductions": False,
    }
    assert program_options(torch.device("meta"), small) == {"triton.cudagraphs": False}


def test_a_torch_without_the_pass_for_right_numbers_is_said_in_the_log(monkeypatch):
    said = []
    monkeypatch.setattr(compiled_module.torchrl_logger, "warning", said.append)
    compiled_module._log_once.cache_clear()
    monkeypatch.setattr(compiled_module, "inductor_settings", set)
    assert program_options(torch.device("cpu"), [torch.ones(1)]) == {}
    assert program_options(torch.device("cpu"), [torch.ones(1)]) == {}
    assert len(said) == 1
    assert "lacks the Inductor pass" in said[0]
    assert "185702" in said[0]


def test_an_option_that_this_torch_lacks_is_left_out(monkeypatch):
    monkeypatch.setitem(JOINED, "an_option_of_another_version", 1)
    assert "an_option_of_another_version" not in program_options(
        torch.device("cuda"), [torch.ones(1)]
    )
