"""Agents on the Hub: uploaded to and loaded from one in memory, and from folders."""

import hashlib
import importlib
import json
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch
from extras import needs
from small_agents import (
    config,
    discrete_agent,
    masks,
    observations,
    same_weights,
    small_columns,
    trained,
)

from iql_torchrl import Agent, load_dataset, make_agent
from iql_torchrl.agent import HubError
from iql_torchrl.data.digests import sketch_of
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.files import CheckpointError

yaml = pytest.importorskip("yaml")
hub = needs("huggingface_hub")
errors = importlib.import_module("huggingface_hub.errors")
HfApi = hub.HfApi
REPO, TOKEN = "me/pendulum", "hf_writes"


class FakeHub:
    """Repositories in memory, and the Hub's errors, behind calls with huggingface_hub's signatures."""

    def __init__(self, folder):
        self.folder, self.commits, self.private, self.messages = folder, {}, {}, []
        self.branches = {}  # by repository, then by name: the name of a commit

    def client(self, token=None):
        api = create_autospec(HfApi, instance=True)
        for name in ("create_repo", "create_branch", "create_commit"):
            getattr(api, name).side_effect = partial(getattr(self, name), token)
        return api

    def check(self, repo, token, writes):
        hub.utils.validate_repo_id(repo)
        anonymous = token != TOKEN and (writes or self.private.get(repo, True))
        lacks = repo not in self.branches and not writes
        status = 401 if anonymous else 404 if lacks else 200 if repo.startswith("me/") else 403
        if status != 200:
            kind = errors.HfHubHTTPError if writes else errors.RepositoryNotFoundError
            raise kind(f"{status} Client Error", response=Mock(status_code=status, headers={}))

    def create_repo(self, token, repo_id, *, private, exist_ok):
        self.check(repo_id, token, writes=True)
        assert exist_ok
        self.private.setdefault(repo_id, private)
        self.branches.setdefault(repo_id, {"main": None})

    def create_branch(self, token, repo_id, *, branch, exist_ok):
        assert exist_ok
        self.branches[repo_id].setdefault(branch, self.branches[repo_id]["main"])

    def create_commit(self, token, repo_id, operations, *, commit_message, revision):
        files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        name = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        self.commits[name] = files
        self.branches[repo_id][revision or "main"] = name
        self.messages.append(commit_message)
        return Mock(oid=name)

    def snapshot_download(self, repo_id, *, revision, token, allow_patterns):
        self.check(repo_id, token, writes=False)
        commit = self.branches[repo_id].get(revision or "main", revision)
        if commit not in self.commits:
            response = Mock(status_code=404, headers={})
            raise errors.RevisionNotFoundError("404 Client Error", response=response)
        folder = self.folder / commit
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(allow_patterns) & set(self.commits[commit]):
            (folder / name).write_bytes(self.commits[commit][name])
        return str(folder)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = FakeHub(tmp_path / "cache")
    download = create_autospec(hub.snapshot_download, side_effect=server.snapshot_download)
    monkeypatch.setattr(hub, "HfApi", server.client)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return server


@pytest.fixture
def short_program(monkeypatch):
    """Export takes a second; these tests are of the transport of its files."""

    def export(agent, path):
        path.write_bytes(b"program")
        path.with_suffix(".json").write_text("{}")

    monkeypatch.setattr(Agent, "export", export)


@pytest.fixture
def folder(server, short_program, tmp_path):
    """The files of an agent."""
    trained().push_to_hub(REPO, token=TOKEN, folder=tmp_path / "agent")
    return tmp_path / "agent"


def test_an_agent_comes_back_from_the_hub(server, tmp_path):
    agent = trained()
    agent.loss.expectile = 0.875
    first = agent.push_to_hub(REPO, token=TOKEN, folder=tmp_path / "files", commit_message="one")
    assert server.private == {REPO: True}
    assert server.messages == ["one"]
    assert server.branches[REPO] == {"main": first}
    files = server.commits[first]
    assert set(files) == {"agent.torchrl", "policy.pt2", "policy.json", "README.md"}
    assert files == {name: (tmp_path / "files" / name).read_bytes() for name in files}
    loaded = Agent.from_hub(REPO, token=TOKEN)
    assert same_weights(loaded, agent)
    assert loaded.config == agent.config
    assert float(loaded.loss.expectile) == 0.875
    np.testing.assert_array_equal(loaded.act(observations()), agent.act(observations()))
    program = torch.export.load(tmp_path / "files" / "policy.pt2").module()
    found = program(torch.tensor(observations()))
    np.testing.assert_allclose(found, agent.act(observations()), atol=1e-6)


