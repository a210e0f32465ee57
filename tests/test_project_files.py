"""CITATION.cff, hooks, workflows and extras agree with pyproject.toml and with each other."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()

PAPER = "https://arxiv.org/abs/2110.06169"


def test_the_citation_names_this_version_and_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert f'version = "{citation["version"]}"' in PYPROJECT
    assert f'license = "{citation["license"]}"' in PYPROJECT
    for author in citation["authors"]:
        assert f'name = "{author["name"]}"' in PYPROJECT
    (paper,) = citation["references"]
    assert (paper["url"], paper["year"]) == (PAPER, 2021)
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Kostrikov", "Nair", "Levine"]
    assert f'Paper = "{PAPER}"' in PYPROJECT


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_import_the_package_before_torch(path):
    """It sets GOMP_SPINCOUNT, which torch's threads read when torch is loaded."""
    names = re.findall(
        r"^(?:from|import) (torch|tensordict|torchrl|iql_\w+)\b", path.read_text(), re.M
    )
    assert names[0].startswith("iql_")


def test_the_hooks_run_what_ci_runs():
    (local,) = pytest.importorskip("yaml").safe_load(
        (ROOT / ".pre-commit-config.yaml").read_text()
    )["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"^Check it:.*?^(python3 -m venv.*?)$", readme, flags=re.M | re.S)
    assert command, "the command that .ci/run looks for in README.md"
    in_ci = re.findall(r"^\.venv/bin/(.*)", script, flags=re.M)
    in_ci += re.findall(r"\.venv/bin/(python -m pytest.*)", command[1])
    assert sorted(entries) == sorted(in_ci)


def workflow(name: str):
    return pytest.importorskip("yaml").safe_load((ROOT / ".github/workflows" / name).read_text())


def test_the_workflow_tests_every_python_and_the_oldest_torch_that_are_promised():
    jobs = workflow("tests.yml")["jobs"]
    matrix = jobs["versions"]["strategy"]["matrix"]
    promised = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    assert matrix["python"] == promised
    assert f'requires-python = ">={promised[0]}"' in PYPROJECT
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', PYPROJECT)
    assert any(f"torch=={oldest}.*" in row["packages"] for row in matrix["include"])
    (torchrl,) = re.findall(r'"torchrl>=([\d.]+)"', PYPROJECT)
    assert any(f"torchrl=={torchrl}" in row["packages"] for row in matrix["include"])
    commands = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert {"bash .ci/run", "bash .ci/package"} <= set(commands)


def test_a_tag_alone_releases_and_by_trusted_publishing():
    release = workflow("release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    assert release["permissions"] == {"contents": "read"}
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


def test_the_pages_are_built_with_warnings_as_errors_and_deployed_from_main():
    docs = workflow("docs.yml")
    commands = "\n".join(step.get("run", "") for step in docs["jobs"]["build"]["steps"])
    assert "python -m sphinx -W -b html docs docs/_build/html" in commands
    assert "tests/docs/test_notebook.py" in commands
    deploy = docs["jobs"]["deploy"]
    assert deploy["needs"] == "build"
    assert "refs/heads/main" in deploy["if"]
    assert deploy["permissions"] == {"pages": "write", "id-token": "write"}


def test_the_default_tests_install_no_simulator():
    project = pytest.importorskip("tomllib").loads(PYPROJECT)["project"]
    extras = project["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        """The packages that an extra installs, by itself and by the extras that it names."""
        names = set()
        for requirement in extras[extra]:
            name, _, inner = requirement.partition("[")
            if name == project["name"]:
                names |= set().union(*(packages(e) for e in inner.rstrip("]").split(",")))
            else:
                names.add(re.split(r"[><=; ]", requirement)[0])
        return names

    simulators = packages("mujoco") | packages("ogbench") | packages("datasets") | packages("video")
    assert not simulators & packages("test")
    assert simulators <= packages("test-all")


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
    from torch._inductor import compile_fx

    assert f'"{TF32}"' in inspect.getsource(compile_fx), "it is written as it is ignored"
