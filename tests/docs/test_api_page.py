"""The page of the API lists what scripts use, and everything on it exists and has a contract."""

import ast
import importlib
import inspect
import re
from types import ModuleType

import pytest
from snippets import PAGES, ROOT, read_parts

import iql_torchrl
from iql_torchrl import losses

LISTED = re.findall(r"^   ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
#: Shown by a table or a comment where they are defined, not by a docstring.
PLAIN_DATA = ("PRESETS", "data.REFERENCE_RETURNS", "data.builtin.BUILTIN")
ALIASES = ("policies.flow", "policies.best_of")


def named(name: str):
    """The object of a name such as ``policies.gaussian``, below ``iql_torchrl``."""
    module, _, own = f"iql_torchrl.{name}".rpartition(".")
    return getattr(importlib.import_module(module), own)


@pytest.mark.parametrize("name", LISTED)
def test_a_listed_name_has_a_docstring(name):
    value = named(name)
    assert name in PLAIN_DATA or inspect.getdoc(value), f"iql_torchrl.{name} has no docstring"


def test_every_public_name_of_the_package_is_listed():
    names = {n for n in iql_torchrl.__all__ if not isinstance(named(n), ModuleType)}
    assert names <= set(LISTED)
    functional = {f"functional.{name}" for name in iql_torchrl.functional.__all__}
    assert functional <= set(LISTED)
    classes = {n for n in losses.__all__ if inspect.isclass(getattr(losses, n))} - names
    assert {f"losses.{name}" for name in classes} <= set(LISTED)
    assert len(set(LISTED)) == len(LISTED)


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p not in ("CONTRIBUTING.md", "benchmarks/README.md", "docs/extending.md")],
)
def test_what_the_pages_import_is_listed(page):
    for part in read_parts(page, (ROOT / page).read_text()):
        for block in part.blocks:
            for node in ast.walk(ast.parse(block.code)):
                if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                    "iql_"
                ):
                    continue
                below = node.module.removeprefix("iql_torchrl").removeprefix(".")
                for alias in node.names:
                    name = f"{below}.{alias.name}".strip(".")
                    if isinstance(named(name), ModuleType):
                        continue
                    assert name in (*LISTED, *ALIASES), f"{page}:{block.line} imports {name}"
