"""Files of checkpoints from one node to another, over TCP.

A connection per file. The sender names it; the receiver knows from its own manifest, of the same
save, what it must be. A file appears under its name once its digest and every CRC are checked, and
it is synced.
"""

import hmac
import json
import logging
import os
import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO

from harness.checkpoint.files import FileEntry, Stopped, verify_file
from harness.checkpoint.manifest import Manifest, read_manifest
from harness.distributed.forks import close_in_forks
from harness.errors import CheckpointError
from harness.files import sync_directory

log = logging.getLogger(__name__)

Address = tuple[str, int]

CHUNK = 1 << 20
LONGEST_LINE = 100_000
SECONDS_OF_SILENCE = 60.0
"""After which a connection counts as lost."""
SLOWEST_DISK = 20e6
"""Bytes per s: how long an answer may take, for which the receiver reads and syncs the file."""
SEND, HAVE = "send", "have"
"""What a receiver answers to a request, if nothing is wrong."""


class Receiver:
    """Takes files that belong to the checkpoints below a directory, in threads, until `close`."""

    def __init__(self, parent: Path, host: str, token: str):
        """`host`: an address of this node. `token`: a secret that senders know. Raises OSError."""
        self._parent = parent
        self._token = token
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        """By file: a sender may begin again while its lost connection still looks alive."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        close_in_forks(self._server.fileno())
        self.address: Address = self._server.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="receive", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes no more files."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._server.close()
        self._thread.join(SECONDS_OF_SILENCE)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            name = "receive-file"
            threading.Thread(target=self._serve, args=(connection,), name=name, daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream, suppress(OSError):  # a lost sender
            connection.settimeout(SECONDS_OF_SILENCE)
            close_in_forks(connection.fileno())
            token = stream.readline(LONGEST_LINE).strip()
            if not hmac.compare_digest(token, self._token.encode()):
                return
            try:
                request = json.loads(stream.readline(LONGEST_LINE))
                self._take(stream, connection, **request)
                answer = HAVE
            except (OSError, CheckpointError, ValueError) as error:
                answer = f"{socket.gethostname()}: {error}"
            _tell(connection, answer)

    def _take(
        self,
        stream: BufferedReader,
        connection: socket.socket,
        name: str,
        saved_at: float,
        file: str,
    ) -> None:
        """Receives a file. Raises CheckpointError, OSError."""
        directory = self._parent / name
        manifest = read_manifest(directory)
        if manifest.saved_at != saved_at or file not in manifest.files:
            raise CheckpointError(f"{directory}: {file} is not of the same save")
        with self._locks[directory / file]:
            receive(stream, manifest, directory, file, lambda: _tell(connection, SEND))


def receive(
    stream: BufferedReader,
    manifest: Manifest,
    directory: Path,
    file: str,
    begin: Callable[[], None],
) -> None:
    """Reads a file of a checkpoint from a stream, unless it is there. `begin`: called before the
    first byte is read. Raises CheckpointError if it is not the file that was saved; OSError."""
    path, entry = directory / file, manifest.files[file]
    if path.is_file():
        with suppress(CheckpointError):  # a damaged one is replaced
            verify_file(path, entry)
            return
    staged = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(exist_ok=True)
    buffer, left = memoryview(bytearray(min(CHUNK, entry.size))), entry.size
    try:
        with staged.open("wb") as target:
            begin()
            while left:
                count = stream.readinto(buffer[: min(CHUNK, left)])
                if not count:
                    raise CheckpointError(f"{path}: the sender has ended {left} bytes too early")
                target.write(buffer[:count])
                left -= count
            target.flush()
            os.fsync(target.fileno())
        verify_file(staged, entry)
        staged.replace(path)
        sync_directory(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def send(
    source: Path,
    file: str,
    manifest: Manifest,
    to: Address,
    token: str,
    should_stop: Callable[[], bool],
) -> None:
    """Sends a file of the checkpoint `source` to a receiver, which verifies it.

    Raises OSError if it cannot be read, CheckpointError if it cannot be sent, Stopped.
    """
    with (source / file).open("rb") as opened:
        try:
            with socket.create_connection(to, SECONDS_OF_SILENCE) as connection:
                close_in_forks(connection.fileno())
                connection.settimeout(SECONDS_OF_SILENCE + manifest.files[file].size / SLOWEST_DISK)
                request = {"name": source.name, "saved_at": manifest.saved_at, "file": file}
                _tell(connection, f"{token}\n{json.dumps(request)}")
                with connection.makefile("rb") as stream:
                    answer = _line(stream)
                    if answer == SEND:
                        _send_all(opened, connection, should_stop)
                        connection.shutdown(socket.SHUT_WR)
                        answer = _line(stream)
        except OSError as error:
            raise CheckpointError(f"cannot send {source / file} to {_text(to)}: {error}") from None
    if answer != HAVE:
        _check_source(source / file, manifest.files[file])
        why = answer or "the connection has ended"
        raise CheckpointError(f"cannot send {source / file} to {_text(to)}: {why}")


def _check_source(path: Path, entry: FileEntry) -> None:
    """Raises OSError if the file itself is damaged: to send it again is no help."""
    try:
        verify_file(path, entry)
    except CheckpointError as error:
        raise OSError(str(error)) from None


def _send_all(
    opened: IO[bytes], connection: socket.socket, should_stop: Callable[[], bool]
) -> None:
    while chunk := opened.read(CHUNK):
        if should_stop():
            raise Stopped
        connection.sendall(chunk)


def _tell(connection: socket.socket, text: str) -> None:
    connection.sendall(f"{text}\n".encode())


def _line(stream: IO[bytes]) -> str:
    return stream.readline(LONGEST_LINE).decode(errors="replace").strip()


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
