"""The rooms of the package: a file imports only from rooms of a lower layer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import nn
from torchrl.objectives import LossModule
from torchrl.trainers import Trainer

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "iql_torchrl"

# A room is a folder or a top-level file. A file imports only from its own room and from rooms of
# lower layers.
LAYERS = (
    ("config", "descriptions", "files", "functional", "private_apis", "tolerance"),
    ("networks",),
    ("data", "policies"),
    ("distributed", "evaluation", "losses"),
    ("report", "selection", "update"),
    ("agent",),
    ("trainers",),
    ("population",),
    ("tune",),
)
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
MOST_ROOMS, MOST_LAYERS = 20, 9


def room(module: str) -> str:
    """The room of ``iql_torchrl.room...``, empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


NAMES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if p != PACKAGE / "__init__.py"
}


def imports(path: Path) -> set[str]:
    """Files of the package that a file imports, also for type checkers alone, and names of its face."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                whole = name in NAMES or node.module == "iql_torchrl"
                found.add(name if whole else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("iql_torchrl")}


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_down(name):
    own = room(name)
    assert own in LAYER_OF, f"{name} has no layer: give its room one here"
    for imported in imports(NAMES[name]):
        other = room(imported)
        assert other == own or LAYER_OF[other] < LAYER_OF[own], f"{name} imports {imported}"


def test_no_files_import_each_other_in_a_circle():
    """Inside of a room too."""
    left = {name: imports(path) & NAMES.keys() - {name} for name, path in NAMES.items()}
    while ends := {name for name, used in left.items() if not used & left.keys()}:
        left = {name: used for name, used in left.items() if name not in ends}
    while starts := left.keys() - set().union(*left.values()):
        left = {name: used for name, used in left.items() if name not in starts}
    assert not left, f"circles among {sorted(left)}"


def test_rooms_and_layers_are_few():
    rooms = set(map(room, NAMES))
    assert rooms <= set(LAYER_OF)
    assert len(rooms) <= MOST_ROOMS
    assert len(LAYERS) <= MOST_LAYERS


def test_examples_and_benchmarks_use_public_names_only():
    for path in (*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iql_torchrl"):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"{path.name} imports {private}"


def private_attributes(tree: ast.AST) -> set[str]:
    """Names ``x`` of every ``....x`` in the code, ``getattr(..., "x")`` included, that are private."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            names |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def defined_here(tree: ast.AST) -> set[str]:
    """Names that the code gives to functions, classes and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def is_private_import(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Import):
        parts = [part for alias in node.names for part in alias.name.split(".")]
    else:
        return False
    libraries = ("torch", "torchrl", "tensordict")
    return parts[0] in libraries and any(part.startswith("_") for part in parts)


def of_instances() -> set[str]:
    """Names that derived classes of TorchRL's LossModule and Trainer have from their base classes."""

    class Loss(LossModule):
        def forward(self, tensordict):
            return tensordict

    names = {"collector": None, "optimizer": None, "progress_bar": False, "loss_module": Loss()}
    counts = dict.fromkeys(("total_frames", "frame_skip", "optim_steps_per_batch"), 1)
    own = {*vars(Loss()), *vars(Trainer(**names, **counts))} - {*vars(nn.Module())}
    return own | {*dir(LossModule), *dir(Trainer)}


def test_private_names_of_the_libraries_are_in_one_file():
    inherited = of_instances()
    trees = {path: ast.parse(path.read_text()) for path in NAMES.values()}
    private_file = trees.pop(PACKAGE / "private_apis.py")
    ours = set().union(*map(defined_here, trees.values()))
    private = private_attributes(private_file) - inherited
    # os._exit; what executors do at exit, and their processes (in public from Python 3.14);
    # the tables of nn.Module, which every module has; and no others
    other = {"_exit", "_register_atexit", "_processes", "_modules", "_parameters", "_buffers"}
    for path, tree in trees.items():
        imports = [ast.unparse(n) for n in ast.walk(tree) if is_private_import(n)]
        assert not imports, f"{path.name}: {imports}; use or add a function in private_apis.py"
        names = private_attributes(tree)
        wrong = (names & private) | (names - ours - inherited)
        wrong -= other
        assert not wrong, f"{path.name} uses {sorted(wrong)}; use or add a function there"


def test_public_names_exist():
    import iql_torchrl

    for name in iql_torchrl.__all__:
        assert getattr(iql_torchrl, name) is not None
