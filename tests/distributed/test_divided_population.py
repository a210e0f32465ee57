"""The runs of a population that two ranks divide are those of one process."""

from __future__ import annotations

import pytest
import torch
from population_cases import CASES, DIFFERENT, UPDATES, population, trained
from small_populations import configs, dataset, double
from two_ranks import run_ranks

from iql_torchrl import IQLPopulation
from iql_torchrl.distributed import Ranks

BEFORE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the file of a population of one process after some updates."""
    folder = tmp_path_factory.mktemp("populations")
    with double():
        first = population("own batches, adamw", Ranks())
        list(first.train(BEFORE, every=BEFORE))
        first.save(folder / "of_one_process.torchrl")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks("population_cases.py", folder, "default")


def check(found, alone, tolerance):
    assert found["configs"] == alone["configs"]
    for part in ("state", "metrics"):
        assert found[part].keys() == alone[part].keys()
        for key, value in alone[part].items():
            torch.testing.assert_close(
                found[part][key], value, rtol=tolerance, atol=tolerance, msg=f"{part} {key}"
            )


@pytest.mark.parametrize("case", CASES)
def test_runs_are_those_of_one_process_up_to_rounding(ranks, case):
    with double():
        alone = trained(population(case, Ranks()), Ranks())
    check(ranks[0][case], alone, 1e-12)
    assert ranks[1][case] == {}  # rank 0 alone gets the results


def test_each_rank_has_its_own_part_of_the_runs(ranks):
    seeds = [config.seed for config in configs(DIFFERENT)]
    assert [result["runs"] for result in ranks] == [seeds[:1], seeds[1:]]


def test_files_hold_all_runs_and_are_continued_by_any_number_of_ranks(ranks, folder):
    with double():
        alone = trained(population("own batches, adamw", Ranks()), Ranks())
        again = IQLPopulation.load(folder / "of_two_ranks.torchrl", dataset())
        assert (again.updates, len(again)) == (BEFORE, len(DIFFERENT))
        by_one = trained(again, Ranks(), UPDATES - BEFORE)
    check({**by_one, "metrics": {}}, {**alone, "metrics": {}}, 1e-12)
    for name in ("of_two_ranks", "of_one_process"):
        updates, result = ranks[0]["files"][name]
        assert updates == BEFORE
        check({**result, "metrics": {}}, {**alone, "metrics": {}}, 1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fewer", "ValueError: there are 1 configs and 2 ranks; start as many processes"),
        ("configs", "ValueError: the ranks have different configs; give each rank the whole list"),
        ("data", "ValueError: the ranks have different data: their datasets' digests differ"),
    ],
)
def test_refusals_are_raised_on_all_ranks(ranks, name, message):
    for result in ranks:
        assert result["refused"][name].startswith(message), result["refused"][name]


@pytest.mark.slow
def test_captured_runs_of_two_ranks_are_eager_ones_of_one_process(tmp_path):
    with double():
        alone = trained(population("own batches, adamw", Ranks()), Ranks())
    first, _ = run_ranks("population_cases.py", tmp_path, "slow")
    first["captured"]["configs"] = alone["configs"]  # those of the ranks have compile=True
    check(first["captured"], alone, 1e-9)
