"""A mirror of the original MNIST files on loopback, which can fail in many ways."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import threading
from collections import Counter

import pytest

SECRET = "s3cr@t/7"
BASIC = f"Basic {base64.b64encode(f'someone:{SECRET}'.encode()).decode()}"


class Mirror(http.server.SimpleHTTPRequestHandler):
    """Serves the MNIST files, or fails as its server's `fault` says, and counts."""

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked[name] += 1
        self.server.passwords.append(self.headers["Authorization"])
        fault = self.server.fault
        if fault == "hangs":
            self.server.over.wait(30)
        elif fault in ("drips", "drips a head"):
            if fault == "drips":
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
            with contextlib.suppress(OSError):
                while not self.server.over.wait(0.1):
                    self.wfile.write(b"x")
        elif fault == "no end":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 20))
        elif fault and fault.startswith("http://"):  # leads elsewhere
            self.send_response(302)
            self.send_header("Location", f"{fault}{name}")
            self.end_headers()
        elif fault == "closes":
            self.close_connection = True
        elif fault == "404" or (fault == "password" and self.headers["Authorization"] != BASIC):
            self.send_error(404)
        elif fault in ("truncated", "other content"):
            content = (self.server.folder / name).read_bytes()
            body = content[: len(content) // 2] if fault == "truncated" else b"\x00" * len(content)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(mnist_dir):
    yield from serve(mnist_dir)


def serve(mnist_dir):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Mirror, directory=str(mnist_dir)))
    server.asked, server.fault, server.over, server.folder = Counter(), None, threading.Event(), mnist_dir
    server.passwords = []
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_other_mirror(monkeypatch):
    """torchvision's own mirrors are not asked."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
