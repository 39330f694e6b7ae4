"""The report: a JSON file to send, without paths and host names, and a table to read."""

import getpass
import json
import platform
import re
import socket
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harness import __version__

PACKAGES = ("torch", "deepspeed", "numpy", "triton", "apollo-torch", "peft")
PATH = re.compile(r"(?<![\w.])/(?:[\w.+@-]+/)+")
"""The directories of an absolute path."""
ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")


def machine() -> dict[str, Any]:
    """The card and the versions; nothing that names the machine or its user."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "harness": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "card": "none: an imitation on a CPU",
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["card"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        found["cards"], found["CUDA"] = torch.cuda.device_count(), torch.version.cuda
    return found


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def without_names(value: Any) -> Any:
    """A result without directories, host names, addresses and user."""
    if isinstance(value, dict):
        return {without_names(key): without_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_names(item) for item in value]
    if not isinstance(value, str):
        return value
    text = ADDRESS.sub("ADDRESS", PATH.sub("", value))
    host = re.escape(socket.gethostname().partition(".")[0])
    text = re.sub(rf"\b{host}\b(\.[a-zA-Z][\w-]*)*", "HOST", text)
    if user := _user():
        text = re.sub(rf"\b{re.escape(user)}\b", "USER", text)
    return text


def _user() -> str:
    """Empty in a container whose user has no name."""
    with suppress(KeyError, OSError):
        return getpass.getuser()
    return ""


def write(report: dict[str, Any], file: Path) -> None:
    """Writes the report without names."""
    file.write_text(json.dumps(without_names(report), indent=1) + "\n")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, for docs/benchmarks.md."""
    heading = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [heading, "", "| section | what | result |", "|---|---|---|"]
    for section, found in report["sections"].items():
        results = {"": found["ended"]} | found["results"]
        for name, result in results.items():
            text = result if isinstance(result, str) else json.dumps(result)
            lines.append(f"| {section} | {name} | {text.replace('|', '/')} |")
    return without_names("\n".join(lines))
