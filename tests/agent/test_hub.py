"""Agents on the Hub: uploaded to and loaded from a server on this machine, and from folders."""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer, Repository
from small_agents import MEAN, SCALE, box_agent, config, discrete_agent, log, masks

from iql_torchrl import Agent, load_dataset, make_agent
from iql_torchrl.agent import HubError
from iql_torchrl.agent.hub import DIGESTED, FILES
from iql_torchrl.checkpoint import CheckpointError, StateAdapter, write_components
from iql_torchrl.data.episode_digests import episode_digests, sketch_of
from iql_torchrl.evaluation.result import Evaluation

yaml = pytest.importorskip("yaml")
hub = pytest.importorskip("huggingface_hub")
constants = importlib.import_module("huggingface_hub.constants")
# huggingface_hub 2.4 calls its HTTP library so
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
REPO = "me/pendulum"


def observations(rows: int = 9):
    return (np.random.default_rng(1).normal(size=(rows, 3)) * SCALE + MEAN).astype(np.float32)


def trained(**options):
    agent = box_agent(**options)
    agent.step(load_dataset(log()).replay_buffer(16, seed=0).sample())
    return agent


def same_weights(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = HubServer()
    pattern = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    disconnect(server)


def disconnect(server):
    getattr(hub, "close_session", lambda: None)()  # or its open connections are served further
    server.stop()


@pytest.fixture
def short_program(monkeypatch):
    """Export takes a second; these tests are of the transport of its files."""

    def export(agent, path):
        path.write_bytes(b"program")
        path.with_suffix(".json").write_text("{}")

    monkeypatch.setattr(Agent, "export", export)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of one agent, written once."""
    from iql_torchrl.agent.shared_folder import write_folder

    path = tmp_path_factory.mktemp("shared") / "agent"
    write_folder(trained(), path, "the card")
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """The same files, to be changed."""
    (tmp_path / "copy").mkdir()
    for name in FILES:
        (tmp_path / "copy" / name).write_bytes((folder / name).read_bytes())
    return tmp_path / "copy"


def test_an_agent_comes_back_from_the_hub(server, tmp_path):
    agent = trained()
    first = agent.push_to_hub(REPO, token=TOKEN, folder=tmp_path / "files", commit_message="one")
    stored = server.repositories[REPO]
    assert stored.private
    assert stored.messages == ["initial commit", "one"]
    assert stored.branches["main"] == first
    files = stored.commits[first]
    assert files == {name: (tmp_path / "files" / name).read_bytes() for name in FILES}
    assert len(server.stored) == 2  # checkpoint and program: Git LFS
    loaded = Agent.from_hub(REPO, token=TOKEN)
    assert same_weights(loaded, agent)
    assert loaded.config == agent.config
    np.testing.assert_array_equal(loaded.act(observations()), agent.act(observations()))
    program = torch.export.load(tmp_path / "files" / "policy.pt2").module()
    found = program(torch.tensor(observations()))
    np.testing.assert_allclose(found, agent.act(observations()), atol=1e-6)


@pytest.mark.usefixtures("short_program")
def test_revisions_are_branches_and_commits(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    agents = [trained(seed=seed) for seed in range(3)]
    first = agents[0].push_to_hub(REPO, private=False)
    agents[1].push_to_hub(REPO)
    agents[2].push_to_hub(REPO, revision="wide")
    assert not server.repositories[REPO].private
    monkeypatch.delenv("HF_TOKEN")
    for revision, agent in ((first, agents[0]), (None, agents[1]), ("wide", agents[2])):
        assert same_weights(Agent.from_hub(REPO, revision=revision), agent)
    with pytest.raises(HubError, match="me/pendulum: has no revision 'narrow'; give a branch"):
        Agent.from_hub(REPO, revision="narrow")


@pytest.mark.usefixtures("short_program")
def test_without_a_connection_the_cache_is_used(server, monkeypatch):
    agent = trained()
    agent.push_to_hub(REPO, token=TOKEN, private=False)
    assert same_weights(Agent.from_hub(REPO), agent)
    disconnect(server)
    assert same_weights(Agent.from_hub(REPO), agent)
    with pytest.raises(HubError, match=r"me/other: the Hub cannot be reached.*load it once"):
        Agent.from_hub("me/other")
    with pytest.raises(HubError, match=r"me/pendulum: the upload failed \(.*check the connection"):
        agent.push_to_hub(REPO, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="me/pendulum: HF_HUB_OFFLINE is set; unset it to upload"):
        agent.push_to_hub(REPO, token=TOKEN)
    assert same_weights(Agent.from_hub(REPO), agent)
    with pytest.raises(HubError, match=r"me/other: the Hub cannot be reached \(or HF_HUB_OFFLINE"):
        Agent.from_hub("me/other")


@pytest.mark.usefixtures("short_program")
def test_what_the_hub_refuses(server):
    agent = trained()
    agent.push_to_hub(REPO, token=TOKEN)
    for repo, token in (("me/other", None), ("me/other", TOKEN), (REPO, None), (REPO, "hf_other")):
        with pytest.raises(HubError, match=rf"{repo}: .* 40[14]: there is no such .* or it is pri"):
            Agent.from_hub(repo, token=token)
    with pytest.raises(
        HubError, match=r"me/pendulum: there is no token to upload with; pass token"
    ):
        agent.push_to_hub(REPO)
    for repo, token, status in ((REPO, "hf_other", 401), ("you/pendulum", TOKEN, 403)):
        with pytest.raises(
            HubError, match=f"{repo}: .* {status}: the token is not valid or may not"
        ):
            agent.push_to_hub(repo, token=token)
    for repo in ("./missing", "a/b/c", "pendulum"):
        with pytest.raises(ValueError, match=f"repo is '{repo}': no folder, and not .*'user/name'"):
            agent.push_to_hub(repo, token=TOKEN)
    with pytest.raises(ValueError, match=r"repo is '\./missing': no folder"):
        Agent.from_hub("./missing")
    assert set(server.repositories) == {REPO}


@pytest.mark.usefixtures("short_program")
def test_a_file_that_was_changed_on_the_hub_is_refused(server):
    commit = trained().push_to_hub(REPO, token=TOKEN, private=False)
    files = server.repositories[REPO].commits[commit]
    files["agent.torchrl"] = files["agent.torchrl"][:-1] + b"x"
    with pytest.raises(CheckpointError, match=r"me/pendulum: agent.torchrl is not .* SHA-256"):
        Agent.from_hub(REPO)
    server.repositories["me/empty"] = Repository("me/empty", private=False)
    with pytest.raises(CheckpointError, match=r"me/empty: has no manifest.json, so it is not"):
        Agent.from_hub("me/empty")


def test_a_folder_needs_neither_the_hub_nor_its_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("iql_torchrl.agent.hub.find_spec", lambda name: None)
    assert same_weights(Agent.from_hub(folder, device="cpu"), trained())
    with pytest.raises(ValueError, match=r"revision is 'v1' and '.*' is a folder, which has none"):
        Agent.from_hub(str(folder), revision="v1")
    for act in (lambda: Agent.from_hub(REPO), lambda: trained().push_to_hub(REPO, token=TOKEN)):
        with pytest.raises(
            ImportError, match=r'huggingface_hub; .*pip install "iql_torchrl\[hub\]"'
        ):
            act()


def test_the_manifest_has_the_digests(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in DIGESTED:
        content = (folder / name).read_bytes()
        expected = {"bytes": len(content), "SHA-256": hashlib.sha256(content).hexdigest()}
        assert manifest["files"][name] == expected
    assert set(manifest["files"]) == {"agent.torchrl", "policy.pt2", "policy.json"}
    (folder / "README.md").write_text("a card that its author has edited")
    Agent.from_hub(folder)


@pytest.mark.usefixtures("server")
def test_files_that_are_not_of_an_agent_are_kept(tmp_path):
    (tmp_path / "README.md").write_text("of another project")
    with pytest.raises(ValueError, match=r"folder '.*' already has README.md, which would be rep"):
        trained().push_to_hub(REPO, token=TOKEN, folder=tmp_path)
    assert (tmp_path / "README.md").read_text() == "of another project"


@pytest.mark.parametrize("name", DIGESTED)
def test_changed_and_missing_files_are_refused(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CheckpointError, match=rf"{name} is not the file .* SHA-256 is .* Nothing was"
    ):
        Agent.from_hub(copy)
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=rf"{name} .* bytes is {len(content) - 1} and manifest"
    ):
        Agent.from_hub(copy)
    (copy / name).unlink()
    with pytest.raises(
        CheckpointError, match=f"copy: incomplete: manifest.json lists {name}, which"
    ):
        Agent.from_hub(copy)


def test_a_manifest_that_cannot_be_used(copy):
    path, right = copy / "manifest.json", json.loads((copy / "manifest.json").read_text())
    outside = {**right["files"], "../../secret": right["files"]["policy.json"]}
    for text, message in (
        ("{", r"manifest.json cannot be read \(JSONDecodeError"),
        ("[]", r"manifest.json cannot be read \(TypeError"),
        (json.dumps({**right, "format": 2}), "from another version of iql_torchrl .layout 2"),
        (
            json.dumps({**right, "files": {}}),
            r"manifest.json lists \[\]; expected \['agent.torchrl'",
        ),
        (json.dumps({**right, "files": outside}), r"lists \['../../secret', 'agent.torchrl'"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Agent.from_hub(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest.json, so .* loaded by Agent.load"):
        Agent.from_hub(copy)


class Runs:
    """Unpickled, it would create the file ``path``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_runs_nothing(copy, tmp_path, monkeypatch):
    """Even where the manifest agrees, as an author with bad intentions would write it."""
    mark, path = tmp_path / "ran", copy / "agent.torchrl"
    pickle.loads(pickle.dumps(Runs(mark)))
    assert mark.exists(), "it does what it says when it is loaded"
    mark.unlink()
    monkeypatch.setattr(StateAdapter, "_check_readable", lambda *_: None)
    write_components(path, {"agent": {"config": {}}, "loss_module": {"weight": Runs(mark)}})
    manifest = json.loads((copy / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "SHA-256": digest}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"not loaded, because loading it could run a program"
    ):
        Agent.from_hub(copy)
    assert not mark.exists()


def card_of(agent, folder, **options):
    """Metadata, and the rows of each section's table, of the card that is uploaded."""
    agent.push_to_hub(REPO, token=TOKEN, folder=folder, **options)
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    sections = {}
    for section in body.split("\n## ")[1:]:
        title, _, rest = section.partition("\n")
        rows = [line.strip("| ").split(" | ") for line in rest.splitlines() if "|" in line][2:]
        sections[title] = {row[0].strip("`"): row[1].strip("`") for row in rows}
    return yaml.safe_load(front), sections, text


@pytest.mark.usefixtures("short_program")
def test_the_card_says_what_the_agent_is(server, tmp_path):
    dataset = load_dataset(log(), reward=(0.5, -1.0))
    agent = make_agent(config(discount=0.9), dataset)
    agent = replace(
        agent, task=replace(agent.task, name="x | y\n`z`", reference_scores=(-9.0, 3.0))
    )
    evaluation = Evaluation(np.array([1.0, 2.0, 6.0]), np.array([4, 5, 6]))
    front, sections, text = card_of(
        agent, tmp_path, evaluation=evaluation, dataset=dataset, license="mit", tags=["small"]
    )
    assert front["library_name"] == "iql_torchrl"
    assert front["license"] == "mit"
    assert front["tags"][-1] == "small"
    assert "# pendulum" in text
    assert 'agent = Agent.from_hub("me/pendulum")' in text
    task, data = sections["Task"], sections["Data"]
    assert task["observation"].startswith("Box of shape (3,), float32")
    assert task["action"] == "Box of shape (2,), float32, [-1, 1]" or "low" in task["action"]
    assert task["returns of score 0 and 100"] == "-9, 3"
    digests = sketch_of(episode_digests(dataset))
    expected = hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()
    assert data["digest of its episodes"] == expected
    assert (data["episodes"], data["transitions"]) == ("4", "40")
    assert float(data["mean return"]) == pytest.approx(log()["reward"].sum() / 4, rel=1e-5)
    assert data["rewards were mapped to"] == "0.5 * reward + -1"
    assert sections["Scores"]["return_mean"] == "3"
    assert sections["Scores"]["episodes"] == "3"
    assert json.loads(sections["Settings"]["discount"]) == 0.9
    assert set(sections["Settings"]) == set(agent.config.to_dict())
    assert sections["Versions"]["torch"] == metadata.version("torch")
    assert "| `name` | `x \\| y 'z'` |" in text


@pytest.mark.usefixtures("short_program")
def test_a_card_without_scores_data_and_license(server, tmp_path):
    front, sections, _ = card_of(discrete_agent(start=5, masked=True), tmp_path)
    assert "license" not in front
    assert "Scores" not in sections
    assert sections["Task"]["action"] == "Discrete(4, start=5)"
    assert "True where" in sections["Task"]["action_mask"]
    assert set(sections["Data"]) == {"name", "digest of its episodes"}
    agent = Agent.from_hub(tmp_path)
    assert agent.act(observations(), action_mask=masks()).min() >= 5


def test_scores_and_data_that_do_not_fit(server):
    agent = trained()
    for evaluation, error, message in (
        ({"return": float("nan")}, ValueError, "evaluation has return = nan; expected finite"),
        ({"return": "high"}, ValueError, "evaluation has return = 'high'"),
        (3.0, TypeError, "evaluation is float; expected what evaluate"),
    ):
        with pytest.raises(error, match=message):
            agent.push_to_hub(REPO, evaluation=evaluation, token=TOKEN)
    with pytest.raises(
        ValueError, match=r"dataset is 'arrays', whose episodes are not .* make_agent"
    ):
        agent.push_to_hub(REPO, dataset=load_dataset(log(50)), token=TOKEN)
    with pytest.raises(TypeError, match=r"dataset is str; expected what load_dataset"):
        agent.push_to_hub(REPO, dataset="arrays", token=TOKEN)
    assert not server.repositories
