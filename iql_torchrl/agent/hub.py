"""Shared agents: their files in a folder or a repository of the Hugging Face Hub, and their card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iql_torchrl.agent.export import first_cause
from iql_torchrl.agent.task import Task
from iql_torchrl.data import DatasetSummary
from iql_torchrl.data.digests import digest
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.files import atomic_write, make_folder, write_components

AGENT, PROGRAM, CARD = "agent.torchrl", "policy.pt2", "README.md"
FILES = (AGENT, PROGRAM, "policy.json", CARD)
TAGS = ("reinforcement-learning", "offline-reinforcement-learning", "implicit-q-learning")


class HubError(RuntimeError):
    """The Hub cannot be used as asked; the message is one sentence that names the repository."""


def upload(
    folder: Path,
    repo: str,
    revision: str | None,
    *,
    private: bool,
    token: str | None,
    message: str | None,
) -> str:
    """Upload ``FILES`` of ``folder`` in one commit; its hash."""
    hub = _package()
    with _errors(f"{repo}: the upload", repo, revision):
        if "/" not in repo:
            raise hub.errors.HFValidationError("the name of the user is missing")
        api = hub.HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        # upload_folder may make several commits
        commit = api.create_commit(
            repo,
            [hub.CommitOperationAdd(name, folder / name) for name in FILES],
            commit_message=message or "Agent of iql_torchrl",
            revision=revision,
        )
    return str(commit.oid)


def download(repo: str, revision: str | None, token: str | None) -> Path:
    """The folder of the Hub's cache with ``FILES``."""
    hub, files = _package(), list(FILES)
    with _errors(f"{repo}: the download", repo, revision):
        folder = hub.snapshot_download(repo, revision=revision, token=token, allow_patterns=files)
    return Path(folder)


@contextmanager
def _errors(action: str, repo: str, revision: str | None) -> Iterator[None]:
    """A context in which the Hub's errors become one sentence that begins with ``action``."""
    errors = _package().errors
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(
            f"repo is {repo!r}: no folder, and not the name of a repository; expected 'user/name'."
        ) from error
    except Exception as error:  # of the HTTP library too, which differs between versions
        if isinstance(error, errors.RevisionNotFoundError):
            advice = f"give revision={revision!r} as a branch, a tag or a full commit hash"
        elif isinstance(error, errors.HfHubHTTPError):
            advice = (
                "check the name, and that the token (token=, HF_TOKEN, `hf auth login`; made at "
                "https://huggingface.co/settings/tokens) is valid and permits it"
            )
        else:
            advice = (
                "check the connection and that HF_HUB_OFFLINE is not set; what was downloaded once "
                "is in the cache and needs none, and neither does a folder"
            )
        raise HubError(f"{action} failed ({first_cause(error)}): {advice}.") from error


def _package() -> Any:
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ImportError(
            "agents are shared with the package huggingface_hub; install it with "
            'pip install "iql_torchrl[hub]".'
        ) from error
    return huggingface_hub


def write_files(
    folder: Path, states: Mapping[str, Any], export: Callable[[Path], Any], card: str
) -> None:
    """Write ``FILES`` to ``folder``, which is made if needed; other files in it do not change."""
    make_folder("folder", folder)
    taken = [name for name in FILES if (folder / name).exists()]
    if taken and AGENT not in taken:
        raise ValueError(
            f"folder {str(folder)!r} already has {', '.join(taken)}, which would be replaced; choose "
            "an empty folder, or one that push_to_hub wrote."
        )
    write_components(folder / AGENT, states)
    export(folder / PROGRAM)
    with atomic_write(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")


def model_card(
    repo: str,
    sections: Mapping[str, Mapping[str, Any]],
    license: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The text of ``README.md``: metadata of the Hub, how to load the agent, ``sections`` as JSON."""
    metadata = _package().ModelCardData(
        library_name="iql_torchrl",
        pipeline_tag="reinforcement-learning",
        license=license,
        tags=list(dict.fromkeys((*TAGS, *tags))),
    )
    text = f"""---
{metadata.to_yaml()}
---

# {repo.rpartition("/")[2]}

A policy learned from logged data by Implicit Q-Learning
([Kostrikov et al. 2021](https://arxiv.org/abs/2110.06169)) with iql_torchrl.

## Use

```python
from iql_torchrl import Agent

agent = Agent.from_hub({json.dumps(repo)})
action = agent.act(observation)
```

Loading it executes none of its contents. `policy.pt2` is the same policy for plain torch;
`policy.json` describes its inputs and output, with an example.
"""
    for title, content in sections.items():
        text += f"\n## {title}\n\n```json\n{json.dumps(content, indent=2)}\n```\n"
    return str(_package().ModelCard(text))


def data_of(task: Task, dataset: DatasetSummary | None) -> dict[str, Any]:
    """The card's section about the data of ``task``; ``dataset`` adds sizes and returns."""
    data: dict[str, Any] = {"name": task.name, "returns of score 0 and 100": task.reference_scores}
    if task.episodes is not None:
        data["digest of its episodes"] = digest([task.episodes.astype("<i8").tobytes()])
    if dataset is None:
        return data
    given = Task.of(dataset).episodes
    if task.episodes is not None and not np.array_equal(np.asarray(given), task.episodes):
        raise ValueError(
            f"dataset is {dataset.name!r}, whose episodes are not those that the agent was made for "
            f"({task.name!r}); pass the dataset that make_agent was given."
        )
    mapped = f"{dataset.reward_map.scale:.6g} * reward + {dataset.reward_map.shift:.6g}"
    sizes = {"episodes": len(dataset.episode_lengths), "transitions": len(dataset)}
    returns = {"mean return": float(dataset.episode_returns.mean())}
    return {**data, **sizes, **returns, "rewards were mapped to": mapped}


def scores_of(evaluation: Evaluation | Mapping[str, float]) -> dict[str, float]:
    """Finite scores by name, of an evaluation without those that one episode leaves undefined."""
    if isinstance(evaluation, Evaluation):
        return {name: x for name, x in evaluation.summary().items() if not math.isnan(x)}
    if not isinstance(evaluation, Mapping):
        raise TypeError(
            f"evaluation is {type(evaluation).__name__}; expected what evaluate(...) returns, or a "
            "mapping from names to numbers."
        )
    for name, value in evaluation.items():
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise ValueError(f"evaluation has {name} = {value!r}; expected finite numbers.")
    return {name: float(value) for name, value in evaluation.items()}
