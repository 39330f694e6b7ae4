"""What `harness doctor` finds, and what it says to do."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from harness import doctor
from harness.doctor import Finding, examine
from tests.support.imports import loaded_by

FOUND = {"devices": "no GPU; 2 CPU cores", "cuda": "", "nccl": "", "gloo": "works"}


def findings(
    monkeypatch: pytest.MonkeyPatch, place: Path, torch: dict[str, str] = FOUND
) -> dict[str, Finding]:
    """By their names, with this answer of torch."""
    monkeypatch.setattr(doctor, "_ask_torch", lambda: torch)
    monkeypatch.setattr(doctor, "BYTES_TO_WRITE", 1 << 20)
    monkeypatch.setattr(doctor, "SLOW_DISK", 0)
    return {finding.what: finding for finding in examine(place)}


def test_what_is_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    found = findings(monkeypatch, tmp_path / "runs/later")
    good = {"python", "torch", "deepspeed", "devices", "gloo", "port", "disk", "stale locks"}
    assert good <= {what for what, finding in found.items() if finding.state == "ok"}
    assert found["disk"].text.startswith(f"{tmp_path}: ")
    assert list(tmp_path.iterdir()) == []


def test_every_fault_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1, 1))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(doctor, "SMALL_SHARED_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "ENOUGH_FILES", 1 << 30)
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        torch = {"error": "ImportError: libcudart.so", "extensions": str(tmp_path)}
        found = findings(monkeypatch, tmp_path, torch)
    bad = {what: f.state for what, f in found.items() if f.state != "ok"}
    assert bad == {
        "no-such-package": "error",
        "torch": "error",
        "port": "warning",
        "/dev/shm": "warning",
        "open files": "warning",
        "compiler": "warning",
        "stale locks": "warning",
    }
    for what in bad:
        first, remedy = found[what].lines()
        assert re.match(r"(warn|FAIL)  \S", first) and re.search(r"-> .{8}", remedy)
    assert str(lock) in found["stale locks"].remedy


def test_a_port_that_a_run_has_just_left_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed connection holds it for a minute (TIME_WAIT), but not from torch's store."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        port = store.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            store.accept()[0].close()
    monkeypatch.setenv("MASTER_PORT", str(port))
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("", port))
    assert doctor._port() == Finding("port", "ok", f"{port} is free")
    store = TCPStore("127.0.0.1", port, is_master=True)
    assert doctor._port().state == "warning"
    del store


def test_a_file_is_not_where_runs_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my.toml").touch()
    disk = findings(monkeypatch, tmp_path / "my.toml")["disk"]
    assert (disk.state, disk.text) == ("error", f"{tmp_path}/my.toml: not a directory")


def test_a_disk_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(monkeypatch, Path("/proc/1/runs"))["disk"].state == "error"


def test_version_needs_no_torch() -> None:
    code = "import sys; sys.argv[1:] = ['--version']\nfrom harness.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    code += "assert 'torch' not in sys.modules"
    assert "harness.cli" in loaded_by(code)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.cli", "doctor", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^ok    gloo +works$", done.stdout, re.MULTILINE)
    assert re.search(r"^ok    devices +\S", done.stdout, re.MULTILINE)
