"""As much of a W&B server as wandb's own client needs for a run: it takes what is sent, and can stall or disappear."""

from __future__ import annotations

import base64
import gzip
import http.server
import json
import threading
from typing import Any


class WandbServer(http.server.ThreadingHTTPServer):
    """On a port of its own, from `with` on. `ends` is how it fails, once the run has begun: "", "stalls" or "dies"."""

    daemon_threads = True

    def __init__(self, ends: str = "", *, knows_key: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ends, self.knows_key = ends, knows_key
        self.failed, self.over = threading.Event(), threading.Event()
        self.history: list[dict[str, Any]] = []
        self.files: set[str] = set()
        self.requests = 0
        self.keys: set[str] = set()  # what clients have sent as their key
        self.runs: list[dict[str, Any]] = []  # what they have said of their runs
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that closes its connection is no error."""

    def fail(self) -> None:
        """From now on stall, or refuse connections."""
        self.failed.set()
        if self.ends == "dies":
            self.socket.close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What the server says to a request."""
        if path.endswith("/file_stream"):
            if self.ends:
                self.fail()
            sent = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += map(json.loads, sent)
        elif path == "/graphql":
            return {"data": self._data(**{"operationName": "", "variables": {}, **json.loads(body)})}
        else:
            self.files.add(path.rsplit("/", 1)[-1])
        return {}

    def _data(self, operationName: str, variables: dict[str, Any], query: str) -> dict[str, Any]:
        entity = {"id": "e", "name": "somebody"}
        if operationName == "UpsertBucket":
            self.runs.append(variables)
            bucket = {"id": "b", "name": variables["name"], "displayName": variables["name"], "config": "{}",
                      "historyLineCount": 0, "project": {"id": "p", "name": "mnist_dist", "entity": entity}}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operationName == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/files/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "query ArtifactType(" in query:
            return {"project": {"artifact": None}}  # none yet
        if operationName == "CreateArtifact":  # COMMITTED: the server has its files
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": {
                "id": "s", "latestArtifact": None}}}}
        viewer = {**entity, "entity": "somebody", "username": "somebody"}
        return {"viewer": viewer if self.knows_key else None} if "viewer" in query else {}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        self.server.requests += 1
        if authorization := self.headers.get("Authorization", ""):
            self.server.keys.add(base64.b64decode(authorization.removeprefix("Basic ")).decode())
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = {} if self.server.failed.is_set() else self.server.answer(self.path, body)
        if self.server.failed.is_set():
            if self.server.ends == "stalls":
                self.server.over.wait(120)
            self.close_connection = True
            return
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Nothing."""
