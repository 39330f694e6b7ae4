"""The network between the nodes: which interface gloo uses, and the error when a rank is lost."""

import ipaddress
import os
import socket
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import psutil
from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

from harness.errors import ConfigError, LostRank

ANYWHERE = "192.0.2.1"
"""An address that no machine has (RFC 5737): packets to it take the default route."""


def choose_interface(environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes gloo listen on an interface that the other nodes can reach; for several nodes.

    By default gloo resolves the host's own name, which is a loopback address on many machines
    (Debian's /etc/hosts), or unknown. So GLOO_SOCKET_IFNAME is set to the interface that leads to
    MASTER_ADDR, or to the default route's if that is this node. It is not changed if it is already
    set, or if there is no such interface.
    """
    master = environ.get("MASTER_ADDR", "localhost")
    if "GLOO_SOCKET_IFNAME" in environ or master == "localhost" or _is_loopback(master):
        return
    name = _interface_to(master) or _interface_to(ANYWHERE)
    if name:
        environ["GLOO_SOCKET_IFNAME"] = name


def _interface_to(host: str) -> str:
    """The interface of the route to a host; empty if there is none, or it is this machine."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing, but selects the route
            own = probe.getsockname()[0]
    except OSError:
        return ""
    if _is_loopback(own):
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if own in (address.address.partition("%")[0] for address in addresses):
            return name
    return ""


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def is_lost_rank(error: Exception) -> bool:
    """Whether it is the error of a collective, if a rank is gone or hangs."""
    is_gloo = any(words in str(error) for words in ("gloo/", "pair closure"))
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and is_gloo)


@contextmanager
def raise_lost_rank(timeout_s: float) -> Iterator[None]:
    """Turns the error of a collective, if a rank is gone or hangs, into a LostRank.

    `timeout_s`: of every collective, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        reason = str(error).rpartition("/gloo/")[2].partition("] ")[2] or str(error)
        reason = reason.partition(" This is typically")[0].rstrip(".")
        raise LostRank(
            f"{socket.gethostname()} has lost another rank: {reason}. Its process has ended, its "
            f"node or the network is down, or it has hung for run.timeout_s = {timeout_s:g} s: see "
            "its own output. Start the run again, on these or the remaining nodes: it resumes from "
            "its newest checkpoint"
        ) from error


@contextmanager
def raise_port_in_use() -> Iterator[None]:
    """Turns rank 0's error, if another program listens on the port for the ranks, into a
    ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} of {socket.gethostname()} is in use, perhaps by "
            "another run: start with another port, of the launcher's --master_port (`deepspeed`, "
            "`torchrun`) or in MASTER_PORT"
        ) from error


@contextmanager
def bounded(seconds: float, doing: str) -> Iterator[None]:
    """Ends this process with exit code 1 if the body takes longer.

    For calls that ignore timeouts: gloo waits for a connection five times as long as its own.
    """

    def give_up() -> None:
        os.write(2, f"error: {doing}: not done within {seconds:g} s\n".encode())
        os._exit(LostRank.code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
