"""What a sweep refuses, in one sentence each, and how it recognises its folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from small_populations import BASE
from small_sweeps import first_weight, grid, perform_here, write_log

from iql_torchrl.data import DatasetError
from iql_torchrl.sweep import Sweep, engines


@pytest.fixture
def source(tmp_path):
    return write_log(tmp_path)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr("iql_torchrl.sweep.sweep.perform_locally", perform_here)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"members_per_task": 0}, "members_per_task is 0"),
        ({"held_out": 1.0}, r"held_out is 1.0; it must lie in \(0, 1\)"),
        ({"score": "reward"}, "score is 'reward'"),
        ({"source": {"observation": []}}, "source is a dict; a sweep reads a name or a path"),
        ({"configs": []}, "configs is empty"),
        ({"configs": BASE}, "configs is IQLConfig"),
        ({"configs": [BASE, 3]}, r"configs\[1\] is int"),
    ],
)
def test_bad_arguments_get_one_sentence(tmp_path, options, words):
    given = {"configs": [BASE], "source": "log.npz", "folder": tmp_path / "sweep"} | options
    with pytest.raises((ValueError, TypeError), match=words):
        Sweep(**given)


@pytest.mark.parametrize(
    ("updates", "options", "words"),
    [
        (1, {"save_every": 7}, r"another sweep: save_every was 5000, now 7;"),
        (1, {"log_score": ("doctor", 0.5)}, r"log_score was None, now .*0\.5"),
        (2, {}, r"updates was 1, now 2 in 'expectile 0.6 #0' in 'configs'"),
    ],
)
def test_the_folder_of_another_sweep_is_refused(source, tmp_path, here, updates, options, words):
    Sweep(grid(updates=1), source, tmp_path / "sweep", score=None).run()
    with pytest.raises(ValueError, match=words):
        Sweep(grid(updates=updates), source, tmp_path / "sweep", score=None, **options).run()


def test_other_engines_and_damaged_folders_are_refused(source, tmp_path, here):
    with pytest.raises(ValueError, match="engine is 'dask'; choose one of local, ray, slurm"):
        Sweep(grid(), source, tmp_path / "other").run("dask")
    with pytest.raises(ValueError, match="workers is 0"):
        Sweep(grid(), source, tmp_path / "other").run(workers=0)
    assert not (tmp_path / "other").exists()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json is not JSON"):
        Sweep(grid(updates=1), source, tmp_path / "sweep", score=None).run()


def test_an_absent_source_or_one_bad_config_leaves_the_folder_to_a_corrected_sweep(
    source, tmp_path, here
):
    folder = tmp_path / "sweep"
    absent = tmp_path / "logg.npz"
    with pytest.raises((DatasetError, FileNotFoundError), match=r"logg\.npz") as caught:
        Sweep(grid(updates=1), absent, folder, score=None).run()
    assert "\n" not in str(caught.value)
    bad = replace(BASE, updates=1, policy="categorical")
    result = Sweep({"mine": bad}, source, folder, score=None).run()
    assert list(result.failures) == ["mine"]
    assert result.failures["mine"].startswith("cannot be built: policy is 'categorical'")
    result = Sweep(grid(updates=1), source, folder, score=None).run()
    assert not result.failures
    assert len(result.rows) == 4


def test_a_sweep_recognises_its_folder_from_another_process(source, tmp_path, here):
    """Addresses in memory differ between processes; a path is the same as its text."""
    folder = tmp_path / "sweep"
    scores = [partial(first_weight) for _ in range(2)]
    assert repr(scores[0].func) in repr(scores[0])
    Sweep(grid(updates=1), source, folder, score=scores[0]).run()
    saved = (folder / "sweep.json").read_text()
    assert " at 0x" not in saved
    Sweep(grid(updates=1), str(source), folder, score=scores[1]).run()
    with pytest.raises(ValueError, match=r"source was .*now 'other.npz'"):
        Sweep(grid(updates=1), "other.npz", folder, score=scores[1]).run()
    with pytest.raises(ValueError, match=r"expectile 0\.6 #1 was .*, now None"):
        Sweep(grid(updates=1)[:1] + grid(updates=1)[2:], source, folder, score=scores[1]).run()
    with pytest.raises(ValueError, match=r"log\.npz is a file; a sweep needs a folder"):
        Sweep(grid(updates=1), source, source).run()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", "Connection refused"),
        ("my-cluster", "expected 'auto', 'HOST:PORT' or 'ray://HOST:PORT'"),
        ("host.invalid:6379", "no Ray cluster answers"),
    ],
)
def test_an_unreachable_address_gets_one_sentence_at_once(address, words):
    """Ray tries to connect for five minutes, and ends the process."""
    with pytest.raises(ConnectionError, match=r"start one with ray start --head") as caught:
        engines.connect(SimpleNamespace(init=None), address, 1)
    assert words in str(caught.value)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_absent_package_is_named(source, tmp_path, monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "iql_torchrl\[{engine}\]"'):
        Sweep(grid(updates=1), source, tmp_path / "sweep", score=None).run(engine)
