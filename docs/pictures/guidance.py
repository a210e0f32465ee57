"""Exact value and value gap over the guidance of one conditioned flow: guidance.png.

    python docs/pictures/guidance.py

The picture of ``examples/iql_guidance.py``. It takes about half a minute on one core.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "examples"))
from iql_guidance import main  # noqa: E402

main(picture=FOLDER / "guidance.png")
