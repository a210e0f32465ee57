"""CITATION.cff, the pre-commit hooks and the project's URLs agree with the rest of the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
PAPER = "https://arxiv.org/abs/2110.06169"


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert citation["cff-version"] == "1.2.0"
    assert f'version = "{citation["version"]}"' in pyproject
    assert f'license = "{citation["license"]}"' in pyproject
    for author in citation["authors"]:
        assert f'name = "{author["name"]}"' in pyproject
    (paper,) = citation["references"]
    assert (paper["url"], paper["year"]) == (PAPER, 2021)
    assert [author["family-names"] for author in paper["authors"]] == [
        "Kostrikov",
        "Nair",
        "Levine",
    ]
    assert f'Paper = "{PAPER}"' in pyproject


def test_the_hooks_run_what_ci_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"^Check it:.*?^(python3 -m venv.*?)$", readme, flags=re.M | re.S)
    assert command, "the command that .ci/run looks for in README.md"
    in_ci = re.findall(r"^\.venv/bin/(.*)", script, flags=re.M)
    in_ci += re.findall(r"\.venv/bin/(python -m pytest.*)", command[1])
    assert sorted(entries) == sorted(in_ci)
