"""The objectives that the pages define compute their formulas, train, and anneal."""

import pytest
import torch
from snippets import ROOT, read_parts, run_block
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLStep

OF_VALUE, OF_POLICY = "docs/objectives.md", "docs/mathematics.md"


def loss_of(page):
    namespace: dict[str, object] = {}
    for block in read_parts(page, (ROOT / page).read_text())[0].blocks:
        run_block(block, page, namespace, shorten=False)
    return namespace["loss"]


def batch():
    torch.manual_seed(0)
    following = {
        "observation": torch.randn(32, 3),
        "reward": torch.randn(32, 1),
        "terminated": torch.zeros(32, 1, dtype=torch.bool),
        "done": torch.zeros(32, 1, dtype=torch.bool),
    }
    entries = {"observation": torch.randn(32, 3), "action": torch.rand(32, 1) * 2 - 1}
    return TensorDict(entries | {"next": following}, [32])


@pytest.mark.parametrize(
    ("page", "hyperparameter", "name"),
    [
        (OF_VALUE, "value_objective.threshold", "loss_value"),
        (OF_POLICY, "actor_objective.entropy_weight", "loss_actor"),
    ],
)
def test_an_objective_of_a_page_trains(page, hyperparameter, name):
    loss, data = loss_of(page), batch()
    step = IQLStep(loss, torch.optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.005))
    assert step(data)[name] > step(data)[name]
    before = loss(data)[name].detach()
    loss.hyperparameters[hyperparameter].fill_(1e-3)
    assert loss(data)[name] != before


def test_the_objective_of_the_policy_is_its_formula():
    """``-sigmoid(2 A) log pi(a|s) - 0.1 log std`` of the page's numbers."""
    loss, data = loss_of(OF_POLICY), batch()
    found, metadata = loss.actor_objective(loss, loss.prepare_batch(data), torch.full((32,), 0.5))
    distribution = loss.actor_network.get_dist(data)
    log_prob, std = distribution.log_prob(data["action"]), distribution.base_dist.scale[:, 0]
    weight = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    torch.testing.assert_close(metadata["weight"], weight.expand(32))
    torch.testing.assert_close(found, -weight * log_prob - 0.1 * std.log())
