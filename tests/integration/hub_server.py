"""A small Hugging Face Hub on localhost, which the real `huggingface_hub` client talks to in tests.

    with running_hub(tokens={"hf_test": ["me", "org"]}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}

It holds repositories of models and Spaces in memory and answers what the client needs in order to say who it is, create
a repository, look into it, upload to it (commits, pull requests and LFS, but not Xet) and download from it. Statuses,
headers and messages are those of huggingface.co where the client or its user sees them. A Space is called
spaces/ORG/NAME here, as in its address.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".ckpt", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".zip")
LFS_SIZE = 1_000_000  # 10 MB on the real Hub, which would make slow tests
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """An answer that says no; the client picks its exception by the status and by `code`."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


def goes_to_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


@dataclass(frozen=True)
class File:
    """A file of a commit; with a `sha256` it is in the LFS store, and git holds a pointer to it."""

    content: bytes
    sha256: str = ""

    def describe(self, path: str) -> dict:
        """What the Hub's listings say of it; `oid` is the name that git gives to what it holds."""
        entry, held = {"type": "file", "path": path, "size": len(self.content)}, self.content
        if self.sha256:
            held = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(held)}\n".encode()
            entry["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": entry["size"], "pointerSize": len(held)}
        return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()}

    @property
    def etag(self) -> str:
        return self.sha256 or self.describe("")["oid"]


@dataclass
class Repository:
    """The commits in the order they were made, and the branches and pull requests that point at them."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # name -> all the files as it leaves them
    parents: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        """The name and the files of the commit that a branch, a pull request or the commit's own name means."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]

    def commit(self, ref: str, parent: str, files: dict[str, File]) -> str:
        """Make a commit that `ref` then points at; equal ones get different names, as in git by their time."""
        oid = secrets.token_hex(20)
        self.commits[oid], self.parents[oid], self.refs[ref] = files, parent, oid
        return oid


class Hub:
    """The state of the server, and the faults that a test asks for, which may change while it runs.

    The keys of the faults are looked for in "METHOD path?query": "PUT /lfs/" are the uploads to the LFS store, "GET
    /lfs/" the downloads from it (the file's path ends their address) and "/resolve/" what is asked of a file first.
    """

    def __init__(self, url: str, tokens: dict[str, list[str]]):
        self.url = url
        # Another host for the client, as the real store is: it takes a file's metadata from the redirection to it.
        self.store_url = url.replace("127.0.0.1", "localhost")
        self.tokens = tokens  # token -> the namespaces it may write to: the user's own, then organisations
        self.readonly: set[str] = set()  # tokens of the role "read"
        self.gated: set[str] = set()  # repositories whose files only members of the namespace get
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # the LFS store, by SHA-256
        self.lock = threading.Lock()  # held while a commit is made

        self.requests: list[tuple[str, str]] = []  # (method, path?query) of every request so far
        self.fail: dict[str, int] = {}  # answer with this status
        self.cut: dict[str, int] = {}  # close the connection after so many bytes of the answer's body
        self.drop: set[str] = set()  # close the connection without an answer, and before an upload is read

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit files to main without HTTP, in a new repository if there is none; the commit's name."""
        repository = self.repositories.setdefault(repo, Repository(private))
        parent = repository.refs.get("main", "")
        stored = dict(repository.commits.get(parent, {}))
        for path, content in files.items():
            stored[path] = self.store(content) if goes_to_lfs(path, len(content)) else File(content)
        return repository.commit("main", parent, stored)

    def store(self, content: bytes) -> File:
        """Put content into the LFS store."""
        oid = hashlib.sha256(content).hexdigest()
        self.objects[oid] = content
        return File(content, oid)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision, with the content of those in the LFS store."""
        return {path: file.content for path, file in self.repositories[repo].at(revision)[1].items()}

    def commits(self, repo: str, revision: str = "main") -> list[str]:
        """The names of a revision's commits, the first one first."""
        oid, _ = self.repositories[repo].at(revision)
        parent = self.repositories[repo].parents[oid]
        return [*(self.commits(repo, parent) if parent else []), oid]


