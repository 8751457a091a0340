"""A registry of container images, as far as fetching needs one: OCI's distribution API over a folder."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

from .containers import Podman


class Registry:
    """Serves one image under one name, to one user.

    Attributes:
        asked: Paths and what they were asked with.
        reached: Set when somebody fetches a layer or the configuration.
        open: While it is not set, nobody gets those.

    Args:
        layout: A folder in OCI's image layout.
        name: Of the image's repository.
        user: Who may fetch it.
        password: His password.
    """

    def __init__(self, layout: Path, name: str, user: str, password: str) -> None:
        self.layout = layout
        self.name = name
        self.authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self.asked: list[tuple[str, str]] = []
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.server.server_address[1]}"

    def blob(self, digest: str) -> bytes:
        """Content by its digest."""
        return (self.layout / "blobs" / digest.replace(":", "/")).read_bytes()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body for somebody who is known."""
        manifest = json.loads((self.layout / "index.json").read_text())["manifests"][0]
        digest = path.rpartition("/")[2]
        if path == "/v2/":
            return 200, "application/json", b"{}"
        if path.startswith(f"/v2/{self.name}/manifests/"):
            return 200, manifest["mediaType"], self.blob(manifest["digest"])
        if path.startswith(f"/v2/{self.name}/blobs/"):
            return 200, "application/octet-stream", self.blob(digest)
        return 404, "application/json", b'{"errors":[{"code":"NAME_UNKNOWN","message":"no such image"}]}'

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

            def do_GET(self) -> None:
                given = self.headers.get("Authorization", "")
                registry.asked.append((self.path, given))
                if "/blobs/" in self.path:
                    registry.reached.set()
                    registry.open.wait()
                if given == registry.authorization:
                    status, kind, body = registry.answer(self.path)
                else:
                    status, kind, body = 401, "application/json", b'{"errors":[{"code":"UNAUTHORIZED"}]}'
                self.send_response(status)
                self.send_header("WWW-Authenticate", 'Basic realm="registry"')
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Docker-Content-Digest", f"sha256:{hashlib.sha256(body).hexdigest()}")
                self.end_headers()
                if self.command == "GET":
                    # Whoever was told to give up has hung up.
                    with contextlib.suppress(OSError):
                        self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 - the name is the standard library's

        return Handler


@contextlib.contextmanager
def serving(registry: Registry) -> Iterator[Registry]:
    """The registry while it answers."""
    thread = threading.Thread(target=registry.server.serve_forever)
    thread.start()
    try:
        yield registry
    finally:
        registry.open.set()
        registry.server.shutdown()
        registry.server.server_close()
        thread.join()


@contextlib.contextmanager
def private_registry(podman: Podman, image: str, name: str, folder: Path) -> Iterator[Registry]:
    """A registry with one image, for the user `me` with the password `secret-word`; Podman starts anew.

    Args:
        podman: Whose image it is, and who is told to trust the registry.
        image: The image.
        name: Its repository there.
        folder: Of the test.
    """
    podman.run("push", image, f"oci:{folder}/layout:latest")
    registry = Registry(folder / "layout", name, "me", "secret-word")
    podman.registries.write_text(f'[[registry]]\nlocation = "{registry.address}"\ninsecure = true\n')
    podman.stop()
    podman.start()
    try:
        with serving(registry):
            yield registry
    finally:
        podman.run("rmi", "--ignore", "--force", f"{registry.address}/{name}:1")
        podman.registries.write_text("")
