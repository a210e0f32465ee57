"""The examples as modules, and called as a user calls them."""

import csv
import importlib.util
import inspect
import sys
from pathlib import Path

import numpy as np
import tyro

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    """The example as a module, known to Python by its name as its dataclasses need."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))  # examples import one another
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(example, *arguments: object) -> int:
    """The exit code of an example, a module or its name, with options of the command line."""
    main = (load(example) if isinstance(example, str) else example).main
    words = [str(argument) for argument in arguments]
    try:
        if "arguments" in inspect.signature(main).parameters:
            return main(words) or 0
        return tyro.cli(main, args=words) or 0
    except SystemExit as stop:
        return stop.code


def table(path: Path | str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def write_log(path: str, actions: np.ndarray) -> None:
    """A file with 200 steps at random in four episodes; an observation has four numbers."""
    rng = np.random.default_rng(0)
    np.savez(
        path,
        observations=rng.uniform(-1, 1, (200, 4)).astype(np.float32),
        actions=actions,
        rewards=rng.uniform(-1, 0, 200),
        terminals=np.zeros(200, bool),
        timeouts=np.arange(200) % 50 == 49,
    )
