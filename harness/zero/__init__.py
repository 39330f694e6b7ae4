"""What we know of the insides of DeepSpeed."""
