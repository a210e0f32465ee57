"""``tune``: trials that stop at any report and continue; Ray with a killed worker and a lost node."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from extras import needs
from small_agents import config, small_columns
from tune_session import Session, Stopped

from iql_torchrl import load_dataset
from iql_torchrl.files import read_components
from iql_torchrl.tune import FILE, agents_of, trainable


@pytest.fixture
def session(monkeypatch, tmp_path):
    """What makes a session, which ``from ray import tune`` then gives."""

    def make(stop=None):
        folder = tmp_path / f"session-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        this = Session(folder, stop)
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(tune=this))
        return this

    return make


def load():
    return load_dataset(small_columns())


def first_weight(agent, dataset):
    """A score without an environment; a dropped or doubled update changes it."""
    parameters = [p.detach().double().sum() for p in agent.actor.parameters()]
    return {"score": float(torch.stack(parameters).sum()), "rows": float(len(dataset))}


SMALL = partial(trainable, load, score=first_weight)


def test_a_trial_reports_losses_and_scores_at_each_interval(session):
    tune = session()
    SMALL(config(updates=10), report_every=4)({"expectile": 0.9})
    assert [row["updates"] for row in tune.rows] == [4, 8, 10]
    for row in tune.rows:
        names = {"updates", "score", "rows", "loss_actor", "loss_qvalue", "loss_value"}
        assert set(row) == names
        assert all(np.isfinite(value) for value in row.values())
        assert row["rows"] == 40
    (agent,) = agents_of(tune.checkpoint, load())
    assert agent.config.expectile == 0.9
    assert first_weight(agent, load())["score"] == tune.rows[-1]["score"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_trial_that_was_stopped_ends_with_the_same_bits(session, seeds):
    settings = {"temperature": 1.0, "dropout": 0.1}  # draws random numbers in every update
    small = partial(SMALL, config(updates=12), seeds=seeds, report_every=3)
    whole = session()
    small()(settings)
    stopped = session(stop=2)
    with pytest.raises(Stopped):
        small()(settings)
    small()(settings)
    assert stopped.rows == whole.rows
    ends = [first_weight(a, load()) for a in agents_of(whole.checkpoint, load())]
    assert ends == [first_weight(a, load()) for a in agents_of(stopped.checkpoint, load())]
    assert len({end["score"] for end in ends}) == seeds


def test_seeds_report_means_and_the_standard_deviation(session):
    tune = session()
    SMALL(config(updates=3, seed=5), seeds=3, report_every=3)({})
    agents = agents_of(tune.checkpoint, load())
    assert [agent.config.seed for agent in agents] == [5, 6, 7]
    scores = [first_weight(agent, load())["score"] for agent in agents]
    assert tune.rows[0]["score"] == pytest.approx(np.mean(scores), rel=1e-12)
    assert tune.rows[0]["score_std"] == pytest.approx(np.std(scores, ddof=1), rel=1e-12)


def continued(session, first, second):
    """What two trials hold after their first reports, of which the second continues the first."""
    states, checkpoint = [], None
    for trial in (first, second):
        run = session(stop=1)
        run.checkpoint = checkpoint
        with pytest.raises(Stopped):
            trial()
        checkpoint = run.checkpoint
        states.append(read_components(Path(checkpoint.folder, FILE)))
    return states


def test_population_based_training_changes_settings_and_keeps_weights(session):
    """The learning rate at update 3 of 6 of the new cosine: 2 (1 + cos(pi / 2)) / 2 = 1 times 0.01."""
    small = partial(SMALL, config(updates=6, optimizer="adamw"), report_every=3)
    first = {"actor_lr": 1e-3, "expectile": 0.6, "weight_decay": 0.125}
    settings = {
        "actor_lr": 2e-2, "expectile": 0.9, "discount": 0.5, "temperature": 5.0, "weight_decay": 0.5,
    }  # fmt: skip
    before, after = continued(session, lambda: small()(first), lambda: small()(settings))
    assert after["settings"]["expectile"] == 0.9
    assert after["agent"]["config"]["discount"] == 0.5
    assert float(after["loss_module"]["_value_estimator.gamma"]) == 0.5
    assert after["trainer_state"]["progress"]["updates"] == 6, "it went on from update 3"
    assert len(after["trainer_state"]["progress"]["rows"]) == 2
    groups = [state["step"]["optimizer"]["param_groups"] for state in (before, after)]
    assert groups[0][0]["lr"] == pytest.approx(5e-4)  # half of 1e-3
    assert (groups[1][0]["initial_lr"], groups[1][0]["lr"]) == (2e-2, 0.0)  # its end
    assert after["step"]["lr_schedulers"][0]["base_lrs"][0] == 2e-2
    used = [state["step"]["hyperparameters"] for state in (before, after)]
    expectiles = [float(values["value_objective.expectile"]) for values in used]
    assert expectiles == pytest.approx([0.6, 0.9]), "of the updates, and not of the config alone"
    temperatures = [float(values["actor_objective.temperature"]) for values in used]
    assert temperatures == pytest.approx([3.0, 5.0])
    assert [groups[i][0]["weight_decay"] for i in (0, 1)] == [0.125, 0.5]
    assert groups[1][1]["lr"] == groups[0][1]["lr"], "rates that were not changed"


def test_the_next_update_has_the_changed_learning_rate(session):
    """Adam's first step after the change moves a weight by about the new rate, 50 times the old."""
    constant, moved = config(updates=100, schedule="constant"), {}
    for rate in (1e-4, 5e-3):
        states = continued(
            session,
            lambda: SMALL(constant, report_every=50)({"critic_lr": 1e-4}),
            lambda rate=rate: SMALL(constant, report_every=51)({"critic_lr": rate}),
        )
        name = "qvalue_network_params.module.mlp.2.bias"
        old, new = (state["loss_module"][name] for state in states)
        moved[rate] = float((new - old).abs().mean())
    assert moved[5e-3] / moved[1e-4] == pytest.approx(50, rel=1e-3)


