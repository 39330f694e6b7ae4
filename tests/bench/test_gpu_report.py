"""The report of `python -m bench.gpu` can be sent."""

import getpass
import json
import socket
from pathlib import Path

from bench.gpu.report import machine, table, write


def test_it_names_no_path_host_or_user(tmp_path: Path) -> None:
    error = f"OSError: {Path.home()}/secret/x.py:3: {socket.gethostname()}, {getpass.getuser()}: no"
    found = {"ended": "exit code 1", "seconds": 1, "results": {"a": {"error": error}, "b": [error]}}
    report = {"machine": machine(), "sections": {"smoke": found | {"output": str(tmp_path)}}}
    write(report, tmp_path / "report.json")
    for text in ((tmp_path / "report.json").read_text(), table(report)):
        for name in (str(Path.home()), "/secret", socket.gethostname(), str(tmp_path.parent)):
            assert name not in text
        assert "OSError: x.py:3: HOST, USER: no" in text
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["sections"]["smoke"]["ended"] == "exit code 1" and "card" in read["machine"]
