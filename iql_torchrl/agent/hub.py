"""Sharing agents by the Hugging Face Hub, or as a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iql_torchrl.agent.export_note import versions
from iql_torchrl.agent.model_card import check_dataset, model_card, scores_of
from iql_torchrl.agent.shared_folder import FILES, checked_agent, write_folder
from iql_torchrl.data import DatasetSummary
from iql_torchrl.descriptions import one_line
from iql_torchrl.evaluation.result import Evaluation

if TYPE_CHECKING:
    from iql_torchrl.agent.build import Agent
    from iql_torchrl.agent.make_encoder import Encoders

__all__ = ["HubError", "from_hub", "push_to_hub"]

LIBRARY = "iql_torchrl"
VERSION = versions([LIBRARY])[LIBRARY]
MAY_NOT_WRITE = (
    "the token is not valid or may not write there; make one that may at "
    "https://huggingface.co/settings/tokens"
)
MAY_NOT_READ = (
    "there is no such repository, or it is private or gated and the token (token=, HF_TOKEN, `hf auth "
    "login`) may not read it"
)


class HubError(RuntimeError):
    """The Hub cannot be used as asked; the message is one sentence that names the repository."""


def push_to_hub(
    agent: Agent,
    repo: str,
    *,
    evaluation: Evaluation | Mapping[str, float] | None = None,
    dataset: DatasetSummary | None = None,
    folder: str | Path | None = None,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Upload the agent to the Hugging Face Hub (extra ``hub``), for :meth:`from_hub`.

    One commit has all files, and replaces those of an earlier one: ``agent.torchrl`` (settings, task
    and weights of all networks, as plain data that is loaded without running code; no optimizer),
    ``policy.pt2`` and ``policy.json`` (see :meth:`export`), a model card ``README.md``, and
    ``manifest.json`` with the SHA-256 of the first three. Of the data they contain: its name, the
    bounds, mean and deviation of its observations, and 64-bit digests of at most 2048 of its
    episodes.

    Args:
        repo: ``"user/name"``; made if it does not exist.
        evaluation: scores for the card: what ``evaluate`` returns, or numbers by name.
        dataset: what the agent was made for; its size and mean return are added to the card.
        folder: where the files are written and kept, in place of those of an earlier upload; a
            temporary folder by default.
        private: whether a repository that is made here is private; others stay as they are.
        revision: a branch to upload to, made if needed; ``main`` by default.
        token: with the permission to write; by default ``HF_TOKEN`` or the login of this machine.
        license: identifier for the card, such as ``"mit"``.
        tags: for the card, in addition to those of offline reinforcement learning.

    Returns the commit's hash: ``from_hub(repo, revision=hash)`` loads exactly these files.

    Raises:
        ImportError: huggingface_hub is not installed.
        HubError: no token, the Hub refuses or cannot be reached.
        ValueError: ``repo`` is no such name, ``dataset`` has other episodes than the agent's, or
            ``folder`` has other files of these names.
        RuntimeError, OSError: as :meth:`export`.
    """
    hub = _package()
    scores = scores_of(evaluation)
    if dataset is not None:
        check_dataset(dataset, agent.task)
    with _plain_errors(repo, revision, "upload"):
        hub.utils.validate_repo_id(repo)
        if "/" not in repo:
            raise hub.errors.HFValidationError("the name of the user is missing")
    token = token or hub.get_token()
    if token is None:
        raise HubError(
            f"{repo}: there is no token to upload with; pass token=, set HF_TOKEN, or run "
            "`hf auth login` once."
        )
    card = model_card(agent, repo, scores, dataset, license, tags)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary if folder is None else folder)
        write_folder(agent, place, card)
        with _plain_errors(repo, revision, "upload"):
            api = hub.HfApi(token=token, library_name=LIBRARY, library_version=VERSION)
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            # upload_folder may make several commits
            commit = api.create_commit(
                repo,
                [hub.CommitOperationAdd(name, place / name) for name in FILES],
                commit_message=commit_message or f"Agent of {LIBRARY} {VERSION}",
                revision=revision,
            )
    return str(commit.oid)


def from_hub(
    cls: type[Agent],
    repo: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    token: str | None = None,
    encoders: Encoders | None = None,
) -> Agent:
    """The agent that :meth:`push_to_hub` uploaded, with its weights and a fresh optimizer.

    ``repo``: ``"user/name"``, or a folder with such files, which takes precedence. ``revision``: a
    branch, a tag or a commit's hash. ``device`` and ``encoders``: as in :meth:`load`. ``token``: for
    private repositories; by default ``HF_TOKEN`` or the login of this machine. Without a connection
    the copy in the Hub's cache is used, if there is one.

    All files are compared with ``manifest.json`` first, and loading executes none of their contents.
    The manifest comes from the same repository: it reveals damage, not an author with bad
    intentions. A commit's hash as ``revision`` fixes the contents.

    Raises:
        ImportError: huggingface_hub is not installed.
        HubError: no such repository or revision, or the Hub cannot be reached and the cache has no
            copy.
        CheckpointError: a file is missing, differs from the manifest, or is of another version.
        ValueError: ``repo`` is neither a folder nor such a name, or a ``revision`` of a folder.
    """
    folder = Path(repo)
    if not folder.is_dir():
        folder = _downloaded(str(repo), revision, token)
    elif revision is not None:
        raise ValueError(
            f"revision is {revision!r} and {str(repo)!r} is a folder, which has none; leave it out, or "
            "start Python elsewhere to mean the repository of that name."
        )
    return cls.load(checked_agent(folder, str(repo)), device, encoders=encoders)


def _downloaded(repo: str, revision: str | None, token: str | None) -> Path:
    """The folder of the Hub's cache with the files of ``repo``."""
    hub = _package()
    with _plain_errors(repo, revision, "download"):
        folder = hub.snapshot_download(
            repo,
            revision=revision,
            token=token,
            allow_patterns=list(FILES),
            library_name=LIBRARY,
            library_version=VERSION,
        )
    return Path(folder)


def _package() -> Any:
    if find_spec("huggingface_hub") is None:
        raise ImportError(
            "agents are shared with the package huggingface_hub; install it with "
            'pip install "iql_torchrl[hub]".'
        )
    import huggingface_hub.errors
    import huggingface_hub.utils

    return huggingface_hub


@contextmanager
def _plain_errors(repo: str, revision: str | None, doing: str) -> Iterator[None]:
    """A context in which the Hub's errors become one sentence each; ``doing``: upload or download."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(
            f"repo is {repo!r}: no folder, and not the name of a repository; expected 'user/name'."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo}: has no revision {revision!r}; give a branch, a tag or a full commit hash."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{repo}: the Hub cannot be reached (or HF_HUB_OFFLINE is set) and there is no copy in its "
            f"cache; connect and load it once, or pass a folder. ({_cause(error)})"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{repo}: HF_HUB_OFFLINE is set; unset it to {doing}.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if doing == "upload" and status in (401, 403, 404):
            reason = MAY_NOT_WRITE
        else:
            unknown = isinstance(error, errors.RepositoryNotFoundError)
            reason = MAY_NOT_READ if unknown else _cause(error)
        raise HubError(
            f"{repo}: the {doing} failed with HTTP status {status}: {reason}."
        ) from error
    except Exception as error:  # of the HTTP library, which differs between versions of the package
        raise HubError(
            f"{repo}: the {doing} failed ({_cause(error)}); check the connection to the Hub."
        ) from error


def _cause(error: BaseException) -> str:
    """Kind and message of the first cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(error)}"
