"""Two ranks make the updates of one process; their trainer writes, resumes and stops as one."""

from __future__ import annotations

from types import SimpleNamespace

import population_cases
import pytest
import torch
from rank_cases import CASES, DEFAULT, make_step, run_ranks, trained
from small_logs import in_shards
from small_populations import dataset, double
from torch.utils._pytree import tree_leaves
from trainer_cases import (
    COMPILED,
    HALF,
    WHOLE,
    calls_by_hand,
    prioritised,
    state,
    trained_on_shards,
    trainer,
)

from iql_torchrl import IQLPopulation
from iql_torchrl.distributed import Ranks, data_parallel
from iql_torchrl.trainers import run_folder


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """A picture takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "draw", lambda *args, **kwargs: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and what each of two ranks ended with."""
    folder = tmp_path_factory.mktemp("runs")
    trainer(Ranks(), folder / "alone", HALF).train()
    population_cases.write_file_of_one_process(folder)
    return folder, run_ranks("trainer_cases.py", folder, "default")


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    """What two ranks ended with in the slow cases."""
    return run_ranks("trainer_cases.py", tmp_path_factory.mktemp("rest"), "slow")


@pytest.fixture(scope="module")
def alone():
    """A run of one process without interruption."""
    run = trainer(Ranks(), None)
    run.train()
    return state(run)


def close(a, b, tolerance):
    a, b = tree_leaves(a), tree_leaves(b)
    assert len(a) == len(b) > 10
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def check_updates(name, ranks):
    alone = trained(CASES[name], Ranks())
    first, second = (result["updates"][name] for result in ranks)
    assert_ranks(first, second, alone, 1e-6)


def assert_ranks(first, second, alone, rtol, atol=None):
    """Both ranks have the same bits, and those of one process up to rounding."""
    first, second = ({part: each[part] for part in alone} for each in (first, second))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=rtol, atol=rtol if atol is None else atol)


@pytest.mark.parametrize("name", DEFAULT)
def test_two_ranks_make_the_updates_of_one_process(runs, name):
    check_updates(name, runs[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES.keys() - set(DEFAULT)))
def test_two_ranks_make_the_updates_of_one_process_in_the_other_cases(rest, name):
    check_updates(name, rest)


def test_the_cases_train_and_differ():
    """Weights, masks and clipping of the cases change the result, so that ignoring one is seen."""
    names = ("sequential", "clipped", "masked", "weighted", "sums")
    moved = [trained(CASES[name], Ranks())["state"] for name in names]
    key = next(name for name in moved[0] if name.startswith("value_network_params"))
    values = [state[key] for state in moved]
    for i, one in enumerate(values):
        assert all((one - other).abs().max() > 1e-4 for other in values[i + 1 :])


def test_one_process_changes_nothing():
    step = make_step({})
    before = {name: value.clone() for name, value in step.loss.named_parameters()}
    assert data_parallel(step, Ranks()) is step
    assert step.ranks is None
    assert all(torch.equal(value, before[name]) for name, value in step.loss.named_parameters())


def test_members_of_a_population_are_divided_and_not_its_batches():
    step = make_step({})
    step.lift = object()
    with pytest.raises(ValueError, match="Build the IQLPopulation in the process group"):
        data_parallel(step, SimpleNamespace(size=2))


def test_only_steps_are_made_parallel():
    with pytest.raises(TypeError, match="step is SGD; expected an IQLStep"):
        data_parallel(make_step({}).optimizer, Ranks())


def test_priorities_are_written_to_the_rows_that_one_process_draws(runs):
    first, second = (result["prioritised"] for result in runs[1])
    alone = prioritised(Ranks())
    assert_ranks(first, second, alone, 1e-6)
    assert len(alone["priorities"].unique()) > 30


def test_a_table_is_built_once(runs):
    """By two processes that open it at the same time, and by rank 0 where the others wait."""
    first, second = (result["memmaps"] for result in runs[1])
    assert first["built"][0] + second["built"][0] == 1
    assert [first["built"][1], second["built"][1]] == [1, 0]
    assert len({*first["sums"], *second["sums"]}) == 1


@pytest.mark.slow
def test_rank_0_evaluates_in_the_background(rest):
    first, second = rest
    assert len(first["background"]) == 5  # before the first update and at 6, 12, 18 and 24
    assert first["background"] == first["foreground"]
    assert len(set(first["background"])) > 1
    assert first["best"]
    assert second["background"] == []


@pytest.mark.parametrize("name", ["whole", "again", "other"])
def test_ranks_have_equal_bits_and_those_of_one_process_up_to_rounding(runs, alone, name):
    first, second = (result[name] for result in runs[1])
    close(first, second, 0.0)
    close(first, alone, 2e-5)
    assert torch.equal(first["replay"], alone["replay"])
    assert torch.equal(first["random"], alone["random"])  # although rank 0 alone evaluates
    assert first["updates"] == WHOLE


def test_a_run_of_two_ranks_that_is_resumed_has_the_bits_of_one_without_interruption(runs):
    close(runs[1][0]["again"], runs[1][0]["whole"], 0.0)


def test_a_run_of_two_ranks_is_resumed_by_one_process(runs, alone):
    run = trainer(Ranks(), runs[0] / "kept").resume()
    assert run.updates == HALF
    run.train()
    close(state(run), alone, 2e-5)


def test_only_rank_0_writes(runs):
    _, (first, second) = runs
    assert {"half/metrics.csv", "half/best.torchrl", "half/config.json"} <= set(first["written"])
    assert second["written"] == []
    assert first["known"] == second["known"] == [True, False]  # although rank 1 has no folder


