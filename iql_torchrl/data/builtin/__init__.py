"""Datasets made on this machine, as Minari datasets in the user's Minari folder.

They need no download, and are the same for the same seed (up to the platform's floating-point
arithmetic). Minari's tools list, load and delete them.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import minari
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage import get_dataset_path

from iql_torchrl.data.builtin.icu_sepsis import ICU_SEPSIS_CLINICIAN
from iql_torchrl.data.builtin.recipes import (
    PENDULUM_MIXED,
    POINTMAZE_MEDIUM,
    POINTMAZE_UMAZE,
    Recipe,
    record,
)

__all__ = ["BUILTIN", "ensure_dataset", "ensure_source", "make_dataset"]

BUILTIN: Mapping[str, Recipe] = MappingProxyType(
    {
        "pendulum/mixed-v0": PENDULUM_MIXED,
        "pointmaze/umaze-v0": POINTMAZE_UMAZE,
        "pointmaze/medium-v0": POINTMAZE_MEDIUM,
        "icu-sepsis/clinician-v0": ICU_SEPSIS_CLINICIAN,
    }
)
"""Name (also the Minari id) to recipe; ``BUILTIN[name].description`` describes its contents."""


def make_dataset(
    name: str, *, seed: int = 0, progress: bool = True, episodes: int | None = None
) -> str:
    """Make the dataset ``name``, which is its Minari id, and return ``name``.

    It is written to a hidden folder in the same place and renamed when complete, so that an
    interrupted run leaves no incomplete dataset.

    Args:
        name: one of ``BUILTIN``.
        seed: the same seed and number of episodes give the same dataset.
        progress: show a progress bar on standard error, if that is a terminal.
        episodes: how many episodes to make, at least 1; by default the recipe's number. The id
            does not show it: put a dataset of unusual size into a separate Minari folder.

    Raises:
        ValueError: the name is unknown, a number is out of range, or the dataset exists.
        ImportError: the recipe's environment is not installed.
    """
    path = _path(name)
    recipe = BUILTIN[name]
    count = recipe.episodes if episodes is None else episodes
    if count < 1 or seed < 0:
        raise ValueError(f"expected episodes >= 1 and seed >= 0, got episodes={count}, seed={seed}")
    if path.exists():
        raise ValueError(
            f"dataset {name!r} already exists ({path}); use ensure_dataset({name!r}), or delete it "
            "first"
        )
    _write(name, recipe, *record(name, recipe, count, seed, progress))
    return name


def ensure_dataset(name: str, *, progress: bool = True) -> str:
    """Return ``name``, making its dataset with seed 0 if it is absent; an existing one is not changed.

    Raises as :func:`make_dataset`.
    """
    return name if _path(name).exists() else make_dataset(name, progress=progress)


def ensure_source(name: str) -> str:
    """Return ``name``, a source on a command line; one of ``BUILTIN`` is made first."""
    return ensure_dataset(name) if name in BUILTIN else name


def _path(name: str) -> Path:
    """A file that exists if the dataset does."""
    if name not in BUILTIN:
        raise ValueError(f"no built-in dataset {name!r}; there are {', '.join(sorted(BUILTIN))}")
    return Path(get_dataset_path()) / name / "data" / "metadata.json"


def _write(name: str, recipe: Recipe, episodes: list[EpisodeBuffer], env: EnvSpec) -> None:
    """Write a dataset into the user's Minari folder, completely or not at all."""
    root = Path(get_dataset_path()).absolute()  # Minari joins relative paths twice when it writes
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as scratch:
        # Minari takes its folder from the environment only.
        inside = mock.patch.dict(os.environ, {"MINARI_DATASETS_PATH": scratch})
        with inside, warnings.catch_warnings():
            # A dataset made by the user has no e-mail address or permalink.
            warnings.filterwarnings("ignore", "`(code_permalink|author_email)` is set to None")
            minari.create_dataset_from_buffers(
                dataset_id=name,
                buffer=episodes,
                env=env,
                eval_env=env,
                algorithm_name=recipe.algorithm,
                author="iql_torchrl",
                ref_min_score=recipe.reference_scores[0],
                ref_max_score=recipe.reference_scores[1],
                description=recipe.description,
                requirements=list(recipe.requirements),
            )
        namespace = name.rpartition("/")[0]
        if namespace not in list_local_namespaces():
            create_namespace(namespace)
        try:
            os.rename(Path(scratch) / name, root / name)
        except OSError as error:
            if not _path(name).exists():
                raise
            raise ValueError(f"dataset {name!r} was made by another process meanwhile") from error
