"""A Hub on loopback: the endpoints that huggingface_hub calls, tokens, and failures on demand."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".png", ".mid")


def git_oid(content):
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """Files of every commit, and the commit of every branch."""

    private: bool
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message):
        self.messages.append(message)
        sha = hashlib.sha1(repr((branch, sorted(files), self.messages)).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass
class Failure:
    """What goes wrong with requests of this method whose path has this part, some times."""

    method: str
    part: str
    status: int = 0
    headers: dict = field(default_factory=dict)
    drop_after: int | None = None
    """Bytes after which the connection is cut: of the answer, or of what is sent with PUT."""
    hang: bool = False
    """Take ``drop_after`` bytes of what is sent, and wait."""
    times: int = 1


class HubServer:
    """Serves until ``stop``; ``start`` goes on at the same address."""

    def __init__(self):
        self.repos, self.blobs, self.log, self.failures = {}, {}, [], []
        self.tokens = {"hf_writes": {"org"}, "hf_reads": set()}
        self.hung, self.open = threading.Event(), []
        self.port = 0
        self.start()

    def start(self):
        kind = type("Bound", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), kind)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        for connection in self.open:  # what is kept alive too
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.open.clear()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def sent(self, method):
        """Paths of the requests of one method."""
        return [path for way, path in self.log if way == method]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self):
        self.hub.open.append(self.request)
        super().setup()

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        """Send an answer, or the beginning of one."""
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        failure = getattr(self, "failure", None)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if failure is not None and failure.drop_after is not None:
            self.wfile.write(content[: failure.drop_after])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def refuse(self, status, code="", message="", **headers):
        more = {"X_Error_Code": code, "X_Error_Message": message, **headers}
        self.answer({"error": message or code}, status, **{k: v for k, v in more.items() if v})

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path))
        self.failure = None
        for failure in hub.failures:
            if failure.times and failure.method == self.command and failure.part in path:
                failure.times -= 1
                self.failure = failure
                break
        size = int(self.headers.get("Content-Length") or 0)
        if self.failure and self.command == "PUT" and self.failure.drop_after is not None:
            self.rfile.read(self.failure.drop_after)
            hub.hung.set()
            if self.failure.hang:
                self.rfile.read()  # until the client is gone
            self.close_connection = True
            return
        self.body = self.rfile.read(size)
        if self.failure and self.failure.status:
            self.refuse(self.failure.status, message="made to fail", **self.failure.headers)
            return
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if self.token is not None and self.token not in hub.tokens:
            self.refuse(401, message="Invalid credentials in Authorization header")
            return
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                getattr(self, name)(**found.groupdict())
                return
        self.refuse(404, message=f"no endpoint {self.command} {path}")

    def readable(self, id):
        """The repository, or None after an answer that says there is none."""
        repo = self.hub.repos.get(id)
        if repo is not None and not (repo.private and self.token is None):
            return repo
        self.refuse(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        return None

    def writable(self, org):
        if self.token is None:
            self.refuse(401, message="Invalid username or password.")
        elif org not in self.hub.tokens[self.token]:
            self.refuse(403, message=f"You don't have the rights to write under {org}")
        else:
            return True
        return False

    def at(self, repo, rev):
        """The commit of a revision, or None after an answer that says there is none."""
        sha = repo.branches.get(rev, rev)
        if sha in repo.commits:
            return sha
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return None

    def create(self):
        asked = json.loads(self.body)
        id = f"{asked['organization']}/{asked['name']}"
        if not self.writable(asked["organization"]):
            return
        if id in self.hub.repos:
            self.refuse(409, message="You already created this model repo")
            return
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos[id] = Repo(private)
        self.hub.repos[id].commit("main", {".gitattributes": b"* text\n"}, "initial commit")
        self.answer({"url": f"{self.hub.url}/{id}"})

    def validate(self):
        self.answer({"errors": [], "warnings": []})

    def info(self, id, rev="main"):
        if (repo := self.readable(id)) and (sha := self.at(repo, rev)):
            siblings = [{"rfilename": name} for name in repo.commits[sha]]
            self.answer({"id": id, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, id, rev):
        if (repo := self.readable(id)) and (sha := self.at(repo, rev)):
            self.answer([self.entry(*file) for file in sorted(repo.commits[sha].items())])

    def entry(self, path, content):
        found = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path.endswith(LFS):
            found["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return found

    def branch(self, id, rev):
        if not self.writable(id.partition("/")[0]):
            return
        repo = self.hub.repos[id]
        if rev in repo.branches:
            self.refuse(409, message="Reference already exists")
            return
        repo.branches[rev] = repo.branches["main"]
        self.answer()

    def resolve(self, id, rev, path):
        if not ((repo := self.readable(id)) and (sha := self.at(repo, rev))):
            return
        content = repo.commits[sha].get(path)
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
            return
        etag = sha256(content) if path.endswith(LFS) else git_oid(content)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, whole = int(found[1]), len(content)
            headers["Content_Range"] = f"bytes {start}-{whole - 1}/{whole}"
            self.answer(content[start:], 206, **headers)
        else:
            self.answer(content, **headers)

    def preupload(self, id, rev):
        if not self.writable(id.partition("/")[0]) or not (repo := self.readable(id)):
            return
        now = repo.commits.get(repo.branches.get(rev), {})
        self.answer({"files": [self.mode(file["path"], now) for file in self.files()]})

    def files(self):
        return json.loads(self.body)["files"]

    def mode(self, path, now):
        lfs = path.endswith(LFS)
        oid = (sha256 if lfs else git_oid)(now[path]) if path in now else None
        mode = "lfs" if lfs else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, id):
        if not self.writable(id.partition("/")[0]):
            return
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/blobs/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}}
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid):
        if sha256(self.body) != oid:
            self.refuse(400, message="content is not what its name says")
            return
        self.hub.blobs[oid] = self.body
        self.answer()

    def commit(self, id, rev):
        if not self.writable(id.partition("/")[0]):
            return
        repo = self.hub.repos[id]
        files, message = dict(repo.commits[repo.branches[rev]]), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                del files[value["path"]]
        sha = repo.commit(rev, files, message)
        self.answer({"commitUrl": f"{self.hub.url}/{id}/commit/{sha}", "commitOid": sha})


ID = r"(?P<id>[^/]+/[^/]+)"
REV = r"(?P<rev>[^/]+)"
ROUTES = [
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("GET",), f"/api/models/{ID}", "info"),
    (("GET",), f"/api/models/{ID}/revision/{REV}", "info"),
    (("GET",), f"/api/models/{ID}/tree/{REV}", "tree"),
    (("POST",), f"/api/models/{ID}/branch/{REV}", "branch"),
    (("POST",), f"/api/models/{ID}/preupload/{REV}", "preupload"),
    (("POST",), f"/api/models/{ID}/commit/{REV}", "commit"),
    (("POST",), f"/{ID}.git/info/lfs/objects/batch", "batch"),
    (("PUT",), "/blobs/(?P<oid>[0-9a-f]+)", "put"),
    (("GET", "HEAD"), f"/{ID}/resolve/{REV}/(?P<path>.+)", "resolve"),
]
