"""Other modules in a model's place; freezing, growing, compiling, placing. Usable alone."""

from harness.wrapper.wrapper import freeze, inject, replace, resize_modules

__all__ = ["freeze", "inject", "replace", "resize_modules"]
