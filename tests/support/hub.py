"""As much of the Hugging Face Hub as an upload of small files needs, on a free port; it keeps what was pushed."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Start with ``with``; ``pushed`` has the files of every repository by path."""

    def __init__(self) -> None:
        self.pushed: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, None)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                hub._answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes | None) -> None:
        status, reply = self._reply(request.path.partition("?")[0], request.path, body)
        content = json.dumps(reply).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _reply(self, path: str, full: str, body: bytes | None) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "auth": {"type": "access_token"}}
        if path == "/api/validate-yaml":  # of model cards
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body or b"{}")
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.pushed.setdefault(name, {})
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if found := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            files = json.loads(body or b"{}")["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return 200, {"files": modes}
        if found := re.fullmatch(r"/api/models/(.+)/commit/([^/]+)", path):
            self._commit(found[1], found[2], full, body or b"")
            link = f"{self.url}/{_whole(found[1])}"
            pull = {"pullRequestUrl": f"{link}/discussions/1"} if "create_pr=1" in full else {}
            return 200, {"success": True, "commitUrl": f"{link}/commit/{'0' * 40}", "commitOid": "0" * 40, **pull}
        if re.fullmatch(r"/api/models/(.+)/revision/[^/]+", path):
            return 200, {"id": "me/it", "sha": "0" * 40, "siblings": []}
        return 404, {"error": "Not found"}

    def _commit(self, repo: str, revision: str, full: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        name = _whole(repo)
        header = lines[0]["value"]
        self.commits.append({"repo": name, "revision": revision, "pull_request": "create_pr=1" in full, **header})
        for line in lines[1:]:
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.pushed.setdefault(name, {})[line["value"]["path"]] = content


def _whole(repo: str) -> str:
    """A repository's name with its owner; without one it is the caller's."""
    return repo if "/" in repo else f"me/{repo}"