@pytest.mark.usefixtures("short_program")
def test_revisions_are_branches_and_commits(server):
    agents = [trained(seed=seed) for seed in range(3)]
    first = agents[0].push_to_hub(REPO, token=TOKEN, private=False)
    agents[1].push_to_hub(REPO, token=TOKEN)
    agents[2].push_to_hub(REPO, token=TOKEN, revision="wide")
    assert server.private == {REPO: False}
    for revision, agent in ((first, agents[0]), (None, agents[1]), ("wide", agents[2])):
        assert same_weights(Agent.from_hub(REPO, revision=revision), agent)
    with pytest.raises(HubError, match=r"me/pendulum: the download .* give revision='narrow' as a"):
        Agent.from_hub(REPO, revision="narrow")


@pytest.mark.usefixtures("short_program")
@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("not in the cache"),
        errors.OfflineModeIsEnabled("offline"),
        ConnectionError("refused"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_a_connection(server, monkeypatch, error):
    monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=error))
    monkeypatch.setattr(server, "create_repo", Mock(side_effect=error))
    text = rf"failed \({type(error).__name__}: {error}\): check the conn"
    with pytest.raises(HubError, match=rf"{REPO}: the download {text}"):
        Agent.from_hub(REPO)
    with pytest.raises(HubError, match=rf"{REPO}: the upload {text}"):
        trained().push_to_hub(REPO, token=TOKEN)


@pytest.mark.usefixtures("short_program")
def test_what_the_hub_refuses(server, tmp_path):
    agent = trained()
    agent.push_to_hub(REPO, token=TOKEN)
    for repo, token in (("me/other", None), ("me/other", TOKEN), (REPO, None), (REPO, "hf_other")):
        text = rf"{repo}: the download failed .*40[14].*and that the token \(token=, HF_TOKEN"
        with pytest.raises(HubError, match=text):
            Agent.from_hub(repo, token=token)
    for repo, token, status in ((REPO, None, 401), (REPO, "hf_x", 401), ("you/it", TOKEN, 403)):
        with pytest.raises(HubError, match=f"{repo}: the upload failed .*{status}.*token=, HF_TOK"):
            agent.push_to_hub(repo, token=token)
    for repo in ("./missing", "a/b/c", "pendulum"):
        with pytest.raises(ValueError, match=f"repo is '{repo}': no folder, and not .*'user/name'"):
            agent.push_to_hub(repo, token=TOKEN)
    with pytest.raises(ValueError, match=r"repo is '\./missing': no folder"):
        Agent.from_hub("./missing")
    (tmp_path / "README.md").write_text("of another project")
    with pytest.raises(ValueError, match=r"folder '.*' already has README.md, which would be rep"):
        agent.push_to_hub(REPO, token=TOKEN, folder=tmp_path)
    assert (tmp_path / "README.md").read_text() == "of another project"
    assert set(server.branches) == {REPO}
    assert len(server.commits) == 1


def test_files_that_are_damaged_or_no_agent_are_refused(server, folder, tmp_path):
    (files,) = server.commits.values()
    content = files["agent.torchrl"]
    for damaged in (content[:6000] + b"?" + content[6001:], content[:-30], b""):
        files["agent.torchrl"] = damaged
        (folder / "agent.torchrl").write_bytes(damaged)
        for source in (folder, REPO):
            with pytest.raises(CheckpointError, match=r"agent.torchrl: truncated or damaged"):
                Agent.from_hub(source, token=TOKEN)
    del files["agent.torchrl"]
    server.folder = tmp_path / "other"
    for source in (tmp_path, REPO):
        with pytest.raises(CheckpointError, match=r"agent.torchrl: there is no such file"):
            Agent.from_hub(source, token=TOKEN)


