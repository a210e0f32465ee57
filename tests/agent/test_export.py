"""Exported programs: plain torch or onnxruntime runs them, and they act as the agent does."""

import json
import logging
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from extras import needs
from gymnasium import spaces
from small_agents import (
    HIGH,
    LOW,
    box_agent,
    by_hand,
    config,
    discrete_agent,
    masks,
    observations,
    small_columns,
    trained,
)
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, OneHot

from iql_torchrl import load_dataset, make_agent, policies
from iql_torchrl.agent.export import export_policy
from iql_torchrl.agent.task import Task
from iql_torchrl.evaluation.acting import act
from iql_torchrl.networks import LSTMEncoder, with_history
from iql_torchrl.networks import OneHot as OneHotLayer

# Runs in a process in which torch is installed and this package, TorchRL and Gymnasium are not.
START = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("iql_torchrl", "torchrl", "tensordict", "gymnasium"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11's own reader
import torch
torch.set_num_threads(1)
"""


def run_with_only_torch(script, folder):
    """The lines that the Python text ``script`` prints in ``folder``."""
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", START + script], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def parts(rows: int = 40):
    generator = np.random.default_rng(0)
    sizes = (("goal", 2), ("at", 1))
    return {k: generator.normal(size=(rows, n)).astype(np.float32) for k, n in sizes}


def camera_agent(channels: int):
    """An agent with ``make_agent``'s encoder of a camera, and what it observed."""
    camera = spaces.Box(0, 255, (12, 12, channels), np.uint8)
    space = spaces.Dict(at=spaces.Box(-1, 1, (1,), np.float32), camera=camera)
    generator = np.random.default_rng(0)
    seen = {
        "at": generator.normal(size=(40, 1)).astype(np.float32),
        "camera": generator.integers(0, 256, (40, 12, 12, channels), dtype=np.uint8),
    }
    return make_agent(
        config(), load_dataset(small_columns(observation=seen), observation_space=space)
    ), seen


def dict_agent():
    return make_agent(config(policy="mixture"), load_dataset(small_columns(observation=parts())))


# by name: an agent
KINDS = {
    "gaussian": box_agent,
    "tanh_normal": lambda: box_agent(policy="tanh_normal"),
    "deterministic": lambda: box_agent(policy="deterministic"),
    "mixture": lambda: box_agent(policy="mixture", dropout=0.3),
    "raw": lambda: box_agent(standardise=False),
    "double": lambda: box_agent(np.float64),
    "categorical": lambda: discrete_agent(start=5),
    "masked": lambda: discrete_agent(start=5, masked=True),
    "dict": dict_agent,
    "category": lambda: make_agent(
        config(), load_dataset(small_columns(observation=np.arange(40) % 5))
    ),
    "chunks": lambda: box_agent(action_chunk=3, replan_every=2),
}
SEVERAL = {"policy": "flow", "num_samples": 5, "flow_steps": 4, "activation": "gelu"}
MORE = {
    "residual": lambda: trained(residual="all", hidden=(4, 4)),
    "averaged": lambda: trained(actor_ema=0.9),
    "gelu": lambda: trained(activation="gelu", layer_norm=True, num_samples=3),
    "mish": lambda: trained(activation="mish"),
    "flow": lambda: trained(policy="flow"),
    "best of flow": lambda: trained(**SEVERAL, layer_norm=True, norm_after_activation=True),
    "best of mixture": lambda: trained(policy="mixture", num_samples=3),
    "best of tanh_normal": lambda: trained(policy="tanh_normal", num_samples=3, num_critics=1),
    "best of chunks": lambda: box_agent(action_chunk=3, **SEVERAL),
    "chunks after frames": lambda: box_agent(
        action_chunk=3, history=2, history_encoder="stack", replan_every=2
    ),
}


def case(name: str):
    """An agent, the inputs of its program in their order, and what it does there."""
    agent, seen, more = {**KINDS, **MORE}[name](), observations(), {}
    if name == "dict":
        seen = parts(9)
    elif name == "category":
        seen = np.arange(9) % 5
    elif name == "masked":
        more = {"action_mask": masks()}
    elif name == "chunks after frames":
        windows = np.stack([seen[:-1], seen[1:]], 1)
        return agent, (windows, np.ones((len(windows), 2), bool)), agent.act(windows)
    leaves = [seen["at"], seen["goal"]] if name == "dict" else [seen]
    return agent, (*leaves, *more.values()), agent.act(seen, **more)


COMPARE = """
cases = torch.load("cases.pt", weights_only=True)
for name, (arguments, expected) in cases.items():
    policy = torch.export.load(f"{name}.pt2").module()
    for rows in (1, 2, len(expected)):
        found = policy(*(a[:rows] for a in arguments))
        assert not found.requires_grad
        assert found.dtype == expected.dtype and found.shape == expected[:rows].shape, name
        assert (found - expected[:rows]).abs().max() <= 1e-6, (name, found, expected)
    print("ran", name)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the folder with the programs of agents of these kinds; each is exported once."""
    folder = tmp_path_factory.mktemp("exported")

    def export(*names):
        for path in (folder / f"{name}.pt2" for name in names):
            if not path.exists():
                assert {**KINDS, **MORE}[path.stem]().export(path) == path
        return folder

    return export


@pytest.mark.parametrize("kinds", [KINDS, pytest.param(MORE, marks=pytest.mark.slow)])
def test_programs_run_where_only_torch_is_installed(kinds, exported):
    cases, folder = {}, exported(*kinds)
    for name in kinds:
        _, arguments, actions = case(name)
        cases[name] = [torch.as_tensor(each) for each in arguments], torch.as_tensor(actions)
    torch.save(cases, folder / "cases.pt")
    ran = run_with_only_torch(COMPARE, folder)
    assert ran == [f"ran {name}" for name in kinds]


@pytest.fixture
def onnx():
    for name in ("onnxscript", "onnx_ir", "onnxruntime"):
        pytest.importorskip(name)
    return needs("onnx")


def session(path):
    runtime = needs("onnxruntime")
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(params=[".pt2", ".onnx"])
def program(request, tmp_path):
    """Exports an agent, to a function of arrays."""
    if request.param == ".onnx":
        request.getfixturevalue("onnx")

    def exported(agent):
        path = tmp_path / f"policy{request.param}"
        assert agent.export(path) == path
        if request.param == ".pt2":
            with zipfile.ZipFile(path) as archive:  # without a path of this machine
                assert not any(b".py" in archive.read(name) for name in archive.namelist())
            module = torch.export.load(path).module()
            return lambda *inputs: module(*map(torch.as_tensor, inputs)).numpy()
        loaded = session(path)
        names = [each.name for each in loaded.get_inputs()]
        return lambda *inputs: loaded.run(None, dict(zip(names, inputs, strict=True)))[0]

    return exported


def test_the_program_is_the_network_by_hand(program, capfd):
    agent = box_agent()
    run = program(agent)
    assert capfd.readouterr().err == ""  # torch's exporter to ONNX reports what is not installed
    assert logging.getLogger("torch.onnx").level == logging.NOTSET
    expected = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * np.tanh(by_hand(agent, observations()))
    found = run(observations())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    discrete = discrete_agent(start=5, masked=True)
    logits = np.where(masks(), by_hand(discrete, observations()), -np.inf)
    chosen = program(discrete)(observations(), masks())
    assert chosen.dtype == np.int64
    assert chosen.tolist() == (logits.argmax(1) + 5).tolist()


@pytest.mark.parametrize("channels", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_cameras_act_as_their_agent(program, channels):
    """One observation alone, and several."""
    agent, seen = camera_agent(channels)
    run = program(agent)
    for rows in (1, 2, 40):
        actions = run(*(each[:rows] for each in seen.values()))
        np.testing.assert_allclose(actions, agent.act(seen)[:rows], atol=1e-5)


@pytest.mark.slow
def test_observations_named_as_an_operation_or_as_the_action(tmp_path, onnx):
    """torch names values of a graph after operations, such as "cat"."""
    generator = np.random.default_rng(0)
    seen = {
        name: generator.normal(size=(40, 2)).astype(np.float32)
        for name in ("action", "cat", "linear", "tanh")
    }
    space = spaces.Box(-np.ones(2, np.float32), np.ones(2, np.float32))
    agent = make_agent(
        config(), replace(load_dataset(small_columns(observation=seen)), action_space=space)
    )
    path = agent.export(tmp_path / "policy.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    note = json.loads((tmp_path / "policy.onnx.json").read_text())
    names = [each["name"] for each in note["inputs"]]
    assert names == ["observation.action", "cat", "linear", "tanh"]
    inputs = {each: seen[each.rpartition(".")[2]] for each in names}
    (found,) = session(path).run(["action"], inputs)
    np.testing.assert_allclose(found, agent.act(seen), atol=1e-5)


REFUSED = """
for name, arguments in torch.load("refused.pt", weights_only=True):
    policy = torch.export.load(f"{name}.pt2").module()
    try:
        print(name, "|", "answered", policy(*arguments).tolist())
    except RuntimeError as error:
        print(name, "|", error)
"""


@pytest.mark.slow
def test_programs_refuse_what_the_agent_refuses(exported):
    """Each case was answered, or ended in an error of torch's own kernels."""
    x, mask = torch.tensor(observations()), torch.tensor(masks())
    hole, forbidden = x.clone(), mask.clone()
    hole[4, 1], forbidden[3] = torch.nan, False
    cases = [
        ("gaussian", (x[0],), "number of dimensions in input at *args[0].shape (expected"),
        ("gaussian", (x.view(3, 3, 3),), "number of dimensions in input at *args[0].shape"),
        ("gaussian", (x[:, :2],), "input at *args[0].shape[1] to be equal to 3, but got 2"),
        ("gaussian", (hole,), "observation must hold finite numbers."),
        ("gaussian", (hole.nan_to_num(torch.inf),), "observation must hold finite numbers."),
        ("gaussian", (x.double(),), "dtype mismatch"),
        ("masked", (x[0], mask[0]), "number of dimensions in input at *args[0].shape (expected"),
        ("masked", (x, mask[0]), "number of dimensions in input at *args[1].shape (expected"),
        ("masked", (x, mask[:4]), "input at *args[1].shape[0] to be equal to 9, but got 4"),
        ("masked", (x, forbidden), "action_mask must hold at least one True in every row."),
        ("masked", (hole, mask), "observation must hold finite numbers."),
        ("masked", (x, mask.float()), "dtype mismatch"),
        ("category", (torch.tensor([0, 5]),), "observation must hold integers in [0, 4]."),
        ("category", (torch.tensor([-1]),), "observation must hold integers in [0, 4]."),
        ("category", (torch.tensor(3),), "number of dimensions in input at *args[0].shape"),
        ("category", (torch.tensor([1.0]),), "dtype mismatch"),
        ("dict", (torch.zeros(2, 1), hole[:, :2][3:5]), "goal must hold finite numbers."),
    ]
    folder = exported("gaussian", "masked", "category", "dict")
    torch.save([case[:2] for case in cases], folder / "refused.pt")
    lines = run_with_only_torch(REFUSED, folder)
    assert len(lines) == len(cases)
    for line, (name, _, message) in zip(lines, cases, strict=True):
        assert line.startswith(f"{name} | ")
        assert message in line


def test_without_the_comparison_of_shapes_values_are_still_checked(exported):
    agent = box_agent()
    loaded = torch.export.load(exported("gaussian") / "gaussian.pt2")
    assert [r.lower for r in loaded.range_constraints.values()] == [1]
    program = loaded.module()
    program.validate_inputs = False
    x = torch.tensor(observations())
    np.testing.assert_allclose(program(x), agent.act(observations()), atol=1e-6)
    with pytest.raises(RuntimeError, match="observation must hold finite numbers"):
        program(x * torch.nan)
    with pytest.raises(RuntimeError, match="dtype"):
        program(x.double())


def test_weights_that_are_not_numbers_are_not_exported(tmp_path):
    agent = box_agent()
    with torch.no_grad():
        agent.actor.get_parameter("module.0.module.mlp.2.bias").fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite for a plausible observation; look for NaN"):
        agent.export(tmp_path / "policy.pt2")
    assert not list(tmp_path.iterdir())


def test_the_description_of_inputs_and_output(exported):
    names = ("masked", "dict", "double", "category", "chunks")
    folder = exported(*names)
    notes = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    observed = {"name": "observation", "key": ["observation"], "shape": ["B", 3]}
    mask = {"name": "action_mask", "key": ["action_mask"], "shape": ["B", 4], "dtype": "bool"}
    assert notes["masked"]["inputs"] == [
        {**observed, "dtype": "float32", "values": "finite numbers"},
        {**mask, "values": "at least one True in every row"},
    ]
    indices = {"name": "action", "shape": ["B"], "dtype": "int64"}
    assert notes["masked"]["output"] == {**indices, "kind": "discrete", "n": 4, "start": 5}
    assert notes["double"]["output"] == {
        "name": "action", "shape": ["B", 2], "dtype": "float64",
        "kind": "box", "low": LOW.tolist(), "high": HIGH.tolist(),
    }  # fmt: skip
    output = notes["chunks"]["output"]
    assert (output["shape"], output["steps"], output["execute"]) == (["B", 3, 2], 3, 2)
    assert (output["low"], output["high"]) == (LOW.tolist(), HIGH.tolist())
    described = [(i["name"], i["shape"]) for i in notes["dict"]["inputs"]]
    assert described == [("at", ["B", 1]), ("goal", ["B", 2])]
    assert notes["category"]["inputs"][0]["values"] == "integers in [0, 4]"
    assert "RuntimeError" in notes["double"]["use"]
    assert notes["double"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert sorted(p.name for p in folder.glob("dict*")) == ["dict.json", "dict.pt2"]


def test_the_agent_and_the_callers_state_do_not_change(tmp_path):
    agent = box_agent(policy="mixture", dropout=0.5)
    agent.actor.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = {k: v.clone() for k, v in agent.state_dict().items()}
    agent.export(tmp_path / "policy.pt2")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in agent.actor.modules())
    assert all(p.requires_grad for p in agent.actor.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in agent.state_dict().items())
    # The file is of this moment: training on changes the agent and not the program.
    expected = agent.act(observations())
    agent.step(load_dataset(small_columns()).replay_buffer(16, seed=0).sample())
    program = torch.export.load(tmp_path / "policy.pt2").module()
    np.testing.assert_allclose(program(torch.tensor(observations())), expected, atol=1e-6)
    assert np.abs(agent.act(observations()) - expected).max() > 1e-6


@pytest.mark.gpu
def test_an_agent_on_a_gpu_acts_and_exports_for_the_cpu(tmp_path):
    for make in (box_agent, lambda **o: box_agent(policy="tanh_normal", **o), discrete_agent):
        agent = make(device="cuda")
        program = torch.export.load(agent.export(tmp_path / "policy.pt2")).module()
        expected = agent.act(observations())
        np.testing.assert_allclose(program(torch.tensor(observations())), expected, atol=1e-5)
        state = torch.cuda.get_rng_state()
        agent.act(observations(), deterministic=False, seed=1)
        assert torch.equal(torch.cuda.get_rng_state(), state)


# -- ONNX


def test_the_onnx_description_and_both_formats_in_one_folder(tmp_path, onnx):
    agent = dict_agent()
    for name in ("policy.pt2", "policy.onnx"):
        agent.export(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 4
    torch_note = json.loads((tmp_path / "policy.json").read_text())
    note = json.loads((tmp_path / "policy.onnx.json").read_text())
    for key in ("task", "inputs", "output", "device"):
        assert note[key] == torch_note[key]
    assert "values are not checked" in note["use"]
    assert note["versions"]["onnx"] == onnx.__version__
    loaded = session(tmp_path / "policy.onnx")
    found = [(each.name, each.shape, each.type) for each in loaded.get_inputs()]
    assert found == [("at", ["batch", 1], "tensor(float)"), ("goal", ["batch", 2], "tensor(float)")]
    (output,) = loaded.get_outputs()
    assert (output.name, output.shape) == ("action", ["batch", 2])
    with pytest.raises(Exception, match=r"index: 1 Got: 3 Expected: 2"):
        loaded.run(None, {"at": np.zeros((1, 1), "f4"), "goal": np.zeros((1, 3), "f4")})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_every_policy_acts_as_its_agent_in_onnx(tmp_path, onnx, kind):
    agent, inputs, expected = case(kind)
    path = agent.export(tmp_path / "policy.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    loaded = session(path)
    for rows in (1, 2, 9):
        values = {i.name: x[:rows] for i, x in zip(loaded.get_inputs(), inputs, strict=True)}
        (found,) = loaded.run(None, values)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected[:rows], atol=1e-5)
    assert b".py" not in path.read_bytes()  # no path of this machine


@pytest.mark.slow
@pytest.mark.usefixtures("onnx")
def test_what_onnxruntime_lacks_in_float64(tmp_path):
    agent = box_agent(weights=torch.float64, policy="flow", num_samples=3)
    (found,) = session(agent.export(tmp_path / "flow.onnx")).run(
        None, {"observation": observations().astype(np.float64)}
    )
    np.testing.assert_allclose(found, agent.act(observations()), atol=1e-6)
    for operation, options in (
        ("Softplus", {"activation": "mish"}),
        ("Erf", {"policy": "mixture", "num_samples": 3}),
    ):
        with pytest.raises(
            RuntimeError, match=rf"run by onnxruntime .*{operation}.*on float32 data\.$"
        ):
            box_agent(weights=torch.float64, **options).export(tmp_path / "policy.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flow.onnx", "flow.onnx.json"]


@pytest.mark.usefixtures("onnx")
def test_an_operation_that_onnx_lacks_and_missing_packages(tmp_path, monkeypatch):
    task = Task(spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (2,)))
    actor = actor_of(Pure(lambda _, x: torch.linalg.svdvals(x[:, :, None] * x[:, None, :])))
    message = r"this TensorDictModule cannot be translated to ONNX .*svd.*write a \.pt2 file"
    with pytest.raises(RuntimeError, match=message):
        export_policy(actor, task, tmp_path / "policy.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime.*iql_torchrl\[onnx\]., or write a .pt2"):
        box_agent().export(tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("onnx")
def test_a_program_that_acts_differently_is_not_written(tmp_path, monkeypatch):
    """A translation in which the weights of the first layer are 1 % too large."""
    export = torch.onnx.export

    def wrong(*arguments, **options):
        program = export(*arguments, **options)
        values = program.model.graph.initializers
        (weights,) = (value for name, value in values.items() if "0.weight" in name)
        weights.const_value = pytest.importorskip("onnx_ir").tensor(
            weights.const_value.numpy() * np.float32(1.01)
        )
        return program

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RuntimeError, match="once translated to ONNX, acts differently, by"):
        box_agent().export(tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


# -- export_policy: actors of the user's own, also with a history, and what cannot be exported


class Pure(nn.Module):
    """The function ``call`` of a layer and the inputs."""

    def __init__(self, call, linear=None):
        super().__init__()
        self.call, self.linear = call, linear or nn.Linear(3, 4)

    def forward(self, *inputs):
        return self.call(self.linear, *inputs)


def own_call(linear, picture, kind):
    """A picture and a category to an unbounded action."""
    x = picture.flatten(1).float() / 255
    return 10 * linear(torch.cat([x, nn.functional.one_hot(kind, 3).to(x)], -1)).double()


def test_an_actor_of_the_users_own(tmp_path):
    space = spaces.Dict(
        {
            "kind": spaces.Discrete(3, start=1),
            "inner": spaces.Dict({"picture": spaces.Box(0, 255, (2, 2, 3), np.uint8)}),
            "unread": spaces.Box(-1, 1, (4,)),
        }
    )
    task = Task(space, spaces.Box(np.float32([-1, -np.inf]), np.float32([1, np.inf])))
    keys = [("observation", "inner", "picture"), ("observation", "kind")]
    own = Pure(own_call, nn.Linear(12 + 3, 2))
    program = torch.export.load(
        export_policy(actor_of(own, keys), task, tmp_path / "own.pt2")
    ).module()
    picture = torch.randint(0, 256, (6, 2, 2, 3), dtype=torch.uint8)
    kind = torch.tensor([1, 2, 3, 1, 2, 3])
    expected = own(picture, kind - 1).detach().float()
    expected[:, 0].clamp_(-1, 1)
    assert (expected[:, 0].abs() == 1).any()
    torch.testing.assert_close(program(picture, kind), expected)
    for wrong in ((picture, kind - 1), (picture, kind + 1)):
        with pytest.raises(RuntimeError, match=r"kind must hold integers in \[1, 3\]"):
            program(*wrong)
    note = json.loads((tmp_path / "own.json").read_text())
    described = [(i["name"], i["dtype"]) for i in note["inputs"]]
    assert described == [("inner.picture", "uint8"), ("kind", "int64")]
    assert (note["output"]["low"], note["output"]["high"]) == ([-1, None], [1, None])


@pytest.mark.parametrize("shape", ["one_hot", "column", "scores"])
def test_every_form_of_discrete_action(tmp_path, shape):
    box, choice = spaces.Box(-1, 1, (3,)), spaces.Discrete(4, start=2)
    if shape == "one_hot":
        actor = policies.categorical(3, OneHot(4), hidden=(8,), mask_key="action_mask")
    else:
        column = Pure(lambda linear, x: linear(x).argmax(-1, keepdim=True))
        actor = actor_of(column if shape == "column" else nn.Linear(3, 4))
    program = torch.export.load(export_policy(actor, Task(box, choice), tmp_path / "p.pt2"))
    x = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    more = {"action_mask": masks()} if shape == "one_hot" else {}
    result = program.module()(torch.tensor(x), *(torch.tensor(m) for m in more.values()))
    assert result.dtype == torch.int64
    assert result.tolist() == act(actor, x, box, choice, **more).tolist()
    assert len(set(result.tolist())) > 1


def actor_of(net, keys=("observation",)):
    return TensorDictModule(net, in_keys=list(keys), out_keys=["action"])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda _, x: x if x.sum() > 0 else -x, "cannot be traced .*data-dependent"),
        (lambda _, x: x + torch.tensor([0.0] * len(x))[:, None], "cannot be traced .*batch"),
        (lambda _, x: torch.rand_like(x), "once traced, acts differently, by .* in a batch of 1"),
    ],
)
def test_the_error_names_what_cannot_be_exported(tmp_path, call, reason):
    task = Task(spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (2,)))
    with pytest.raises(RuntimeError, match=rf"TensorDictModule,? {reason}"):
        export_policy(actor_of(Pure(call)), task, tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_pictures_of_16_bits(tmp_path, suffix):
    """Depth; torch compares no integers without sign of more than 8 bits."""
    seen = np.random.default_rng(0).integers(0, 60_000, (40, 4, 4)).astype(np.uint16)
    space = spaces.Box(0, 65_534, (4, 4), np.uint16)
    data = load_dataset(small_columns(observation=seen), observation_space=space)
    agent = make_agent(config(), data)
    for name in ("onnxscript", "onnxruntime") * (suffix == ".onnx"):
        runtime = needs(name)
    path = agent.export(tmp_path / f"policy{suffix}")
    if suffix == ".onnx":
        (action,) = runtime.InferenceSession(path).run(None, {"observation": seen})
    else:
        program = torch.export.load(path).module()
        action = program(torch.from_numpy(seen)).numpy()
        with pytest.raises(RuntimeError, match="observation"):
            program(torch.full((1, 4, 4), 65_535, dtype=torch.uint16))
    np.testing.assert_allclose(action, agent.act(seen), atol=1e-5)


def test_actions_of_a_small_unit_are_compared_in_it(tmp_path):
    task = Task(spaces.Box(-9, 9, (2,)), spaces.Box(-1e-6, 1e-6, (2,)))
    noisy = actor_of(Pure(lambda _, x: 1e-7 * torch.rand_like(x)))
    with pytest.raises(RuntimeError, match="acts differently"):
        export_policy(noisy, task, tmp_path / "p.pt2")


def test_what_does_not_fit_is_refused(tmp_path):
    box, path, actor = spaces.Box(-1, 1, (2,)), tmp_path / "p.pt2", actor_of(nn.Linear(2, 3))
    masked = policies.categorical(2, OneHot(4), mask_key="action_mask")
    gaussian = policies.gaussian(2, Bounded(-1, 1, (2,)), in_keys=["hidden"])
    for policy, task, place, error, result in (
        (actor, Task(box, box), tmp_path / "p.pt", ValueError, r"'.*p.pt'; .* ends in .pt2"),
        (nn.Linear(2, 2), Task(box, box), path, TypeError, "TensorDict module .*found Linear"),
        (actor, Task(box, box), path, ValueError, r"rows of shape \(3,\), for Box of shape \(2,\)"),
        (actor, Task(box, spaces.Discrete(5)), path, ValueError, "float32.*shape .*one-hot"),
        (actor, Task(box, spaces.MultiBinary(3)), path, ValueError, "needs Box or Discrete"),
        (actor, Task(spaces.Dict(a=box), box), path, ValueError, "reads 'observation' as one"),
        (masked, Task(box, box), path, ValueError, "action_mask needs Discrete"),
        (gaussian, Task(box, box), path, ValueError, "reads 'hidden'"),
    ):
        with pytest.raises(error, match=result):
            export_policy(policy, task, place)
    assert not list(tmp_path.iterdir())


def test_whole_numbers_have_limits_of_their_own(tmp_path):
    """Limits by dimension, bounds of an integer Box, bits; a Box of all uint8 needs no check."""
    space = spaces.Dict(
        {
            "bits": spaces.MultiBinary(2),
            "choices": spaces.MultiDiscrete([2, 5], start=[1, 0]),
            "count": spaces.Box(-3, 3, (2,), np.int64),
            "pixels": spaces.Box(0, 255, (2,), np.uint8),
        }
    )
    task = Task(space, spaces.Box(-9, 9, (2,)))
    keys = [("observation", name) for name in space.spaces]
    joined = Pure(lambda _, *parts: torch.cat([part.float() for part in parts], -1)[:, :2])
    path = export_policy(actor_of(joined, keys), task, tmp_path / "p.pt2")
    program = torch.export.load(path).module()
    right = [torch.tensor([[0, 1]]), torch.tensor([[2, 4]]), torch.tensor([[-3, 3]])]
    right.append(torch.tensor([[0, 255]], dtype=torch.uint8))
    assert program(*right).tolist() == [[0, 1]]
    for place, wrong, text in (
        (0, [[0, 2]], r"bits must hold integers in \[0, 1\]"),
        (1, [[0, 4]], r"choices must hold integers in low \[1, 0\], high \[2, 4\]"),
        (1, [[2, 5]], "choices must hold"),
        (2, [[-4, 0]], r"count must hold integers in \[-3, 3\]"),
    ):
        inputs = list(right)
        inputs[place] = torch.tensor(wrong)
        with pytest.raises(RuntimeError, match=text):
            program(*inputs)
    note = json.loads((tmp_path / "p.json").read_text())
    assert note["inputs"][3]["values"] == "integers in [0, 255]"


T = 3
VECTOR = spaces.Box(-np.inf, np.inf, (3,))
NESTED = spaces.Dict({"at": VECTOR, "kind": spaces.Discrete(5, start=3)})
ACTIONS = spaces.Box(np.array([-2, 0], np.float32), np.array([1, 0.25], np.float32))


class Policy(nn.Module):
    """Actions inside the bounds from a window's features, or from stacked frames."""

    def __init__(self, encoder, features):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features, 2)

    def forward(self, *inputs):
        out = self.head(self.encoder(*inputs)).tanh()
        return torch.stack([1.5 * out[:, 0] - 0.5, 0.125 * out[:, 1] + 0.125], 1)


