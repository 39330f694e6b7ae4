"""The network between the nodes of a run. Imports no torch."""

import ipaddress
import os
import socket
from collections.abc import MutableMapping

import psutil

ANYWHERE = "192.0.2.1"
"""An address that no machine has (RFC 5737): the way there is the default route."""


def choose_interface(environ: MutableMapping[str, str] = os.environ) -> None:
    """Has gloo listen where the other nodes come in; for a world of several nodes.

    Gloo by itself asks for the address of the host's own name, which is a loopback's on many
    machines (Debian's /etc/hosts), or nobody's. So GLOO_SOCKET_IFNAME becomes the interface that
    leads to MASTER_ADDR, or the default route's where that is a name for the node itself. It is
    left alone if it is set, or if there is no such interface.
    """
    master = environ.get("MASTER_ADDR", "localhost")
    if "GLOO_SOCKET_IFNAME" in environ or master == "localhost" or _is_loopback(master):
        return
    name = _interface_to(master) or _interface_to(ANYWHERE)
    if name:
        environ["GLOO_SOCKET_IFNAME"] = name


def _interface_to(host: str) -> str:
    """The interface that packets to a host leave by; empty if none, or if it is this machine."""
    try:
        family, kind, *_, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing: it asks for the route
            here = probe.getsockname()[0]
    except OSError:
        return ""
    if _is_loopback(here):
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if here in (address.address.partition("%")[0] for address in addresses):
            return name
    return ""


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False
