"""ONNX programs: onnxruntime runs them, and they act as the agent does."""

from __future__ import annotations

import json
import logging
import sys

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import (
    HIGH,
    LOW,
    box_agent,
    by_hand,
    config,
    discrete_agent,
    log,
    masks,
    observations,
)
from tensordict.nn import TensorDictModule
from test_export import KINDS, MORE, camera_agent, case, dict_agent
from torch import nn

from iql_torchrl import load_dataset, make_agent
from iql_torchrl.agent.export import export_policy
from iql_torchrl.agent.task import Task

onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
pytest.importorskip("onnxscript")
onnx_ir = pytest.importorskip("onnx_ir")


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def double(**options):
    return make_agent(config(**options), load_dataset(log(), dtype=torch.float64))


def test_the_program_is_the_network_by_hand(tmp_path, capfd):
    agent = box_agent()
    path = agent.export(tmp_path / "policy.onnx")
    assert path == tmp_path / "policy.onnx"
    assert capfd.readouterr().err == ""  # torch's exporter reports what is not installed
    assert logging.getLogger("torch.onnx").level == logging.NOTSET
    expected = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * np.tanh(by_hand(agent, observations()))
    (found,) = session(path).run(None, {"observation": observations()})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_masks_and_the_start_of_the_actions(tmp_path):
    agent = discrete_agent(start=5, masked=True)
    path = agent.export(tmp_path / "discrete.onnx")
    logits = np.where(masks(), by_hand(agent, observations()), -np.inf)
    inputs = {"observation": observations(), "action_mask": masks()}
    (found,) = session(path).run(None, inputs)
    assert found.dtype == np.int64
    assert found.tolist() == (logits.argmax(1) + 5).tolist()


def test_the_description_and_both_formats_in_one_folder(tmp_path):
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
    assert found == [
        ("at", ["batch", 1], "tensor(float)"),
        ("goal", ["batch", 2], "tensor(float)"),
    ]
    (output,) = loaded.get_outputs()
    assert (output.name, output.shape) == ("action", ["batch", 2])
    with pytest.raises(Exception, match=r"index: 1 Got: 3 Expected: 2"):
        loaded.run(None, {"at": np.zeros((1, 1), "f4"), "goal": np.zeros((1, 3), "f4")})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_every_policy_acts_as_its_agent(tmp_path, kind):
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


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cameras_act_as_their_agent(tmp_path, channels):
    agent, seen = camera_agent(channels)
    loaded = session(agent.export(tmp_path / "p.onnx"))
    for rows in (1, 2, 40):
        (found,) = loaded.run(None, {name: each[:rows] for name, each in seen.items()})
        np.testing.assert_allclose(found, agent.act(seen)[:rows], atol=1e-5)


@pytest.mark.slow
def test_what_onnxruntime_lacks_in_float64(tmp_path):
    agent = double(policy="flow", num_samples=3)
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
            double(**options).export(tmp_path / "policy.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flow.onnx", "flow.onnx.json"]


class NoSuchOperation(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x[:, :, None] * x[:, None, :])


def test_an_operation_that_onnx_lacks(tmp_path):
    task = Task(spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (2,)))
    actor = TensorDictModule(NoSuchOperation(), in_keys=["observation"], out_keys=["action"])
    message = r"this TensorDictModule cannot be translated to ONNX .*svd.*write a \.pt2 file"
    with pytest.raises(RuntimeError, match=message):
        export_policy(actor, task, tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


def test_a_program_that_acts_differently_is_not_written(tmp_path, monkeypatch):
    """A translation in which the weights of the first layer are 1 % too large."""
    export = torch.onnx.export

    def wrong(*arguments, **options):
        program = export(*arguments, **options)
        values = program.model.graph.initializers
        (weights,) = (value for name, value in values.items() if "0.weight" in name)
        weights.const_value = onnx_ir.tensor(weights.const_value.numpy() * np.float32(1.01))
        return program

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RuntimeError, match="once translated to ONNX, acts differently, by"):
        box_agent().export(tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime.*iql_torchrl\[onnx\]., or write a .pt2"):
        box_agent().export(tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())
