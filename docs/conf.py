"""Settings of Sphinx: ``python -m sphinx -W -b html docs docs/_build/html`` builds the pages.

The build needs no network. ``IQL_DOCS_INVENTORIES=1`` downloads the inventories of torch, TorchRL and
others, so that their names become links to their pages.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the pages describe this checkout

import formulas  # noqa: E402

project = "iql_torchrl"
author = copyright = "The iql_torchrl authors"
(release,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_templates", "pictures/*.py", "formulas.py"]
html_theme = "furo"
html_title = f"iql_torchrl {release}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_math_renderer = "svg"
html_static_path, html_css_files = ["_static"], ["pages.css"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
# GitHub's workflows set the variable to the owner and name of the repository that they run in
repository = os.environ.get("GITHUB_REPOSITORY", "")
notebook = "docs/notebooks/pendulum.ipynb"
colab = f"https://colab.research.google.com/github/{repository}/blob/main/{notebook}"
myst_substitutions = {"colab": f"[Open it in Colab]({colab})." if repository else ""}
myst_heading_anchors = 3

templates_path = ["_templates"]
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = napoleon_use_param = napoleon_use_keyword = False
napoleon_use_ivar = True
# OfflineTrainer has more arguments than one list can show
napoleon_custom_sections = [
    (f"Args of {words}", "params_style")
    for words in ("time in updates", "evaluation", "what is written")
]

copybutton_exclude = ".linenos, .gp, .go"

INVENTORIES = {
    "python": "https://docs.python.org/3",
    "torch": "https://docs.pytorch.org/docs/stable",
    "torchrl": "https://docs.pytorch.org/rl/stable",
    "tensordict": "https://docs.pytorch.org/tensordict/stable",
    "gymnasium": "https://gymnasium.farama.org",
    "minari": "https://minari.farama.org/main",
}
online = os.environ.get("IQL_DOCS_INVENTORIES") == "1"
intersphinx_mapping = {name: (url, None) for name, url in INVENTORIES.items()} if online else {}


def settings_table() -> list[str]:
    """Every setting of ``IQLConfig`` with its default, choices and meaning, from their descriptions."""
    from iql_torchrl.config import IQLConfig, config_settings

    rows = []
    for name, setting in config_settings(IQLConfig).items():
        choices = (
            "; one of " + ", ".join(f"``{c!r}``" for c in setting.choices)
            if setting.choices
            else ""
        )
        default = getattr(IQLConfig, name)
        rows.append((f"``{name}``", f"``{default!r}``", f"{setting.help_with_range}{choices}"))
    return table(("setting", "default", "meaning"), (15, 15, 70), rows)


def presets_table() -> list[str]:
    from iql_torchrl.config import PRESETS, IQLConfig

    default = IQLConfig().to_dict()
    rows = []
    for preset, config in PRESETS.items():
        changed = {k: v for k, v in config.to_dict().items() if v != default[k]}
        rows.append((f"``{preset}``", ", ".join(f"``{k}={v!r}``" for k, v in changed.items())))
    return table(("preset", "what differs from the defaults"), (15, 85), rows)


def datasets_table() -> list[str]:
    from iql_torchrl.data.builtin import BUILTIN

    rows = [(f"``{name}``", recipe.description) for name, recipe in BUILTIN.items()]
    return table(("name", "contents"), (30, 70), rows)


def table(
    header: tuple[str, ...], widths: tuple[int, ...], rows: list[tuple[str, ...]]
) -> list[str]:
    lines = ["", ".. list-table::", "   :header-rows: 1"]
    lines += [f"   :widths: {' '.join(map(str, widths))}", ""]
    for row in (header, *rows):
        for number, cell in enumerate(row):
            lines.append(f"   {'* -' if number == 0 else '  -'} {' '.join(cell.split())}")
    return [*lines, ""]


TABLES = {
    "iql_torchrl.IQLConfig": settings_table,
    "iql_torchrl.PRESETS": presets_table,
    "iql_torchrl.data.builtin.BUILTIN": datasets_table,
}


#: Data that one module defines with a comment, and another makes public.
DEFINED_IN = {
    "iql_torchrl.PRESETS": "iql_torchrl.config.iql_config",
    "iql_torchrl.data.REFERENCE_RETURNS": "iql_torchrl.data.scaling",
}


def complete(app, what, name, obj, options, lines) -> None:
    """Replace the docstring of a dict by its comment, and add the tables."""
    if name in DEFINED_IN:
        comments = ModuleAnalyzer.for_module(DEFINED_IN[name]).find_attr_docs()
        lines[:] = comments["", name.rpartition(".")[2]]
    if name in TABLES:
        lines += TABLES[name]()


def signature(app, what, name, obj, options, arguments, result):
    """The arguments of a class whose metaclass takes any, as TorchRL's losses and trainers do."""
    if what == "class" and arguments and arguments.split() == ["(*args,", "**kwargs)"]:
        own = inspect.signature(obj.__init__)
        own = own.replace(parameters=list(own.parameters.values())[1:])
        arguments = stringify_signature(
            own, unqualified_typehints=True, show_return_annotation=False
        )
    if arguments and "<factory>" in arguments:  # which Sphinx cannot read
        arguments = re.sub(r"~[\w.]+\.", "", arguments.replace("<factory>", "{}"))
    return arguments, result


def by_last_name(app, env, node, content):
    """A link to the one documented name that ends as the docstring writes it, such as ``captured``."""
    python = env.domains["py"]
    last = node.get("reftarget", "").rpartition(".")[2]
    found = [(name, o) for name, o in python.objects.items() if name.rpartition(".")[2] == last]
    found = [(name, o) for name, o in found if not o.aliased and name.startswith("iql_torchrl.")]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    (name, entry), from_page = found[0], node["refdoc"]
    return make_refnode(app.builder, from_page, entry.docname, entry.node_id, content, name)


def setup(app) -> None:
    app.add_html_math_renderer("svg", (formulas.visit, None), (formulas.visit, None))
    app.connect("missing-reference", by_last_name)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", complete)