def parts_of_a_step(_, at, kind):
    return torch.cat([at, OneHotLayer(5)(kind)], -1)


def windows_of(space, steps):
    """Windows as inputs of a program, and the real steps as ``act`` takes them."""
    generator = np.random.default_rng(steps)
    at = generator.normal(size=(T, 3)).astype(np.float32)
    kind = generator.integers(3, 8, T)
    mask = np.arange(T) >= T - steps
    nested = isinstance(space, spaces.Dict)
    seen = {"at": at[mask], "kind": kind[mask]} if nested else at[mask]
    at[~mask], kind[~mask] = np.nan, 99  # ignored
    leaves = [at, kind] if nested else [at]
    return [torch.as_tensor(x)[None] for x in (*leaves, mask)], seen


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Policies that read nested or stacked frames, and the exported programs' paths, by name."""
    keys = [("observation", "at"), ("observation", "kind"), "history_mask"]
    lstm = actor_of(Policy(LSTMEncoder(8, 8, preprocess=Pure(parts_of_a_step)), 8), keys)
    stack = actor_of(Policy(nn.Linear(3 * T, 8), 8))
    made = {
        "nested": (with_history(lstm, T, stack=False), Task(NESTED, ACTIONS)),
        "stacked": (with_history(stack, T, stack=True), Task(VECTOR, ACTIONS)),
    }
    folder = tmp_path_factory.mktemp("programs")
    return {k: (*each, export_policy(*each, folder / f"{k}.pt2")) for k, each in made.items()}


