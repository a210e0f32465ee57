"""V for one goal over a maze, and paths to it: goals.png, drawn by the example.

    python docs/pictures/goals.py

It takes 12 s on one core.
"""

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.argv[1:] = ["--picture", str(FOLDER / "goals.png")]
    runpy.run_path(str(FOLDER.parents[1] / "examples" / "iql_goals.py"), run_name="__main__")
