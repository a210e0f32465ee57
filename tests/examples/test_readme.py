"""README's code runs as printed (with fewer updates)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iql_torchrl.data.builtin import make_dataset

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if "pendulum/mixed-v0" in block:
        make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
    exec(compile(block.replace("updates=5000", "updates=20"), "README.md", "exec"), {})


def test_first_block_is_at_most_ten_lines_of_code():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 10


def test_files_it_names_exist():
    root = Path(__file__).resolve().parents[2]
    named = re.findall(r"`((?:examples|tests|benchmarks)/[\w./-]+)`", README)
    named += re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert named
    for name in named:
        assert (root / name).exists(), name
