"""The files of a shared agent: a checkpoint, a program, a card, and digests of what is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iql_torchrl.agent.export import description_path
from iql_torchrl.agent.export_note import versions
from iql_torchrl.files import SUFFIX, CheckpointError, whole_file, write_components

if TYPE_CHECKING:
    from iql_torchrl.agent.build import Agent

__all__ = ["AGENT", "CARD", "FILES", "MANIFEST", "PROGRAM", "checked_agent", "write_folder"]

AGENT = f"agent{SUFFIX}"
PROGRAM = "policy.pt2"
DESCRIPTION = description_path(Path(PROGRAM)).name
CARD = "README.md"
MANIFEST = "manifest.json"
DIGESTED = (AGENT, PROGRAM, DESCRIPTION)
FILES = (*DIGESTED, CARD, MANIFEST)
FORMAT = 1


def write_folder(agent: Agent, folder: Path, card: str) -> None:
    """Write ``FILES`` to ``folder``, which is made if needed; other files in it do not change.

    ``manifest.json`` is written last: size in bytes and SHA-256 of the checkpoint, the program and
    its description. The card has no digest, so that it can be edited.

    Raises ``ValueError`` where ``folder`` has such files that are not of a shared agent, and as
    ``Agent.export`` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = [name for name in FILES if (folder / name).exists()]
    if taken and MANIFEST not in taken:
        raise ValueError(
            f"folder {str(folder)!r} already has {', '.join(taken)}, which would be replaced; choose "
            "an empty folder, or one that push_to_hub wrote."
        )
    states = {"agent": agent.description(), "loss_module": agent.state_dict()}
    write_components(folder / AGENT, states)
    agent.export(folder / PROGRAM)
    manifest = {
        "format": FORMAT,
        "files": {name: _record(folder / name) for name in DIGESTED},
        "versions": versions(),
    }
    for name, text in ((CARD, card), (MANIFEST, json.dumps(manifest, indent=2) + "\n")):
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def checked_agent(folder: Path, source: str) -> Path:
    """The checkpoint in ``folder``, after comparing each file with the manifest.

    Raises ``CheckpointError`` that begins with ``source``: no manifest or one that cannot be read, a
    file that is missing or differs from the one that was pushed, a manifest of a later version.
    """
    for name, expected in _listed(folder / MANIFEST, source).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{source}: incomplete: {MANIFEST} lists {name}, which is not in {folder}; download "
                "all of its files again."
            )
        record = _record(path)
        if record != expected:
            key = next(key for key in record if record[key] != expected.get(key))
            raise CheckpointError(
                f"{source}: {name} is not the file that was pushed: its {key} is {record[key]} and "
                f"{MANIFEST} says {expected.get(key)}. Nothing was loaded; delete {folder} and "
                "download it again, or ask the author to push the agent again."
            )
    return folder / AGENT


def _listed(path: Path, source: str) -> dict[str, Mapping[str, Any]]:
    """Name and record of each file in the manifest ``path``."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        listed: dict[str, Mapping[str, Any]] = {
            str(name): dict(record) for name, record in files.items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{source}: has no {MANIFEST}, so it is not an agent that push_to_hub wrote. A run's "
            "folder or a checkpoint is loaded by Agent.load."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: {MANIFEST} cannot be read ({type(error).__name__}: {error}); download it again."
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{source}: from another version of iql_torchrl (layout {version!r} of {MANIFEST}, this "
            f"one reads {FORMAT}); load it with that version."
        )
    if set(listed) != set(DIGESTED):
        raise CheckpointError(
            f"{source}: {MANIFEST} lists {sorted(listed)}; expected {sorted(DIGESTED)}, as "
            "push_to_hub writes them."
        )
    return listed


def _record(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "SHA-256": hashlib.sha256(content).hexdigest()}
