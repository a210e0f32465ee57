"""The rooms of the package: a file imports only from rooms of a lower layer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "iql_torchrl"

# Lower layers first; files of one layer may not import one another, but within a folder.
FOLDERS = ("data", "selection")
LAYERS = {
    "descriptions": -1,
    "functional": 0,
    "config": 0,
    "distributions": 0,
    "interface": 0,
    "intervals": 0,
    "reading": 0,
    "records": 0,
    "data.transitions": 0,
    "data.normalise": 0,
    "acting": 1,
    "arguments": 1,
    "bound": 2,
    "capture_checks": 6,
    "categories": 3,
    "fingerprint": 6,
    "capture": 7,
    "checkpoint": 1,
    "correlation": 0,
    "dense": 1,
    "networks": 0,
    "critics": 1,
    "pictures": 1,
    "results": 1,
    "evaluation": 2,
    "data": 2,
    "foundation": 3,
    "policies": 2,
    "report": 2,
    "background_process": 3,
    "objectives": 4,
    "task": 3,
    "video": 3,
    "background": 4,
    "export": 6,
    "export_checks": 2,
    "run_folder": 4,
    "step": 5,
    "compilation": 6,
    "population": 8,
    "population_loss": 5,
    "stacked": 3,
    "stacked_adam": 0,
    "process_end": 0,
    "progress": 6,
    "resume": 6,
    "agent": 7,
    "selection": 7,
    "scores": 8,
    "trainer_parts": 8,
    "update_checks": 0,
    "trainer": 9,
}


def room(module: str) -> str:
    parts = module.split(".")[1:]
    if parts and parts[0] == "data":
        return module.removeprefix("iql_torchrl.") if ".".join(parts) in LAYERS else "data"
    return parts[0] if parts else ""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iql_torchrl"):
            if node.module == "iql_torchrl":
                found |= {f"iql_torchrl.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("iql_torchrl")}
    return found


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    mine = room(name)
    assert mine in LAYERS, f"{name} has no layer: give it one here and in the design"
    for imported in imports(path):
        theirs = room(imported)
        if theirs == mine and mine in FOLDERS:
            continue
        assert LAYERS[theirs] < LAYERS[mine], f"{name} imports {imported}"


def test_examples_and_benchmarks_use_public_names_only():
    for folder in ("examples", "benchmarks"):
        for path in (PACKAGE.parent / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "iql_torchrl"
                ):
                    private = [a.name for a in node.names if a.name.startswith("_")]
                    assert not private, f"{path.name} imports {private}"


def test_importing_writes_nothing_and_touches_no_device(tmp_path):
    code = (
        "import os, torch, iql_torchrl; assert not torch.cuda.is_initialized(); "
        "assert not os.listdir('.'), os.listdir('.')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_public_names_exist():
    import iql_torchrl

    for name in iql_torchrl.__all__:
        assert getattr(iql_torchrl, name) is not None
