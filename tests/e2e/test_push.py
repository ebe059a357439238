"""`qpalette push` against a server that answers as the Hub does: what arrives, and what every refusal says."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants
from test_cli import model, packed, run  # noqa: F401 - fixtures

from qpalette.formats import check_checksums

TOKEN = "hf_secret"
REPOSITORY = "owner/model"


class Hub(ThreadingHTTPServer):
    """One repository, of small files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] | None = None  # None: the repository is not there
        self.private = False
        self.commits = 0
        self.refuse: int | None = None
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        hub = self.server
        hub.asked.append(path)
        if path.startswith(f"/api/models/{REPOSITORY}/tree"):
            files = (hub.files or {}).items()
            return self._answer([{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files])
        if path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in hub.files or {}]
            return self._answer({"id": REPOSITORY, "private": hub.private, "siblings": siblings, "sha": "0" * 40})
        return self._answer({"error": path}, 404)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server
        hub.asked.append(path)
        if hub.refuse is not None or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "of the server"}, hub.refuse or 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": files})
        if path.endswith("/commit/main"):
            return self._commit([json.loads(line) for line in body.splitlines()])
        return self._answer({"error": path}, 404)

    def _create(self, asked: dict) -> None:
        hub = self.server
        if hub.files is not None:
            return self._answer(
                {"error": "You already created this model repo", "url": f"{hub.address}/{REPOSITORY}"}, 409
            )
        hub.files, hub.private = {}, asked.get("visibility") == "private"
        return self._answer({"url": f"{hub.address}/{REPOSITORY}"})

    def _commit(self, lines: list[dict]) -> None:
        hub = self.server
        assert hub.files is not None
        hub.commits += 1
        for line in lines:
            if line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del hub.files[line["value"]["path"]]
        self._answer({"commitUrl": f"{hub.address}/{REPOSITORY}/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def files_of(directory) -> dict[str, bytes]:
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def test_what_arrives_is_the_model_and_nothing_else(run, packed, hub, tmp_path):  # noqa: F811
    mine = shutil.copytree(packed, tmp_path / "mine")
    (mine / "notes.txt").write_text("mine alone")
    result = run("push", mine, REPOSITORY, "--private")
    assert result.code == 0, result.err
    assert "not sent: notes.txt" in result.err
    assert hub.files == files_of(packed)
    assert hub.private
    assert f"{hub.address}/{REPOSITORY}/commit/1" in result.out
    arrived = tmp_path / "arrived"
    for name, content in hub.files.items():
        (arrived / name).parent.mkdir(parents=True, exist_ok=True)
        (arrived / name).write_bytes(content)
    assert check_checksums(arrived) == len(hub.files) - 1


def test_shards_of_an_earlier_push_go_in_the_same_commit(run, packed, hub):  # noqa: F811
    hub.files = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "mine.md": b"text"}
    assert run("push", packed, REPOSITORY).code == 0
    assert hub.files == files_of(packed) | {"mine.md": b"text"}
    assert hub.commits == 1


def test_a_dry_run_says_all_and_sends_nothing(run, packed, hub):  # noqa: F811
    result = run("push", packed, REPOSITORY, "--dry-run")
    assert result.code == 0
    assert hub.asked == []
    for name, content in files_of(packed).items():
        assert f"{len(content):,}" in next(line for line in result.out.splitlines() if f" {name} " in line)
    assert f"{sum(map(len, files_of(packed).values())):,} bytes" in result.out


def test_a_changed_file_is_never_sent(run, packed, hub, tmp_path):  # noqa: F811
    mine = shutil.copytree(packed, tmp_path / "mine")
    (mine / "README.md").write_text("changed")
    for more in ((), ("--dry-run",)):
        result = run("push", mine, REPOSITORY, *more)
        assert result.code == 1
        assert "README.md is not what was written" in result.err
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("model", "give owner/name"), ("a/b/c", "give owner/name"), ("owner/-bad-", "give owner/name")],
)
def test_a_name_is_checked_first(run, packed, hub, name, message):  # noqa: F811
    result = run("push", packed, name)
    assert (result.code, message in result.err, hub.asked) == (1, True, [])


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "does not know the token"), (403, "may not write to owner/model"), (500, "with 500: of the server")],
)
def test_refusals_are_one_line(run, packed, hub, status, message):  # noqa: F811
    hub.refuse = status
    result = run("push", packed, REPOSITORY)
    assert result.code == 1
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert TOKEN not in result.err


def test_without_a_token(run, packed, hub, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    result = run("push", packed, REPOSITORY)
    assert result.code == 1
    assert "no token" in result.err
    assert "HF_TOKEN" in result.err
    assert hub.asked == []


def test_offline(run, packed, hub, monkeypatch):  # noqa: F811
    hub.shutdown()
    hub.server_close()
    result = run("push", packed, REPOSITORY)
    assert result.code == 1
    assert "the Hub cannot be reached" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_private_never_means_public(run, packed, hub):  # noqa: F811
    hub.files = {}
    result = run("push", packed, REPOSITORY, "--private")
    assert result.code == 1
    assert "and public" in result.err
    assert hub.files == {}
