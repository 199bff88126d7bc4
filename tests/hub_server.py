"""A small server of the Hugging Face Hub's API on the loopback interface, for its own client."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRITER, READER = "hf_writer", "hf_reader"       # tokens; without one, only public repositories can be read


class Hub:
    """Repositories, {id: {"private", "commits": [(sha, {path: content})]}}, and the requests that were made."""

    def __init__(self):
        self.repositories, self.large, self.requests = {}, {}, []

    def add(self, name, files, private=False):
        """Add a repository with one commit."""
        self.repositories[name] = {"private": private, "commits": []}
        self.commit(name, {".gitattributes": b"*.safetensors filter=lfs", **files})

    def commit(self, name, files):
        commits = self.repositories[name]["commits"]
        files = {**(commits[-1][1] if commits else {}), **files}
        commits.append((hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest(), files))
        return commits[-1][0]


class Refused(Exception):
    """A status, and the code of the error that the client looks for."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self.rfile.read(length)
        self.hub.requests.append(f"{self.command} {self.path}")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        path = self.path.partition("?")[0]
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                try:
                    status, headers, content = function(self, *match.groups())
                except Refused as error:
                    status, code = error.args
                    headers, content = {"X-Error-Code": code, "X-Error-Message": code}, b""
                break
        else:
            status, headers, content = 500, {}, b"no such route"
        if isinstance(content, dict):
            headers, content = {"Content-Type": "application/json"} | headers, json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    @property
    def address(self):
        return "http://{}:{}".format(*self.server.server_address)

    def repository(self, name, writing=False):
        repository = self.hub.repositories.get(name)
        if repository is None or repository["private"] and self.token is None:
            raise Refused(404 if self.token else 401, "RepoNotFound")
        if self.token not in (None, WRITER, READER):
            raise Refused(401, "InvalidToken")
        if writing and self.token != WRITER:
            raise Refused(403, "Forbidden")
        return repository

    def revision(self, name, revision):
        commits = self.repository(name)["commits"]
        named = [(sha, files) for sha, files in commits if revision in (sha, "main", None)]
        if not named:
            raise Refused(404, "RevisionNotFound")
        return named[-1]


def create(self):
    values = json.loads(self.content)
    name = f"{values['organization']}/{values['name']}"
    if self.token != WRITER:
        raise Refused(403, "Forbidden")
    if name in self.hub.repositories:
        raise Refused(409, "Exists")
    self.hub.add(name, {}, private=values.get("private", values.get("visibility") == "private"))
    return 200, {}, {"url": f"{self.address}/{name}"}


def info(self, name, revision=None):
    sha, files = self.revision(name, revision)
    private = self.repository(name)["private"]
    return 200, {}, {"id": name, "sha": sha, "private": private, "gated": False, "downloads": 0, "likes": 0, "tags": [],
                     "siblings": [{"rfilename": file} for file in files]}


def resolve(self, name, revision, file):
    sha, files = self.revision(name, revision)
    if file not in files:
        raise Refused(404, "EntryNotFound")
    return 200, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(files[file]).hexdigest()}"'}, files[file]


def preupload(self, name):
    self.repository(name, writing=True)
    return 200, {}, {"files": [{"path": file["path"], "shouldIgnore": False,
                                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                               for file in json.loads(self.content)["files"]]}


def lfs_batch(self, name):
    self.repository(name, writing=True)
    return 200, {}, {"transfer": "basic", "objects": [
        {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}", "header": {}}}}
        for one in json.loads(self.content)["objects"]]}


def lfs_upload(self, oid):
    assert hashlib.sha256(self.content).hexdigest() == oid
    self.hub.large[oid] = self.content
    return 200, {}, b""


def commit(self, name):
    head, _ = self.repository(name, writing=True)["commits"][-1]
    lines = [json.loads(line) for line in self.content.splitlines()]
    assert lines[0]["key"] == "header"
    if lines[0]["value"].get("parentCommit", head) != head:
        raise Refused(412, "Precondition")
    files = {line["value"]["path"]: self.hub.large[line["value"]["oid"]] if line["key"] == "lfsFile" else
             base64.b64decode(line["value"]["content"]) for line in lines[1:]}
    sha = self.hub.commit(name, files)
    return 200, {}, {"success": True, "commitOid": sha, "commitUrl": f"{self.address}/{name}/commit/{sha}"}


def stop(self):
    self.server.shutdown()
    self.server.socket.close()
    return 200, {}, b""


REPOSITORY = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", "/api/repos/create", create), ("GET", f"/api/models/{REPOSITORY}", info),
    ("GET", f"/api/models/{REPOSITORY}/revision/([^/]+)", info),
    ("GET HEAD", f"/{REPOSITORY}/resolve/([^/]+)/(.+)", resolve),
    ("POST", "/api/validate-yaml", lambda self: (200, {}, {"errors": [], "warnings": []})),
    ("POST", f"/api/models/{REPOSITORY}/preupload/main", preupload),
    ("POST", f"/{REPOSITORY}\\.git/info/lfs/objects/batch", lfs_batch), ("PUT", r"/lfs/(\w+)", lfs_upload),
    ("POST", f"/api/models/{REPOSITORY}/commit/main", commit), ("POST", "/stop", stop))


@contextlib.contextmanager
def serve():
    """Context with a `Hub` that is served at its attribute `address`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.address = "http://{}:{}".format(*server.server_address)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
