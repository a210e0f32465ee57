"""Draws ``chunks.png``, the picture of ``examples/iql_chunks.py`` (two minutes)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))

from iql_chunks import main  # noqa: E402

if __name__ == "__main__":
    main(output=HERE)
