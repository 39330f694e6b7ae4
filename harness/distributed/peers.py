"""Where the other ranks run; those of this node are seen without their help, even when they end."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    namespace: str
    """Of process ids; empty if unknown."""
    pid: int
    file: int | None
    """Its descriptor of a file in memory that tells what it is doing."""

    @staticmethod
    def own(file: int | None = None) -> "Place":
        """That of this rank."""
        try:
            namespace = str(Path("/proc/self/ns/pid").readlink())
        except OSError:
            namespace = ""
        return Place(socket.gethostname(), namespace, os.getpid(), file)

    @property
    def is_near(self) -> bool:
        """Whether its process is one of this node, as seen from here."""
        own = Place.own()
        return bool(own.namespace) and (own.host, own.namespace) == (self.host, self.namespace)

    def open_process(self) -> int | None:
        """A descriptor that is readable once its process has ended; None on another node."""
        try:
            return os.pidfd_open(self.pid) if self.is_near else None
        except (OSError, AttributeError):  # not on this system
            return None

    def open_file(self) -> int | None:
        """Its file, which remains when its process has ended; None on another node."""
        if self.file is not None and self.is_near:
            with suppress(OSError):
                return os.open(f"/proc/{self.pid}/fd/{self.file}", os.O_RDWR)
        return None
