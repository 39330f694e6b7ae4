"""The report of `python -m bench.gpu` can be sent."""

import getpass
import json
import socket
from pathlib import Path

import pytest

from bench.gpu.report import machine, table, without_names, write


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


def test_names_in_other_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found: 1000730000")

    monkeypatch.setattr(getpass, "getuser", nobody)
    monkeypatch.setattr(socket, "gethostname", lambda: "node7.cluster.example.com")
    text = "connect to node7.cluster.example.com [10.1.20.7]:29500 from node7: torch 2.13.0, 1.5 ms"
    assert without_names(text) == "connect to HOST [ADDRESS]:29500 from HOST: torch 2.13.0, 1.5 ms"
    assert without_names("on node77") == "on node77"