def test_a_population_refuses_other_settings(session):
    tune = session(stop=1)
    trial = SMALL(config(updates=4), seeds=2, report_every=2)
    with pytest.raises(Stopped):
        trial({"expectile": 0.6})
    assert tune.checkpoint is not None
    with pytest.raises(ValueError, match=r"expectile=0\.6.*expectile=0\.9.*only with seeds=1"):
        trial({"expectile": 0.9})


def test_names_that_are_not_settings_and_numbers_below_one_are_refused(session):
    session()
    with pytest.raises(ValueError, match="unknown: expectil;"):
        SMALL(config())({"expectil": 0.9})
    with pytest.raises(ValueError, match="seeds is 0; expected an integer >= 1"):
        SMALL(config(), seeds=0)
    with pytest.raises(ValueError, match="report_every is -3"):
        SMALL(config(), report_every=-3)


def test_without_ray_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "iql_torchrl\[tune\]"'):
        SMALL(config())


# -- with Ray ---------------------------------------------------------------------------------------

with_ray = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of Ray, which differ between versions
]
GRID = (0.6, 0.7, 0.9)


@pytest.fixture
def ray(monkeypatch):
    ray = needs("ray")
    needs("ray.tune")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    monkeypatch.setenv("PYTHONPATH", path + os.pathsep + os.environ.get("PYTHONPATH", ""))
    yield ray
    ray.shutdown()


def fit(folder: Path, *, callbacks=(), **how):
    from ray import tune

    trial = trainable(load, config(updates=1_500, hidden=(32, 32)), score=first_weight)
    return tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"expectile": tune.grid_search(list(GRID))},
        tune_config=tune.TuneConfig(metric="score", mode="max", **how),
        run_config=tune.RunConfig(
            name="grid",
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=4),
            callbacks=list(callbacks),
            verbose=0,
        ),
    ).fit()


def scores(results) -> dict[float, float]:
    assert not results.errors
    assert [result.metrics["updates"] for result in results] == [1_500] * len(GRID)
    return {result.config["expectile"]: result.metrics["score"] for result in results}


def alone(expectile: float, monkeypatch, folder: Path) -> float:
    """The score of a trial in this process, without Ray."""
    folder.mkdir()
    here = Session(folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", SimpleNamespace(tune=here))
        trainable(load, config(updates=1_500, hidden=(32, 32)), score=first_weight)(
            {"expectile": expectile}
        )
    return here.rows[-1]["score"]


def node_of(cluster, worker: int):
    """The node whose raylet has started the process ``worker``."""
    parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    for node in cluster.worker_nodes:
        if any(each.process.pid == parent for each in node.all_processes["raylet"]):
            return node
    raise LookupError(worker)


class TestWithRay:
    pytestmark = with_ray

    def test_a_killed_worker_and_a_removed_node_change_no_bit(self, ray, tmp_path, monkeypatch):
        """A head without processors, and two nodes of one processor, of which one is removed."""
        from ray.cluster_utils import Cluster
        from ray.tune import Callback

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address)
        done = []

        class Faults(Callback):
            def __reduce__(self):  # Tune pickles callbacks, and a cluster holds locks
                return Callback, ()

            def on_trial_result(self, iteration, trials, trial, result, **info):
                if result["training_iteration"] == 2 and "killed" not in done:
                    done.append("killed")
                    os.kill(result["pid"], signal.SIGKILL)
                elif result["training_iteration"] == 3 and "removed" not in done:
                    done.append("removed")
                    cluster.remove_node(node_of(cluster, result["pid"]), allow_graceful=False)

        try:
            found = scores(fit(tmp_path, callbacks=[Faults()]))
        finally:
            ray.shutdown()
            cluster.shutdown()
        assert done == ["killed", "removed"]
        torch.set_num_threads(1)
        assert found[0.6] == alone(0.6, monkeypatch, tmp_path / "first")
        assert found[0.9] == alone(0.9, monkeypatch, tmp_path / "last")
