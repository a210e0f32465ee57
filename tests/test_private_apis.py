"""The private names of torch, tensordict and TorchRL do what this package relies on."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import nn
from torch.distributions import Distribution
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.objectives import LossModule
from torchrl.trainers import LogScalar, Trainer

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
    with pytest.raises(NotImplementedError, match=r"exporting a policy .* agent\.save"):
        apis.assert_dtype(torch.zeros(1), torch.float32)


HIDING = """
import importlib.util, sys
import torch

# imports the package, whose modules are dropped
spec = importlib.util.find_spec("iql_torchrl.private_apis")
source = spec.origin
for name in [name for name in sys.modules if name.split(".")[0] == "iql_torchrl"]:
    del sys.modules[name]
spec = importlib.util.spec_from_file_location("iql_torchrl.private_apis", source)
private_apis = importlib.util.module_from_spec(spec)
sys.modules["iql_torchrl.private_apis"] = private_apis
spec.loader.exec_module(private_apis)
find, asked, hidden = private_apis.find, set(), {None}

def watched(owner, name, default=None):
    asked.add(name)
    return default if name in hidden or None in hidden else find(owner, name, default)

private_apis.find = watched
import iql_torchrl  # every private name is missing
assert sys.modules["iql_torchrl.private_apis"] is private_apis and not asked, asked
hidden.clear()

from test_step import make_batch, make_loss, snapshot
from torch import optim
from torchrl.objectives import SoftUpdate

def train(**options):
    torch.manual_seed(0)
    loss = make_loss(**options)
    step = iql_torchrl.IQLStep(loss, optim.Adam(loss.parameters(), lr=1e-2), SoftUpdate(loss, tau=0.1))
    for _ in range(20):
        step(make_batch())
    return snapshot(loss)

