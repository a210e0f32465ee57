"""CITATION.cff, the pre-commit hooks and the project's URLs agree with the rest of the repository."""

from __future__ import annotations

import inspect
import re
import warnings
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


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_import_the_package_before_torch(path):
    """It sets GOMP_SPINCOUNT, which torch's threads read when torch is loaded."""
    names = re.findall(
        r"^(?:from|import) (torch|tensordict|torchrl|iql_\w+)\b", path.read_text(), re.M
    )
    assert names[0].startswith("iql_")


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


TF32 = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. "
WAITS = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
    "operations (Triggered internally at torch/csrc/cuda/Module.cpp:1.)"
)


@pytest.mark.parametrize("message", [TF32, WAITS])
def test_hints_that_torch_gives_on_a_gpu_do_not_fail_a_test(message):
    warnings.warn(message, UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="another"):
        warnings.warn(f"another hint: {message}", UserWarning, stacklevel=1)


def test_inductors_hint_is_written_as_it_is_ignored():
    from torch._inductor import compile_fx

    assert f'"{TF32}"' in inspect.getsource(compile_fx)