def test_programs_act_as_the_policy_on_the_steps_so_far(programs):
    saved = {}
    path = programs["nested"][2]
    for name, (policy, task, _) in programs.items():
        windows = [windows_of(task.observation_space, steps) for steps in range(1, T + 1)]
        actions = [act(policy, seen, task.observation_space, ACTIONS) for _, seen in windows]
        assert len(set(map(str, actions))) == T
        inputs = [torch.cat(each) for each in zip(*(given for given, _ in windows), strict=True)]
        saved[name] = inputs, torch.as_tensor(np.stack(actions))
    torch.save(saved, path.with_name("cases.pt"))
    ran = run_with_only_torch(COMPARE, path.parent)
    assert ran == [f"ran {name}" for name in programs]


def test_the_description_and_the_refusals_of_windows(programs):
    path = programs["nested"][2]
    at, kind, mask = json.loads(path.with_suffix(".json").read_text())["inputs"]
    assert (at["name"], at["shape"], at["dtype"]) == ("at", ["B", T, 3], "float32")
    assert (kind["name"], kind["shape"], kind["dtype"]) == ("kind", ["B", T], "int64")
    assert kind["values"] == "integers in [3, 7]"
    assert (mask["name"], mask["shape"], mask["dtype"]) == ("history_mask", ["B", T], "bool")
    assert "False at padding" in mask["values"]
    program = torch.export.load(path).module()
    (at, kind, mask), _ = windows_of(NESTED, 2)
    full = torch.ones(1, T, dtype=torch.bool)
    for inputs, words in (
        *(((at, kind, torch.tensor([m]).bool()), "history_mask must hold in every row False")
          for m in ([1, 0, 1], [1, 1, 0], [0, 0, 0])),
        ((at, kind, full), "at must hold finite numbers"),
        ((at.nan_to_num(), kind, full), "kind must hold integers"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=words):
            program(*inputs)
    with pytest.raises((RuntimeError, AssertionError), match=r"shape|dimension|Guard"):
        program(at[:, 1:], kind[:, 1:], mask[:, 1:])
