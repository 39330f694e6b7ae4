"""What on this machine would stop or slow a run, each with a remedy: `harness doctor`.

torch is imported only for the checks of devices and of the network between ranks, and in another
process, so that one that is broken is a line of the report.
"""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

PACKAGES = ("torch", "deepspeed", "safetensors", "numpy", "psutil", "pydantic")
SMALL_SHARED_MEMORY = 256 << 20
ENOUGH_FILES = 4096
SLOW_DISK = 50e6
"""Bytes per second."""
BYTES_TO_WRITE = 64 << 20
STALE_S = 600.0
SECONDS_OF_TORCH = 120.0
_TORCH = """
import os, torch
import torch.distributed as dist
gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
print("devices", ", ".join(gpus) or f"no GPU; {os.cpu_count()} CPU cores", sep="|")
print("cuda", torch.version.cuda or "", sep="|")
print("nccl", ".".join(map(str, torch.cuda.nccl.version())) if gpus else "", sep="|")
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
print("gloo", "works", sep="|")
from torch.utils import cpp_extension
print("extensions", os.environ.get("TORCH_EXTENSIONS_DIR")
    or cpp_extension.get_default_build_root(), sep="|")
"""


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    what: str
    state: Literal["ok", "warning", "error"]
    text: str
    remedy: str = ""

    def lines(self) -> Iterator[str]:
        """The finding, and below it the remedy."""
        mark = {"ok": "ok  ", "warning": "warn", "error": "FAIL"}[self.state]
        yield f"{mark}  {self.what:<14}  {self.text}"
        if self.remedy and self.state != "ok":
            yield f"      {'':<14}  -> {self.remedy}"


def examine(directory: Path) -> Iterator[Finding]:
    """The findings on this machine; `directory`: where runs are to be written."""
    yield from _versions()
    torch = _ask_torch()
    yield from _of_torch(torch)
    checks: tuple[Callable[[], Finding], ...] = (
        _port,
        _host,
        _shared_memory,
        _files,
        _locked_memory,
        _clock,
        _compiler,
        lambda: _disk(directory),
        lambda: _locks(torch.get("extensions", "")),
    )
    for check in checks:
        yield check()


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    is_new = sys.version_info >= (3, 11)
    yield _judged("python", is_new, python, "harness needs Python 3.11 or newer")
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "error", "not installed", f"pip install {name}")


def _ask_torch() -> dict[str, str]:
    """What torch says in a process of its own; `error` if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS_OF_TORCH,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SECONDS_OF_TORCH:g} s"}
    found = dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    if done.returncode:
        last = done.stderr.strip().splitlines()
        found["error"] = last[-1] if last else f"exit code {done.returncode}"
    return found


def _of_torch(found: dict[str, str]) -> Iterator[Finding]:
    if "devices" in found:
        yield Finding("devices", "ok", found["devices"])
        has_driver = shutil.which("nvidia-smi") is not None
        if has_driver and not found["cuda"]:
            remedy = "install a build of torch with CUDA: https://pytorch.org/get-started"
            yield Finding("CUDA", "warning", "a GPU, but a torch for CPUs", remedy)
        elif found["cuda"]:
            yield Finding("CUDA", "ok", f"{found['cuda']}, NCCL {found['nccl'] or 'unused'}")
    if "error" in found:
        remedy = "the error is torch's own: install it again, or see its message in full by "
        yield Finding("torch", "error", found["error"], remedy + '`python -c "import torch"`')
    elif "gloo" in found:
        yield Finding("gloo", "ok", found["gloo"])


def _port() -> Finding:
    port = int(os.environ.get("MASTER_PORT") or 29500)
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            one.bind(("", port))
            one.listen()
        except OSError as error:
            remedy = "another run uses it: give this one another, by --master_port of its launcher"
            return Finding("port", "warning", f"{port}: {error.strerror}", remedy)
    return Finding("port", "ok", f"{port} is free")


def _host() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = f"add a line with {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return Finding("host name", "error", f"{name}: {error}", remedy)
    return Finding("host name", "ok", f"{name} is {address}")


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "warning", "missing", "set data.workers = 0")
    free = shutil.disk_usage(path).free
    remedy = "data.workers hand over batches there: docker run --shm-size=8g, or data.workers = 0"
    return _judged(
        "/dev/shm", free >= SMALL_SHARED_MEMORY, f"{free >> 20} MiB free", remedy, soft=True
    )


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES
    remedy = "ulimit -n 65536"
    if hard not in (soft, resource.RLIM_INFINITY) and hard < 65536:
        remedy = f"ulimit -n {hard}"
    elif hard == soft:
        remedy = "docker run --ulimit nofile=65536, or /etc/security/limits.conf"
    return _judged("open files", is_enough, f"{soft} (at most {hard})", remedy, soft=True)


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_unlimited = soft == resource.RLIM_INFINITY
    text = "unlimited" if is_unlimited else f"{soft >> 20} MiB"
    is_enough = is_unlimited or soft >= 1 << 30 or not Path("/dev/infiniband").is_dir()
    remedy = "InfiniBand needs more: ulimit -l unlimited, or docker run --ulimit memlock=-1"
    return _judged("locked memory", is_enough, text, remedy, soft=True)


def _clock() -> Finding:
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    newest = Path(__file__).stat().st_mtime
    remedy = "synchronize it (timedatectl set-ntp true): log and locks go by it"
    return _judged("clock", time.time() > newest, now, remedy, soft=True)


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        remedy = "apt-get install g++: torch.compile and DeepSpeed's CPU optimizers need one"
        return Finding("compiler", "warning", "no C++ compiler", remedy)
    has_ninja = shutil.which("ninja") is not None
    return _judged(
        "compiler",
        has_ninja,
        found + ("" if has_ninja else ", no ninja"),
        "pip install ninja",
        soft=True,
    )


def _disk(directory: Path) -> Finding:
    """Writes and syncs a file there, which is gone afterwards."""
    if directory.exists() and not directory.is_dir():
        return Finding("disk", "error", f"{directory}: not a directory", "give that of run.dir")
    place = next(
        parent
        for parent in (directory.absolute(), *directory.absolute().parents)
        if parent.is_dir()
    )
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            block, began = os.urandom(1 << 20), time.monotonic()
            for _ in range(BYTES_TO_WRITE >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = BYTES_TO_WRITE / (time.monotonic() - began)
    except OSError as error:
        return Finding("disk", "error", f"{place}: {error.strerror}", "set run.dir to another disk")
    free = shutil.disk_usage(place).free
    text = f"{place}: {speed / 1e6:,.0f} MB/s, {free / 1e9:,.0f} GB free"
    remedy = "saves are slow: set run.dir to another disk, or checkpoint.background = true"
    return _judged("disk", speed >= SLOW_DISK, text, remedy, soft=True)


def _locks(extensions: str) -> Finding:
    root, now = Path(extensions or "/nonexistent"), time.time()
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    stale = [lock for lock in locks if now - lock.stat().st_mtime > STALE_S]
    if not stale:
        return Finding("stale locks", "ok", "none")
    remedy = f"rm {' '.join(map(str, stale))}: whoever needs these extensions waits for ever"
    return Finding("stale locks", "warning", f"{len(stale)} of killed compilations", remedy)


def _judged(what: str, is_good: bool, text: str, remedy: str, soft: bool = False) -> Finding:
    bad: Literal["warning", "error"] = "warning" if soft else "error"
    return Finding(what, "ok" if is_good else bad, text, remedy)
