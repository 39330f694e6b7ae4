"""Layers of other packages for `optimizations.replace`, a file for each package."""
