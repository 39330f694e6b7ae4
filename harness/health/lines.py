"""Messages between watchdogs: JSON objects, one a line, over sockets."""

import json
import select
import socket
from contextlib import suppress
from time import monotonic
from typing import Any

Message = dict[str, Any]
LONGEST = 2**20
"""Bytes of a message."""


class Lines:
    """One end of a connection. `read` never waits for more than what has arrived."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setblocking(True)
        self._buffer = b""
        self.is_open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Sends a message; if the other end is gone, `read` tells."""
        with suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[Message]:
        """The complete messages that have arrived, at least one byte of which is there. At the end
        of the connection `is_open` becomes False."""
        try:
            received = self._socket.recv(65536)
        except OSError:
            received = b""
        if not received:
            self.is_open = False
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        try:
            messages: list[Any] = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if len(self._buffer) > LONGEST or not all(isinstance(one, dict) for one in messages):
            self.is_open = False  # not one of ours
            return []
        return messages

    def wait(self, seconds: float) -> list[Message]:
        """As `read`, but waits for so long for something to arrive."""
        end, messages = monotonic() + seconds, []
        while self.is_open and not messages:
            if not select.select([self], [], [], max(0.0, end - monotonic()))[0]:
                break
            messages = self.read()
        return messages

    def close(self) -> None:
        """Closes this end."""
        self.is_open = False
        self._socket.close()