REPO, REVISION, OBJECT = r"(?P<repo>(?:spaces/)?[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)", r"(?P<oid>\w{64})"
ROUTES = {  # "METHOD path" -> method of `Handler`; a HEAD goes where its GET does
    "GET /api/whoami-v2": "whoami",
    "POST /api/repos/create": "create_repo",
    "POST /api/validate-yaml": "validate_card",
    f"GET /api/models/{REPO}(/revision/{REVISION})?": "model_info",
    f"GET /api/models/{REPO}/tree/{REVISION}": "tree",
    f"POST /api/models/{REPO}/preupload/{REVISION}": "preupload",
    f"POST /api/models/{REPO}/commit/{REVISION}": "commit",
    rf"POST /{REPO}\.git/info/lfs/objects/batch": "lfs_batch",
    rf"POST /{REPO}\.git/info/lfs/objects/verify": "lfs_verify",
    f"PUT /lfs/{OBJECT}": "lfs_put",
    f"GET /lfs/{OBJECT}/.+": "lfs_get",
    f"GET /{REPO}/resolve/{REVISION}/(?P<path>.+)": "resolve",
}


class Server(ThreadingHTTPServer):
    hub: Hub


class Handler(BaseHTTPRequestHandler):
    """One connection. The methods in `ROUTES` return what to send as JSON, or send their answer themselves."""

    protocol_version = "HTTP/1.1"
    server: Server

    def serve(self) -> None:
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.query, length = dict(parse_qsl(url.query)), int(self.headers.get("Content-Length", 0))
        self.pull_request = self.query.get("create_pr") == "1"
        self.hub.requests.append((self.command, unquote(self.path)))
        if self.fault(self.hub.drop) is not None:
            self.rfile.read(min(length, 1024))
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        try:
            if (fault := self.fault(self.hub.fail)) is not None:
                # By this header the client's five retries are a second apart, not 23 seconds in all.
                raise HubError(self.hub.fail[fault], "A failure that the test asked for", **{"Retry-After": "0"})
            answer = self.answer(url.path)
            if answer is not None:
                self.send(200, answer)
        except HubError as error:
            self.send(error.status, {"error": str(error)}, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, *args) -> None:
        """Keep quiet."""

    def fault(self, faults: Iterable[str]) -> str | None:
        return next((key for key in list(faults) if key in f"{self.command} {unquote(self.path)}"), None)

    def answer(self, path: str) -> dict | list | None:
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token and self.token not in self.hub.tokens:  # refused even where no token is needed
            raise HubError(401, "Invalid credentials in Authorization header")
        self.namespaces = self.hub.tokens.get(self.token, [])
        path = path.replace("/api/spaces/", "/api/models/spaces/")
        for pattern, name in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {path}"):
                if not self.token and name in ("whoami", "create_repo"):
                    raise HubError(401, "Invalid username or password.")
                named = match.groupdict("main")  # the default branch where the address may leave out the revision
                return getattr(self, name)(**{key: unquote(value) for key, value in named.items()})
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def send(self, status: int, answer: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if (fault := self.fault(self.hub.cut)) is not None:
            body = body[: self.hub.cut[fault]]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the range of it that is asked for."""
        headers["Accept-Ranges"] = "bytes"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or int(match[1]) >= len(content):
            return self.send(200, content, headers)
        start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        self.send(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})

    def is_member(self, repo: str) -> bool:
        return repo.removeprefix("spaces/").split("/")[0] in self.namespaces

    def repository(self, repo: str, write: bool = False) -> Repository:
        """The repository, to read or to write; one that is private looks to others as if there were none."""
        repository = self.hub.repositories.get(repo)
        if repository is not None and repository.private and not self.is_member(repo):
            repository = None
        if not self.token and (repository is None or write):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and self.token in self.hub.readonly:
            raise HubError(403, "Authorization error.")
        if write and not self.pull_request and not self.is_member(repo):
            raise HubError(403, "pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def whoami(self) -> dict:
        role = "read" if self.token in self.hub.readonly else "write"
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name in self.namespaces[1:]]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return {"type": "user", "name": self.namespaces[0], "orgs": orgs, "auth": auth}

    def create_repo(self) -> dict | None:
        """Create a repository; a namespace that does not exist is refused as another's is, as on the real Hub."""
        request = json.loads(self.body)
        kind = request.get("type", "model")
        namespace = request.get("organization") or self.namespaces[0]
        repo = f"{'spaces/' if kind == 'space' else ''}{namespace}/{request['name']}"
        if kind == "space" and request.get("sdk") != "gradio":
            raise HubError(400, "A Space needs an SDK")
        if not self.is_member(repo) or self.token in self.hub.readonly:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repositories:  # by `exist_ok` the client takes the address from this answer
            self.send(409, {"error": f"You already created this {kind} repo: {repo}", **answer})
            return None
        self.hub.add(repo, {".gitattributes": GIT_ATTRIBUTES}, private=request.get("visibility") == "private")
        return answer

    def validate_card(self) -> dict:
        """Accept any README; only metadata that are missing are noticed."""
        empty = not json.loads(self.body)["content"].startswith("---")
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}] if empty else []}

    def model_info(self, repo: str, revision: str) -> dict:
        repository, siblings = self.repository(repo), []
        oid, files = repository.at(revision)
        for path, file in sorted(files.items()):
            entry = file.describe(path)
            more = {"size": entry["size"], "blobId": entry["oid"], "lfs": entry.get("lfs")}
            siblings.append({"rfilename": path, **(more if self.query.get("blobs") == "true" else {})})
        state = {"private": repository.private, "gated": "manual" if repo in self.hub.gated else False}
        return {"id": repo, "author": repo.split("/")[0], "sha": oid, "siblings": siblings, **state}

    def tree(self, repo: str, revision: str) -> list[dict]:
        """The files, and without `recursive` the folders of the top level in place of what is in them."""
        (_, files), folders = self.repository(repo).at(revision), []
        if self.query.get("recursive") != "true":
            folders = sorted({path.split("/")[0] for path in files if "/" in path})
            files = {path: file for path, file in files.items() if "/" not in path}
        entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
        return entries + [file.describe(path) for path, file in sorted(files.items())]

    def preupload(self, repo: str, revision: str) -> dict:
        """Say of each file how to upload it, and its present `oid`, by which the client leaves out what is there."""
        (_, present), files = self.repository(repo, write=True).at(revision), []
        for path, size in ((file["path"], file["size"]) for file in json.loads(self.body)["files"]):
            oid = {"oid": present[path].etag} if path in present else {}
            mode = "lfs" if goes_to_lfs(path, size) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files}

    def commit(self, repo: str, revision: str) -> dict:
        """Change the files of `revision` line by line, and commit them to it or to a new pull request."""
        repository, ref, answer = self.repository(repo, write=True), revision, {}
        with self.hub.lock:
            head, present = repository.at(revision)
            files = dict(present)
            for item in map(json.loads, self.body.splitlines()):
                value, path = item["value"], item["value"].get("path")
                if item["key"] == "header" and value.get("parentCommit", head) != head:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
                if item["key"] == "file":
                    files[path] = File(base64.b64decode(value["content"]))
                if item["key"] == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise HubError(400, "An LFS pointer pointed to a file that does not exist")
                    files[path] = File(self.hub.objects[value["oid"]], value["oid"])
                if item["key"] == "deletedFile" and files.pop(path, None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            if self.pull_request:
                number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
                ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.hub.url}/{repo}/discussions/{number}"
            elif ref not in repository.refs:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            oid = repository.commit(ref, head, files)
        return {**answer, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}

    def lfs_batch(self, repo: str) -> dict:
        """Say where to upload the objects that the store lacks; the client names no ref for a pull request."""
        request = json.loads(self.body)
        self.pull_request = "ref" not in request
        self.repository(repo, write=True)
        objects, verify = request["objects"], {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.store_url}/lfs/{item['oid']}"}, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> None:
        if self.hub.store(self.body).sha256 != oid:
            raise HubError(400, "The content does not have the SHA-256 that was announced")
        self.send(200, b"")

    def lfs_verify(self, repo: str) -> dict:
        if json.loads(self.body)["oid"] not in self.hub.objects:
            raise HubError(404, "The object was not uploaded")
        return {}

    def lfs_get(self, oid: str) -> None:
        self.send_file(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        """Send a file that git holds, or the way to the LFS store with the file's metadata."""
        repository = self.repository(repo)
        if repo in self.hub.gated and not self.is_member(repo):
            raise HubError(403 if self.token else 401, f"Access to model {repo} is restricted.", "GatedRepo")
        oid, files = repository.at(revision)
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        file = files[path]
        headers["ETag"] = f'"{file.etag}"'
        if not file.sha256:
            return self.send_file(file.content, headers)
        location = f"{self.hub.store_url}/lfs/{file.sha256}/{quote(path)}"
        linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(file.content)), "Location": location}
        self.send(302, b"", {**headers, **linked})


@contextmanager
def running_hub(tokens: dict[str, list[str]] | None = None) -> Iterator[Hub]:
    """Run a Hub on a free port for the time of the `with`; for the tokens see `Hub`."""
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}", tokens or {})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        hub.drop = {""}  # connections that a client kept open must not be served any more
