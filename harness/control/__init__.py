"""Live commands: typed into a running job, applied by every rank at the same step."""
