"""The example in plain torch makes the same update as ``IQLStep``, and runs by itself."""

import numpy as np
import pytest
import torch
from conftest import make_batch, make_networks
from example_scripts import load
from torchrl.data import Bounded
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, policies
from iql_torchrl.data.builtin import make_dataset

example = load("plain_iql")
STATE, ACTION, BOUND, HIDDEN = 5, 3, 2.0, (64, 64)
KEYS = ("observation", "action", *(("next", k) for k in ("reward", "observation", "terminated")))


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def make_step() -> IQLStep:
    bound = torch.full((ACTION,), BOUND)
    spec = Bounded(-bound, bound, (ACTION,), dtype=bound.dtype)
    actor = policies.gaussian(STATE, spec, hidden=HIDDEN)
    parts = make_networks(STATE, ACTION, hidden=HIDDEN, policy=actor)
    loss = IQLLoss(*parts, expectile=0.7, temperature=3.0, max_weight=100.0)
    loss.make_value_estimator(gamma=0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    return IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.005), order="sequential")


def tensors_of(agent) -> dict[str, list[torch.Tensor]]:
    """The example's parameters by their names in the loss; a list has one entry per critic."""
    networks_of = {
        "actor_network_params.module.0.module.mlp.": [agent.mean],
        "value_network_params.module.mlp.": [agent.value],
        "qvalue_network_params.module.mlp.": list(agent.critics),
        "target_qvalue_network_params.module.mlp.": list(agent.targets),
    }
    tensors = {"actor_network_params.module.0.module.log_std": [agent.log_std]}
    for prefix, members in networks_of.items():
        for name in members[0].state_dict():
            tensors[prefix + name] = [member.get_parameter(name) for member in members]
    return tensors


def stacked(name: str, members: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(members) if "qvalue" in name else members[0]


def test_twenty_updates_equal_those_of_the_step(dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    step, agent = make_step(), example.IQL(STATE, ACTION, BOUND, lr=1e-3)
    state = step.loss.state_dict()
    with torch.no_grad():
        for name, members in tensors_of(agent).items():
            stacked_start = state[name] if "qvalue" in name else state[name][None]
            for member, start in zip(members, stacked_start, strict=True):
                member.copy_(start)
    start = {name: stacked(name, m).detach().clone() for name, m in tensors_of(agent).items()}
    for _ in range(20):
        batch = make_batch(32, obs=STATE, act=ACTION, dtype=dtype)
        losses = agent.update(*(batch[key] for key in KEYS))
        metrics = step(batch)
        expected = [metrics[f"loss_{name}"].item() for name in ("value", "actor", "qvalue")]
        np.testing.assert_allclose(losses, expected, **close)
    state = step.loss.state_dict()
    compared = {name: stacked(name, members) for name, members in tensors_of(agent).items()}
    unchanged = [name for name, tensor in compared.items() if torch.equal(tensor, start[name])]
    assert not unchanged, "every parameter must have been updated"
    parameters = {name for name in state if name.endswith(("weight", "bias", "log_std"))}
    assert set(compared) == parameters, "every parameter of the loss must be compared"
    for name, tensor in compared.items():
        torch.testing.assert_close(tensor, state[name], **close, msg=lambda m, n=name: f"{n}: {m}")


def test_it_runs_by_itself_and_prints_a_result(empty_folder, capsys):
    make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
    returned = example.main(updates=10, episodes=2)
    assert -2000 < returned < 0
    assert f"mean return {returned:.1f} (the dataset: -" in capsys.readouterr().out
