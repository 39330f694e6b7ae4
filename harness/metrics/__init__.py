"""What a run measures, where the numbers go, and what is shown."""
