"""Checkpoints: a committed directory `checkpoints/step-N/` from which a run goes on exactly."""
