"""The short training script: 30 lines that write a run and print its result."""

from pathlib import Path

from example_scripts import EXAMPLES, load

from iql_torchrl import Agent
from iql_torchrl.data.builtin import make_dataset


def test_it_trains_evaluates_and_keeps_earlier_runs(empty_folder, capsys):
    make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
    main = load("train").main
    means = [main(updates=20, episodes=2) for _ in range(2)]
    assert means[0] == means[1], "the same seed gives the same result"
    assert -2000 < means[0] < 0
    assert f"IQL: {means[0]:.1f}, standard error " in capsys.readouterr().out
    for folder in (Path("runs/train"), Path("runs/train-2")):
        assert (folder / "metrics.csv").read_text().startswith("update,")
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert Agent.load(folder).config.updates == 20


def test_it_has_thirty_lines():
    assert len((EXAMPLES / "train.py").read_text().splitlines()) <= 31
