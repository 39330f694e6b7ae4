"""The network between the nodes: which interface gloo uses, and what its errors mean."""

import ipaddress
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import psutil
from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

from harness.errors import ConfigError, LostRank

ANYWHERE = "192.0.2.1"
"""An address that no machine has (RFC 5737): packets to it take the default route."""

FAMILIES = (socket.AF_INET, socket.AF_INET6)
"""Of addresses, the preferred one first."""


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


def own_address(environ: Mapping[str, str] = os.environ) -> str:
    """An address of this node that the other nodes can reach: of the interface that gloo listens
    on; without one, all ranks are on this machine or its name is known to the others."""
    names = environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    found = [a for a in psutil.net_if_addrs().get(names[0], ()) if a.family in FAMILIES]
    if found:
        return min(found, key=lambda address: FAMILIES.index(address.family)).address
    master = environ.get("MASTER_ADDR", "localhost")
    if master == "localhost" or _is_loopback(master):
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname())


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


SECONDS_TO_A_WORD = 60.0

_GLOO = re.compile(
    r"""\[[^\s\]]*gloo/\S+\.(cc|h):\d+\]\ .  # where in gloo it was raised
    |\[enforce\ fail\ at\ \S*gloo/          # a check of gloo's: sizes differ between ranks
    |Application\ timeout\ caused\ pair\ closure""",
    re.VERBOSE,
)
"""How the messages of gloo begin."""


def is_lost_rank(error: BaseException) -> bool:
    """Whether it is the error of a collective, if a rank is gone or hangs; or a LostRank."""
    if local_cause(error) is not None:
        return False
    is_of_gloo = type(error) is RuntimeError and _GLOO.match(str(error))
    return bool(is_of_gloo) or isinstance(error, DistError | LostRank)


def local_cause(error: BaseException) -> ConfigError | None:
    """What is wrong on this machine, if that is why the ranks cannot connect; else None."""
    text = str(error)
    if not (isinstance(error, DistError) or _GLOO.match(text)):
        return None
    here = f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"
    if "EADDRINUSE" in text or "Address already in use" in text:
        return ConfigError(
            f"port {os.environ['MASTER_PORT']} of {socket.gethostname()} is in use, perhaps by "
            "another run: start with another port, of the launcher's --master_port (`deepspeed`, "
            "`torchrun`) or in MASTER_PORT"
        )
    if "too many open files" in text.lower() or "Failed to init uv loop" in text:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return ConfigError(
            f"{here} cannot connect to the other ranks: too many open files, of which the limit is "
            f"{limit}: raise it before the start, with `ulimit -n 65536` for instance"
        )
    return None


@contextmanager
def bounded(seconds: float, doing: str) -> Iterator[None]:
    """Ends this process, as one that has lost a rank, if the body takes longer; says before, from
    `SECONDS_TO_A_WORD` on, that it waits.

    For calls that ignore timeouts: gloo waits for a connection five times as long as its own.
    """
    is_done = threading.Event()

    def watch() -> None:
        begin, wait = time.monotonic(), min(SECONDS_TO_A_WORD, seconds)
        while not is_done.wait(wait):
            passed = time.monotonic() - begin
            if passed >= seconds:
                os.write(2, f"error: {doing}: not done within {seconds:g} s\n".encode())
                os._exit(LostRank.code)
            text = f"{doing}: not done for {passed:.0f} s: a rank has not started, has ended, or "
            text += f"cannot connect; this one waits for {seconds:g} s\n"
            os.write(2, text.encode())
            wait = min(passed, seconds - passed)  # each word after twice as long

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
