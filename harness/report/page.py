"""One HTML file, with everything that it needs: it opens offline, and asks no network."""

import json
from importlib.resources import files
from typing import Any

_FORBIDS = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
"""The browser holds the page to it."""


def page_of(content: dict[str, Any]) -> str:
    """The page that shows the content (`content_of`)."""
    policy = _FORBIDS + ("; connect-src 'self'" if content["live_s"] else "")
    parts = {
        "POLICY": policy,
        "STYLE": _static("uplot.css") + _static("report.css"),
        "LIBRARY": _static("uplot.js"),
        "SCRIPT": _static("charts.js") + _static("report.js"),
        "CONTENT": json_of(content).replace("</", "<\\/").replace("<!--", "<\\u0021--"),
    }
    first, *rest = _static("page.html").split("{{")
    pieces = [first]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)


def json_of(content: dict[str, Any]) -> str:
    """The content as JSON, without spaces."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _static(name: str) -> str:
    return (files("harness.report") / "static" / name).read_text()
