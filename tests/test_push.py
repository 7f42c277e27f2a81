"""`lorazip export --push`: against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from handmade import MakeAdapter
from nursery import Ended, Nursery

from lorazip import Bundle, Spec, open_adapter
from lorazip.compress import job

TOKEN = "hf_example"


class Hub(ThreadingHTTPServer):
    """The few answers that a client needs to make a repository and to commit files to it.

    Attributes:
        repositories: repo -> path in it -> content.
        status: what commits are answered with.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.status = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        repo = "/".join(self.path.split("/")[3:5])
        match self.path.split("/")[1:]:
            case ["api", "repos", "create"]:
                order = json.loads(body)
                repo = f"{order['organization']}/{order['name']}"
                if repo in self.server.repositories:
                    return self.reply(409, {"error": "exists", "url": f"{self.server.address}/{repo}"})
                self.server.repositories[repo] = {}
                return self.reply(200, {"url": f"{self.server.address}/{repo}"})
            case ["api", "validate-yaml"]:
                return self.reply(200, {"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", "main"]:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.reply(200, {"files": files})
            case ["api", "models", _, _, "commit", "main"]:
                if self.server.status != 200:
                    return self.reply(self.server.status, {"error": "You are over your quota"})
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        self.server.repositories[repo][line["value"]["path"]] = content
                url = f"{self.server.address}/{repo}/commit/{40 * '0'}"
                return self.reply(200, {"commitUrl": url, "commitOid": 40 * "0", "success": True})
        return self.reply(404, {"error": f"no answer to {self.path}"})

    def do_GET(self) -> None:
        self.reply(404, {"error": "Repository not found"})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    forking = Nursery()
    yield forking
    forking.close()


@pytest.fixture
def team(make_adapter: MakeAdapter) -> Path:
    for name in ("ant", "bee", "cat [v2]"):
        make_adapter(f"zoo/{name}", rank=2)
    job.run([make_adapter.root / "zoo"], Spec(), make_adapter.root / "team")
    return make_adapter.root / "team"


def push(nursery: Nursery, hub: Hub, *arguments: str | Path, **environment: str | None) -> Ended:
    usual = {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": None,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return nursery.run("export", *arguments, environment=usual | environment)


def write(repository: dict[str, bytes], directory: Path) -> None:
    for name, data in repository.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_one_adapter_with_its_card(nursery: Nursery, hub: Hub, team: Path, tmp_path: Path) -> None:
    ended = push(nursery, hub, team, "ant", "-o", tmp_path / "out", "--push", "org/ant", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["pushed"] == f"{hub.address}/org/ant"
    repository = hub.repositories["org/ant"]
    assert set(repository) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = repository["README.md"].decode()
    assert card.startswith('---\nbase_model: "org/base"\nlibrary_name: peft\ntags:\n- lora\n')
    error = Bundle.open(team).adapter("ant").record.error
    assert f"| ant | {error:.3g} |" in card
    write(repository, tmp_path / "back")
    assert open_adapter(tmp_path / "back", "ant").modules
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "ant").iterdir()} == repository


def test_several_adapters_and_nothing_else_of_the_directory(
    nursery: Nursery, hub: Hub, team: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "private").mkdir(parents=True)
    (out / "private" / "key.pem").write_text("secret")
    (out / "notes.txt").write_text("secret")
    (out / "cat v").mkdir()  # what the name would match as a pattern
    (out / "cat v" / "secret").write_text("secret")
    ended = push(nursery, hub, team, "ant", "cat [v2]", "-o", out, "--push", "org/both")
    assert ended.code == 0, ended.err
    assert f"pushed to {hub.address}/org/both" in ended.out
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert set(hub.repositories["org/both"]) == {
        "README.md",
        *(f"{name}/{file}" for name in ("ant", "cat [v2]") for file in files),
    }
    assert "| cat [v2] | " in hub.repositories["org/both"]["README.md"].decode()


def test_a_card_that_is_there_is_not_replaced(nursery: Nursery, hub: Hub, team: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    ended = push(nursery, hub, team, "-o", tmp_path / "out", "--push", "org/all")
    assert (ended.code, ended.out) == (2, "")
    assert "README.md exists" in ended.err
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert hub.repositories == {}


def test_a_bundle_into_a_repository_that_exists(
    nursery: Nursery, hub: Hub, team: Path, tmp_path: Path
) -> None:
    hub.repositories["org/team"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
    ended = push(nursery, hub, team, "ant", "bee", "--bundle", "-o", tmp_path / "sub", "--push", "org/team")
    assert ended.code == 0, ended.err
    write(hub.repositories["org/team"], tmp_path / "back")
    back = Bundle.open(tmp_path / "back")
    assert back.names == ["ant", "bee"]
    assert back.verify() == [] and back.strays() == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_TOKEN": "hf_wrong"}, "401"),
        ({"HF_TOKEN": None, "HF_HOME": "/nowhere"}, "401"),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
    ],
    ids=["wrong token", "no token", "offline", "no server"],
)
def test_a_hub_that_does_not_take_it(
    nursery: Nursery, hub: Hub, team: Path, tmp_path: Path, environment: dict[str, str | None], words: str
) -> None:
    ended = push(
        nursery, hub, team, "ant", "-o", tmp_path / "out", "--push", "org/ant", "--json", **environment
    )
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    assert "error: org/ant: the Hub did not take it: " in ended.err
    assert words in ended.err
    assert "`hf auth login`" in ended.err and str(tmp_path / "out" / "ant") in ended.err
    assert TOKEN not in ended.err
    assert hub.repositories == {}
    assert open_adapter(tmp_path / "out" / "ant", "ant").modules  # what was exported is there all the same


def test_a_refused_commit_and_a_bad_name(nursery: Nursery, hub: Hub, team: Path, tmp_path: Path) -> None:
    hub.status = 403
    ended = push(nursery, hub, team, "ant", "-o", tmp_path / "one", "--push", "org/ant")
    assert (ended.code, ended.out) == (2, "")
    assert "You are over your quota" in ended.err and "Traceback" not in ended.err
    ended = push(nursery, hub, team, "ant", "-o", tmp_path / "two", "--push", "org/a/b c")
    assert (ended.code, ended.out) == (2, "")
    assert "org/a/b c: the Hub did not take it: Repo id must" in ended.err and "Traceback" not in ended.err
