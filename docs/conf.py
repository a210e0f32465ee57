"""Settings of Sphinx: ``python -m sphinx -W -b html docs docs/_build/html`` builds the pages.

The build needs no network. ``IQL_DOCS_INVENTORIES=1`` downloads the inventories of torch, TorchRL and
others, so that their names become links to their pages.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the pages describe this checkout

project = "iql_torchrl"
author = copyright = "The iql_torchrl authors"
(release,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_templates", "pictures/*.py"]
html_theme = "furo"
html_title = f"iql_torchrl {release}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

templates_path = ["_templates"]
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

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
    from iql_torchrl.config import IQLConfig, knobs

    rows = []
    for name, knob in knobs(IQLConfig).items():
        choices = "; one of " + ", ".join(f"``{c!r}``" for c in knob.choices) if knob.choices else ""
        default = getattr(IQLConfig, name)
        rows.append((f"``{name}``", f"``{default!r}``", f"{knob.help_with_range}{choices}"))
    return table(("setting", "default", "meaning"), (15, 15, 70), rows)


def presets_table() -> list[str]:
    from iql_torchrl.config import PRESETS, IQLConfig

    default = IQLConfig().to_dict()
    rows = []
    for preset, config in PRESETS.items():
        changed = {k: v for k, v in config.to_dict().items() if v != default[k]}
        rows.append((f"``{preset}``", ", ".join(f"``{k}={v!r}``" for k, v in changed.items())))
    return table(("preset", "what differs from the defaults"), (15, 85), rows)


def logs_table() -> list[str]:
    from iql_torchrl.data.builtin import BUILTIN

    rows = [(f"``{name}``", recipe.description) for name, recipe in BUILTIN.items()]
    return table(("name", "contents"), (30, 70), rows)


def table(header: tuple[str, ...], widths: tuple[int, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["", ".. list-table::", "   :header-rows: 1"]
    lines += [f"   :widths: {' '.join(map(str, widths))}", ""]
    for row in (header, *rows):
        for number, cell in enumerate(row):
            lines.append(f"   {'* -' if number == 0 else '  -'} {' '.join(cell.split())}")
    return [*lines, ""]


TABLES = {
    "iql_torchrl.IQLConfig": settings_table,
    "iql_torchrl.PRESETS": presets_table,
    "iql_torchrl.data.builtin.BUILTIN": logs_table,
}


def add_tables(app, what, name, obj, options, lines) -> None:
    if name in TABLES:
        lines += TABLES[name]()


def setup(app) -> None:
    app.connect("autodoc-process-docstring", add_tables)
