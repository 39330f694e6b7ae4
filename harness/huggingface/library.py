"""transformers, imported late: it takes seconds, and is an extra."""

from typing import Any

from harness.errors import ConfigError


def transformers() -> Any:
    """The library. Raises ConfigError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers is not installed: pip install transformers") from None
    return transformers
