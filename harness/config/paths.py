"""Paths in a config, as users write them."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from harness.remote_path import as_path


def expand_path(path: Any) -> Any:
    """A path with `~`, `$NAME` and `${NAME}` replaced, as a shell does it.

    Raises ValueError if there is no such user, the variable is not set, or a brace is not closed.
    """
    if not isinstance(path, str):
        return path
    for match in re.finditer(r"\$(?:(\w+)|\{(\w+)\}|\{)", path):
        name = match[1] or match[2]
        if name is None:
            raise ValueError(f"found {path!r}: expected ${{NAME}} at {path[match.start() :]!r}")
        if name not in os.environ:
            raise ValueError(f"found {path!r}: the environment variable {name} is not set")
    expanded = os.path.expandvars(path)
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError:
        raise ValueError(f"found {path!r}: there is no such user") from None


UserPath = Annotated[Path, BeforeValidator(expand_path)]
"""A path as users write it."""


def _path_or_url(value: Any) -> Any:
    value = expand_path(value)
    return as_path(value) if isinstance(value, str) else value


PathOrUrl = Annotated[Path, BeforeValidator(_path_or_url)]
"""The same, or the URL of a store."""
