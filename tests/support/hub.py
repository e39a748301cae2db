"""A stand-in for the model hub on a free port: one repository, with the endpoints that huggingface_hub uses to create,
list, read and commit. Small files are part of commits; files with `LFS_SUFFIXES` are first uploaded as LFS objects."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

COMMIT = "a" * 40
LFS_SUFFIXES = (".tar", ".safetensors")


class Hub(http.server.ThreadingHTTPServer):
    """`files` holds the committed files. `faults`: path pattern -> `[status, times]` of the next such requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.objects, self.created, self.log = {}, {}, [], []
        self.commits, self.puts = [], []
        self.status, self.exists, self.token, self.faults = 200, False, None, {}
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that disconnect are expected."""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def do_PUT(self):
        self.respond()

    def do_POST(self):
        self.respond()

    def respond(self):
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        with self.server.lock:
            self.server.log.append((self.command, path))
            status = self.refusal(path)
            if status != 200:
                self.answer(status, {"error": "refused"})
                return
            self.route(path, body)

    def refusal(self, path):
        """The status of a request that fails on purpose; 200 for all others."""
        server = self.server
        for pattern, fault in server.faults.items():
            if re.search(pattern, path) and fault[1] > 0:
                fault[1] -= 1
                return fault[0]
        if server.token and path.startswith("/api/") and self.headers["Authorization"] != f"Bearer {server.token}":
            return 401
        return server.status if self.command == "POST" else 200

    def route(self, path, body):
        server = self.server
        if self.command == "PUT":
            digest = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == digest
            server.objects[digest] = body
            server.puts.append(digest)
            self.answer(200, {})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            server.created.append(asked)
            server.exists = True
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            self.answer(200, {"url": f"{server.url}/{kind}ann/pets", "name": "ann/pets"})
        elif "/preupload/" in path:
            modes = [
                {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False, "oid": self.oid(file)}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"objects": [self.upload_of(one) for one in json.loads(body)["objects"]]})
        elif "/commit/" in path:
            self.commit([json.loads(line) for line in body.splitlines()])
        elif "/tree/" in path:
            start = re.sub(r".*/tree/[^/]+/?", "", path)
            found = [self.facts(name) for name in sorted(server.files) if name.startswith(f"{start}/" if start else "")]
            there = server.exists and (found or not start)
            self.answer(200 if there else 404, found if there else {"error": "not found"})
        elif "/paths-info/" in path:
            asked = [unquote(part.partition("=")[2]) for part in body.decode().split("&") if part.startswith("paths")]
            asked = asked or json.loads(body)["paths"]
            self.answer(200, [self.facts(name) for name in asked if name in server.files])
        elif "/resolve/" in path:
            self.file(re.sub(r".*/resolve/[^/]+/", "", path))
        elif path.startswith("/api/validate-yaml"):
            self.answer(200, {"errors": [], "warnings": []})
        elif path.startswith("/api/datasets/") and not server.exists:
            self.answer(404, {"error": "Repository not found"})
        else:
            self.answer(200, {"sha": COMMIT, "id": "ann/pets"})

    def oid(self, file):
        content = self.server.files.get(file["path"])
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if mode(file["path"]) == "lfs" else git_oid(content)

    def upload_of(self, one):
        if one["oid"] in self.server.objects:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.server.url}/objects/{one['oid']}"}}}

    def commit(self, lines):
        names = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
            names += [value["path"]] if "path" in value else []
        self.server.commits.append(names)
        self.answer(
            200, {"commitUrl": f"{self.server.url}/ann/pets/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def facts(self, name):
        content = self.server.files[name]
        facts = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
        if mode(name) == "lfs":
            facts["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return facts

    def file(self, name):
        content = self.server.files.get(name)
        if content is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        etag = hashlib.sha256(content).hexdigest() if mode(name) == "lfs" else git_oid(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        start, end = (int(wanted[1]), int(wanted[2] or len(content) - 1)) if wanted else (0, len(content) - 1)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
        self.answer(206 if wanted else 200, content[start : end + 1], headers)

    def answer(self, status, content=b"", headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = headers or {}
        if status == 404 and "X-Error-Code" not in headers:
            headers["X-Error-Code"] = "EntryNotFound" if self.server.exists else "RepoNotFound"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def mode(name):
    return "lfs" if name.endswith(LFS_SUFFIXES) else "regular"


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def hub_server():
    """A running hub, which huggingface_hub uses in this process."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    page = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": page, "HF_HUB_OFFLINE": False,
                            "HF_HUB_DISABLE_XET": True}.items():  # fmt: skip
            patch.setattr(constants, name, value)
        patch.setenv("HF_ENDPOINT", server.url)
        yield server
    server.shutdown()
    thread.join()
    server.server_close()
