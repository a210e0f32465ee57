"""Every command line in the Markdown pages is one that the script or module it calls would read."""

import os

import pytest
from command_lines import check, commands
from extras import needs
from snippets import PAGES, ROOT

LINES = [
    pytest.param(words, id=f"{page}-{number}-{words[-1]}")
    for page in PAGES
    for number, words in enumerate(commands((ROOT / page).read_text()))
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch, empty_folder):
    """What scripts set for themselves when they start ends with the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        yield


@pytest.mark.parametrize("words", LINES)
def test_command_line_is_read(words, capsys):
    try:
        check(words)
    except ModuleNotFoundError as missing:
        needs(missing.name)
        raise
    except SystemExit as stop:
        pytest.fail(f"{' '.join(words)}: exit code {stop.code}\n{capsys.readouterr().err}")


def test_commands_are_divided():
    page = (
        "```bash\nA=1 python x.py --a \\\n  1 && pip install y  # why\n```\n```\nno command\n```\n"
    )
    assert commands(page) == [["A=1", "python", "x.py", "--a", "1"], ["pip", "install", "y"]]


@pytest.mark.parametrize(
    "line",
    [
        "python examples/iql_pixels.py --frames 5",
        "python examples/iql_offline.py --expectile 2",
        "python examples/iql_offline.py --preset none",
        ".venv/bin/python examples/train.py --updates 5",
        "OMP_NUM_THREADS=1 python -m torch.distributed.run examples/iql_offline.py --absent",
        "python examples/absent.py",
        "python -m iql_torchrl.data remove shards",
        "python -m iql_torchrl.absent",
        "python benchmarks/bench_trust.py --absent",
        "torchrun --nproc-per-node 2 examples/iql_offline.py --absent",
        "torchrun --absent examples/iql_offline.py",
        "pip install iql_torchrl[absent]",
    ],
)
def test_a_wrong_line_is_refused(line):
    with pytest.raises((SystemExit, ValueError, ImportError, OSError)):
        check(line.split())