options = {"actor_ema": 0.9}
expected = train(**options)
names = sorted(asked)
for name in (*names, None):
    hidden.clear()
    hidden.add(name)
    weights = train(**options)
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
print(*names)
"""


def test_a_hidden_private_name_stops_neither_import_nor_eager_updates():
    """Each name that training asks for is hidden in turn, then all; the weights are the same."""
    here = Path(__file__).parent
    paths = [str(here), str(here / "update"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDING],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=here.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    assert {"_modules", "_forward_hooks", "_get_kwargs"} <= set(done.stdout.split())


def test_what_takes_the_place_of_a_hidden_name(monkeypatch):
    """The slower public ways give the same as the private names."""
    module = nn.Module()
    module.first = module.second = nn.Linear(2, 1)
    params = TensorDictParams(TensorDict({"net": {"weight": nn.Parameter(torch.ones(2))}}))
    wrapped = TensorDictModule(module.first, ["a"], ["c"])
    before = (
        apis.children_of(module),
        apis.plain_entries(params),
        apis.validates_distributions(),
    )
    monkeypatch.setattr(apis, "find", lambda owner, name, default=None: default)
    assert apis.children_of(module) == before[0]
    entries = apis.plain_entries(params)
    assert type(entries) is TensorDict
    assert entries["net", "weight"] is before[1]["net", "weight"]
    assert apis.validates_distributions() is before[2]
    assert not apis.reads_positions(wrapped)  # evaluated through its TensorDict
    totals = [torch.tensor([1.0])]
    apis.add_to_all(totals, [torch.tensor([10.0])], 2)
    assert totals[0].tolist() == [21.0]
    with apis.tracing_gradients():
        assert apis.inductor_settings() == set()
    assert apis.untiled_loops_only.__wrapped__() is None
    graph = torch.fx.symbolic_trace(lambda x: (x * 2 + 1,))
    monkeypatch.setattr(torch, "compile", lambda graph, **options: (graph, options))
    assert apis.compile_program(graph, [], {"a": 1}) == (
        graph, {"fullgraph": True, "options": {"a": 1}},
    )  # fmt: skip


def test_what_a_trainer_was_given_and_has_logged():
    class Loss(LossModule):
        def forward(self, tensordict):
            return tensordict

    trainer = Trainer(
        collector=None,
        total_frames=1,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=Loss(),
        optimizer=None,
        progress_bar=False,
    )
    trainer._log_dict["loss"].append(1.0)
    assert apis.logged_values(trainer)["loss"] == [1.0]
    part = LogScalar("reward")
    trainer.register_module("part", part)
    assert apis.registered_modules(trainer)["part"] is part


def test_an_optimizer_marked_as_stepped_lets_its_scheduler_go_first():
    def scheduler():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    _, plain = scheduler()
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before"):
        plain.step()
    optimizer, marked = scheduler()
    apis.mark_stepped(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marked.step()


def test_versions_count_writes_in_place():
    tensor = torch.zeros(3)
    before = apis.version_of(tensor)
    assert apis.version_of(tensor) == before
    tensor.add_(1)
    assert apis.version_of(tensor) == before + 1


def test_sums_of_many_tensors():
    totals = [torch.tensor([1.0]), torch.tensor([2.0, 3.0])]
    apis.add_to_all(totals, [torch.tensor([10.0]), torch.tensor([20.0, 30.0])], 2)
    assert [t.tolist() for t in totals] == [[21.0], [42.0, 63.0]]


def test_assertions_stay_in_an_exported_program():
    class Checked(nn.Module):
        def forward(self, x):
            apis.assert_dtype(x, torch.float32)
            apis.assert_later((x > 0).all(), "x must be positive.")
            return x + 1

    program = torch.export.export(Checked(), (torch.ones(2),)).module()
    assert program(torch.tensor([2.0, 3.0])).tolist() == [3.0, 4.0]
    with pytest.raises(RuntimeError, match="x must be positive"):
        program(torch.tensor([2.0, -3.0]))
    with pytest.raises(RuntimeError):
        Checked()(torch.ones(2, dtype=torch.float64))


def test_the_default_of_validate_args_is_read():
    before = apis.validates_distributions()
    try:
        for value in (False, True):
            Distribution.set_default_validate_args(value)
            assert apis.validates_distributions() is value
    finally:
        Distribution.set_default_validate_args(before)


def test_tables_of_a_module_are_its_own_and_name_a_module_each_time():
    shared = nn.Linear(1, 1)
    module = nn.Module()
    module.first, module.second = shared, shared
    assert list(apis.children_of(module)) == ["first", "second"]
    assert dict(module.named_children()) == {"first": shared}


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_hooks_are_seen(register):
    module = nn.Linear(1, 1)
    assert not apis.has_hooks(module)
    register(module)
    assert apis.has_hooks(module)


def test_plain_entries_are_the_parameters_themselves():
    weight = nn.Parameter(torch.ones(2))
    params = TensorDictParams(TensorDict({"net": {"weight": weight}}))
    entries = apis.plain_entries(params)
    assert not isinstance(entries, TensorDictParams)
    assert entries.get(("net", "weight")) is weight


def test_modules_that_read_by_keyword_or_with_options_are_told_apart():
    def net(a, b=None):
        return a

    assert apis.reads_positions(TensorDictModule(net, ["a", "b"], ["c"]))
    assert not apis.reads_positions(TensorDictModule(net, {"a": "x", "b": "y"}, ["c"]))
    options = {"as_padded_tensor": True}
    assert not apis.reads_positions(TensorDictModule(net, ["a"], ["c"], get_kwargs=options))


def test_a_buffers_generator_rows_and_state():
    replay = ReplayBuffer(storage=LazyTensorStorage(4), batch_size=2)
    assert apis.generator_of(replay) is None
    generator = torch.Generator()
    replay.set_rng(generator)
    assert apis.generator_of(replay) is generator
    data = TensorDict({"x": torch.arange(4.0)}, batch_size=[4])
    replay.extend(data)
    rows = apis.stored_rows(replay)
    rows["x"][0] = 7.0
    assert float(replay[:]["x"][0]) == 7.0  # the storage itself, not a copy
    state = replay.state_dict()
    assert "_prefetch_state" in state
    assert set(state) - set(apis.without_prefetched(state)) == {"_prefetch_state"}


def test_a_gradient_inside_a_graph_is_traced():
    def slope(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x**3).sum(), x)[0]

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    weight = nn.Parameter(torch.tensor([2.0]))

    def update():
        gradient = torch.autograd.grad((weight**3).sum(), [weight])[0]
        return gradient.detach()

    with apis.tracing_gradients():
        assert torch.compile(update, fullgraph=True, backend=backend)().tolist() == [12.0]
    assert len(graphs) == 1
    assert not torch._dynamo.config.trace_autograd_ops  # restored


def test_a_program_is_the_graph_without_guards():
    graph = torch.fx.symbolic_trace(lambda x: (x * 2 + 1,))
    program = apis.compile_program(graph, [torch.ones(3)], {})
    assert {"triton.cudagraphs", "cpp_wrapper", "combo_kernels"} <= apis.inductor_settings()
    (out,) = program(torch.tensor([1.0, 2.0, 3.0]))
    assert out.tolist() == [3.0, 5.0, 7.0]


def test_the_loss_asks_for_its_keys_through_the_names_listed():
    seen = []

    class Loss(LossModule):
        def _make_vmap(self):
            seen.append("_make_vmap")

        def forward(self, tensordict):
            return tensordict

    loss = Loss()
    loss.set_vmap_randomness("different")
    assert seen == ["_make_vmap"]
    assert loss._loss_mask_keys() == (("collector", "mask"), "shifted_valid")
    with pytest.raises(RuntimeError, match="priority"):
        loss._set_deprecated_ctor_keys(priority="x")


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


def test_programs_hold_no_cuda_graphs_of_inductor(monkeypatch):
    """A user's global setting would capture a graph inside of the one that ``captured`` makes."""
    from torch._inductor import compile_fx, config

    seen, original = [], compile_fx.compile_fx

    def spy(*arguments, **options):
        seen.append((config.triton.cudagraphs, config.cpp_wrapper))
        return original(*arguments, **options)

    def backend(graph, inputs):
        options = program_options(torch.device("cpu"), inputs)
        return apis.compile_program(graph, inputs, options)

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    with config.patch({"triton.cudagraphs": True}):
        double = torch.compile(lambda x: 2 * x, backend=backend)
        assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert seen == [(True, False), (False, True)]  # before and with the program's own settings
