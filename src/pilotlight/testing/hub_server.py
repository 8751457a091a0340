"""A hub of one's own on loopback: the routes that the Hugging Face client library uses to read models.

Used by tests with the real client library, in this process or others: `with HubServer() as hub`, then
`HF_ENDPOINT=hub.url`. It serves repositories from memory, with branches and tags, large files by their
sha256, ranges, gated and private repositories with the error codes of the real hub. It misbehaves on request:
it cuts a connection in the middle of a file, holds a file back until it is let go, says or sends something
else than it has, leads to a storage elsewhere by signed addresses, or answers everything with one status.

    hub = HubServer()
    repository = hub.add("org/model", {"config.json": b"{}", "model.safetensors": weights})
    repository.gated = True                 # 401 without a token, 403 with one that `granted` does not hold
    hub.cut["model.safetensors"] = [1000]   # the next answer with this file ends after 1000 bytes
    hold = hub.hold("model.safetensors")    # half of the file, then nothing until `hold.release.set()`
    hub.sent["config.json"] = b"[]"         # sent in the place of what the listing says
    hub.storage = other.url                 # large files are led there, with a signature
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

from aiohttp import web

LARGE_BYTES = 4096
"""Files from this size on are stored by their sha256, as the real hub does with large ones."""


SIGNATURE = "X-Amz-Signature=0123456789abcdef"
"""What an address in the storage carries; whoever has it may read the file."""


@dataclass(slots=True)
class HubRepository:
    """One repository.

    Attributes:
        name: Its id.
        commits: Content of the files by path, by commit.
        refs: Commit by branch or tag.
        gated: Whether its terms have to be accepted.
        private: Whether only `granted` tokens may know of it.
        granted: Tokens that may read it.
    """

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    granted: set[str] = field(default_factory=set)

    def commit(self, files: Mapping[str, bytes], *refs: str) -> str:
        """Store a revision and let branches or tags lead to it; gives its commit."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path in sorted(files):
            digest.update(path.encode() + b"\0" + files[path])
        number = digest.hexdigest()
        self.commits[number] = dict(files)
        self.refs |= dict.fromkeys(refs, number)
        return number


@dataclass(frozen=True, slots=True)
class HubRequest:
    """One request as it came.

    Attributes:
        method: GET or HEAD.
        path: Without the query.
        token: The bearer token; "" without one.
        first: First byte that was asked for.
    """

    method: str
    path: str
    token: str
    first: int


@dataclass(slots=True)
class Hold:
    """A file that is held back: half of it is sent, the rest when `release` is set or bit by bit.

    Attributes:
        reached: Set when somebody has got the first half.
        release: Set it to let the rest go.
    """

    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    _given: SimpleQueue[int] = field(default_factory=SimpleQueue)
    _rest: int = 0

    def give(self, count: int) -> None:
        """Let so many bytes go."""
        self._given.put(count)

    def is_all_given(self) -> bool:
        """Whether nothing is held back any more."""
        return self.reached.is_set() and self._rest == 0

    def reach(self, rest: int) -> None:
        """Hold back so many bytes."""
        self._rest = rest
        self.reached.set()

    def next(self) -> int:
        """How many more bytes may go; blocks until there are some."""
        allowed = 0
        while not allowed:
            try:
                allowed = min(self._rest, self._given.get(timeout=0.05))
            except Empty:
                allowed = self._rest if self.release.is_set() else 0
        self._rest -= allowed
        return allowed


