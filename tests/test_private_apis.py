"""The private names of torch, tensordict and TorchRL do what this package relies on."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from iql_torchrl import private_apis as apis
from iql_torchrl.update.compiled import program_options


def test_a_missing_name_is_an_error_that_names_feature_version_and_another_way(monkeypatch):
    monkeypatch.setattr(apis, "find", lambda owner, name, default=None: default)
    with pytest.raises(
        NotImplementedError,
        match=r"captured\(step, replay\) needs Tensor\._version, which is missing in torch \d.*"
        r"TorchRL 0\.14.*Use compiled",
    ):
        apis.version_of(torch.zeros(1))
    with pytest.raises(NotImplementedError, match=r"exporting a policy .* Agent\.load\(path\)"):
        apis.assert_dtype(torch.zeros(1), torch.float32)


HIDING = """
import importlib.util, os, sys
from multiprocessing.resource_tracker import _resource_tracker
import torch

# imports the package, whose modules are dropped
spec = importlib.util.find_spec("iql_torchrl.private_apis")
assert not torch.cuda.is_initialized()
assert "tyro" not in sys.modules
assert _resource_tracker._pid is None, "a process was started"
assert not os.listdir("."), os.listdir(".")
source = spec.origin
for name in [name for name in sys.modules if name.split(".")[0] == "iql_torchrl"]:
    del sys.modules[name]
spec = importlib.util.spec_from_file_location("iql_torchrl.private_apis", source)
private_apis = importlib.util.module_from_spec(spec)
sys.modules["iql_torchrl.private_apis"] = private_apis
spec.loader.exec_module(private_apis)
asked = set()

def watched(owner, name, default=None):
    asked.add(name)
    return default

private_apis.find = watched
import iql_torchrl  # every private name is missing
assert sys.modules["iql_torchrl.private_apis"] is private_apis

from small_losses import make_step
from test_step import make_batch, make_loss, snapshot

def train():
    torch.manual_seed(0)
    loss = make_loss()
    loss.average_actor(0.9)
    step = make_step(loss)
    for _ in range(20):
        step(make_batch())
    return snapshot(step.loss)

weights = train()
assert weights
for key, value in weights.items():
    assert value.isfinite().all(), key
assert not asked, asked
"""


def test_an_import_does_nothing_else_and_it_and_eager_updates_ask_for_no_private_name(tmp_path):
    """It writes nothing, starts no process and touches no device."""
    here = Path(__file__).parent
    folders = [here, here / "losses", here / "update", here.parent]
    settings = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDING],
        env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("steps", "accepted"), [([1, 1], True), ([1, 16], False), ([16, 1], False)]
)
def test_loops_that_step_over_rows_are_not_joined(steps, accepted):
    """The second loop level is not joined, so its steps do not matter."""
    node, asked = SimpleNamespace(), []
    node.check_outer_fusion_loop_level_attr = lambda *given: not asked.append(given)
    other = SimpleNamespace()
    assert apis.untiled_loops_only()([node, other]) == [node, other]
    proxies = [
        SimpleNamespace(loop_nest=SimpleNamespace(loops=[SimpleNamespace(steps=n) for n in (s, 8)]))
        for s in steps
    ]
    assert node.check_outer_fusion_loop_level_attr(proxies, 1) is accepted
    assert asked == ([(proxies, 1)] if accepted else [])
    assert vars(other) == {}
    assert pickle.loads(pickle.dumps(apis.untiled_loops_only())) is apis.untiled_loops_only()


@pytest.mark.parametrize("hidden", [False, True])
def test_private_names_and_the_public_ways_in_their_place_give_the_same(hidden, monkeypatch):
    if hidden:
        monkeypatch.setattr(apis, "find", lambda owner, name, default=None: default)
    totals = [torch.tensor([1.0]), torch.tensor([2.0, 3.0])]
    apis.add_to_all(totals, [torch.tensor([10.0]), torch.tensor([20.0, 30.0])], 2)
    assert [t.tolist() for t in totals] == [[21.0], [42.0, 63.0]]


def test_what_compiles_where_inductors_names_are_hidden(monkeypatch):
    monkeypatch.setattr(apis, "find", lambda owner, name, default=None: default)
    with apis.tracing_gradients():
        assert apis.inductor_settings() == set()
    assert apis.untiled_loops_only.__wrapped__() is None
    graph = torch.fx.symbolic_trace(lambda x: (x * 2 + 1,))
    monkeypatch.setattr(torch, "compile", lambda graph, **options: (graph, options))
    options = {"fullgraph": True, "options": {"a": 1}}
    assert apis.compile_program(graph, [], {"a": 1}) == (graph, options)


def test_programs_are_the_graph_without_guards_and_without_cuda_graphs_of_inductor(monkeypatch):
    """A user's global setting would capture a graph inside of the one that ``captured`` makes."""
    from torch._inductor import compile_fx, config

    seen, original = [], compile_fx.compile_fx

    def spy(*arguments, **options):
        seen.append((config.triton.cudagraphs, config.cpp_wrapper))
        return original(*arguments, **options)

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    graph, inputs = torch.fx.symbolic_trace(lambda x: (x * 2 + 1,)), [torch.ones(3)]
    assert {"triton.cudagraphs", "cpp_wrapper", "combo_kernels"} <= apis.inductor_settings()
    with config.patch({"triton.cudagraphs": True}):
        options = program_options(torch.device("cpu"), inputs)
        (out,) = apis.compile_program(graph, inputs, options)(torch.tensor([1.0, 2.0, 3.0]))
    assert out.tolist() == [3.0, 5.0, 7.0]
    assert seen == [(True, False), (False, True)]  # before and with the program's own settings


def test_hooks_are_seen():
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        module = nn.Linear(1, 1)
        assert not apis.has_hooks(module)
        getattr(module, f"register_{kind}_hook")(lambda *_: None)
        assert apis.has_hooks(module)
