"""A Unix socket in the run directory as a front: `harness ctl` connects to it.

It has mode 0600 in a directory of mode 0700, and accepts only the user of the run and root.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
import threading
from dataclasses import asdict
from pathlib import Path

from harness.control.bus import Bus
from harness.control.wire import MAX_LINE, SOCKET, Answer, short_path, user_name
from harness.distributed.forks import close_in_forks

log = logging.getLogger(__name__)

MAX_CLIENTS = 100
MAX_UNREAD = 1024 * 1024
"""Bytes that a client may leave unread before it is disconnected."""
SECONDS_TO_DISCONNECT = 2.0


class SocketFront:
    """A thread on rank 0 that serves many clients, none of which can block the run or the others.

    A client that sends an incomplete or overlong line, or does not read its answers, is
    disconnected; the commands that it has sent are still executed.
    """

    def __init__(self, bus: Bus, run_dir: Path):
        """Raises OSError if the socket cannot be created."""
        self._bus = bus
        self._path = run_dir / SOCKET
        self._clients: set[asyncio.StreamWriter] = set()
        listening = _listen(self._path)
        self._loop = asyncio.new_event_loop()
        # All of it in the thread: the caller's may be in an event loop, as in a notebook.
        self._thread = threading.Thread(
            target=self._run, args=(listening,), name="socket", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Sends the remaining answers, disconnects all clients, and removes the socket."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self, listening: socket.socket) -> None:
        server = asyncio.start_unix_server(self._serve, sock=listening, limit=MAX_LINE)
        starting = self._loop.create_task(server)  # `close` may come before it is done
        self._loop.run_forever()
        self._loop.run_until_complete(starting).close()
        self._loop.run_until_complete(self._disconnect_all())
        self._loop.close()

    async def _disconnect_all(self) -> None:
        """Lets every client read its answers, then drops the others."""
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for disconnect in (asyncio.StreamWriter.close, _abort):
            for writer in list(self._clients):
                disconnect(writer)
            if serving:
                await asyncio.wait(serving, timeout=SECONDS_TO_DISCONNECT)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        refusal = _refusal(writer) or (len(self._clients) >= MAX_CLIENTS and "too many clients")
        if refusal:
            self._send(writer, Answer(0, "", "rejected", result=refusal))
            writer.close()
            return
        self._clients.add(writer)
        close_in_forks(writer.get_extra_info("socket").fileno())
        try:
            await self._serve_lines(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # it has disconnected; an incomplete line is not a command
        except asyncio.LimitOverrunError:
            reason = f"line longer than {MAX_LINE} bytes"
            self._send(writer, Answer(0, "", "rejected", result=reason))
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _serve_lines(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        user = user_name(_peer(writer))

        def reply(answer: Answer) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it all clients
                self._loop.call_soon_threadsafe(self._send, writer, answer)

        while True:
            line = (await reader.readuntil(b"\n")).decode(errors="replace").strip()
            if line:
                self._bus.submit(line, "socket", user, reply)
            await asyncio.sleep(0)  # lets other clients run

    def _send(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        if writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > MAX_UNREAD:
            writer.transport.abort()
            return
        writer.write(json.dumps(asdict(answer)).encode() + b"\n")


def _listen(path: Path) -> socket.socket:
    """The socket at `path`, replacing a dead run's; it appears when it can accept connections."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.parent.chmod(0o700)
    staged = path.with_name(f".{path.name}.tmp")
    staged.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(staged) as name:
            listening.bind(name)
        staged.chmod(0o600)
        listening.listen(MAX_CLIENTS)
        staged.replace(path)
    except OSError:
        listening.close()
        raise
    close_in_forks(listening.fileno())
    return listening


def _peer(writer: asyncio.StreamWriter) -> int:
    """The user ID of the client's process (this process's, where the system does not report it)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.getuid()
    size = struct.calcsize("3i")
    connection = writer.get_extra_info("socket")
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[
        1
    ]


def _refusal(writer: asyncio.StreamWriter) -> str:
    """Why a client is not served; empty if it is."""
    if _peer(writer) in (0, os.getuid()):
        return ""
    return f"only {user_name(os.getuid())}, the owner of this run, may send commands"


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
