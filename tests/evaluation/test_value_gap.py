"""``value_gap`` by hand, against brute force, and in the rows of a trainer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_agents import box_agent, config, discrete_agent, small_columns, trained
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl import OfflineTrainer, load_dataset, make_agent
from iql_torchrl.evaluation import value_gap
from iql_torchrl.losses import LossCritics

BEST = {"policy": "flow", "num_samples": 6, "flow_steps": 3, "num_critics": 2}


def critic(slope, offset=0.0):
    def value(observation, action):
        return offset + slope * action.sum(-1, keepdim=True) * observation[..., :1]

    return TensorDictModule(value, ["observation", "action"], ["state_action_value"])


def test_by_hand():
    """pi(s) = 2, Q_1 = a s and Q_2 = 3 - a s, at (s, a) = (1, 0), (2, 1), (1, 1)."""
    policy = TensorDictModule(lambda s: torch.full_like(s, 2.0), ["observation"], ["action"])
    data = TensorDict(
        {"observation": torch.tensor([[1.0], [2.0], [1.0]]), "action": torch.tensor([[0.0], [1], [1]])},
        [3],
    )  # fmt: skip
    gap = value_gap(policy, data, critics=[critic(1.0), critic(-1.0, 3.0)])
    assert sorted(gap.chosen) == [-1, 1, 1]  # min(2, 1), min(4, -1), min(2, 1)
    assert sorted(gap.logged) == [0, 1, 1]  # min(0, 3), min(2, 1), min(1, 2)
    assert gap.mean == pytest.approx(-1 / 3)
    # differences 1 (first row), -2, 0: deviation sqrt(((4/3)^2 + (5/3)^2 + (1/3)^2) / 2)
    assert gap.standard_error == pytest.approx(np.sqrt(42 / 9 / 2 / 3))


def brute_force(agent, rows):
    """The best of all candidates, written out with loops over rows, candidates and critics."""
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        candidates = agent.policy.candidates(rows)
        values = []
        for number in range(len(rows)):
            actions = torch.stack([*candidates[number], rows["action"][number]])
            each = []
            for action in actions:
                row = TensorDict({"observation": rows["observation"][number], "action": action})
                heads = []
                for params in agent.loss.qvalue_network_params.unbind(0):
                    with params.to_module(agent.loss.qvalue_network, preserve_module_state=False):
                        heads.append(agent.loss.qvalue_network(row.clone())["state_action_value"])
                each.append(float(torch.stack(heads).min()))
            values.append((max(each[:-1]), each[-1]))
    return np.array(values).T


def test_best_of_against_brute_force():
    agent, dataset = trained(**BEST), load_dataset(small_columns())
    chosen, logged = brute_force(agent, dataset.transitions)
    gap = value_gap(agent.policy, dataset.transitions)
    np.testing.assert_allclose(np.sort(gap.chosen), np.sort(chosen), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.sort(gap.logged), np.sort(logged), rtol=1e-5, atol=1e-6)
    assert gap.mean == pytest.approx((chosen - logged).mean(), rel=1e-4)
    few = value_gap(agent.policy, dataset.transitions, rows=7, seed=3)
    assert len(few.chosen) == 7
    assert set(np.round(few.logged, 4)) <= set(np.round(logged, 4))
    # of more candidates the best is at least as good
    more = make_agent(replace(agent.config, num_samples=30), dataset)
    more.load_state_dict(agent.state_dict())
    assert len(more.policy.fixed_noise) == 30
    assert value_gap(more.policy, dataset.transitions).mean > gap.mean


def test_random_generators_and_modes_are_left_alone():
    agent, dataset = box_agent(**BEST), load_dataset(small_columns())
    agent.actor.train()
    state = torch.get_rng_state()
    drawn = [
        value_gap(agent.policy, dataset.transitions, deterministic=False, seed=s) for s in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert agent.actor.training
    assert drawn[0].mean == drawn[1].mean != drawn[2].mean


def test_a_policy_that_does_not_choose():
    agent, dataset = box_agent(actor_objective="ddpg_bc"), load_dataset(small_columns())
    with pytest.raises(ValueError, match=r"critics is None.*pass critics=losses.LossCritics"):
        value_gap(agent.policy, dataset.transitions)
    gap = value_gap(agent.policy, dataset.transitions, critics=LossCritics(agent.loss))
    out = agent.loss(dataset.transitions.clone())
    assert gap.mean == pytest.approx(float(out["policy_value_gap"]), rel=1e-4)


def test_refusals():
    agent, dataset = box_agent(**BEST), load_dataset(small_columns())
    with pytest.raises(ValueError, match="rows is 0; expected an integer >= 1"):
        value_gap(agent.policy, dataset.transitions, rows=0)
    with pytest.raises(ValueError, match="the transitions have no 'action'"):
        value_gap(agent.policy, dataset.transitions.exclude("action"))
    with pytest.raises(ValueError, match="each must read 'action'"):
        value_gap(agent.policy, dataset.transitions, critics=[])
    other = discrete_agent()
    with pytest.raises(ValueError, match="each must read 'action'"):
        value_gap(other.policy, dataset.transitions, critics=LossCritics(other.loss))


@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_trainer_records_it_at_every_evaluation(num_samples):
    dataset = load_dataset(small_columns())
    agent = make_agent(config(policy="flow", flow_steps=3, num_samples=num_samples), dataset)
    trainer = OfflineTrainer(
        agent=agent, dataset=dataset, total_updates=4, eval_interval=2, log_interval=1,
        evaluation=lambda: {"return_mean": 1.0}, progress_bar=False,
    )  # fmt: skip
    trainer.train()
    seen = [row["update"] for row in trainer.progress.rows if "chosen_value_gap" in row]
    assert seen == ([] if num_samples == 1 else [0, 2, 4])
    if num_samples > 1:
        last = value_gap(agent.policy, dataset.transitions).mean
        assert trainer.progress.rows[-1]["chosen_value_gap"] == last
