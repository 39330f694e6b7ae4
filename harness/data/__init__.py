"""From a dataset to the micro-batches of a rank."""
