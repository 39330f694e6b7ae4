"""Checkpoints and files of weights, rewritten as plain weights."""
