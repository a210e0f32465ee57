"""Datasets made on this machine, as real Minari datasets in the user's Minari folder, and OGBench's.

They need no download, and are the same for the same seed (up to the platform's floating-point
arithmetic). Minari's own tools list, load and delete those of ``BUILTIN``; those of
``OGBENCH_LOCAL`` are npz files in OGBench's folder.
"""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from iql_torchrl.data.builtin.icu_sepsis import ICU_SEPSIS_CLINICIAN
from iql_torchrl.data.builtin.ogbench import (
    OGBENCH_LOCAL,
    OGBenchRecipe,
    make_ogbench,
    ogbench_id,
    ogbench_path,
)
from iql_torchrl.data.builtin.pendulum import PENDULUM_MIXED
from iql_torchrl.data.builtin.pointmaze import POINTMAZE_MEDIUM, POINTMAZE_UMAZE
from iql_torchrl.data.builtin.recipe import Recipe, Recording

__all__ = ["BUILTIN", "OGBENCH_LOCAL", "ensure_dataset", "ensure_source", "make_dataset"]

BUILTIN: Mapping[str, Recipe] = MappingProxyType(
    {
        "pendulum/mixed-v0": PENDULUM_MIXED,
        "pointmaze/umaze-v0": POINTMAZE_UMAZE,
        "pointmaze/medium-v0": POINTMAZE_MEDIUM,
        "icu-sepsis/clinician-v0": ICU_SEPSIS_CLINICIAN,
    }
)
"""Name (also the Minari id) to recipe; ``BUILTIN[name].description`` describes its contents."""

AUTHOR = "iql_torchrl"
ROOT_VARIABLE = "MINARI_DATASETS_PATH"
_root_lock = threading.Lock()


def make_dataset(
    name: str, *, seed: int = 0, progress: bool = True, episodes: int | None = None
) -> str:
    """Make the dataset ``name`` and return an id for ``load_dataset``.

    For ``BUILTIN`` that is ``name``, the Minari id. For ``OGBENCH_LOCAL`` it is the id with OGBench's
    default task; ``-singletask-taskN`` in place of its ``-singletask`` names another task.

    It is written to a hidden folder in the same place and renamed when complete, so that an
    interrupted run leaves no incomplete dataset. One of ``OGBENCH_LOCAL``, which takes about an hour,
    continues with the episodes that an interrupted call has made.

    Args:
        name: one of ``BUILTIN`` or ``OGBENCH_LOCAL``.
        seed: the same seed and number of episodes give the same log.
        progress: show a progress bar on standard error.
        episodes: how many episodes to log, at least 1; by default the recipe's own number. The
            id does not show it: put a dataset of unusual size into a separate Minari folder.

    Raises:
        ValueError: the name is unknown, a number is out of range, or the dataset exists.
        ImportError: the recipe's environment is not installed.
    """
    recipe = _recipe(name)
    count = recipe.episodes if episodes is None else episodes
    if count < 1 or seed < 0:
        raise ValueError(f"expected episodes >= 1 and seed >= 0, got episodes={count}, seed={seed}")
    if isinstance(recipe, OGBenchRecipe):
        if _exists(name):
            raise ValueError(
                f"dataset {name!r} already exists: {ogbench_path(name)}; use ensure_dataset({name!r}), "
                "or remove the file first"
            )
        make_ogbench(name, episodes=count, seed=seed, progress=progress)
        return ogbench_id(name)
    if _exists(name):
        raise ValueError(
            f"dataset {name!r} already exists in {_root()}; use ensure_dataset({name!r}), or "
            f"remove it first with minari.delete_dataset({name!r})"
        )
    _write(name, recipe, recipe.record(count, seed, progress))
    return name


def ensure_dataset(name: str, *, progress: bool = True) -> str:
    """Return the id of the dataset ``name``, making it with seed 0 if it is absent.

    The id is that of :func:`make_dataset`, which also has the errors; but an existing dataset is
    used as it is.
    """
    recipe = _recipe(name)
    if not _exists(name):
        return make_dataset(name, progress=progress)
    return ogbench_id(name) if isinstance(recipe, OGBenchRecipe) else name


def ensure_source(name: str) -> str:
    """What ``load_dataset`` reads for a name on a command line.

    One of ``BUILTIN`` is made if it is absent, as by :func:`ensure_dataset`; another id, or a path,
    is returned as it is.
    """
    return ensure_dataset(name) if name in BUILTIN else name


def _recipe(name: str) -> Recipe | OGBenchRecipe:
    if name in OGBENCH_LOCAL:
        return OGBENCH_LOCAL[name]
    if name not in BUILTIN:
        names = ", ".join(sorted([*BUILTIN, *OGBENCH_LOCAL]))
        raise ValueError(f"no built-in dataset {name!r}; there are {names}")
    return BUILTIN[name]


def _root() -> Path:
    from minari.storage import get_dataset_path

    return Path(get_dataset_path())


def _exists(name: str) -> bool:
    if name in OGBENCH_LOCAL:
        return ogbench_path(name).exists()
    return (_root() / name / "data" / "metadata.json").exists()


def _write(name: str, recipe: Recipe, recording: Recording) -> None:
    import minari

    root = _root()
    low, high = recording.reference_scores or (None, None)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as scratch:
        with _minari_root(Path(scratch)), warnings.catch_warnings():
            # A log made by the user has no e-mail address or permalink.
            warnings.filterwarnings("ignore", "`(code_permalink|author_email)` is set to None")
            minari.create_dataset_from_buffers(
                dataset_id=name,
                buffer=list(recording.episodes),
                env=recording.env_spec,
                eval_env=recording.env_spec,
                algorithm_name=recording.algorithm,
                author=AUTHOR,
                ref_min_score=low,
                ref_max_score=high,
                description=recipe.description,
                requirements=list(recording.requirements),
            )
        folder = (root / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        for described in (Path(scratch) / name).parent.glob("*.json"):
            # Minari's description of the namespace: keep the user's own where there is one.
            if not (folder / described.name).exists():
                described.replace(folder / described.name)
        try:
            os.rename(Path(scratch) / name, root / name)
        except OSError as error:
            if not _exists(name):
                raise
            raise ValueError(f"dataset {name!r} was made by another process meanwhile") from error


@contextmanager
def _minari_root(path: Path) -> Iterator[None]:
    """Let Minari use the folder ``path`` inside the block, by its environment variable."""
    with _root_lock:
        before = os.environ.get(ROOT_VARIABLE)
        os.environ[ROOT_VARIABLE] = str(path)
        try:
            yield
        finally:
            if before is None:
                del os.environ[ROOT_VARIABLE]
            else:
                os.environ[ROOT_VARIABLE] = before
