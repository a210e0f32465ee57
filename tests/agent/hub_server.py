"""The part of the Hugging Face Hub's HTTP interface that uploading and downloading a model use.

Written from the requests that huggingface_hub makes and https://huggingface.co/docs/hub/api. Files
of more than text are uploaded by Git LFS's batch interface, as by the Hub where hf_xet is off.
"""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_writes"
BINARY = (".torchrl", ".pt2")


class Repository:
    """Commits of a model: files by path, by hash; and branches."""

    def __init__(self, name: str, private: bool):
        self.name, self.private = name, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.branches = {"main": self.add({}, "initial commit")}

    def add(self, files: dict[str, bytes], message: str) -> str:
        text = f"{len(self.commits)} {message} {sorted(files)}"
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = files
        self.messages.append(message)
        return name

    def find(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of this machine until :meth:`stop`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def writes(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository | None:
        """The repository, or None after an answer: unknown and hidden look alike, as on the Hub."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.writes):
            status = 404 if self.writes else 401
            self.answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, what, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
            path = None
        else:  # user/name/resolve/revision/path
            name, what, revision = "/".join(parts[:2]), parts[2], parts[3]
            path = "/".join(parts[4:])
        if (repository := self.repository(name)) is None:
            return
        if (commit := repository.find(revision)) is None:
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        files = repository.commits[commit]
        if path is not None:
            self.file(files, path, commit)
        elif what == "tree":
            self.answer(200, [self.entry(each, content) for each, content in files.items()])
        else:
            siblings = [{"rfilename": each} for each in files]
            self.answer(200, {"id": name, "sha": commit, "siblings": siblings, "tags": []})

    do_HEAD = do_GET

    def file(self, files: dict[str, bytes], path: str, commit: str):
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        digest = hashlib.sha256(files[path]).hexdigest()
        self.answer(200, files[path], ETag=f'"{digest}"', X_Repo_Commit=commit)

    @staticmethod
    def entry(path: str, content: bytes):
        digest = hashlib.sha256(content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": digest}

    def do_PUT(self):
        content = self.read()
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == name
        self.server.stored[name] = content
        self.answer(200)

    def do_POST(self):
        body, parts = self.read(), unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            _, front, _ = json.loads(body)["content"].split("---", 2)
            assert isinstance(yaml.safe_load(front), dict)
            self.answer(200, {"errors": [], "warnings": []})
        elif not self.writes:
            self.answer(401, {"error": "Invalid username or password."})
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts[-1] == "batch":
            self.batch(json.loads(body))
        elif (repository := self.repository("/".join(parts[2:4]))) is not None:
            getattr(self, parts[4])(repository, "/".join(parts[5:]), body)

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "me":
            self.answer(403, {"error": "You don't have the rights to create a model there"})
        elif name in self.server.repositories:
            taken = {
                "error": "You already created this model repo",
                "url": f"{self.server.url}/{name}",
            }
            self.answer(409, taken)
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.server.repositories[name] = Repository(name, bool(private))
            self.answer(200, {"url": f"{self.server.url}/{name}"})

    def branch(self, repository: Repository, name: str, _):
        if name in repository.branches:
            self.answer(409, {"error": "Reference already exists"})
        else:
            repository.branches[name] = repository.branches["main"]
            self.answer(200)

    def preupload(self, _repository, _revision, body: bytes):
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(BINARY) else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, wanted):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
            for each in wanted["objects"]
        ]
        content = {"transfer": "basic", "objects": objects}
        self.answer(200, content, Content_Type="application/vnd.git-lfs+json")

    def commit(self, repository: Repository, branch: str, body: bytes):
        if branch not in repository.branches:
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        files, message = dict(repository.commits[repository.branches[branch]]), ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.stored[value["oid"]]
        commit = repository.branches[branch] = repository.add(files, message)
        url = f"{self.server.url}/{repository.name}/commit/{commit}"
        self.answer(200, {"commitUrl": url, "commitOid": commit})
