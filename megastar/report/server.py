"""An HTTP server for one page and the event stream that announces its new versions. It serves no files.

Requests need a Host header that names this server: a page of another site, whose name was rebound to this address,
cannot read it. The numbers of connections and of event streams are bounded, and so are sizes and times of requests.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from megastar.errors import UserError
from megastar.report.live import LiveReport

MOST_CONNECTIONS, MOST_STREAMS = 64, 16
REQUEST_TIMEOUT = 10.0  # seconds for a request, and for a client to take an answer
BEAT = 15.0  # seconds between comments in a stream, which find clients that are gone
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
logger = logging.getLogger(__name__)


class ReportServer(ThreadingHTTPServer):
    """Listens on ``host``:``port`` (0: a free one). Raises ``UserError`` where that is not possible."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, report: LiveReport, host: str, port: int):
        self.report = report
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        self.connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
                0
            ]
        except (OSError, UnicodeError) as error:
            raise UserError(f"--host {host} is not an address of this machine: name one, or leave it out") from error
        self.address_family = family
        try:
            super().__init__(address[:2], ReportHandler)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"--port {port} is in use: name another one, or 0 for any free port") from error
            if error.errno == errno.EACCES:
                raise UserError(f"--port {port} may not be opened by this user: name one above 1023") from error
            raise UserError(f"--host {host} is not an address of this machine: name one, or leave it out") from error
        self.names = {name.lower() for name in (host, "localhost", socket.gethostname(), socket.getfqdn()) if name}

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def is_own(self, host_header: str | None) -> bool:
        """Whether a Host header names this server: its own names, or any address, which cannot be rebound."""
        try:
            parts = urlsplit(f"//{host_header}")
            name, port = parts.hostname, parts.port or 80
        except ValueError:
            return False
        if not host_header or not name or parts.username is not None or parts.path or parts.query or parts.fragment:
            return False
        if port != self.server_address[1]:  # a tunnel to another port keeps the name localhost
            return name == "localhost" or _is_loopback(name)
        return name in self.names or _is_address(name)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request failed", exc_info=True)  # the client went away


class ReportHandler(BaseHTTPRequestHandler):
    """``GET /``: the page. ``GET /events``: its versions, as server-sent events."""

    server: ReportServer
    server_version, sys_version = "megastar", ""
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_TIMEOUT

    def handle_one_request(self) -> None:
        """As the base class; a client that sends its request too slowly is cut off."""
        self.slow = threading.Timer(REQUEST_TIMEOUT, self._cut_off)
        self.slow.daemon = True
        self.slow.start()
        try:
            super().handle_one_request()
        finally:
            self.slow.cancel()

    def _cut_off(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        self.slow.cancel()
        self.close_connection = True  # an idle connection would count against the limit
        if not self.server.is_own(self.headers.get("Host")):
            self.answer(HTTPStatus.MISDIRECTED_REQUEST, b"this server has another name\n")
        elif self.path == "/":
            self.answer(HTTPStatus.OK, self.server.report.current().html, "text/html; charset=utf-8")
        elif self.path == "/events" and self.command == "GET":
            self.stream()
        else:
            self.answer(HTTPStatus.NOT_FOUND, b"there is no such page\n")

    do_HEAD = do_GET

    def answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.start(status, kind, {"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def start(self, status: HTTPStatus, kind: str, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Connection": "close", **HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def stream(self) -> None:
        """An event for each version of the page, until the client goes away."""
        server, report = self.server, self.server.report
        if not server.streams.acquire(blocking=False):
            self.answer(HTTPStatus.SERVICE_UNAVAILABLE, b"too many pages are open: close some\n")
            return
        with report.changed:
            report.watchers += 1
        try:
            self.start(HTTPStatus.OK, "text/event-stream", {})
            self.wfile.write(b"retry: 2000\n\n")
            shown = ""
            while not report.closed:
                page = report.wait(shown, BEAT)
                if report.closed:
                    break
                if page.version == shown:
                    self.wfile.write(b": still here\n\n")
                else:
                    kind, text = ("problem", page.problem) if page.problem else ("page", page.version)
                    self.wfile.write(f"event: {kind}\ndata: {text}\n\n".encode(errors="backslashreplace"))
                    shown = page.version
                self.wfile.flush()
        finally:
            with report.changed:
                report.watchers -= 1
            server.streams.release()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s " + format, self.client_address[0], *args)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback
