"""The typed configuration, checked before torch is imported."""

from harness.config.config import Config

__all__ = ["Config"]
