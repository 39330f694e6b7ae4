"""harness: the training loop around your own PyTorch models on DeepSpeed."""

__version__ = "0.1.0"
