"""Two machines in one: nodes with their own network, host name, processes and sshd.

A node is a set of Linux namespaces. When its first process ends, its sshd, all its processes are
killed. Nodes share the disk. They are joined by one cable, which can be cut.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil

from tests.support.helpers import ROOT
from tests.support.jobs import BIN, until

PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh-keygen")
SEARCHED = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

BOOT = """
set -e
hostname {name}
mount --bind {name}.hosts /etc/hosts
mount --bind ssh_config /etc/ssh/ssh_config
mount -t tmpfs run /run
mkdir /run/sshd
ip link set lo up
exec "$(command -v sshd)" -D -e -f "$PWD/sshd_config"
"""
"""What a node does first, in its namespaces; the files are below its working directory."""

SSHD_CONFIG = """
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
StrictModes no
UsePAM no
AuthenticationMethods publickey
SetEnv DS_ACCELERATOR=cpu
ClientAliveInterval 2
ClientAliveCountMax 2
"""

SSH_CONFIG = """
IdentityFile {directory}/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
BatchMode yes
ServerAliveInterval 2
ServerAliveCountMax 2
"""


class Node:
    """A booted node."""

    def __init__(self, name: str, address: str, boot: subprocess.Popen[bytes]):
        self.name = name
        self.address = address
        self._boot = boot
        until(lambda: bool(psutil.Process(boot.pid).children()), boot)
        (self.init,) = psutil.Process(boot.pid).children()
        self._network = os.open(f"/proc/{boot.pid}/ns/net", os.O_RDONLY)
        """Keeps this end of the cable when all processes are killed, and with it the other end."""

    def command(self, directory: Path, *words: str | Path) -> list[str]:
        """A command line that runs `words` on this node, in a directory."""
        pid = str(self.init.pid)
        enter = ["nsenter", "--target", pid, "--mount", "--uts", "--net", "--pid"]
        return [*enter, "env", "-C", str(directory), *map(str, words)]

    def popen(self, directory: Path, *words: str | Path, **files: Any) -> subprocess.Popen[str]:
        """Starts a command on this node."""
        return subprocess.Popen(
            self.command(directory, *words), env=environment(), text=True, **files
        )

    def run(self, *words: str) -> str:
        """What a short command on this node prints. Raises CalledProcessError if it fails."""
        return subprocess.check_output(
            self.command(Path("/"), *words), env=environment(), text=True, timeout=60
        )

    def processes(self) -> list[psutil.Process]:
        """All processes on this node except its sshd and its forks for connections."""
        namespace = Path(f"/proc/{self.init.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = Path(f"/proc/{process.pid}/ns/pid").readlink() == namespace
                if is_ours and process.name() != "sshd":
                    found.append(process)
            except (OSError, psutil.Error):  # it has ended
                continue
        return found

    def connect(self) -> None:
        """Brings the network up."""
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "route", "replace", "default", "dev", "eth0")

    def kill(self) -> None:
        """Kills all processes on this node at once."""
        self.init.kill()
        self._boot.wait(timeout=30)

    def close(self) -> None:
        """Removes the node."""
        if self._boot.poll() is None:
            self.kill()
        os.close(self._network)


def environment() -> dict[str, str]:
    """The environment of a user's shell on a node, without a GPU: two nodes cannot share one."""
    shell = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR")}
    return shell | {"PATH": SEARCHED, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


@cache
def why_not(*programs: str) -> str:
    """Why nodes with these programs cannot be made on this machine; empty if they can."""
    if os.geteuid() != 0:
        return "nodes need root"
    for program in (*PROGRAMS, *programs):
        if shutil.which(program, path=SEARCHED) is None:
            return f"{program} is not installed"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True
    )
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.decode().strip()}"


class Pair:
    """Two nodes and their cable."""

    def __init__(self, first: Node, second: Node):
        self.first = first
        self.second = second

    def cut(self) -> None:
        """Cuts the cable: nothing gets through, and neither node is notified."""
        self.second.run("ip", "link", "set", "eth0", "down")

    def reconnect(self) -> None:
        """Repairs the cable."""
        self.second.connect()


@contextmanager
def two_nodes(directory: Path) -> Iterator[Pair]:
    """`node1` and `node2`, which resolve each other's names, and admit root by key."""
    directory.mkdir(exist_ok=True)
    for key in ("host_key", "key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    addresses = {"node1": "10.0.0.1", "node2": "10.0.0.2"}
    for own in addresses:  # a host's own name is a loopback address, as in Debian
        seen = {"localhost": "127.0.0.1"} | addresses | {own: "127.0.1.1"}
        lines = [f"{address} {name}\n" for name, address in seen.items()]
        (directory / f"{own}.hosts").write_text("".join(lines))
    (directory / "sshd_config").write_text(SSHD_CONFIG.format(directory=directory))
    (directory / "ssh_config").write_text(SSH_CONFIG.format(directory=directory))
    with ExitStack() as stack:
        nodes = []
        for name, address in addresses.items():
            nodes.append(Node(name, address, boot(name, directory)))
            stack.callback(nodes[-1].close)
        first, second = (str(node.init.pid) for node in nodes)
        link = ["ip", "link", "add", "eth0", "netns", first, "type", "veth"]
        link += ["peer", "name", "eth0", "netns", second]
        subprocess.run(link, env=environment(), check=True)
        for node in nodes:
            node.run("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
            node.connect()
        for node in nodes:
            until(partial(can_log_in, nodes[0], node.name))
        yield Pair(*nodes)


def boot(name: str, directory: Path) -> subprocess.Popen[bytes]:
    """Starts a node, which ends with this process at the latest."""
    apart = ["unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
    with (directory / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *apart, "sh", "-c", BOOT.format(name=name)],
            cwd=directory,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def can_log_in(node: Node, name: str) -> bool:
    words = node.command(Path("/"), "ssh", name, "true")
    return subprocess.run(words, env=environment(), capture_output=True).returncode == 0
