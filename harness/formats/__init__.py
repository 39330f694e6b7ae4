"""The files that weights lie in, read and written without torch."""
