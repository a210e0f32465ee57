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
exclude_patterns = ["_build", "generated/README.md", "pictures/*.py"]
html_theme = "furo"
html_title = f"iql_torchrl {release}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

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