def test_a_signal_to_one_rank_stops_all_at_the_same_update(runs):
    assert [result["signal"] for result in runs[1]] == [("SystemExit: 143", 16)] * 2


def test_nan_on_one_rank_stops_all_at_the_same_update(runs):
    for result in runs[1]:
        message, updates = result["nan"]
        assert message.startswith("FloatingPointError: ")
        assert "became nan before update 4" in message
        assert updates == 4


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("evaluation", "OSError: the environment is gone",
         "RuntimeError: rank 0 failed, so all ranks stop: the environment is gone"),
        ("resume", "CheckpointError: ", "CheckpointError: "),
        ("unseeded", "ValueError: the ranks' replay buffers", "ValueError: the ranks' replay buffers"),
        ("data", "ValueError: the ranks have different data", "ValueError: the ranks have different"),
        ("intervals", "ValueError: the ranks would stop", "ValueError: the ranks would stop"),
        ("not given", "ValueError: the trainer has 1 ranks and the step 2 ranks", "ValueError: the tr"),
        ("not parallel", "ValueError: the trainer has 2 ranks and the step one process", "ValueError"),
        ("batch norm", "ValueError: qvalue_network has a BatchNorm1d at", "ValueError: qvalue_network"),
        ("plain", "RuntimeError: the torch.distributed process group has 2 ranks", "RuntimeError"),
        ("one trajectory", "ValueError: the batch has shape (8,) and the value estimator is a TDLambda",
         "ValueError: the batch has shape (8,)"),
        ("few rows", "ValueError: the batch has 1 rows and there are 2 ranks", "ValueError"),
    ],
)  # fmt: skip
def test_errors_are_raised_on_all_ranks(runs, name, first, second):
    for result, start in zip(runs[1], (first, second), strict=True):
        assert result[name].startswith(start), result[name]


def test_what_cannot_be_sent_raises_on_every_rank(runs):
    for rank, result in enumerate(runs[1]):
        value, error, gathered = result["unsendable"]
        assert value.startswith("TypeError: a function cannot be sent to the other ranks")
        assert error == (
            "Unsendable: of rank 0" if rank == 0 else "RuntimeError: Unsendable: of rank 0"
        )
        assert "a function cannot be sent to the other ranks" in gathered


@pytest.mark.parametrize("case", population_cases.CASES)
def test_divided_runs_are_those_of_one_process_up_to_rounding(runs, case):
    first, second = (result["populations"][case] for result in runs[1])
    alone = population_cases.of_one_process(case)
    assert first["configs"] == alone["configs"]
    population_cases.check(first, alone, 1e-12)
    assert second == {}  # rank 0 alone gets the results


def test_each_rank_has_its_own_part_of_a_population(runs):
    assert [result["populations"]["runs"] for result in runs[1]] == [[1], [2, 3]]  # by seed


def test_files_hold_all_runs_and_are_continued_by_any_number_of_ranks(runs):
    folder, (first, _) = runs
    alone = population_cases.of_one_process("own batches, adamw")
    with double():
        again = IQLPopulation.load(folder / "of_two_ranks.torchrl", dataset())
        assert (again.updates, len(again)) == (population_cases.BEFORE, 3)
        left = population_cases.UPDATES - population_cases.BEFORE
        by_one = population_cases.trained(again, Ranks(), left)
    population_cases.check(by_one, alone, 1e-12, ["state"])
    for name in ("of_two_ranks", "of_one_process"):
        updates, result = first["populations"]["files"][name]
        assert updates == population_cases.BEFORE
        population_cases.check(result, alone, 1e-12, ["state"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fewer", "ValueError: there are 1 configs and 2 ranks; start as many processes"),
        ("configs", "ValueError: the ranks have different configs; give each rank the whole list"),
        ("data", "ValueError: the ranks have different data: their datasets' digests differ"),
    ],
)
def test_what_populations_refuse_is_raised_on_all_ranks(runs, name, message):
    for result in runs[1]:
        refusal = result["populations"]["refused"][name]
        assert refusal.startswith(message), refusal


@pytest.mark.slow  # compilation takes minutes
def test_compiled_and_captured_updates_of_two_ranks_are_eager_ones_of_one_process(tmp_path):
    alone = {"compiled": trained(COMPILED, Ranks()), "captured": calls_by_hand()}
    first, second = run_ranks("trainer_cases.py", tmp_path, "compiled")
    for form in alone:
        parts = (
            {p: each[form][p] for p in ("state", "metrics")} for each in (first, second, alone)
        )
        assert_ranks(*parts, 1e-9)
    assert first["sums"] == second["sums"] == [3]  # one graph: V; actor and critics; metrics
    population = population_cases.of_one_process("own batches, adamw")
    population_cases.check(first["population"], population, 1e-9)


@pytest.mark.slow
def test_two_ranks_on_shards(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        in_shards(tmp_path / str(number), [7, 3, 12, 5, 5, 9, 2, 8, 6, 11], 5, seed=number)
    first, second = run_ranks("trainer_cases.py", tmp_path, "shards")
    alone = trained_on_shards(Ranks(), tmp_path / "0" / "shards")
    assert first["loaded"] == second["loaded"] == alone["loaded"]
    weights = (each["weights"] for each in (first, second, alone))
    assert_ranks(*weights, 1e-4, 1e-5)
    for rank in (first, second):
        assert rank["data"].startswith("ValueError: the ranks have different data: their datasets'")
        assert rank["rotation"].startswith("ValueError: the ranks' replay buffers would draw")