class HubServer:
    """The hub, on a thread of its own while the `with` block runs.

    Attributes:
        repositories: By id.
        known_tokens: Tokens of accounts that exist; None takes every token for one.
        requests: All requests, in the order they came.
        cut: By path within a repository: after how many bytes its next answers end, one each.
        status: When not 200, the answer to everything.
        listed: Changes what is said of a revision before it is sent: `{"sha": …, "siblings": […]}`.
        sent: By path within a repository: what is sent in the place of its content.
        storage: URL of another such server to which requests for large files are led.
        xet: Whether large files are said to lie in Xet storage too; nothing gives them out that way.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.known_tokens: set[str] | None = None
        self.requests: list[HubRequest] = []
        self.cut: dict[str, list[int]] = {}
        self.status = 200
        self.listed: Callable[[dict[str, Any]], object] = lambda _about: None
        self.sent: dict[str, bytes] = {}
        self.storage = ""
        self.xet = False
        self._holds: dict[str, Hold] = {}
        self._all_holds: list[Hold] = []
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="hub server")

    @property
    def url(self) -> str:
        """For `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._port}"

    def add(self, name: str, files: Mapping[str, bytes]) -> HubRepository:
        """A repository whose main branch has these files."""
        repository = self.repositories[name] = HubRepository(name)
        repository.commit(files, "main")
        return repository

    def hold(self, path: str) -> Hold:
        """Hold back the next answer with this file of any repository."""
        self._holds[path] = Hold()
        self._all_holds.append(self._holds[path])
        return self._holds[path]

    def downloads(self, path: str) -> list[HubRequest]:
        """Requests for the content of a file."""
        return [one for one in self.requests if one.method == "GET" and one.path.endswith(f"/{path}")]

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hold in self._all_holds:
            hold.release.set()
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        self._ready.set()
        await self._over.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = unquote(request.path)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        first = _first_byte(request)
        self.requests.append(HubRequest(request.method, path, token, first))
        if self.status != 200:
            return web.json_response({}, status=self.status)
        if token and self.known_tokens is not None and token not in self.known_tokens:
            return _error(401, "", "Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        about = parts[:2] == ["api", "models"]
        repository, rest = self._repository(parts[2:] if about else parts)
        if repository is None or (repository.private and token not in repository.granted):
            return _error(404 if token else 401, "RepoNotFound", "Repository not found")
        if repository.gated and token not in repository.granted and not about:
            # What the real hub does: descriptions and lists are open, files are not.
            return _error(
                403 if token else 401, "GatedRepo", f"Access to model {repository.name} is restricted"
            )
        verb, revision, file = (rest[0] if rest else ""), "main", ""
        if len(rest) > 1:
            revision, file = rest[1], "/".join(rest[2:])
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if about:
            return self._describe(repository, commit, verb)
        content = repository.commits[commit].get(file)
        if verb != "resolve" or content is None:
            return _error(404, "EntryNotFound", "Entry not found")
        return await self._send(request, commit, file, content, first)

    def _repository(self, parts: list[str]) -> tuple[HubRepository | None, list[str]]:
        for length in (2, 1):
            found = self.repositories.get("/".join(parts[:length]))
            if found is not None:
                return found, parts[length:]
        return None, []

    def _describe(self, repository: HubRepository, commit: str, verb: str) -> web.Response:
        files = repository.commits[commit]
        if verb == "tree":
            return web.json_response([_tree_entry(path, content) for path, content in files.items()])
        siblings = [_sibling(path, content) for path, content in files.items()]
        about = {"id": repository.name, "sha": commit, "siblings": siblings}
        self.listed(about)
        return web.json_response(about)

    async def _send(
        self, request: web.Request, commit: str, file: str, content: bytes, first: int
    ) -> web.StreamResponse:
        content = self.sent.get(file, content)
        if self.storage and len(content) >= LARGE_BYTES:
            raise web.HTTPFound(f"{self.storage}{request.path}?{SIGNATURE}")
        digest = hashlib.sha256(content).hexdigest() if len(content) >= LARGE_BYTES else _git_hash(content)
        headers = {
            "ETag": f'"{digest}"',
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{digest}"',
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content) - first),
        }
        if self.xet and len(content) >= LARGE_BYTES:
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.url}/no-token"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        response = web.StreamResponse(status=206 if first else 200, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        # Whoever asked may be gone by now.
        with contextlib.suppress(ConnectionError):
            await self._write(request, response, file, content[first:])
        return response

    async def _write(
        self, request: web.Request, response: web.StreamResponse, file: str, body: bytes
    ) -> None:
        if cuts := self.cut.get(file):
            await response.write(body[: cuts.pop(0)])
            if request.transport is not None:
                request.transport.close()
            return
        hold = self._holds.pop(file, None)
        if hold is not None:
            half = len(body) // 2
            await response.write(body[:half])
            body = body[half:]
            hold.reach(len(body))
            while body:
                allowed = await asyncio.to_thread(hold.next)
                await response.write(body[:allowed])
                body = body[allowed:]
            return
        await response.write(body)


def _first_byte(request: web.Request) -> int:
    wanted = request.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
    return int(wanted or 0)


def _error(status: int, code: str, message: str) -> web.Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return web.Response(
        status=status, headers=headers, text=json.dumps({"error": message}), content_type="application/json"
    )


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": _git_hash(content)}
    if len(content) >= LARGE_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return entry


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if len(content) >= LARGE_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry
