"""A Unix socket in the run directory as a front: `harness ctl` talks to it.

It has mode 0600 in a directory of mode 0700, and only the run's own user (and root) is listened to.
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
from harness.control.wire import LONGEST_LINE, SOCKET, Answer, short_path
from harness.utils import user_name

log = logging.getLogger(__name__)

MOST_CLIENTS = 100
MOST_UNREAD = 1024 * 1024
"""Bytes that a client may leave unread before it is dropped."""
SECONDS_TO_LEAVE = 2.0


class SocketFront:
    """A thread that serves many clients at once, none of which can hold up the run or the others.

    Rank 0 has one. A client that sends half a line, too long a one, or reads no answers is
    dropped; commands that it has sent stay sent.
    """

    def __init__(self, bus: Bus, run_dir: Path):
        """Raises OSError if there can be no socket."""
        self._bus = bus
        self._path = run_dir / SOCKET
        self._clients: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        listening = _listen(self._path)
        serving = asyncio.start_unix_server(self._serve, sock=listening, limit=LONGEST_LINE)
        self._server = self._loop.run_until_complete(serving)
        self._thread = threading.Thread(target=self._run, name="socket", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sends the answers that are still to be read, and takes the socket away."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        self._loop.run_forever()
        self._server.close()
        self._loop.run_until_complete(self._dismiss())
        self._loop.close()

    async def _dismiss(self) -> None:
        """Lets every client have its answers, and hangs up on those that do not take them."""
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for hang_up in (asyncio.StreamWriter.close, _abort):
            for writer in list(self._clients):
                hang_up(writer)
            if serving:
                await asyncio.wait(serving, timeout=SECONDS_TO_LEAVE)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        refused = _refusal(writer) or (len(self._clients) >= MOST_CLIENTS and "too many clients")
        if refused:
            self._send(writer, Answer(0, "", "rejected", result=refused))
            writer.close()
            return
        self._clients.add(writer)
        try:
            await self._listen_to(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # it has left; half a line is no command
        except asyncio.LimitOverrunError:
            told = f"a line of more than {LONGEST_LINE} bytes"
            self._send(writer, Answer(0, "", "rejected", result=told))
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _listen_to(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        user = user_name(_peer(writer))

        def reply(answer: Answer) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._send, writer, answer)

        while True:
            line = (await reader.readuntil(b"\n")).decode(errors="replace").strip()
            if line:
                self._bus.submit(line, "socket", user, reply)
            await asyncio.sleep(0)  # others take their turn

    def _send(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        if writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > MOST_UNREAD:
            writer.transport.abort()
            return
        writer.write(json.dumps(asdict(answer)).encode() + b"\n")


def _listen(path: Path) -> socket.socket:
    """The socket at `path`, in place of one that a dead run has left; it appears listening."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.parent.chmod(0o700)
    staged = path.with_name(f".{path.name}.tmp")
    staged.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(staged) as name:
            listening.bind(name)
        staged.chmod(0o600)
        listening.listen(MOST_CLIENTS)
        staged.replace(path)
    except OSError:
        listening.close()
        raise
    return listening


def _peer(writer: asyncio.StreamWriter) -> int:
    """The user number of the process at the other end (this one's where the system cannot tell)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.getuid()
    size = struct.calcsize("3i")
    connection = writer.get_extra_info("socket")
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[
        1
    ]


def _refusal(writer: asyncio.StreamWriter) -> str:
    """Why this client is not listened to; empty if it is."""
    if _peer(writer) in (0, os.getuid()):
        return ""
    return f"only {user_name(os.getuid())}, whose run this is, may command it"


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