def test_a_folder_needs_neither_the_hub_nor_its_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (folder / "README.md").write_text("a card that its author has edited")
    assert same_weights(Agent.from_hub(folder, device="cpu"), trained())
    with pytest.raises(ValueError, match=r"revision is 'v1' and '.*' is a folder, which has none"):
        Agent.from_hub(str(folder), revision="v1")
    for act in (lambda: Agent.from_hub(REPO), lambda: trained().push_to_hub(REPO, token=TOKEN)):
        with pytest.raises(ImportError, match=r'huggingface_hub; .*"iql_torchrl\[hub\]"'):
            act()


def card_of(agent, folder, **options):
    """Metadata, and the contents of each section, of the card that is uploaded."""
    agent.push_to_hub(REPO, token=TOKEN, folder=folder, **options)
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    parts = [section.split("\n```json\n") for section in body.split("\n## ")[2:]]
    sections = {title.strip(): json.loads(content.strip("`\n")) for title, content in parts}
    return yaml.safe_load(front), sections, text


@pytest.mark.usefixtures("short_program")
def test_the_card_says_what_the_agent_is(server, tmp_path):
    dataset = load_dataset(small_columns(), reward=(0.5, -1.0))
    agent = make_agent(config(discount=0.9), dataset)
    named = replace(agent.task, name="x\n```z\n## y", reference_scores=(-9.0, 3.0))
    evaluation = Evaluation(np.array([1.0, 2.0, 6.0]), np.array([4, 5, 6]))
    options = {"evaluation": evaluation, "dataset": dataset, "license": "mit", "tags": ["small"]}
    front, sections, text = card_of(replace(agent, task=named), tmp_path, **options)
    assert (front["library_name"], front["license"]) == ("iql_torchrl", "mit")
    assert front["tags"][-1] == "small"
    assert "# pendulum" in text
    assert 'agent = Agent.from_hub("me/pendulum")' in text
    data, policy = sections["Data"], sections["Policy"]
    assert policy["inputs"][0]["shape"] == ["B", 3]
    assert policy["output"]["low"] == agent.task.action_space.low.tolist()
    assert data["returns of score 0 and 100"] == [-9, 3]
    digests = sketch_of(dataset.episode_digests())
    expected = hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()
    assert data["digest of its episodes"] == expected
    assert (data["name"], data["episodes"], data["transitions"]) == (named.name, 4, 40)
    assert data["mean return"] == pytest.approx(small_columns()["reward"].sum() / 4, rel=1e-5)
    assert data["rewards were mapped to"] == "0.5 * reward + -1"
    assert (sections["Scores"]["return_mean"], sections["Scores"]["episodes"]) == (3, 3)
    assert sections["Settings"] == json.loads(json.dumps(agent.config.to_dict()))
    assert sections["Versions"]["torch"] == metadata.version("torch")
    bare = tmp_path / "bare"  # without scores, data and license
    front, sections, _ = card_of(discrete_agent(start=5, masked=True), bare)
    assert "license" not in front
    assert not {"Scores", "episodes"} & {*sections, *sections["Data"]}
    assert sections["Policy"]["output"]["start"] == 5
    assert "True in every row" in sections["Policy"]["inputs"][1]["values"]
    assert Agent.from_hub(bare).act(observations(), action_mask=masks()).min() >= 5


def test_scores_and_data_that_do_not_fit(server):
    agent = trained()
    for evaluation, error, message in (
        ({"return": float("nan")}, ValueError, "evaluation has return = nan; expected finite"),
        ({"return": "high"}, ValueError, "evaluation has return = 'high'"),
        (3.0, TypeError, "evaluation is float; expected what evaluate"),
    ):
        with pytest.raises(error, match=message):
            agent.push_to_hub(REPO, evaluation=evaluation, token=TOKEN)
    words = r"dataset is 'arrays', whose episodes are not .* make_agent"
    for other in (small_columns(50), small_columns(reward=np.ones(40, np.float32))):
        with pytest.raises(ValueError, match=words):
            agent.push_to_hub(REPO, dataset=load_dataset(other), token=TOKEN)
    with pytest.raises(TypeError, match=r"dataset is str; expected what load_dataset"):
        agent.push_to_hub(REPO, dataset="arrays", token=TOKEN)
    assert not server.branches
