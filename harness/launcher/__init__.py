"""Who this rank is in the environment of whatever launched it; whether that still lives."""
