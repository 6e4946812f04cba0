"""A Hugging Face hub of a few repositories on the loopback address, for tests."""

import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class SmallHub:
    """Serves ``repositories``: folders by "user/model" or "datasets/user/name".

    ``gated`` and ``private`` name repositories that it refuses. ``requests`` counts what was asked
    for, by method and path. ``cut`` counts how often only half of what is left of a file is sent.
    """

    def __init__(self, repositories: dict[str, Path]):
        self.repositories, self.requests = repositories, Counter()
        self.gated, self.cut = set(), Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                hub.answer(self, body=True, posted=self.rfile.read(length))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request, body: bool, posted: bytes = b""):
        path = unquote(urlsplit(request.path).path)
        self.requests[f"{request.command} {path}"] += 1
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path)
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            self.answer_api(request, ("datasets/" if api[1] == "datasets" else "") + api[2], api[3] or "", posted)
        elif file:
            self.answer_file(request, *file.groups(), body)
        else:
            send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def refusal(self, repository: str, revision: str = "main") -> tuple[int, str] | None:
        if repository in self.gated:
            return 403, "GatedRepo"
        if repository not in self.repositories:
            return 401, "RepoNotFound"
        return None if revision in ("main", COMMIT) else (404, "RevisionNotFound")

    def answer_file(self, request, repository: str, revision: str, name: str, body: bool):
        if refused := self.refusal(repository, revision):
            return send(request, refused[0], b"", {"X-Error-Code": refused[1]}, body)
        path = self.repositories[repository] / name
        commit = {"X-Repo-Commit": COMMIT}
        if not path.is_file():
            return send(request, 404, b"", commit | {"X-Error-Code": "EntryNotFound"}, body)
        content = path.read_bytes()
        headers = commit | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        start = int((re.match(r"bytes=(\d+)-", request.headers.get("Range", "")) or [0, 0])[1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if body and self.cut[name]:
            self.cut[name] -= 1
            request.send_response(206 if start else 200)
            for key, value in (headers | {"Content-Length": str(len(content) - start)}).items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(content[start : (start + len(content)) // 2])
            request.close_connection = True
            return None
        return send(request, 206 if start else 200, content[start:], headers, body)

    def answer_api(self, request, repository: str, rest: str, posted: bytes):
        revision = (re.match(r"/(?:revision|tree|paths-info)/([^/]+)", rest) or ["", "main"])[1]
        if refused := self.refusal(repository, revision):
            return send(request, refused[0], b"{}", {"X-Error-Code": refused[1]})
        root = self.repositories[repository]
        kind = rest.split("/")[1] if rest else ""
        if kind == "tree":
            place = re.sub(r"^/tree/[^/]+/?", "", rest)
            if place and not (root / place).is_dir():
                return send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
            recursive = "recursive=true" in urlsplit(request.path).query.lower()
            return send(request, 200, json.dumps(list_tree(root, place, recursive)).encode())
        if kind == "paths-info":
            asked = set(json.loads(posted)["paths"]) if posted[:1] == b"{" else set(parse_qs(posted.decode())["paths"])
            shown = [entry for entry in list_tree(root, "", recursive=True) if entry["path"] in asked]
            return send(request, 200, json.dumps(shown).encode())
        files = [entry["path"] for entry in list_tree(root, "", recursive=True) if entry["type"] == "file"]
        siblings = [dict(rfilename=file) for file in files]
        about = dict(id=repository.removeprefix("datasets/"), sha=COMMIT, siblings=siblings, tags=[], private=False)
        return send(request, 200, json.dumps(about | dict(gated=False, disabled=False)).encode())


def list_tree(root: Path, place: str, recursive: bool) -> list[dict]:
    """What lies in ``place`` of a repository, as the hub describes it."""
    paths = sorted((root / place).rglob("*") if recursive else (root / place).iterdir())
    entries = []
    for path in paths:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        entries.append(dict(type=kind, path=path.relative_to(root).as_posix(), size=size, oid="0" * 40))
    return entries


def send(request, status: int, content: bytes, headers: dict | None = None, body: bool = True):
    request.send_response(status)
    for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if body:
        request.wfile.write(content)


@contextmanager
def served(repositories: dict[str, Path]):
    hub = SmallHub(repositories)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
