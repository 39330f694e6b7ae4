"""The page of a run that continues, on this machine only."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_LOCAL = ("localhost", "127.0.0.1")


class Server(ThreadingHTTPServer):
    """Answers / with a page, and /content.json with what it shows now."""

    daemon_threads = True

    def __init__(self, port: int, page: Callable[[], str], content: Callable[[], str]):
        """`port`: 0 chooses a free one. `page` and `content` are called one at a time. Raises
        OSError if the port is in use."""
        self.answers = {"/": (page, "text/html"), "/content.json": (content, "application/json")}
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://localhost:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        answer = self.server.answers.get(self.path)
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in _LOCAL:  # another site's name for this machine
            self.send_error(HTTPStatus.FORBIDDEN)
        elif answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            make, kind = answer
            with self.server.lock:
                body = make().encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""
