"""Upload to a model hub, with a local mock server: it receives the files of the export, and errors contain a fix."""

import base64
import http.server
import json
import threading

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.hub import push_export
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student

CARD = "---\nlibrary_name: timm\n---\n# a student\n"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that an upload needs; `server.files` holds the committed files."""

    def answer(self, status, fields=None):
        body = json.dumps(fields or {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        name = self.path.rpartition("/")[2]
        self.answer(200 if name in self.server.files else 404)

    def do_GET(self):
        self.answer(200, {"sha": "0" * 40, "id": "ann/pets"})

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        if self.server.status != 200:
            self.answer(self.server.status)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer(200, {"url": f"{self.server.url}/ann/pets", "name": "ann/pets"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self.answer(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/ann/pets/commit/{'a' * 40}"
            self.answer(200, {"commitUrl": url, "commitOid": "a" * 40, "success": True})
        else:  # it checks the card's header
            self.answer(200, {"errors": [], "warnings": []})

    def chunks(self):
        """A body without a length."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.status = {}, [], 200
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    page = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", page)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "export"
    torch.manual_seed(0)
    config = StudentConfig(name="resnet10t", mean=(0.1, 0.2, 0.3))
    student = build_student(config, num_classes=2, image_size=64)
    export_student(student, config, folder, image_size=64, class_names=["cat", "dog"], card=CARD)
    return folder


def test_the_hub_receives_the_files_of_the_export(export, hub):
    assert push_export(export, "ann/pets", token="t", private=True) == f"{hub.url}/ann/pets/commit/{'a' * 40}"
    assert all("private" in json.dumps(request) for request in hub.created)
    assert sorted(hub.files) == sorted(path.name for path in export.iterdir())  # no pickle, no other card
    assert hub.files["README.md"].decode() == CARD
    assert json.loads(hub.files["config.json"]) == json.loads((export / "config.json").read_text())
    copy = export.parent / "served.safetensors"
    copy.write_bytes(hub.files["model.safetensors"])
    expected = load_file(export / "model.safetensors")
    assert {name: value.tolist() for name, value in load_file(copy).items()} == {
        name: value.tolist() for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("status", "repo", "words"),
    [(401, "ann/pets", "hf auth login"), (500, "ann/pets", "rejected"), (200, "a b/c/d", "user/name")],
)
def test_a_rejected_upload(export, hub, status, repo, words):
    hub.status = status
    with pytest.raises(UserError, match=words):
        push_export(export, repo, token="t")
    assert not hub.files


def test_a_hub_that_cannot_be_reached(export, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot reach"):
        push_export(export, "ann/pets", token="t")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="unset HF_HUB_OFFLINE"):
        push_export(export, "ann/pets", token="t")
