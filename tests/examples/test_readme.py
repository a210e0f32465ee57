"""The code in the Markdown files runs as printed (with fewer updates), and their links are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iql_torchrl.data.builtin import make_dataset

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "examples/README.md", "benchmarks/README.md", "CONTRIBUTING.md")
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    )
]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if "pendulum/mixed-v0" in block:
        make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
    short = re.sub(r"updates=\d{4,}", "updates=20", block)
    exec(compile(short, "README.md", "exec"), {})


def test_first_block_is_at_most_ten_lines_of_code():
    (block,) = BLOCKS[0].values
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_the_main_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES)
def test_files_and_sections_it_names_exist(page):
    path = ROOT / page
    text = path.read_text()
    named = re.findall(r"`((?:examples|tests|benchmarks|iql_torchrl)/[\w./-]+)`", text)
    assert named or page != "README.md"
    for name in named:
        assert (ROOT / name).exists(), name
    links = re.findall(r"\]\(((?!http)[^)]+)\)", text)
    assert links
    for link in links:
        name, _, section = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)", target.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert section in slugs, f"{link}: the sections are {slugs}"
